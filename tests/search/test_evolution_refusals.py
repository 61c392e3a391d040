"""Evolution under constraints that are hard or impossible to meet, and calls that make no sense."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from landscapes import Letters, weight

from nasdet.arch import Card
from nasdet.search.constraints import Constraint
from nasdet.search.evolution import Evolution, Offspring
from nasdet.spaces.detnas import DetNASSpace
from nasdet.spaces.msnas import MSNASSpace

SMALL = DetNASSpace("small")


def detnas_macs(card: Card) -> int:
    return SMALL.macs(card.genotype)


def test_bounds_outside_the_exact_range_are_refused_at_once() -> None:
    least, most = SMALL.macs.reachable()
    text = f"macs must be at most 200000000, reachable are {least} to {most}"
    with pytest.raises(ValueError, match=text):
        Constraint("macs", detnas_macs, high=200e6, reachable=SMALL.macs.reachable())
    with pytest.raises(ValueError, match="macs must be at least 400000000, reachable are"):
        Constraint("macs", detnas_macs, low=400e6, reachable=SMALL.macs.reachable())
    Constraint("macs", detnas_macs, high=least, reachable=(least, most))


def test_an_infeasible_bound_ends_with_what_was_reached() -> None:
    """The walks go all the way to the least, so the range that is stated begins with it."""
    least, _ = SMALL.macs.reachable()
    with pytest.raises(
        ValueError, match=rf"after \d+ were tried: macs must be at most 237000000, met were {least} "
    ):
        Evolution(SMALL, constraints=[Constraint("macs", detnas_macs, high=237e6)], draws=500)


IMPOSSIBLE: dict[str, tuple[Any, str]] = {
    "predicate": ({"legal": lambda card: False}, "legal must hold"),
    "window": (
        {"constraints": [Constraint("weight", weight, 4.2, 4.8)]},
        "weight must be within 4.2 to 4.8, met were",
    ),
    "above": ({"constraints": [Constraint("weight", weight, 19)]}, "weight must be at least 19, met were . to 18"),
    "jointly": (
        {"constraints": [Constraint("weight", weight, high=3), Constraint("less", lambda c: -weight(c), high=-9)]},
        "weight must be at most 3, met were . to 1.; less must be at most -9, met were -1. to -?.$",
    ),
}


@pytest.mark.parametrize(("settings", "words"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_constraints_end(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=f"no architecture meets the constraints, after .* were tried: {words}"):
        Evolution(Letters(), **settings, draws=50)


def test_a_space_without_mutations_ends_as_well() -> None:
    space = Letters()
    space.mutations = {}
    with pytest.raises(ValueError, match="after 40 were tried: legal must hold"):
        Evolution(space, legal=lambda card: False, draws=40, offspring=(Offspring(("crossover",), 1),))


def test_walks_reach_what_random_draws_miss() -> None:
    """Within 1 % of the least MACs: one path in some 10^9."""
    least, _ = SMALL.macs.reachable()
    limit = Constraint("macs", detnas_macs, high=1.01 * least)
    search = Evolution(SMALL, constraints=[limit], population=8, parents=4, generations=2, draws=300)
    cards = search.waiting()
    assert len({card.key for card in cards}) == 8 and all(detnas_macs(card) <= 1.01 * least for card in cards)
    assert {one.operator for one in search.candidates[0]} == {"walk"}


def test_a_constraint_met_by_few_makes_a_smaller_population() -> None:
    search = Evolution(Letters(), constraints=[Constraint("weight", weight, high=1)], draws=200)
    assert sorted("".join(card.genotype) for card in search.waiting()) == sorted(
        ["aaaaaa", *("a" * i + "b" + "a" * (5 - i) for i in range(6))]
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), None, True])
def test_a_cost_that_is_no_number_is_named(value: Any) -> None:
    with pytest.raises(ValueError, match=f"cost latency must be a finite number, got {value} for 'word'"):
        Evolution(Letters(), constraints=[Constraint("latency", lambda card: value)])


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "population": ({"population": 0}, "population must be a positive integer, got 0"),
    "bool": ({"generations": True}, "generations must be a positive integer, got True"),
    "float": ({"draws": 1.5}, "draws must be a positive integer, got 1.5"),
    "parents": ({"parents": 51}, "parents must not exceed the population of 50, got 51"),
    "operator": (
        {"offspring": (Offspring(("mutate_heads",), 5),)},
        "operators must be among mutate, crossover, random, got 'mutate_heads'",
    ),
    "no-offspring": ({"offspring": ()}, "offspring must not be empty where there is more than one generation"),
    "names": (
        {"constraints": [Constraint("a", weight), Constraint("a", weight)]},
        "constraints must have different names, got a, a",
    ),
}


@pytest.mark.parametrize(("settings", "words"), BAD.values(), ids=BAD)
def test_bad_settings(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Evolution(Letters(), **settings)


PARTS: dict[str, tuple[Any, str]] = {
    "count": (lambda: Offspring(("mutate",), 0), "count must be a positive integer, got 0"),
    "attempts": (lambda: Offspring(("mutate",), 1, 0), "attempts must be a positive integer, got 0"),
    "operators": (lambda: Offspring((), 1), "operators must not be empty"),
    "order": (lambda: Constraint("macs", weight, 3, 2), "low of macs must not exceed high, got 3 and 2"),
    "nan": (lambda: Constraint("macs", weight, float("nan")), "low of macs must be a finite number or None, got nan"),
    "target": (lambda: Constraint.window("macs", weight, 0), "target of macs must be positive"),
    "tolerance": (lambda: Constraint.window("macs", weight, 9, 1.0), r"tolerance in \(0, 1\), got 9 and 1.0"),
    "reach": (
        lambda: Constraint.window("macs", weight, 200.0, reachable=(1, 190.5)),
        "macs must be within 198 to 202, reachable are 1 to 190.5",
    ),
}


@pytest.mark.parametrize(("make", "words"), PARTS.values(), ids=PARTS)
def test_bad_parts(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_a_window_is_relative_and_inclusive() -> None:
    window = Constraint.window("macs", weight, 200.0)
    assert (window.low, window.high) == (198.0, 202.0)
    assert window.excess(198.0) == window.excess(202.0) == 0
    assert window.excess(404.0) == pytest.approx(1) and window.excess(99.0) == pytest.approx(0.5)


def test_bad_calls() -> None:
    search = Evolution(Letters(), population=2, parents=1, generations=1)
    with pytest.raises(ValueError, match="best needs at least one told architecture, got none"):
        search.best()
    first, second = search.ask(), search.ask()
    with pytest.raises(RuntimeError, match="ask needs the scores of generation 0: 2 are not told"):
        search.ask()
    with pytest.raises(ValueError, match="card must come from ask, got 'stranger'"):
        search.tell(Card("letters", "stranger", ["z"]), 1.0)
    for score in (float("nan"), float("inf"), True, "0.5", None):
        with pytest.raises(ValueError, match="score must be a finite number"):
            search.tell(first, score)  # type: ignore[arg-type]  # wrong on purpose
    search.tell(first, 1)
    with pytest.raises(ValueError, match="card must be told once"):
        search.tell(first, 2.0)
    search.tell(second, 0.5)
    with pytest.raises(RuntimeError, match="the search is done after 2 architectures"):
        search.ask()


def test_a_state_of_another_search_is_refused_and_changes_nothing() -> None:
    def make(space: Any, **changes: Any) -> Evolution:
        groups = (Offspring(("random",), 2),)
        return Evolution(space, **{"population": 3, "parents": 2, "offspring": groups, **changes})

    search = make(Letters())
    before = json.dumps(search.state_dict())
    others = {
        "parents 2, got 1": make(Letters(), parents=1),
        "constraints .*, got .*weight": make(Letters(), constraints=[Constraint("weight", weight, high=9)]),
        r"offspring \[\[\['random'\], 2, None, False\]\], got": make(Letters(), offspring=(Offspring(("random",), 3),)),
        "genotype must have 6 letters": make(Letters(5)),
        "msnas-random: genotype must have 6 letters": make(MSNASSpace()),
    }
    for words, other in others.items():
        with pytest.raises(ValueError, match=words):
            search.load_state_dict(json.loads(json.dumps(other.state_dict())))
        assert json.dumps(search.state_dict()) == before
    with pytest.raises(ValueError, match="msnas-random: method must be 'detnas', got 'msnas'"):
        make(SMALL).load_state_dict(make(MSNASSpace()).state_dict())
    with pytest.raises(ValueError, match="settings must have .*'stem': 48"):
        make(DetNASSpace("large")).load_state_dict(make(SMALL).state_dict())


def test_operators_that_never_make_a_child_end_the_search() -> None:
    class Barren(Letters):
        def mutate(self, card: Card, rng: Random) -> None:  # type: ignore[override]  # no child is allowed
            return None

    search = Evolution(Barren(), population=3, parents=2, offspring=(Offspring(("mutate",), 5),))
    for card in search.waiting():
        search.tell(card, 0.0)
    assert search.done and len(search.candidates) == 1 and search.generation == 0
