"""The Hit-Detector search space: sizes and candidates of every part, supernets, cards, costs and building."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from random import Random
from typing import Any

from torch import nn

from nasdet.arch import Card
from nasdet.spaces.hit.costs import INPUT, PROPOSALS, CostTable, Size, macs_table, parameters_table
from nasdet.spaces.hit.genotype import (
    LAYOUTS,
    OPERATIONS,
    SUBSPACES,
    TWO_STAGE,
    Sizes,
    check_genotype,
    check_names,
    check_part,
    decode,
    places,
    random_genotype,
)
from nasdet.spaces.hit.networks import network, plain
from nasdet.spaces.hit.supernet import MixedLayer, all_mixed_layers, inherited_state, kept_names, mixed_layers, restrict

Candidates = str | Sequence[str] | Mapping[str, Sequence[str]]


class HitSpace:
    """Hit-Detector's search space: one of a part's candidate operations at each place of backbone, neck and head.

    Args:
        sizes: ``"released"`` or ``"paper"`` (the two layouts of the backbone), or :class:`Sizes`.
        candidates: ``"screened"``, the published 8 operations of each part; ``"full"``, all 32; a list of operations
            (:func:`named_operation`) for all parts alike (Table 4); or a list for each part, as a screening's result.
        parts: what is searched: all three, or some alone (Table 5); ``towers`` in the place of ``head`` for a
            one-stage detector.

    The published space, 8 operations at 32 places, has 8^32 = 7.9e28 architectures.
    """

    method = "hit"
    part = "detector"

    def __init__(
        self,
        sizes: str | Sizes = "released",
        candidates: Candidates = "screened",
        parts: Sequence[str] = TWO_STAGE,
    ) -> None:
        if isinstance(sizes, str):
            if sizes not in LAYOUTS:
                raise ValueError(f"sizes must be one of {', '.join(LAYOUTS)}, or Sizes, got {sizes!r}")
            sizes = LAYOUTS[sizes]
        if not isinstance(sizes, Sizes):
            raise TypeError(f"sizes must be one of {', '.join(LAYOUTS)}, or Sizes, got {type(sizes).__name__}")
        if isinstance(parts, str) or not parts or len(set(parts)) != len(parts) or {"head", "towers"} <= set(parts):
            raise ValueError(f"parts must be different ones, and not both head and towers, got {parts!r}")
        for part in parts:
            check_part(part)
        self.sizes = sizes
        self.candidates = {part: _candidates(candidates, part) for part in parts}

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts that are searched."""
        return tuple(self.candidates)

    def size(self) -> int:
        """Architectures: for each place as many as there are candidates."""
        return math.prod(len(names) ** len(places(part, self.sizes)) for part, names in self.candidates.items())

    def macs(self, size: Size = INPUT, proposals: int = PROPOSALS) -> CostTable:
        """Multiply-accumulates of the searched parts (:func:`~nasdet.spaces.hit.macs_table`)."""
        return macs_table(self.sizes, self.candidates, size, proposals)

    def parameters(self) -> CostTable:
        """Parameters of the searched parts, by place and operation."""
        return parameters_table(self.sizes, self.candidates)

    def supernet(
        self, part: str, *, norm: str = "bn", memory: str = "full", backend: str | None = None, **options: Any
    ) -> nn.Module:
        """A part with a :class:`MixedLayer` over its candidates at every place; it serves where the derived one does.

        ``memory`` is one of :data:`~nasdet.spaces.hit.MEMORY`; ``backend`` chooses the mixing operator's;
        ``options`` as for :func:`~nasdet.spaces.hit.network`.
        """
        if part not in self.candidates:
            raise ValueError(f"part must be one of {', '.join(self.candidates)}, got {part!r}")
        names = self.candidates[part]
        make = partial(MixedLayer, names=names, norm=norm, memory=memory, backend=backend)
        return network(part, self.sizes, make, norm=norm, **options)

    @staticmethod
    def arch_parameters(model: nn.Module) -> list[nn.Parameter]:
        """The alphas of all mixed layers in ``model``, a vector per layer."""
        return [layer.alpha for layer in all_mixed_layers(model)]

    @staticmethod
    def alphas(model: nn.Module) -> dict[str, list[list[float]]]:
        """The raw alphas as plain numbers: per part one row per layer, all candidates, also those screened out."""
        return {
            part: [layer.alpha.detach().double().cpu().tolist() for layer in layers]
            for part, layers in mixed_layers(model).items()
        }

    def derive(self, model: nn.Module, name: str = "hit-searched", *, source: Mapping[str, Any] | None = None) -> Card:
        """The architecture that the alphas in ``model`` stand for: the highest of the kept ones at each place."""
        rows = {
            part: [[layer.alpha[index].item() for index in layer.kept] for layer in layers]
            for part, layers in mixed_layers(model).items()
        }
        card = self.card(decode(rows, kept_names(model)), name, source)
        self.check(card)
        return card

    @staticmethod
    def restrict(model: nn.Module, genotype: Mapping[str, Any]) -> None:
        """Set the alphas to one architecture: at each place its operation gets weight 1."""
        restrict(model, genotype)

    @staticmethod
    def inherited_state(model: nn.Module, genotype: Mapping[str, Any]) -> dict[str, Any]:
        """The state dict that a derived net takes from a supernet."""
        return inherited_state(model, genotype)

    def settings(self) -> dict[str, Any]:
        """What a card records of the space: the sizes."""
        return self.sizes.to_json()

    def card(
        self, genotype: Mapping[str, Sequence[str]], name: str = "hit", source: Mapping[str, Any] | None = None
    ) -> Card:
        """The card of a genotype of this space; not checked."""
        return Card(self.method, name, dict(genotype), self.settings(), dict(source or {}))

    def random(self, rng: Random, name: str = "hit-random") -> Card:
        """A uniformly random operation at every place."""
        return self.card(random_genotype(rng, self.candidates, self.sizes), name, {"random": True})

    def check(self, card: Card) -> None:
        """Raise ``ValueError`` unless the card is an architecture of this very space."""
        if card_sizes(card) != self.sizes:
            raise ValueError(f"{card.name}: settings must be {self.settings()}, got {card.settings}")
        if set(card.genotype) != set(self.candidates):
            raise ValueError(
                f"{card.name}: genotype parts must be {', '.join(self.parts)}, got {', '.join(card.genotype)}"
            )
        for part, names in self.candidates.items():
            check_names(card.genotype[part], f"{card.name}: genotype.{part}", names)

    @staticmethod
    def build(card: Card, part: str, *, norm: str = "bn", **options: Any) -> nn.Module:
        """One part of a card as a module: a ``Backbone``, a neck, a box trunk (``head``) or a tower (``towers``).

        The published card's have 13,881,848 (backbone), 2,715,952 (neck) and, with the predictors for 80 classes,
        9,932,181 parameters (head). ``options`` as for :func:`~nasdet.spaces.hit.network`.
        """
        sizes = card_sizes(card)
        check_part(part)
        if part not in card.genotype:
            raise ValueError(f"part must be one of {', '.join(card.genotype)} for {card.name}, got {part!r}")
        return network(part, sizes, plain(card.genotype[part], norm), norm=norm, **options)

    @staticmethod
    def pieces(card: Card) -> tuple[str, ...]:
        """The parts of a detector that a card stands for."""
        card_sizes(card)
        return tuple(card.genotype)

    @classmethod
    def backbone(cls, card: Card, *, width: float = 1.0, **options: Any) -> nn.Module:
        """The backbone of a card, as the makers in :data:`nasdet.detectors.BACKBONES` make theirs (``norm``,
        ``frozen_stages``, ``outputs``), but of one width."""
        if width != 1:
            raise ValueError(f"width must be 1 for {card.name!r}, whose channels its settings say, got {width:g}")
        return cls.build(card, "backbone", **options)

    @staticmethod
    def describe(card: Card) -> list[str]:
        """A line for each stage of the backbone, each path of the neck, and the head."""
        sizes = card_sizes(card)
        lines = []
        if "backbone" in card.genotype:
            names = iter(card.genotype["backbone"])
            for stage, (channels, blocks, stride) in enumerate(sizes.stages, 1):
                text = " ".join(next(names) for _ in range(blocks))
                lines.append(f"backbone stage {stage} ({channels} channels, stride {stride}): {text}")
        if "neck" in card.genotype:
            half = len(sizes.inputs)
            for path, names in (
                ("top-down", card.genotype["neck"][:half]),
                ("bottom-up", card.genotype["neck"][half:]),
            ):
                lines.append(f"neck {path}: {' '.join(names)}")
        for part in ("head", "towers"):
            if part in card.genotype:
                lines.append(f"{part}: {' '.join(card.genotype[part])}")
        return lines


def card_sizes(card: Card) -> Sizes:
    """The sizes of a Hit-Detector card; ``ValueError`` unless the card is one, of any sizes."""
    if card.method != HitSpace.method:
        raise ValueError(f"{card.name}: method must be 'hit', got {card.method!r}")
    try:
        sizes = Sizes.from_json(card.settings)
        check_genotype(card.genotype, sizes)
    except ValueError as error:
        raise ValueError(f"{card.name}: {error}") from error
    return sizes


def _candidates(given: Candidates, part: str) -> tuple[str, ...]:
    if isinstance(given, str):
        if given not in ("screened", "full"):
            raise ValueError(f"candidates must be screened, full, or lists of operations, got {given!r}")
        return SUBSPACES[part] if given == "screened" else tuple(OPERATIONS)
    if isinstance(given, Mapping):
        if part not in given:
            raise ValueError(f"candidates must have {part}, got {', '.join(given) or 'nothing'}")
        given = given[part]
    check_names(given, f"candidates of {part}")
    if len(set(given)) != len(given):
        raise ValueError(f"candidates of {part} must be different, got {', '.join(given)}")
    return tuple(given)
