"""Which path learns: uniform over paths, or over bins of cost."""

from __future__ import annotations

from random import Random

import pytest

from nasdet.engine.paths import binned_draw, uniform_draw
from nasdet.spaces.detnas import DetNASSpace, macs_table

SPACE = DetNASSpace("small")
COST = macs_table(SPACE.sizes, classes=1000)


def cost(card):
    return COST(card.genotype)


def test_bins_are_drawn_uniformly_between_290_and_360_million():
    draw = binned_draw(SPACE, cost, seed=1)
    costs = [cost(draw(step)) for step in range(700)]
    bins = [sum(290e6 + 10e6 * k <= value < 300e6 + 10e6 * k for value in costs) for k in range(7)]
    plain = [cost(uniform_draw(SPACE, 1)(step)) for step in range(700)]
    outer = sum(290e6 <= value < 300e6 or 350e6 <= value < 360e6 for value in plain)
    assert outer < 40, "uniform paths crowd in the middle"
    assert all(70 < count < 135 for count in bins), bins
    assert sum(bins) > 680, "what no draw reaches is replaced by the closest, which may lie beside the bin"


def test_paths_depend_on_seed_and_step_alone():
    draw = binned_draw(SPACE, cost, seed=1)
    again = binned_draw(SPACE, cost, seed=1)
    assert [draw(step).key for step in (5, 3, 9)] == [again(step).key for step in (5, 3, 9)]
    assert draw(3).key != binned_draw(SPACE, cost, seed=2)(3).key


def test_out_of_reach_gives_the_closest_of_the_tries():
    values = []

    def watched(card):
        values.append(cost(card))
        return values[-1]

    found = cost(binned_draw(SPACE, watched, low=1e6, high=2e6, width=1e6, tries=7)(0))
    assert len(values) == 7 and found == min(values)


def test_a_last_bin_may_be_narrower():
    class Line:
        def random(self, rng: Random):
            return rng.randrange(25)

    seen = {binned_draw(Line(), float, step, low=0, high=25, width=10)(0) // 10 for step in range(50)}
    assert seen == {0, 1, 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width must be positive"),
        ({"width": 80e6}, "at most high - low"),
        ({"tries": 0}, "tries must be"),
    ],
    ids=["zero", "wide", "tries"],
)
def test_bad_bins(options, message):
    with pytest.raises(ValueError, match=message):
        binned_draw(SPACE, cost, **options)
