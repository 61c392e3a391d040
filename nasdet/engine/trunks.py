"""What is pretrained, by name: a backbone, a search space's supernet, or the backbone of a card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any

from torch import nn

from nasdet.arch import Card
from nasdet.detectors import BACKBONES
from nasdet.engine.paths import Paths, binned_draw, uniform_draw
from nasdet.spaces import SPACES, part_of, space_class
from nasdet.spaces.detnas import DetNASSpace, macs_table
from nasdet.spaces.detnas.space import SHUFFLES
from nasdet.spaces.hit import LAYOUTS, HitSpace
from nasdet.spaces.hit.space import Candidates

Bins = tuple[float, float, float]
_ONE_OF = "one of backbone, space and card must be given"


@dataclass(frozen=True)
class Trunk:
    """What :func:`nasdet.engine.pretrain.pretrain` needs of a network.

    ``make`` makes it, up to its last map and with batch norm; ``paths`` are those of a supernet. ``named`` is plain
    data that says what it is, ``last`` the channels of the 1x1 convolution that a space puts before the classifier.
    """

    make: Callable[[], nn.Module]
    named: dict[str, Any]
    paths: Paths | None = None
    last: int | None = None
    space: Any = field(default=None, compare=False)


def trunk(
    *,
    backbone: str | None = None,
    space: str | None = None,
    card: Card | None = None,
    width: float = 1.0,
    classes: int = 1000,
    bins: Bins | None = None,
    shuffle: str | None = None,
    candidates: Candidates | None = None,
    memory: str | None = None,
    seed: int = 0,
) -> Trunk:
    """The network of one of: ``backbone``, a name of :data:`nasdet.detectors.BACKBONES`; ``space``, the supernet of a
    method and its size, such as ``"detnas-small"``; ``card``, an architecture whose space makes backbones.

    ``"hit-LAYOUT"`` is the whole mixture that Hit-Detector's joint search begins from, ``"hit-LAYOUT-half"`` that of
    its screening, both with alphas that stay as drawn. ``candidates`` are those of :class:`HitSpace` (the published
    sub-space; for screening all 32), and ``memory`` of its mixed layers is ``"full"`` or ``"recompute"`` (the default).

    A supernet learns uniformly random paths, drawn with ``seed``; with ``bins = (low, high, width)``, in MACs with the
    last convolution and a classifier for ``classes`` classes, those of :func:`~nasdet.engine.paths.binned_draw`.
    ``shuffle`` is that of a :class:`DetNASSpace`: weights learnt with one are of no use to the other.

    Raises ``ValueError`` for an unknown name, a card of another part, or more or fewer than one of the three.
    """
    given = [name for name, value in (("backbone", backbone), ("space", space), ("card", card)) if value is not None]
    if len(given) != 1:
        raise ValueError(f"{_ONE_OF}, got {' and '.join(given) or 'none'}")
    if bins is not None and space is None:
        raise ValueError(f"bins must be of a space, got them with a {given[0]}")
    if shuffle is not None and (space or "").partition("-")[0] != DetNASSpace.method:
        raise ValueError(f"shuffle must be of a {DetNASSpace.method} space, got it with {space or given[0]}")
    mixture = space is not None and space.partition("-")[0] == HitSpace.method
    if not mixture and (candidates is not None or memory is not None):
        raise ValueError(f"candidates and memory must be of a hit space, got them with {space or given[0]}")
    options: dict[str, Any] = {"width": width, "norm": "bn", "outputs": ("c5",)}
    if backbone is not None:
        if backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
        return Trunk(partial(BACKBONES[backbone], **options), {"backbone": backbone, "width": width})
    if card is not None:
        if part_of(card) != "body":
            raise ValueError(f"card must be a whole backbone, got {card.name!r}, one of {part_of(card)}")
        maker, named = space_class(card.method).backbone, {"card": card.to_json(), "width": width}
        return Trunk(partial(maker, card, **options), named, last=card.settings.get("last"))
    assert space is not None  # the only one left of the three
    if mixture:
        if bins is not None:
            raise ValueError(f"bins must be of a {DetNASSpace.method} space, got them with {space!r}")
        return _mixture(space, candidates, memory or "recompute", width)
    return _supernet(space, options, classes, bins, shuffle, seed)


def _mixture(name: str, candidates: Candidates | None, memory: str, width: float) -> Trunk:
    layout, half, rest = name.removeprefix(f"{HitSpace.method}-").partition("-half")
    if layout not in LAYOUTS or rest:
        raise ValueError(f"space must be hit-LAYOUT or hit-LAYOUT-half ({', '.join(LAYOUTS)}), got {name!r}")
    if memory not in ("full", "recompute"):
        raise ValueError(f"memory must be full or recompute, got {memory!r}")
    if width != 1:
        raise ValueError(f"width must be 1 for {name!r}, got {width:g}")
    sizes = LAYOUTS[layout].halved() if half else LAYOUTS[layout]
    space = HitSpace(sizes, candidates or ("full" if half else "screened"), ("backbone",))

    def make() -> nn.Module:
        made = space.supernet("backbone", memory=memory, outputs=("c5",))
        for alpha in space.arch_parameters(made):
            alpha.requires_grad_(False)
        return made

    return Trunk(make, {"space": name, "candidates": list(space.candidates["backbone"])}, space=space)


def _supernet(
    name: str, options: dict[str, Any], classes: int, bins: Bins | None, shuffle: str | None, seed: int
) -> Trunk:
    method, _, sizes = name.partition("-")
    if method not in SPACES or not hasattr(space_class(method), "activate"):
        known = ", ".join(f"{one}-SIZE" for one in SPACES if hasattr(space_class(one), "activate"))
        raise ValueError(f"space must be the name of a supernet of paths ({known}), got {name!r}")
    ways = {} if shuffle in (None, SHUFFLES[0]) else {"shuffle": shuffle}
    space = space_class(method)(*filter(None, [sizes]), **ways)
    draw = uniform_draw(space, seed)
    named: dict[str, Any] = {"space": name, "width": options["width"], "bins": None if bins is None else list(bins)}
    named |= ways
    if bins is not None:
        if method != DetNASSpace.method:
            raise ValueError(f"bins must be of a {DetNASSpace.method} space, got them with {name!r}")
        cost = macs_table(space.sizes, classes=classes)
        low, high, step = bins
        seen = [cost(space.random(Random(f"reach {index}")).genotype) for index in range(200)]
        least, most = 2 * min(seen) - max(seen), 2 * max(seen) - min(seen)  # beyond any path's
        if high <= least or low >= most:
            costs = f"{min(seen) / 1e6:.4g} to {max(seen) / 1e6:.4g} million MACs, as most paths have"
            raise ValueError(f"bins must lie about {costs}, got {low / 1e6:g} to {high / 1e6:g}")
        draw = binned_draw(space, lambda one: cost(one.genotype), seed, low=low, high=high, width=step)
    paths = Paths(draw, space.activate)
    last = space.sizes.last if method == DetNASSpace.method else None
    return Trunk(partial(space.supernet, **options), named, paths, last, space)
