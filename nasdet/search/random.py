"""Random search: the baseline every search has to beat. No torch."""

from __future__ import annotations

import math
import random
from typing import Any, Protocol

from nasdet.arch import Card


class RandomSpace(Protocol):
    """What random search needs of a search space."""

    def random(self, rng: random.Random) -> Card:
        """A uniformly random architecture."""
        ...


class RandomSearch:
    """Ask for architectures, tell their scores (larger is better), take the best.

    ``ask`` never gives an architecture that was asked for before, as long as 1,000 draws find another; then it raises
    ``RuntimeError`` (the space is exhausted, or nearly). Deterministic by ``seed``; ``state_dict`` is plain JSON
    data.
    """

    _DRAWS = 1000

    def __init__(self, space: RandomSpace, seed: int = 0) -> None:
        self.space = space
        self._rng = random.Random(seed)
        self._asked: set[str] = set()
        self._told: set[str] = set()
        self._history: list[tuple[Card, float]] = []

    def ask(self) -> Card:
        """A new architecture."""
        for _ in range(self._DRAWS):
            card = self.space.random(self._rng)
            if card.key not in self._asked:
                self._asked.add(card.key)
                return card
        raise RuntimeError(f"no new architecture in {self._DRAWS} draws after {len(self._asked)} were asked for")

    def tell(self, card: Card, score: float) -> None:
        """Record the score of an architecture that ``ask`` gave."""
        if card.key not in self._asked:
            raise ValueError(f"card must come from ask, got {card.name!r} with another genotype")
        if card.key in self._told:
            raise ValueError(f"card must be told once, got {card.name!r} again")
        if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
            raise ValueError(f"score must be a finite number, got {score!r}")
        self._told.add(card.key)
        self._history.append((card, float(score)))

    @property
    def history(self) -> list[tuple[Card, float]]:
        """All told architectures with their scores, in order."""
        return list(self._history)

    def best(self) -> tuple[Card, float]:
        """The architecture with the largest score; of equals the first told."""
        if not self._history:
            raise ValueError("best needs at least one told architecture, got none")
        return max(self._history, key=lambda item: item[1])

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what comes next, as plain data."""
        version, internal, gauss = self._rng.getstate()
        return {
            "rng": [version, list(internal), gauss],
            "asked": sorted(self._asked),
            "history": [[card.to_json(), score] for card, score in self._history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        version, internal, gauss = state["rng"]
        self._rng.setstate((version, tuple(internal), gauss))
        self._asked = set(state["asked"])
        self._history = [(Card.from_json(card), float(score)) for card, score in state["history"]]
        self._told = {card.key for card, _ in self._history}
