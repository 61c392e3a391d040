"""Random search as ask / tell."""

from __future__ import annotations

import json
import random

import pytest

from nasdet.arch import Card
from nasdet.search.random import RandomSearch


class Numbers:
    """A space of a few one-edge architectures."""

    def __init__(self, size: int) -> None:
        self.size = size

    def random(self, rng: random.Random) -> Card:
        return Card("fad", "number", [rng.randrange(self.size)])


def value(card: Card) -> float:
    return float(-((card.genotype[0] - 5) ** 2))


def test_asks_each_architecture_once_and_finds_the_best() -> None:
    search = RandomSearch(Numbers(10), seed=3)
    for _ in range(10):
        card = search.ask()
        search.tell(card, value(card))
    assert sorted(card.genotype[0] for card, _ in search.history) == list(range(10))
    card, score = search.best()
    assert (card.genotype, score) == ([5], 0.0)
    with pytest.raises(RuntimeError, match="no new architecture in 1000 draws after 10 were asked for"):
        search.ask()


def test_seed_decides() -> None:
    runs = [[RandomSearch(Numbers(1000), seed).ask().genotype for _ in range(1)] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_resume_equals_never_stopped() -> None:
    whole, stopped = RandomSearch(Numbers(50), 7), RandomSearch(Numbers(50), 7)
    for search in (whole, stopped):
        for _ in range(5):
            card = search.ask()
            search.tell(card, value(card))
    resumed = RandomSearch(Numbers(50), 0)
    resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
    for _ in range(20):
        assert resumed.ask() == whole.ask()
    assert resumed.best() == whole.best()


def test_of_equals_the_first_told_is_best() -> None:
    search = RandomSearch(Numbers(10), 0)
    first, second = search.ask(), search.ask()
    search.tell(first, 1.0)
    search.tell(second, 1)
    assert search.best()[0] == first


def test_bad_calls() -> None:
    search = RandomSearch(Numbers(10), 0)
    with pytest.raises(ValueError, match="best needs at least one told architecture, got none"):
        search.best()
    with pytest.raises(ValueError, match="card must come from ask, got 'stranger'"):
        search.tell(Card("fad", "stranger", [11]), 1.0)
    card = search.ask()
    for score in (float("nan"), float("inf"), True, "0.5"):
        with pytest.raises(ValueError, match="score must be a finite number"):
            search.tell(card, score)  # type: ignore[arg-type]  # wrong on purpose
    search.tell(card, 1.0)
    with pytest.raises(ValueError, match="card must be told once"):
        search.tell(card, 1.0)
