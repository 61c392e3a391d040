"""The DetNAS search space: sizes, random cards, variation, checks and costs without torch; networks with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Any

from nasdet.arch import Card
from nasdet.spaces import Retraining
from nasdet.spaces.detnas.costs import CostTable, macs_table, parameters_table
from nasdet.spaces.detnas.genotype import CHOICES, SPACES, Sizes, check_genotype, crossover, mutate, random_genotype

if TYPE_CHECKING:
    from torch import nn

    from nasdet.detectors import ShuffleNetV2
    from nasdet.spaces.detnas.supernet import DetNASSupernet

SHUFFLES = ("even_odd", "halves")


class DetNASSpace:
    """DetNAS's search space: one of four ShuffleNetV2 blocks at each place of a backbone.

    Args:
        sizes: ``"small"`` (20 blocks, 300 M MACs), ``"large"`` (40, 1.3 G), ``"3.8g"`` (the large one, wider),
            ``"tiny"`` (ours, to try things out), or :class:`Sizes` of your own.
        shuffle: how channels change branches: ``"even_odd"`` as in the released nets, or ``"halves"`` as in the
            released configurations of the search (:class:`nasdet.detectors.shufflenet.ShuffleBlock`).
        mutation: the probability that a mutation draws a gene anew.

    ``macs`` (at 224 x 224, the backbone alone) and ``parameters`` are cost tables over genotypes. ``mutations`` and
    ``crossovers`` are what :class:`nasdet.search.evolution.Evolution` varies cards with.
    """

    method = "detnas"
    part = "body"

    def __init__(self, sizes: str | Sizes = "small", *, shuffle: str = SHUFFLES[0], mutation: float = 0.1) -> None:
        if isinstance(sizes, str):
            if sizes not in SPACES:
                raise ValueError(f"sizes must be one of {', '.join(SPACES)}, or Sizes, got {sizes!r}")
            sizes = SPACES[sizes]
        if not isinstance(sizes, Sizes):
            raise TypeError(f"sizes must be one of {', '.join(SPACES)}, or Sizes, got {type(sizes).__name__}")
        if isinstance(mutation, bool) or not isinstance(mutation, (int, float)) or not 0 < mutation <= 1:
            raise ValueError(f"mutation must be in (0, 1], got {mutation!r}")
        if shuffle not in SHUFFLES:
            raise ValueError(f"shuffle must be one of {', '.join(SHUFFLES)}, got {shuffle!r}")
        self.sizes, self.shuffle, self.mutation = sizes, shuffle, mutation
        self.macs: CostTable = macs_table(sizes)
        self.parameters: CostTable = parameters_table(sizes)
        self.mutations = {"mutate": self.mutate}
        self.crossovers = {"crossover": self.crossover}

    def size(self) -> int:
        """Architectures: 4^20 or 4^40."""
        return len(CHOICES) ** self.sizes.depth

    def settings(self) -> dict[str, Any]:
        """What a card records of the space."""
        sizes = self.sizes
        own = {"stem": sizes.stem, "channels": [*sizes.channels], "blocks": [*sizes.blocks], "last": sizes.last}
        return own if self.shuffle == SHUFFLES[0] else own | {"shuffle": self.shuffle}

    def card(self, genotype: Sequence[str], name: str = "detnas", source: Mapping[str, Any] | None = None) -> Card:
        """The card of a genotype of this space; not checked."""
        return Card(self.method, name, list(genotype), self.settings(), dict(source or {}))

    def random(self, rng: Random, name: str = "detnas-random") -> Card:
        """A uniformly random path."""
        return self.card(random_genotype(self.sizes.depth, rng), name, {"random": True})

    def mutate(self, card: Card, rng: Random) -> Card:
        """``card`` with each gene drawn anew with the probability ``mutation``; it may come out unchanged."""
        return self.card(mutate(card.genotype, rng, self.mutation), "detnas-child")

    def crossover(self, first: Card, second: Card, rng: Random) -> Card:
        """Each gene from either parent."""
        return self.card(crossover(first.genotype, second.genotype, rng), "detnas-child")

    def check(self, card: Card) -> None:
        """Raise ``ValueError`` unless the card is an architecture of this very space."""
        check_card(card)
        own = {key: card.settings.get(key) for key in self.settings()}
        if own != self.settings() or card.settings.get("shuffle", SHUFFLES[0]) != self.shuffle:
            raise ValueError(f"{card.name}: settings must have {self.settings()}, got {card.settings}")

    def supernet(self, **options: Any) -> DetNASSupernet:
        """The network that holds every path; ``options`` are a backbone's: ``norm``, ``outputs``, ``frozen_stages``,
        ``width``."""
        from nasdet.spaces.detnas.supernet import DetNASSupernet

        return DetNASSupernet(self.sizes, shuffle=self.shuffle, **options)

    def activate(self, supernet: DetNASSupernet, card: Card) -> None:
        """Run the path of a card of this space from now on."""
        self.check(card)
        supernet.activate(card.genotype)

    def inherit(self, net: nn.Module, supernet: DetNASSupernet, card: Card) -> None:
        """Copy the weights of a card's path into its own network (:meth:`backbone` with the options of the supernet).

        ``ValueError`` for a network of another path, norm or size; nothing is changed then.
        """
        from nasdet.spaces.detnas.supernet import inherit

        self.check(card)
        inherit(net, supernet.path_state(card.genotype))

    @staticmethod
    def backbone(card: Card, **options: Any) -> ShuffleNetV2:
        """The network of a card alone, of whatever sizes: a backbone as the makers in
        :data:`nasdet.detectors.BACKBONES` make it, with ``width``, ``norm``, ``frozen_stages`` and ``outputs``."""
        from nasdet.detectors import ShuffleNetV2

        check_card(card)
        sizes = card_sizes(card)
        shuffle = card.settings.get("shuffle", SHUFFLES[0])
        return ShuffleNetV2(sizes.stem, sizes.channels, sizes.blocks, card.genotype, shuffle=shuffle, **options)

    @staticmethod
    def retraining(detector: str) -> Retraining:
        """As the supernet is trained on COCO: 90,000 steps of 16 images at 0.02 (one-stage detectors: 0.01) after a
        linear warm-up; synchronised norms, also in the box head, which has four convolutions. Nothing is frozen."""
        from nasdet.detectors import TWO_STAGE

        model: dict[str, Any] = {"norm": "sync_bn", "frozen_stages": 0}
        if detector in TWO_STAGE:
            model["options"] = {"box_head": "4conv1fc", "head_norm": "sync_bn"}
        rate = 0.02 if detector in TWO_STAGE else 0.01
        return Retraining(model, {"steps": 90_000, "batch": 16, "reference_lr": rate, "warmup": "linear"})

    @staticmethod
    def describe(card: Card) -> list[str]:
        """A line for each stage: its choices block by block."""
        check_card(card)
        genes = iter(card.genotype)
        return [
            f"stage {stage} ({channels} channels): " + " ".join(islice(genes, blocks))
            for stage, (channels, blocks) in enumerate(
                zip(card.settings["channels"], card.settings["blocks"], strict=True), 1
            )
        ]


def card_sizes(card: Card) -> Sizes:
    """The sizes that a DetNAS card names; ``ValueError`` where it does not."""
    found: dict[str, Any] = {key: card.settings.get(key) for key in ("stem", "channels", "blocks", "last")}
    for key in ("channels", "blocks"):
        if not isinstance(found[key], list):
            raise ValueError(f"{card.name}: settings.{key} must be a list, got {found[key]!r}")
        found[key] = tuple(found[key])
    try:
        return Sizes(**found)
    except ValueError as error:
        raise ValueError(f"{card.name}: settings.{error}") from error


def check_card(card: Card) -> None:
    """Raise ``ValueError`` unless the card is a DetNAS architecture of any sizes."""
    if card.method != DetNASSpace.method:
        raise ValueError(f"{card.name}: method must be 'detnas', got {card.method!r}")
    depth = card_sizes(card).depth
    if (shuffle := card.settings.get("shuffle", SHUFFLES[0])) not in SHUFFLES:
        raise ValueError(f"{card.name}: settings.shuffle must be one of {', '.join(SHUFFLES)}, got {shuffle!r}")
    try:
        check_genotype(card.genotype, depth)
    except ValueError as error:
        raise ValueError(f"{card.name}: {error}") from error
