"""What the project promises of a race, and whether an outcome keeps it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from interleave import Race

KEPT = "graph kept"  # what lies between forward and backward


@dataclass(frozen=True)
class Target:
    """What the project promises: ``contestant`` ``factor`` times better than ``over``; without a rival, at most
    ``at_most`` seconds or bytes, or at least ``at_least`` of the machine's measured peak.
    """

    contestant: str
    phase: str
    over: str = ""
    factor: float = 0.0
    # Also "peak_memory" of the tensors; "kept_memory", what of it waits for backward; "resident_memory" of the process,
    # or of the tensors if more; "matrix_share", of the peak of a matrix product in the row's own dtype.
    quantity: str = "time"
    at_most: float = 0.0
    at_least: float = 0.0
    cases: Sequence[str] = ()  # in these only; in all when empty
    device: str = "cpu"
    dtypes: Sequence[str] = ("fp32",)

    def concerns(self, name: str, case: str, dtype: str, phase: str, device: str) -> bool:
        """Whether it is about this row."""
        same = (self.contestant, self.phase, self.device) == (name, phase, device) and dtype in self.dtypes
        return same and (not self.cases or case in self.cases)


@dataclass
class Measured:
    """What promises are held against: a race's times and peak bytes, and who should have been in it but failed."""

    race: Race
    memory: Mapping[str, Mapping[str, int]]
    failed: Mapping[str, str]
    matrix_share: float | None = None  # of the contestant whose promises are looked at


def verdict(target: Target, measured: Measured) -> dict[str, Any] | None:
    """The promise with what was measured, and whether it is met: not, where the rival failed. None where the rival
    does not belong into the race."""
    row: dict[str, Any] = {"quantity": target.quantity}
    if not target.over:
        return row | _limit(target, measured)
    row |= {"over": target.over, "at_least": target.factor}
    if target.over in measured.race.seconds:
        ratio = _ratio(target, measured)
        return row | {"ratio": ratio, "met": ratio >= target.factor}
    reason = measured.failed.get(target.over)
    return None if reason is None else row | {"absent": reason, "met": False}


def most(memory: Mapping[str, int], phase: str) -> int:
    """The peak with what an op takes from malloc beside its tensors, where that is known."""
    return max(memory[phase], memory.get(f"{phase}, resident", 0))


def _limit(target: Target, measured: Measured) -> dict[str, Any]:
    if target.quantity == "matrix_share":
        share = measured.matrix_share
        if share is None:
            return {"at_least": target.at_least, "absent": "no peak was measured for this row", "met": False}
        return {"at_least": target.at_least, "value": share, "met": share >= target.at_least}
    if target.quantity == "time":
        value: float = measured.race.median(target.contestant)
    else:
        what = KEPT if target.quantity == "kept_memory" else target.phase
        value = most(measured.memory[target.contestant], what)
    return {"at_most": target.at_most, "value": value, "met": value <= target.at_most}


def _ratio(target: Target, measured: Measured) -> float:
    if target.quantity == "time":
        return measured.race.speedup(target.contestant, target.over)
    theirs, ours = measured.memory[target.over], measured.memory[target.contestant]
    if target.quantity == "resident_memory":
        return most(theirs, target.phase) / max(most(ours, target.phase), 1)
    what = KEPT if target.quantity == "kept_memory" else target.phase
    return theirs[what] / max(ours[what], 1)
