"""Tau-b against hand-computed cases, the paper's printed values, and what must hold of any rank correlation."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import permutations

import pytest

from nasdet.measure import kendall_tau, rank_correlation
from nasdet.measure.tau import _group_sizes, _law_of_s, _variance_of_s


def scores(rng: random.Random, items: int, levels: int) -> list[float]:
    """Random scores with ties, but not all of them."""
    while len(set(values := [float(rng.randrange(levels)) for _ in range(items)])) == 1:
        pass
    return values


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([1, 2, 3], [1, 2, 3], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 3], [1, 3, 2], 1 / 3),  # two pairs agree, one does not
        ([1, 2, 3, 4], [2, 1, 4, 3], 1 / 3),  # 4 - 2 of 6
        ([1, 1, 2], [1, 2, 3], 2 / math.sqrt(2 * 3)),
        ([1, 1, 2, 2], [1, 2, 1, 2], 0.0),  # of the two pairs without a tie one agrees
        ([1, 1, 2, 3], [1, 2, 2, 3], 4 / math.sqrt(5 * 5)),
        ([0.1, 0.1, 0.1, 0.2], [5, 6, 7, 4], -3 / math.sqrt(3 * 6)),
    ],
    ids=["agree", "contradict", "three", "four", "tie-in-x", "balanced-ties", "ties-in-both", "triple-tie"],
)
def test_hand_computed(x: list[float], y: list[float], expected: float) -> None:
    assert kendall_tau(x, y) == pytest.approx(expected, abs=1e-15)


# Ranks of ten nets by stand-alone training, in their order. The paper's nets come out level once or twice.
ONE_TIE = [0, 1, 2, 3, 4, 5, 6, 7, 8, 8]
TWO_TIES = [0, 0, 1, 2, 3, 4, 5, 6, 7, 7]


@pytest.mark.parametrize(
    ("one_shot", "stand_alone", "printed", "difference", "untied"),
    [
        ([7, 5, 0, 1, 2, 3, 4, 6, 8, 9], ONE_TIE, 0.4495, 20, 44),
        ([0, 1, 7, 6, 2, 3, 4, 5, 8, 9], TWO_TIES, 0.5683, 25, 43),
        ([0, 1, 9, 8, 5, 2, 3, 4, 6, 7], TWO_TIES, 0.2501, 11, 43),
        ([9, 8, 0, 1, 2, 3, 4, 5, 6, 7], ONE_TIE, 0.2247, 10, 44),
        ([9, 8, 3, 0, 1, 2, 4, 5, 6, 7], ONE_TIE, 0.0899, 4, 44),
    ],
    ids=["r18", "r34", "r34-without-tuning", "fpn-heads", "r18-without-tuning"],
)
def test_the_values_that_msnas_prints(
    one_shot: list[int], stand_alone: list[int], printed: float, difference: int, untied: int
) -> None:
    found = rank_correlation(one_shot, stand_alone)
    assert found.concordant - found.discordant == difference
    assert (found.tied_x, found.tied_y, found.items) == (0, 45 - untied, 10)
    assert found.tau == pytest.approx(difference / math.sqrt(45 * untied), abs=1e-15)
    assert round(found.tau, 4) == printed


@pytest.mark.parametrize("levels", [2, 4, 100], ids="{} levels".format)
def test_antisymmetric_symmetric_and_in_range(levels: int) -> None:
    rng = random.Random(levels)
    for items in (2, 3, 7, 12):
        x, y = scores(rng, items, levels), scores(rng, items, levels)
        tau = kendall_tau(x, y)
        assert -1 <= tau <= 1
        assert kendall_tau(y, x) == tau and kendall_tau(x, [-value for value in y]) == -tau
        assert kendall_tau([math.exp(value / 10) for value in x], y) == tau, "only the order counts"
        order = rng.sample(range(items), items)
        assert kendall_tau([x[i] for i in order], [y[i] for i in order]) == tau
        assert kendall_tau(x, x) == 1.0


def test_without_ties_it_is_tau_a() -> None:
    rng = random.Random(3)
    for items in (2, 5, 9, 30):
        x, y = rng.sample(range(items), items), rng.sample(range(items), items)
        found = rank_correlation(x, y)
        pairs = items * (items - 1) // 2
        assert found.concordant + found.discordant == pairs and found.tied_x == found.tied_y == 0
        assert found.tau == pytest.approx((found.concordant - found.discordant) / pairs, abs=1e-15)


def brute_law(x: Sequence[float], y: Sequence[float]) -> Counter[int]:
    def sign(value: float) -> int:
        return (value > 0) - (value < 0)

    pairs = [(i, j) for i in range(len(x)) for j in range(i)]
    return Counter(sum(sign(x[i] - x[j]) * sign(turned[i] - turned[j]) for i, j in pairs) for turned in permutations(y))


CASES = [
    ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]),
    ([1, 1, 2, 3, 4, 5], [3, 1, 2, 6, 5, 4]),
    ([1, 1, 1, 2, 3, 3], [1, 2, 2, 2, 2, 4]),
    ([1, 1, 1, 1, 1, 2], [2, 2, 1, 1, 3, 3]),
]


@pytest.mark.parametrize(("x", "y"), CASES, ids=["no-ties", "one", "skewed", "almost-all"])
def test_the_exact_law_is_that_of_all_permutations(x: list[float], y: list[float]) -> None:
    brute = brute_law(x, y)
    law = _law_of_s(_group_sizes(x), _group_sizes(y))
    factor = sum(brute.values()) / sum(law.values())
    assert {value: ways * factor for value, ways in law.items()} == dict(brute)
    found = rank_correlation(x, y)
    s = found.concordant - found.discordant
    assert found.method == "exact"
    assert found.p == pytest.approx(
        sum(ways for value, ways in brute.items() if abs(value) >= abs(s)) / math.factorial(6), abs=1e-15
    )


@pytest.mark.parametrize(("rows", "columns"), [((1, 1), (1, 1)), ((1,) * 8, (1,) * 8), ((2, 3, 1, 2), (1, 4, 3))])
def test_the_normal_law_has_the_mean_and_variance_of_the_exact_one(
    rows: tuple[int, ...], columns: tuple[int, ...]
) -> None:
    law = _law_of_s(rows, columns)
    ways = sum(law.values())
    assert sum(value * count for value, count in law.items()) == 0
    exact = sum(value**2 * count for value, count in law.items()) / ways
    assert _variance_of_s(rows, columns) == pytest.approx(exact, rel=1e-12)


def test_beyond_ten_items_the_p_value_is_normal_and_close() -> None:
    x, y = list(range(11)), [2, 0, 1, 5, 3, 8, 4, 6, 10, 7, 9]
    found = rank_correlation(x, y)
    s = found.concordant - found.discordant
    law = _law_of_s((1,) * 11, (1,) * 11)
    exact = sum(ways for value, ways in law.items() if abs(value) >= s) / math.factorial(11)
    assert found.method == "normal" and found.p == pytest.approx(exact, abs=5e-3) and exact < 0.01
    assert found.p == math.erfc(s / math.sqrt(2 * 11 * 10 * 27 / 18))


def test_the_interval_is_the_jackknife_on_fishers_scale() -> None:
    x, y = [1, 2, 3, 4, 5, 5, 7, 8], [2, 1, 4, 3, 6, 5, 8, 8]
    left = [kendall_tau(x[:i] + x[i + 1 :], y[:i] + y[i + 1 :]) for i in range(8)]
    mean = sum(left) / 8
    error = math.sqrt(7 / 8 * sum((value - mean) ** 2 for value in left))
    found = rank_correlation(x, y)
    reach = 1.959963984540054 * error / (1 - found.tau**2)
    assert found.low == pytest.approx(math.tanh(math.atanh(found.tau) - reach), abs=1e-12)
    assert found.high == pytest.approx(math.tanh(math.atanh(found.tau) + reach), abs=1e-12)
    wider = rank_correlation(x, y, confidence=0.99)
    assert found.low is not None and found.high is not None and wider.low is not None and wider.high is not None
    assert -1 < wider.low < found.low < found.tau < found.high < wider.high < 1
    turned = rank_correlation(x, [-value for value in y])
    assert (turned.low, turned.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


@pytest.mark.parametrize("rounded", [False, True], ids=["without-ties", "with-ties"])
def test_intervals_hold_the_true_value_as_often_as_they_say(rounded: bool) -> None:
    """Independent scores: tau is 0. Of 400 intervals 95 % are 380; 365 is four standard deviations below."""
    rng, held = random.Random(0), 0
    for _ in range(400):
        x, y = ([rng.gauss(0, 1) for _ in range(12)] for _ in range(2))
        if rounded:
            x, y = ([round(2 * value) for value in values] for values in (x, y))
        found = rank_correlation(x, y)
        assert found.low is not None and found.high is not None
        held += found.low <= 0 <= found.high
    assert 365 <= held <= 399


@pytest.mark.parametrize(
    ("x", "y"),
    [([1, 2, 3], [1, 3, 2]), ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]), ([1, 1, 1, 1, 2], [1, 2, 3, 4, 5])],
    ids=["three-items", "perfect", "one-item-tells"],
)
def test_where_nothing_varies_there_is_no_interval(x: list[float], y: list[float]) -> None:
    found = rank_correlation(x, y)
    assert found.low is None and found.high is None and 0 < found.p <= 1


def test_the_p_value_of_perfect_agreement_is_two_orders_of_all() -> None:
    found = rank_correlation(range(6), range(6))
    assert found.p == 2 / math.factorial(6) and (found.concordant, found.discordant) == (15, 0)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([1, 2], [1, 2, 3], "same items, got 2 and 3"),
        ([1], [1], "at least 2 items, got 1"),
        ([1, math.nan], [1, 2], "x must be finite numbers, got nan at 1"),
        ([1, 2], [1, "2"], "y must be finite numbers, got '2' at 1"),
        ([1, 2], [True, 2], "y must be finite numbers, got True at 0"),
        ([1, 2, 3], [4, 4, 4], "y must differ between items, got 4 for all 3"),
    ],
    ids=["lengths", "one-item", "nan", "text", "bool", "constant"],
)
def test_what_ranks_nothing_is_refused(x: list[float], y: list[float], message: str) -> None:
    for function in (kendall_tau, rank_correlation):
        with pytest.raises(ValueError, match=message):
            function(x, y)  # type: ignore[operator]  # both take two scores


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95, -0.5])
def test_confidence_is_a_share(confidence: float) -> None:
    with pytest.raises(ValueError, match=r"confidence must be in \(0, 1\)"):
        rank_correlation([1, 2], [1, 2], confidence=confidence)


def test_it_needs_no_torch() -> None:
    code = "import sys, nasdet.measure as m; m.rank_correlation([1, 2], [2, 1]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
