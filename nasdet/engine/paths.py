"""Which path of a supernet learns in a step: a function of seed and step, so that nothing has to be kept or sent."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from torch import nn

from nasdet.arch import Card


class DrawnSpace(Protocol):
    """What drawing needs of a search space."""

    def random(self, rng: Random) -> Card:
        """A uniformly random architecture."""
        ...


def activate(supernet: nn.Module, card: Any) -> None:
    """``supernet.activate(card)``."""
    supernet.activate(card)  # type: ignore[operator]  # a supernet's method


@dataclass(frozen=True)
class Paths:
    """``draw(step)`` gives the architecture of a step, the same in every process; ``activate(supernet, card)`` makes
    the supernet run it."""

    draw: Callable[[int], Any]
    activate: Callable[[Any, Any], Any] = activate


def uniform_draw(space: DrawnSpace, seed: int = 0) -> Callable[[int], Card]:
    """A uniformly random path at every step (DetNAS; Guo et al., SPOS)."""

    def draw(step: int) -> Card:
        return space.random(Random(f"path {seed} {step}"))

    return draw


def binned_draw(
    space: DrawnSpace,
    cost: Callable[[Card], float],
    seed: int = 0,
    *,
    low: float = 290e6,
    high: float = 360e6,
    width: float = 10e6,
    tries: int = 500,
) -> Callable[[int], Card]:
    """A cost first, then a path of it: a bin of ``[low, high)`` is drawn uniformly, and the first random path in it is
    taken, or after ``tries`` the one that came closest.

    Random paths crowd at the middle of a space's costs; this trains light and heavy ones as often. DetNAS's released
    code does so for ImageNet, with the last convolution and the classifier in the cost; the paper draws uniformly.
    """
    if not 0 < width <= high - low:
        raise ValueError(f"width must be positive and at most high - low = {high - low:g}, got {width:g}")
    if tries < 1:
        raise ValueError(f"tries must be at least 1, got {tries}")
    bins = -int(-(high - low) // width)

    def draw(step: int) -> Card:
        rng = Random(f"path {seed} {step}")
        least = low + width * rng.randrange(bins)
        most = min(least + width, high)
        best, gap = None, float("inf")
        for _ in range(tries):
            card = space.random(rng)
            value = cost(card)
            if least <= value < most:
                return card
            if (missed := max(least - value, value - most)) < gap or best is None:
                best, gap = card, missed
        assert best is not None  # tries is at least 1
        return best

    return draw
