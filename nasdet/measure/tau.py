"""Kendall's rank correlation tau-b: whether one score ranks architectures as another does. No torch.

Kendall, "Rank Correlation Methods" (1948): of all pairs of items, ``S`` is how many more both scores put in the same
order than in opposite ones, and ``tau_b = S / sqrt((pairs untied in x) (pairs untied in y))``.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import combinations
from numbers import Real
from statistics import NormalDist
from typing import Any

EXACT = 10
"""The most items for which the p-value comes from all permutations."""
_INTERVAL_FROM = 4
"""The fewest items for which leaving out one by one says anything of the spread."""


@dataclass(frozen=True)
class RankCorrelation:
    """Tau-b of two scores of ``items`` items, its confidence interval, and how likely chance is to do as much.

    ``concordant`` and ``discordant`` count pairs of items; those tied in either score are neither. ``tied_x`` and
    ``tied_y`` count the pairs tied in that score. ``low`` and ``high`` are None where there is no interval: below 4
    items, and where leaving out one item changes nothing, as in perfect agreement, or leaves nothing to rank. ``p``
    is two-sided, from all permutations (``method`` ``"exact"``) or the normal distribution (``"normal"``).
    """

    tau: float
    low: float | None
    high: float | None
    confidence: float
    p: float
    method: str
    items: int
    concordant: int
    discordant: int
    tied_x: int
    tied_y: int

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def kendall_tau(x: Sequence[float], y: Sequence[float]) -> float:
    """Tau-b of two scores of the same items, in -1..1; without ties it is tau-a, ``S / (n (n - 1) / 2)``.

    Raises ``ValueError`` for scores of different numbers of items, for fewer than 2 items, for values that are no
    finite numbers, and for a score that is the same for all items, which ranks nothing.
    """
    _check(x, y)
    return _tau_b(*(sum(column) for column in _signs(x, y)))


def rank_correlation(x: Sequence[float], y: Sequence[float], *, confidence: float = 0.95) -> RankCorrelation:
    """Tau-b with its confidence interval and p-value; arguments and errors as for :func:`kendall_tau`.

    The interval is ``tanh(atanh(tau) +- z se / (1 - tau^2))``: the jackknife's standard error ``se`` (tau with each
    item left out in turn) on Fisher's scale, which keeps it within -1..1. The jackknife takes ties into account,
    assumes no distribution and needs no chance; a bootstrap would draw items twice, which are ties that the scores
    do not have. For normal scores with tau of 0, 1/3 and 0.7, with and without ties, intervals of 95 % held the true
    value in 93 to 99 % of simulated cases from 10 items on; with the plain asymptotic variance in 83 to 96 %.

    The p-value is the probability of an ``|S|`` at least as large if one score is permuted: exact, ties included, up to
    10 items, and by the normal distribution with the variance for ties (Kendall, chapter 4) beyond.
    """
    _check(x, y)
    if not isinstance(confidence, float) or not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence!r}")
    signs = _signs(x, y)
    s, untied_x, untied_y = (sum(column) for column in signs)
    pairs = len(x) * (len(x) - 1) // 2
    both = sum(1 for i, j in combinations(range(len(x)), 2) if x[i] != x[j] and y[i] != y[j])
    tau = _tau_b(s, untied_x, untied_y)
    low, high = _interval(tau, signs, confidence)
    exact = len(x) <= EXACT
    return RankCorrelation(
        tau=tau,
        low=low,
        high=high,
        confidence=confidence,
        p=(_exact_p if exact else _normal_p)(x, y, s // 2),
        method="exact" if exact else "normal",
        items=len(x),
        concordant=(both + s // 2) // 2,
        discordant=(both - s // 2) // 2,
        tied_x=pairs - untied_x // 2,
        tied_y=pairs - untied_y // 2,
    )


def _check(x: Sequence[float], y: Sequence[float]) -> None:
    if len(x) != len(y):
        raise ValueError(f"x and y must be scores of the same items, got {len(x)} and {len(y)}")
    if len(x) < 2:
        raise ValueError(f"x and y must be scores of at least 2 items, got {len(x)}")
    for name, values in (("x", x), ("y", y)):
        for place, value in enumerate(values):
            if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
                raise ValueError(f"{name} must be finite numbers, got {value!r} at {place}")
        if len(set(values)) == 1:
            raise ValueError(f"{name} must differ between items, got {values[0]!r} for all {len(values)}")


def _signs(x: Sequence[float], y: Sequence[float]) -> tuple[list[int], list[int], list[int]]:
    """For each item, summed over all others: whether the scores agree (1, -1; 0 for ties), and whether x, and whether y
    tells the two apart. Each pair counts for both of its items."""
    agree, apart_x, apart_y = [0] * len(x), [0] * len(x), [0] * len(x)
    for i, j in combinations(range(len(x)), 2):
        in_x, in_y = (x[i] > x[j]) - (x[i] < x[j]), (y[i] > y[j]) - (y[i] < y[j])
        for item in (i, j):
            agree[item] += in_x * in_y
            apart_x[item] += abs(in_x)
            apart_y[item] += abs(in_y)
    return agree, apart_x, apart_y


def _tau_b(s: int, untied_x: int, untied_y: int) -> float:
    # The root of the product, which is exact for perfect agreement; the product of roots may exceed 1.
    return s / math.sqrt(untied_x * untied_y)


def _interval(tau: float, signs: tuple[list[int], ...], confidence: float) -> tuple[float | None, float | None]:
    n = len(signs[0])
    totals = [sum(column) for column in signs]
    # A pair left out is missing from the sums of both of its items.
    without = [
        [total - 2 * part for total, part in zip(totals, parts, strict=True)] for parts in zip(*signs, strict=True)
    ]
    if n < _INTERVAL_FROM or any(not (apart_x and apart_y) for _, apart_x, apart_y in without):
        return None, None
    taus = [_tau_b(*sums) for sums in without]
    mean = math.fsum(taus) / n
    error = math.sqrt((n - 1) / n * math.fsum((value - mean) ** 2 for value in taus))
    if error == 0 or abs(tau) == 1:
        return None, None
    reach = NormalDist().inv_cdf((1 + confidence) / 2) * error / (1 - tau**2)
    return math.tanh(math.atanh(tau) - reach), math.tanh(math.atanh(tau) + reach)


def _group_sizes(values: Sequence[float]) -> tuple[int, ...]:
    """How many items share each value, from the smallest value on."""
    counts = Counter(values)
    return tuple(counts[value] for value in sorted(counts))


def _exact_p(x: Sequence[float], y: Sequence[float], s: int) -> float:
    law = _law_of_s(_group_sizes(x), _group_sizes(y))
    return sum(ways for value, ways in law.items() if abs(value) >= abs(s)) / sum(law.values())


def _law_of_s(rows: tuple[int, ...], columns: tuple[int, ...]) -> Counter[int]:
    """How many permutations give each S, up to one common factor.

    What counts is how many items of each group of x fall into each group of y: groups of x draw in turn from what is
    left of the groups of y, and everything drawn later agrees with what lies below it.
    """

    @cache
    def law(row: int, left: tuple[int, ...]) -> Counter[int]:
        if row == len(rows):
            return Counter({0: 1})
        found: Counter[int] = Counter()
        for drawn in _draws(rows[row], left):
            rest = tuple(have - take for have, take in zip(left, drawn, strict=True))
            gain = sum(take * (sum(rest[place + 1 :]) - sum(rest[:place])) for place, take in enumerate(drawn))
            ways = math.prod(math.comb(have, take) for have, take in zip(left, drawn, strict=True))
            for value, count in law(row + 1, rest).items():
                found[value + gain] += ways * count
        return found

    return law(0, columns)


def _draws(count: int, left: tuple[int, ...]) -> list[tuple[int, ...]]:
    """All ways to take ``count`` items from groups of these sizes."""
    if not left:
        return [()] if count == 0 else []
    first = range(min(count, left[0]) + 1)
    return [(take, *others) for take in first for others in _draws(count - take, left[1:])]


def _normal_p(x: Sequence[float], y: Sequence[float], s: int) -> float:
    return math.erfc(abs(s) / math.sqrt(2 * _variance_of_s(_group_sizes(x), _group_sizes(y))))


def _variance_of_s(rows: tuple[int, ...], columns: tuple[int, ...]) -> float:
    """The variance of S over all permutations of scores with ties of these sizes."""
    n = sum(rows)

    def over_ties(term: Callable[[int], int]) -> tuple[int, int]:
        return sum(map(term, rows)), sum(map(term, columns))

    twos, threes = over_ties(lambda t: t * (t - 1)), over_ties(lambda t: t * (t - 1) * (t - 2))
    variance = (n * (n - 1) * (2 * n + 5) - sum(over_ties(lambda t: t * (t - 1) * (2 * t + 5)))) / 18
    variance += twos[0] * twos[1] / (2 * n * (n - 1))
    return variance + (threes[0] * threes[1] / (9 * n * (n - 1) * (n - 2)) if n > 2 else 0.0)
