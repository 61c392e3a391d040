"""Evolutionary search under hard constraints, by ask and tell. No torch.

What DetNAS (Algorithm 2) and MSNAS (Algorithm 1) do differs in numbers only, which :data:`PRESETS` has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from nasdet._checks import check_whole
from nasdet.arch import Card
from nasdet.search.constraints import Constraint, Ranges, finite

RANDOM = "random"
_WALKS = 5


class EvolutionSpace(Protocol):
    """What evolution needs of a search space: random cards, and variations by name that return a legal child, or None
    where there is none."""

    @property
    def mutations(self) -> Mapping[str, Callable[[Card, Random], Card | None]]:
        """Variations of one parent, by name."""
        ...

    @property
    def crossovers(self) -> Mapping[str, Callable[[Card, Card, Random], Card | None]]:
        """Variations of two parents, by name."""
        ...

    def random(self, rng: Random) -> Card:
        """A uniformly random architecture."""
        ...

    def check(self, card: Card) -> None:
        """Raise ``ValueError`` unless the card is an architecture of this space."""
        ...


@dataclass(frozen=True)
class Offspring:
    """Children of a generation: the ``operators`` take turns, one child each, until ``count`` new and legal children
    are there or each has tried ``attempts`` times (None: ten times ``count``). With ``fill`` they also make up for what
    the groups before them are short of.

    Operators are the names of the space's mutations and crossovers, and ``"random"``.
    """

    operators: tuple[str, ...]
    count: int
    attempts: int | None = None
    fill: bool = False

    def __post_init__(self) -> None:
        if not self.operators:
            raise ValueError("operators must not be empty")
        check_whole("count", self.count)
        if self.attempts is not None:
            check_whole("attempts", self.attempts)


_MSNAS = ("crossover_encoder", "mutate_encoder", "crossover_heads", "mutate_heads")

PRESETS: dict[str, dict[str, Any]] = {
    "detnas": {
        "population": 50,
        "parents": 10,
        "generations": 20,
        "offspring": (Offspring(("crossover",), 25), Offspring(("mutate",), 25, 500, fill=True)),
    },
    "detnas-released": {
        "population": 50,
        "parents": 10,
        "generations": 20,
        "offspring": (
            Offspring(("mutate",), 20),
            Offspring(("crossover",), 20),
            Offspring((RANDOM,), 10, 1000, fill=True),
        ),
    },
    "msnas": {
        "population": 50,
        "parents": 50,
        "generations": 21,
        "offspring": (Offspring(_MSNAS, 50, attempts=500), Offspring((RANDOM,), 10, attempts=1000)),
    },
}
"""The papers' settings as keywords of :class:`Evolution`. DetNAS: 1,000 evaluations, half of the children by mutation
and half by crossover (its released code: 20, 20 and 10 random ones). MSNAS: 50 first ones and 20 times up to 60; what
it leaves open is set here: parents from the whole population, 500 rounds of its four variations (with 50, its window
leaves some 15 of the 50 children that it wants), 10 random children in at most 1,000 draws."""


@dataclass
class Candidate:
    """An architecture of a generation: what made it, what it costs, and its score once told."""

    card: Card
    operator: str
    costs: dict[str, float]
    score: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return {"card": self.card.to_json(), "operator": self.operator, "costs": self.costs, "score": self.score}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Candidate:
        """The reverse of :meth:`to_json`."""
        return cls(Card.from_json(value["card"]), value["operator"], dict(value["costs"]), value["score"])


class Evolution:
    """Ask for architectures, tell their scores (larger is better), generation by generation.

    The first generation is ``population`` uniformly random architectures that meet the constraints. The population is
    the best ``population`` of all told so far, of equals the earlier; the best ``parents`` of it have the children of
    the next generation (``offspring``), each parent drawn uniformly, for crossover two with replacement. No
    architecture comes twice.

    A generation's candidates are fixed when it begins. So they can be evaluated side by side (:meth:`waiting`) and
    told in any order, and the search depends on ``seed`` and scores alone. :meth:`state_dict` is plain JSON data,
    scores and costs in full precision; a search that is resumed from any of its states goes on as if it had never
    stopped: what was asked and not told is asked again.

    Where random draws seldom meet the constraints, random walks of mutations towards them fill the first generation;
    if neither finds one architecture, ``ValueError`` says what was asked for and what can be reached. A generation may
    stay smaller than planned where operators find nothing new and legal within their attempts; without a single child
    the search is over (:attr:`done`).

    Args:
        space: see :class:`EvolutionSpace`.
        constraints: costs with bounds; those without are recorded only.
        legal: a further condition on cards.
        population, parents, generations: see above; the first generation counts. Defaults: DetNAS's.
        offspring: see above; by default as many children as the population, all operators of the space in turn.
        draws: random draws, or steps of a walk, for one more member of the first generation before giving up.
        seed: of all chance.

    Sources: Chen et al., NeurIPS 2019, Algorithm 2; "Multi-scale Network Architecture Search", Algorithm 1, but for its
    first population, which there need not meet the constraint.
    """

    def __init__(
        self,
        space: EvolutionSpace,
        *,
        constraints: Sequence[Constraint] = (),
        legal: Callable[[Card], bool] | None = None,
        population: int = 50,
        parents: int = 10,
        generations: int = 20,
        offspring: Sequence[Offspring] | None = None,
        draws: int = 1000,
        seed: int = 0,
    ) -> None:
        sizes = {"population": population, "parents": parents, "generations": generations, "draws": draws}
        for name, value in sizes.items():
            check_whole(name, value)
        if parents > population:
            raise ValueError(f"parents must not exceed the population of {population}, got {parents}")
        names = [constraint.name for constraint in constraints]
        if len(set(names)) != len(names):
            raise ValueError(f"constraints must have different names, got {', '.join(names)}")
        known = [*space.mutations, *space.crossovers, RANDOM]
        offspring = (Offspring(tuple(known[:-1]) or (RANDOM,), population),) if offspring is None else tuple(offspring)
        for name in (name for group in offspring for name in group.operators):
            if name not in known:
                raise ValueError(f"operators must be among {', '.join(known)}, got {name!r}")
        if not offspring and generations > 1:
            raise ValueError("offspring must not be empty where there is more than one generation")
        self.space, self.constraints, self.legal = space, tuple(constraints), legal
        self.population_size, self.parents, self.generations = population, parents, generations
        self.offspring, self.draws = offspring, draws
        self._rng = Random(seed)
        self._asked: set[str] = set()
        self._by_key: dict[str, Candidate] = {}
        self._over = False
        self._generations: list[list[Candidate]] = []
        self._begin(self._first())

    @property
    def generation(self) -> int:
        """The generation being evaluated, from 0."""
        return len(self._generations) - 1

    @property
    def done(self) -> bool:
        """Whether nothing is left to ask: all generations are told, or the last one had no children."""
        return self._complete() and (self._over or len(self._generations) >= self.generations)

    @property
    def candidates(self) -> list[list[Candidate]]:
        """All candidates, by generation."""
        return [list(generation) for generation in self._generations]

    @property
    def history(self) -> list[tuple[Card, float]]:
        """All told architectures with their scores, in the order of asking."""
        return [(one.card, score) for one in self._all() if (score := one.score) is not None]

    @property
    def population(self) -> list[tuple[Card, float]]:
        """The best told so far, best first; of equals the earlier."""
        return sorted(self.history, key=lambda item: -item[1])[: self.population_size]

    def best(self) -> tuple[Card, float]:
        """The architecture with the largest score; of equals the earliest."""
        if not (population := self.population):
            raise ValueError("best needs at least one told architecture, got none")
        return population[0]

    def waiting(self) -> list[Card]:
        """The architectures of this generation that are not told yet, asked or not."""
        self._advance()  # where an error or an interruption kept the last tell from it
        return [one.card for one in self._generations[-1] if one.score is None]

    def ask(self) -> Card:
        """The next architecture to score.

        ``RuntimeError`` when the search is done, or all that are left of the generation were asked for and must be
        told first.
        """
        for card in (waiting := self.waiting()):
            if card.key not in self._asked:
                self._asked.add(card.key)
                return card
        if waiting:
            raise RuntimeError(f"ask needs the scores of generation {self.generation}: {len(waiting)} are not told")
        raise RuntimeError(f"the search is done after {len(self._by_key)} architectures")

    def tell(self, card: Card, score: float) -> None:
        """Record the score of an architecture of this generation; the last one begins the next generation."""
        candidate = self._by_key.get(card.key)
        if candidate is None:
            raise ValueError(f"card must come from ask, got {card.name!r} with another genotype")
        if candidate.score is not None:
            raise ValueError(f"card must be told once, got {card.name!r} again")
        if not finite(score):
            raise ValueError(f"score must be a finite number, got {score!r}")
        candidate.score = float(score)
        self._advance()

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides what comes next, as plain data."""
        version, internal, gauss = self._rng.getstate()
        return {
            "settings": self._settings(),
            "rng": [version, list(internal), gauss],
            "over": self._over,
            "generations": [[one.to_json() for one in generation] for generation in self._generations],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`. The number of generations may differ, so that a finished search can go on.

        ``ValueError`` for a state of other settings, or with cards of another space; nothing is changed then.
        """
        own, given = self._settings(), dict(state["settings"])
        for key, value in own.items():
            if given.get(key) != value:
                raise ValueError(f"state must be of a search with {key} {value}, got {given.get(key)}")
        generations = [[Candidate.from_json(one) for one in generation] for generation in state["generations"]]
        everyone = {one.card.key: one for generation in generations for one in generation}
        for one in everyone.values():
            self.space.check(one.card)
        version, internal, gauss = state["rng"]
        self._rng.setstate((version, tuple(internal), gauss))
        self._generations, self._by_key, self._over = generations, everyone, bool(state["over"])
        self._asked = set()
        self._advance()

    def _settings(self) -> dict[str, Any]:
        return {
            "population": self.population_size,
            "parents": self.parents,
            "offspring": [[list(one.operators), one.count, one.attempts, one.fill] for one in self.offspring],
            "constraints": [[one.name, one.low, one.high] for one in self.constraints],
        }

    def _all(self) -> Iterator[Candidate]:
        for generation in self._generations:
            yield from generation

    def _complete(self) -> bool:
        return all(one.score is not None for one in self._generations[-1])

    def _advance(self) -> None:
        if not self._complete() or self._over or len(self._generations) >= self.generations:
            return
        before = self._rng.getstate()
        try:
            children = self._children()
        except BaseException:
            self._rng.setstate(before)  # a state saved after an interruption goes on as if there had been none
            raise
        self._over = not children
        if children:
            self._begin(children)

    def _begin(self, candidates: list[Candidate]) -> None:
        self._generations.append(candidates)
        self._by_key |= {one.card.key: one for one in candidates}

    def _children(self) -> list[Candidate]:
        parents = [card for card, _ in self.population[: self.parents]]
        children: dict[str, Candidate] = {}
        planned = 0
        for group in self.offspring:
            planned += group.count
            wanted = planned if group.fill else len(children) + group.count
            for _ in range(group.attempts or 10 * group.count):
                for name in group.operators:
                    if len(children) < wanted and (card := self._vary(name, parents)):
                        self._admit(card, name, children)
                if len(children) >= wanted:
                    break
        return list(children.values())

    def _vary(self, name: str, parents: Sequence[Card]) -> Card | None:
        if name == RANDOM:
            return self.space.random(self._rng)
        if name in self.space.mutations:
            return self.space.mutations[name](self._rng.choice(parents), self._rng)
        return self.space.crossovers[name](self._rng.choice(parents), self._rng.choice(parents), self._rng)

    def _admit(self, card: Card, operator: str, to: dict[str, Candidate], seen: Ranges | None = None) -> bool:
        """Whether a card is new and legal; then it becomes a candidate."""
        if card.key in self._by_key or card.key in to:
            return False
        costs = self._costs(card, seen)
        if self._excess(card, costs):
            return False
        to[card.key] = Candidate(card, operator, costs)
        return True

    def _costs(self, card: Card, seen: Ranges | None = None) -> dict[str, float]:
        costs = {}
        for constraint in self.constraints:
            value = constraint.cost(card)
            if not finite(value):
                raise ValueError(f"cost {constraint.name} must be a finite number, got {value!r} for {card.name!r}")
            costs[constraint.name] = value
        if seen is not None:
            seen.add(costs)
        return costs

    def _excess(self, card: Card, costs: Mapping[str, float]) -> float:
        """0 for an architecture that meets everything, otherwise how far it is from that."""
        excess = sum(constraint.excess(costs[constraint.name]) for constraint in self.constraints)
        # Asked last, as it may cost more than a table; and never of an architecture that is out anyway.
        return excess if excess or self.legal is None or self.legal(card) else 1.0

    def _first(self) -> list[Candidate]:
        found: dict[str, Candidate] = {}
        seen = Ranges()
        failures = 0
        while len(found) < self.population_size and failures < self.draws:
            failures = 0 if self._admit(self.space.random(self._rng), RANDOM, found, seen) else failures + 1
        failures = 0
        while len(found) < self.population_size and failures < _WALKS and self.space.mutations:
            failures = 0 if self._walk(found, seen) else failures + 1
        if not found:
            raise ValueError(self._unreachable(seen))
        return list(found.values())

    def _walk(self, found: dict[str, Candidate], seen: Ranges) -> bool:
        """Mutate a random architecture towards the constraints until one is new and legal, at most ``draws`` times."""
        names = list(self.space.mutations)
        card = self.space.random(self._rng)
        excess = self._excess(card, self._costs(card, seen))
        for _ in range(self.draws):
            child = self.space.mutations[self._rng.choice(names)](card, self._rng)
            if child is None:
                continue
            costs = self._costs(child, seen)
            other = self._excess(child, costs)
            if not other and child.key not in found:
                found[child.key] = Candidate(child, "walk", costs)
                return True
            if other <= excess:
                card, excess = child, other
        return False

    def _unreachable(self, seen: Ranges) -> str:
        bounded = [one for one in self.constraints if one.low is not None or one.high is not None]
        words = []
        for one in bounded:
            words.append(one.demand(*(one.reachable or seen.of[one.name]), met=one.reachable is None))
        if self.legal is not None:
            words.append("legal must hold")
        what = "; ".join(words) or "the space must not be empty"
        return f"no architecture meets the constraints, after {seen.count} were tried: {what}"
