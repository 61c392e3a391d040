"""How many MSNAS architectures there are, and drawing each with the same probability: exact, by dynamic programming.

Of 3^13 chains of strides 18 % are valid, of 3^21 9 %. Counting the completions of every prefix gives the exact number,
and drawing each stride in proportion to them a uniformly random valid chain without a single rejection. Integers
throughout, so that no chain's probability is rounded.
"""

from __future__ import annotations

import random
from functools import cache

from nasdet.spaces.msnas.genotype import RESOLUTIONS, START, STRIDES, Genotype, head_vectors, laterals

_STEP = {0.5: -1, 1: 0, 2: 1}
_FIRST = RESOLUTIONS.index(START)
_NONE = (len(RESOLUTIONS), -1)  # finest and coarsest level before any block


def _moves(level: int, finest: int, coarsest: int) -> list[tuple[float, int, int, int]]:
    """The strides that a chain may go on with, and where each leads: level, finest and coarsest level so far."""
    moves = []
    for stride in STRIDES:
        to = level + _STEP[stride]
        if 0 <= to < len(RESOLUTIONS):
            moves.append((stride, to, min(finest, to), max(coarsest, to)))
    return moves


@cache
def _completions(left: int, level: int, finest: int, coarsest: int, with_heads: bool) -> int:
    """Chains of ``left`` more blocks; each counts once, or once for each of its legal heads."""
    if left == 0:
        return len(head_vectors(RESOLUTIONS[finest], RESOLUTIONS[coarsest])) if with_heads else 1
    return sum(_completions(left - 1, *move[1:], with_heads) for move in _moves(level, finest, coarsest))


def chain_count(blocks: int) -> int:
    """Valid chains of strides: 293,867 of 13 blocks, 912,137,899 of 21."""
    return _completions(_checked(blocks), _FIRST, *_NONE, False)


def pair_count(blocks: int) -> int:
    """Architectures: pairs of a valid chain and legal heads. Chains that never change resolution have none."""
    return _completions(_checked(blocks), _FIRST, *_NONE, True)


def random_strides(blocks: int, rng: random.Random) -> list[float]:
    """A uniformly random valid chain."""
    return _draw(_checked(blocks), rng, False)


def random_genotype(blocks: int, rng: random.Random) -> Genotype:
    """A uniformly random architecture: all pairs of a valid chain and legal heads are equally likely."""
    if not pair_count(blocks):
        raise ValueError(f"blocks must be enough for two resolutions, one of them at most 8, got {blocks}")
    strides = _draw(blocks, rng, True)
    level, reached = _FIRST, []
    for stride in strides:
        level += _STEP[stride]
        reached.append(RESOLUTIONS[level])
    heads = rng.choice(head_vectors(min(reached), max(reached)))
    return {"strides": strides, "heads": list(heads), "laterals": laterals(strides)}


def _draw(blocks: int, rng: random.Random, with_heads: bool) -> list[float]:
    strides, place = [], (_FIRST, *_NONE)
    for left in range(blocks - 1, -1, -1):
        moves = _moves(*place)
        number = rng.randrange(_completions(left + 1, *place, with_heads))
        for stride, *to in moves:
            place = (to[0], to[1], to[2])
            number -= _completions(left, *place, with_heads)
            if number < 0:
                strides.append(stride)
                break
    return strides


def _checked(blocks: int) -> int:
    if isinstance(blocks, bool) or not isinstance(blocks, int) or not 1 <= blocks <= 200:
        raise ValueError(f"blocks must be an integer in 1..200, got {blocks!r}")
    return blocks
