"""The worked example of a search algorithm: hill climbing by single changes. No torch."""

from __future__ import annotations

import random
from typing import Any, Protocol

from nasdet.arch import Card


class NeighbourSpace(Protocol):
    """What hill climbing needs of a search space."""

    def random(self, rng: random.Random) -> Card:
        """A random architecture."""
        ...

    def neighbour(self, card: Card, rng: random.Random) -> Card:
        """An architecture that differs from ``card`` in one choice."""
        ...


class HillClimb:
    """Ask for a neighbour of the best so far, tell its score (larger is better). Deterministic by ``seed``."""

    def __init__(self, space: NeighbourSpace, seed: int = 0) -> None:
        self.space = space
        self._rng = random.Random(seed)
        self._best: tuple[Card, float] | None = None

    def ask(self) -> Card:
        """An architecture to score."""
        return self.space.random(self._rng) if self._best is None else self.space.neighbour(self._best[0], self._rng)

    def tell(self, card: Card, score: float) -> None:
        """Record a score."""
        if self._best is None or score > self._best[1]:
            self._best = (card, float(score))

    def best(self) -> tuple[Card, float]:
        """The architecture with the largest score."""
        if self._best is None:
            raise ValueError("best needs at least one told architecture, got none")
        return self._best

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what comes next, as plain data."""
        version, internal, gauss = self._rng.getstate()
        best = self._best and [self._best[0].to_json(), self._best[1]]
        return {"rng": [version, list(internal), gauss], "best": best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        version, internal, gauss = state["rng"]
        self._rng.setstate((version, tuple(internal), gauss))
        self._best = (Card.from_json(state["best"][0]), state["best"][1]) if state["best"] else None
