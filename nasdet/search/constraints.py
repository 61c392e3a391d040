"""Hard constraints on what a search may ask for. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from nasdet.arch import Card


@dataclass(frozen=True)
class Constraint:
    """A cost that must lie within ``low`` and ``high`` (inclusive; None: no bound, the cost is only recorded).

    ``cost`` maps a card to a finite number: MACs, parameters, milliseconds from a table. It must depend on the card
    alone, or a resumed search would differ from one never stopped. ``reachable`` is the exact range over the space
    where it is known, so that bounds outside it are refused at once.
    """

    name: str
    cost: Callable[[Card], float]
    low: float | None = None
    high: float | None = None
    reachable: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        for key in ("low", "high"):
            value = getattr(self, key)
            if value is not None and not finite(value):
                raise ValueError(f"{key} of {self.name} must be a finite number or None, got {value!r}")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low of {self.name} must not exceed high, got {self.low} and {self.high}")
        if self.reachable is not None:
            least, most = self.reachable
            if (self.high is not None and least > self.high) or (self.low is not None and most < self.low):
                raise ValueError(self.demand(least, most))

    @classmethod
    def window(
        cls,
        name: str,
        cost: Callable[[Card], float],
        target: float,
        tolerance: float = 0.01,
        reachable: tuple[float, float] | None = None,
    ) -> Constraint:
        """A cost within ``tolerance`` (a share) of ``target``: MSNAS's 1 %; ``reachable`` as above."""
        if not finite(target) or target <= 0 or not finite(tolerance) or not 0 < tolerance < 1:
            raise ValueError(
                f"target of {name} must be positive and tolerance in (0, 1), got {target!r} and {tolerance!r}"
            )
        return cls(name, cost, target * (1 - tolerance), target * (1 + tolerance), reachable)

    def excess(self, value: float) -> float:
        """How far a cost lies outside, relative to the bound that it misses; 0 inside."""
        for bound, over in ((self.low, -1), (self.high, 1)):
            if bound is not None and (value - bound) * over > 0:
                return abs(value - bound) / max(abs(bound), 1e-12)
        return 0.0

    def demand(self, least: float, most: float, met: bool = False) -> str:
        """What is asked for, and the range that can be reached, or was ``met`` with, in words."""
        if self.low is None or self.high is None:
            bound = f"at most {_number(self.high)}" if self.high is not None else f"at least {_number(self.low or 0)}"
        else:
            bound = f"within {_number(self.low)} to {_number(self.high)}"
        seen = "met were" if met else "reachable are"
        return f"{self.name} must be {bound}, {seen} {_number(least)} to {_number(most)}"


@dataclass
class Ranges:
    """What a search came across: how many architectures, and the range of each cost."""

    count: int = 0
    of: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, costs: Mapping[str, float]) -> None:
        """Count one more architecture."""
        self.count += 1
        for name, value in costs.items():
            least, most = self.of.get(name, (value, value))
            self.of[name] = (min(least, value), max(most, value))


def finite(value: Any) -> bool:
    """Whether a value is a number that can be compared."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else f"{value:.6g}"
