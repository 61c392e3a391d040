"""Spaces and benchmark landscapes for tests of evolution: cheap, deterministic, with interactions between genes."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from random import Random
from typing import Any

from nasdet.arch import Card


class Letters:
    """Words of a few letters."""

    def __init__(self, length: int = 6, letters: str = "abcd") -> None:
        self.length, self.letters = length, letters
        self.mutations: dict[str, Callable[[Card, Random], Card | None]] = {"mutate": self.mutate}
        self.crossovers: dict[str, Callable[[Card, Card, Random], Card | None]] = {"crossover": self.crossover}

    def card(self, word: Any) -> Card:
        return Card("letters", "word", list(word), {"length": self.length})

    def random(self, rng: Random) -> Card:
        return self.card(rng.choice(self.letters) for _ in range(self.length))

    def mutate(self, card: Card, rng: Random) -> Card:
        word = list(card.genotype)
        word[rng.randrange(self.length)] = rng.choice(self.letters)
        return self.card(word)

    def crossover(self, first: Card, second: Card, rng: Random) -> Card:
        return self.card(rng.choice(pair) for pair in zip(first.genotype, second.genotype, strict=True))

    def check(self, card: Card) -> None:
        if card.method != "letters" or len(card.genotype) != self.length:
            raise ValueError(f"{card.name}: genotype must have {self.length} letters, got {card.genotype}")


def weight(card: Card) -> int:
    """A cost: a is 0, b is 1, ..."""
    return sum(ord(letter) - ord("a") for letter in card.genotype)


class Neighbours:
    """Fitness as in NK landscapes with K = 1: each pair of neighbouring genes has a value of its own, from 0 to 1."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.values: dict[Any, float] = {}

    def __call__(self, genes: Any) -> float:
        total = 0.0
        for place, pair in enumerate(pairwise(map(str, genes))):
            if (place, pair) not in self.values:
                self.values[place, pair] = Random(f"{self.seed} {place} {pair}").random()
            total += self.values[place, pair]
        return total / (len(genes) - 1)
