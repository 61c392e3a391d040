"""Stage A, screening: which operations of the whole list a part keeps (section 3.2). Pure functions and plain data.

A part's alphas ``[L, N]`` learn under a penalty on whole columns; operations are ranked, and the last of them removed
gradually until the sub-space has its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nasdet.spaces.hit.genotype import check_names

MU = 0.1
"""The paper's weight of the penalty (0 and 0.01 in Figure 4)."""
KEEP = 8
FIRST_EPOCH, LAST_EPOCH = 7, 12
"""Alphas learn from the sixth of twelve epochs on; the removals' rate, of which the paper says nothing, is equal parts
at the ends of the epochs 7 to 12: from 32 operations to 8 that is 4 an epoch."""


def column_penalty(alphas: Tensor) -> Tensor:
    """``sum_i sqrt(sum_l alphas[l, i]^2)``: a group lasso over operations, the column-sparse term of Equation 4.

    ``alphas [L, N]``: a row per layer, a column per operation. To be weighted by mu. At a column of zeros the gradient
    is 0. (The equation prints ``min`` before the sum, which has nothing to range over.)
    """
    if alphas.dim() != 2:
        raise ValueError(f"alphas must have shape (layers, operations), got {tuple(alphas.shape)}")
    return torch.linalg.vector_norm(alphas, dim=0).sum()


def scores(alphas: Sequence[Sequence[float]], names: Sequence[str]) -> dict[str, float]:
    """The score of each operation: the mean over the layers of its softmax probability. They sum to 1.

    ``alphas``: a row per layer with a number for each of ``names``. The paper ranks "the scores of candidates" and does
    not say how a column becomes one number.
    """
    if not alphas or any(len(row) != len(names) for row in alphas):
        raise ValueError(f"alphas must be rows of {len(names)} numbers, got lengths {[len(row) for row in alphas]}")
    sums = [0.0] * len(names)
    for row in alphas:
        if not all(map(math.isfinite, row)):
            raise ValueError(f"alphas must be finite, got {row}")
        top = max(row)
        exps = [math.exp(value - top) for value in row]
        total = sum(exps)
        sums = [old + value / total for old, value in zip(sums, exps, strict=True)]
    return {name: value / len(alphas) for name, value in zip(names, sums, strict=True)}


def sizes_after(epoch: int, start: int, keep: int = KEEP, first: int = FIRST_EPOCH, last: int = LAST_EPOCH) -> int:
    """Operations that are left after an epoch (counted from 1), of ``start``: equal parts from ``first`` to ``last``,
    the larger ones early."""
    if not 1 <= keep <= start:
        raise ValueError(f"keep must be in 1..{start}, got {keep}")
    if not 1 <= first <= last:
        raise ValueError(f"first must be in 1..{last}, got {first}")
    done = min(max(epoch - first + 1, 0), last - first + 1)
    return start - math.ceil((start - keep) * done / (last - first + 1))


def worst(found: Mapping[str, float], count: int) -> list[str]:
    """The ``count`` operations with the least scores, the worst first; of equals the one that stands later goes."""
    if not 0 <= count < len(found):
        raise ValueError(f"count must be in 0..{len(found) - 1}, got {count}")
    order = {name: place for place, name in enumerate(found)}
    return sorted(found, key=lambda name: (found[name], -order[name]))[:count]


@dataclass
class Screening:
    """The screening of one part, as plain data: operations that are left, and after every epoch scores and removals.

    ``history`` has ``{"epoch", "scores": {operation: score}, "removed": [operation]}`` for each epoch, in order.
    """

    part: str
    names: list[str]
    keep: int = KEEP
    first: int = FIRST_EPOCH
    last: int = LAST_EPOCH
    history: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_names(self.names, "names")
        sizes_after(0, len(self.names), self.keep, self.first, self.last)

    @property
    def left(self) -> list[str]:
        """The operations that are left, in the order of ``names``."""
        gone = {name for entry in self.history for name in entry["removed"]}
        return [name for name in self.names if name not in gone]

    def end_epoch(self, epoch: int, alphas: Sequence[Sequence[float]]) -> list[str]:
        """Score what is left by its alphas (rows of numbers in the order of ``left``), remove what the schedule says
        and record both. Returns what was removed; epochs count from 1 and must not come twice."""
        if self.history and epoch <= self.history[-1]["epoch"]:
            raise ValueError(f"epoch must be after {self.history[-1]['epoch']}, got {epoch}")
        left = self.left
        found = scores(alphas, left)
        wanted = sizes_after(epoch, len(self.names), self.keep, self.first, self.last)
        removed = worst(found, max(0, len(left) - wanted))
        self.history.append({"epoch": epoch, "scores": found, "removed": removed})
        return removed

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data."""
        plain = {"part": self.part, "names": [*self.names], "keep": self.keep, "first": self.first, "last": self.last}
        return {**plain, "left": self.left, "history": [dict(entry) for entry in self.history]}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Screening:
        """The screening that :meth:`to_json` gave; ``left`` follows from the history."""
        known = ("part", "names", "keep", "first", "last", "history")
        if missing := [key for key in known if key not in value]:
            raise ValueError(f"screening must have the key {missing[0]!r}, got {', '.join(value) or 'nothing'}")
        return cls(**{key: value[key] for key in known[:-1]}, history=[dict(entry) for entry in value["history"]])
