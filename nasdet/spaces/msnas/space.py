"""The MSNAS search space: sizes, random cards, variation, checks, costs, its supernet and the encoders of its cards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from nasdet._checks import check_whole
from nasdet.arch import Card
from nasdet.spaces import Retraining
from nasdet.spaces.msnas import variation
from nasdet.spaces.msnas.costs import BLOCKS, INPUT, RPN_CHANNELS, VARIANTS, macs, macs_range, parameters
from nasdet.spaces.msnas.genotype import Genotype, check_genotype, head_blocks, resolutions
from nasdet.spaces.msnas.sampling import pair_count, random_genotype

if TYPE_CHECKING:
    from torch import nn

    from nasdet.spaces.msnas.encoder import MSNASEncoder
    from nasdet.spaces.msnas.supernet import MSNASSupernet


class MSNASSpace:
    """MSNAS's search space: a stride for each block of the encoder, and for each group of objects a resolution.

    Args:
        variant: sizes of the paper's encoders: ``"r18"`` (13 basic blocks of 180 channels), ``"r34"`` (21 of 160) or
            ``"r50"`` (21 bottlenecks of 144, and 576 out).
        blocks, channels, block: other sizes in the place of the variant's.

    ``target`` is the MACs of encoder and RPN that the paper holds the variant's nets to, within 1 %; None for other
    sizes. ``mutations`` and ``crossovers`` are what :class:`nasdet.search.evolution.Evolution` varies cards with.
    """

    method = "msnas"
    part = "body"

    def __init__(
        self, variant: str = "r18", *, blocks: int | None = None, channels: int | None = None, block: str | None = None
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant!r}")
        sizes = VARIANTS[variant]
        self.blocks = sizes.blocks if blocks is None else blocks
        self.channels = sizes.channels if channels is None else channels
        self.block = sizes.block if block is None else block
        own = (self.blocks, self.channels, self.block)
        self.target = sizes.target if own == (sizes.blocks, sizes.channels, sizes.block) else None
        for name in ("blocks", "channels"):
            check_whole(name, getattr(self, name))
        if self.block not in BLOCKS:
            raise ValueError(f"block must be one of {', '.join(BLOCKS)}, got {self.block!r}")
        if not pair_count(self.blocks):
            raise ValueError(f"blocks must be at least 2, got {self.blocks}")
        self.mutations = {"mutate_encoder": self.mutate_encoder, "mutate_heads": self.mutate_heads}
        self.crossovers = {"crossover_encoder": self.crossover_encoder, "crossover_heads": self.crossover_heads}

    def mutate_encoder(self, card: Card, rng: Random) -> Card | None:
        """``card`` with one or two other strides; None where none are legal."""
        return self._child(variation.mutate_encoder(card.genotype, rng))

    def mutate_heads(self, card: Card, rng: Random) -> Card | None:
        """``card`` with other heads; None where none are legal."""
        return self._child(variation.mutate_heads(card.genotype, rng))

    def crossover_encoder(self, first: Card, second: Card, rng: Random) -> Card | None:
        """The encoder of ``first`` up to a block and of ``second`` beyond, with the heads of ``first``; None where no
        block makes a legal child."""
        return self._child(variation.crossover_encoder(first.genotype, second.genotype, rng))

    def crossover_heads(self, first: Card, second: Card, rng: Random) -> Card | None:
        """The encoder of ``first``, heads from both; None where no mixture is legal."""
        return self._child(variation.crossover_heads(first.genotype, second.genotype, rng))

    def _child(self, genotype: Genotype | None) -> Card | None:
        return None if genotype is None else self.card(genotype, "msnas-child")

    def size(self) -> int:
        """Architectures: pairs of a valid encoder and legal heads."""
        return pair_count(self.blocks)

    def settings(self) -> dict[str, Any]:
        """What a card records of the space."""
        return {"channels": self.channels, "block": self.block}

    def card(self, genotype: Genotype, name: str = "msnas", source: Mapping[str, Any] | None = None) -> Card:
        """The card of a genotype of this space; not checked."""
        return Card(self.method, name, genotype, self.settings(), dict(source or {}))

    def random(self, rng: Random, name: str = "msnas-random") -> Card:
        """A uniformly random architecture, drawn by dynamic programming."""
        return self.card(random_genotype(self.blocks, rng), name, {"random": True})

    def check(self, card: Card) -> None:
        """Raise ``ValueError`` unless the card is an architecture of this very space."""
        check_card(card)
        if (blocks := len(card.genotype["strides"])) != self.blocks:
            raise ValueError(f"{card.name}: genotype.strides must be {self.blocks}, one for each block, got {blocks}")
        if (own := {key: card.settings.get(key) for key in self.settings()}) != self.settings():
            raise ValueError(f"{card.name}: settings must have {self.settings()}, got {own}")

    def macs(self, card: Card, size: tuple[int, int] = INPUT, rpn_channels: int = RPN_CHANNELS) -> int:
        """MACs of encoder and RPN for an image of ``size`` (height, width)."""
        return macs(card.genotype, self.channels, self.block, size, rpn_channels=rpn_channels)

    def macs_range(self, size: tuple[int, int] = INPUT, rpn_channels: int = RPN_CHANNELS) -> tuple[int, int]:
        """The least and the largest :meth:`macs` over the whole space, exactly."""
        return macs_range(self.blocks, self.channels, self.block, size, rpn_channels=rpn_channels)

    def parameters(self, card: Card) -> int:
        """Parameters of the encoder, those of its norms included."""
        return parameters(card.genotype, self.channels, self.block)

    # torch is imported where modules are made: cards, costs and evolution need none.
    def supernet(
        self, *, width: float = 1.0, norm: str = "bn", frozen_stages: int = 0, outputs: Sequence[str] = ()
    ) -> MSNASSupernet:
        """A fresh supernet of this space, made as the backbones in :data:`nasdet.detectors.BACKBONES` are; it always
        gives its five maps, whatever ``outputs``."""
        from nasdet.spaces.msnas.supernet import MSNASSupernet

        options: dict[str, Any] = {"width": width, "norm": norm, "frozen_stages": frozen_stages}
        return MSNASSupernet(self.blocks, self.channels, self.block, **options)

    @staticmethod
    def backbone(
        card: Card, *, width: float = 1.0, norm: str = "bn", frozen_stages: int = 0, outputs: Sequence[str] = ()
    ) -> MSNASEncoder:
        """The encoder of a card, with the channels and the block that it records; options as for :meth:`supernet`."""
        from nasdet.spaces.msnas.encoder import MSNASEncoder

        check_card(card)
        sizes = _sizes(card)
        return MSNASEncoder(card.genotype, **sizes, width=width, norm=norm, frozen_stages=frozen_stages)

    @staticmethod
    def pyramid_channels(card: Card, width: float = 1.0) -> int:
        """Channels of each of the five maps of a card's encoder."""
        from nasdet.detectors.backbone import scaled

        return scaled(_sizes(card)["channels"], width)

    def activate(self, supernet: nn.Module, card: Card) -> None:
        """Make the encoder of a card of this space the active one of a supernet."""
        self.check(card)
        _checked(supernet).activate(card.genotype)

    def inherit(self, net: MSNASEncoder, supernet: nn.Module, card: Card) -> None:
        """Copy weights and statistics of a card's parts from a supernet into its encoder (:meth:`backbone`)."""
        self.check(card)
        if net.genotype != card.genotype:
            raise ValueError(f"net must be the encoder of {card.name!r}, got that of another genotype")
        _checked(supernet).inherit(net)

    @staticmethod
    def retraining(detector: str) -> Retraining:
        """As the supernet is trained, from random weights: 48 epochs in steps of 32 images, at 0.04 (one-stage
        detectors: 0.02) after a linear warm-up from a 32nd of it, a tenth of it after 42 epochs and again after 47;
        synchronised norms, also in the box head, which has two convolutions. Nothing is frozen."""
        from nasdet.detectors import TWO_STAGE

        model: dict[str, Any] = {"norm": "sync_bn", "frozen_stages": 0}
        if detector in TWO_STAGE:
            model["options"] = {"box_head": "2conv1fc", "head_norm": "sync_bn"}
        training = {
            "batch": 32,
            "reference_lr": 0.02 if detector in TWO_STAGE else 0.01,
            "milestones": (42 / 48, 47 / 48),
            "warmup": "linear",
            "warmup_factor": 1 / 32,
        }
        return Retraining(model, training, epochs=48)

    @staticmethod
    def describe(card: Card) -> list[str]:
        """The encoder stride by stride, its resolutions, its laterals, and what each head reads."""
        check_card(card)
        strides, heads = card.genotype["strides"], card.genotype["heads"]
        maps = resolutions(strides)
        reads = zip(heads, head_blocks(strides, heads), strict=True)
        added = [f"{to} <- {origin} (1/{maps[to - 1]})" for to, origin in card.genotype["laterals"]]
        return [
            "strides: " + " ".join("1/2" if stride == 0.5 else str(stride) for stride in strides),
            "resolutions: " + " ".join(f"1/{resolution}" for resolution in maps),
            "laterals: " + ", ".join(added),
            "heads: " + ", ".join(f"1/{head} (block {block})" for head, block in reads),
        ]


def _sizes(card: Card) -> dict[str, Any]:
    """What a card records of its space."""
    if missing := [key for key in ("channels", "block") if key not in card.settings]:
        raise ValueError(f"{card.name}: settings must have {missing[0]}, got {card.settings}")
    return {key: card.settings[key] for key in ("channels", "block")}


def _checked(supernet: nn.Module) -> MSNASSupernet:
    from nasdet.spaces.msnas.supernet import MSNASSupernet

    if not isinstance(supernet, MSNASSupernet):
        raise TypeError(f"supernet must be an MSNASSupernet, got {type(supernet).__name__}")
    return supernet


def check_card(card: Card) -> None:
    """Raise ``ValueError`` unless the card is an MSNAS architecture of any size."""
    if card.method != MSNASSpace.method:
        raise ValueError(f"{card.name}: method must be 'msnas', got {card.method!r}")
    try:
        check_genotype(card.genotype)
    except ValueError as error:
        raise ValueError(f"{card.name}: {error}") from error
