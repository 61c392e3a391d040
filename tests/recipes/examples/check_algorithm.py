"""The new algorithm finds the optimum of a toy space, and a resumed search is one that never stopped."""

from __future__ import annotations

import json
import random
import sys

from nasdet.arch import Card
from nasdet.search.climb import HillClimb


class Bits:
    """Ten switches; the score is how many are on."""

    def random(self, rng: random.Random) -> Card:
        return Card("bits", "bits", [rng.randint(0, 1) for _ in range(10)])

    def neighbour(self, card: Card, rng: random.Random) -> Card:
        at = rng.randrange(10)
        return Card("bits", "bits", [bit ^ (index == at) for index, bit in enumerate(card.genotype)])


def go(search: HillClimb, steps: int) -> list[str]:
    asked = []
    for _ in range(steps):
        card = search.ask()
        search.tell(card, sum(card.genotype))
        asked.append(card.key)
    return asked


whole, stopped, resumed = HillClimb(Bits(), seed=1), HillClimb(Bits(), seed=1), HillClimb(Bits(), seed=7)
expected = go(whole, 200)
first = go(stopped, 90)
resumed.load_state_dict(json.loads(json.dumps(stopped.state_dict())))
assert first + go(resumed, 110) == expected
assert whole.best()[1] == resumed.best()[1] == 10
assert "torch" not in sys.modules
print("same")
