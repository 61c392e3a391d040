"""MSNAS's four variations: crossover and mutation of the encoder, and of the heads (Algorithm 1).

The paper varies blindly and throws illegal children away. Here a child is drawn among the legal ones, with the
probabilities that blind variation would leave them; ``None`` says that there is none but the parent. What the paper
leaves open: a mutation changes one or two strides, or each head with probability 0.1; encoders cross at one point,
heads one by one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product

from nasdet.spaces.msnas.genotype import GROUPS, STRIDES, Genotype, genotype, legal_heads, resolutions


def _fits(strides: Sequence[float], heads: Sequence[int]) -> bool:
    """Whether the chain is valid and has the heads' resolutions."""
    try:
        return set(heads) <= set(resolutions(strides))
    except ValueError:
        return False


def mutate_encoder(parent: Genotype, rng: random.Random) -> Genotype | None:
    """One or two blocks, drawn uniformly, get other strides, drawn uniformly among those that leave the chain valid
    and the heads with a map."""
    strides, heads = parent["strides"], parent["heads"]
    blocks = rng.sample(range(len(strides)), min(rng.randint(1, 2), len(strides)))
    children = []
    for values in product(STRIDES, repeat=len(blocks)):
        child = list(strides)
        for block, value in zip(blocks, values, strict=True):
            child[block] = value
        if all(child[block] != strides[block] for block in blocks) and _fits(child, heads):
            children.append(child)
    return genotype(rng.choice(children), heads) if children else None


def crossover_encoder(first: Genotype, second: Genotype, rng: random.Random) -> Genotype | None:
    """The strides of ``first`` up to a point and of ``second`` from there on, with the heads of ``first``; the point is
    drawn uniformly among those that make a legal child unlike both."""
    one, two, heads = first["strides"], second["strides"], first["heads"]
    if len(one) != len(two):
        raise ValueError(f"encoders must have the same number of blocks, got {len(one)} and {len(two)}")
    children = [one[:point] + two[point:] for point in range(1, len(one))]
    children = [child for child in children if child not in (one, two) and _fits(child, heads)]
    return genotype(rng.choice(children), heads) if children else None


def mutate_heads(parent: Genotype, rng: random.Random, probability: float = 0.1) -> Genotype | None:
    """Each head, with ``probability``, gets a resolution drawn uniformly from the encoder's; given that the result is
    legal and not the parent's."""
    if not 0 < probability <= 1:
        raise ValueError(f"probability must be in (0, 1], got {probability}")
    strides, heads = parent["strides"], tuple(parent["heads"])
    other = probability / len(set(resolutions(strides)))
    same = 1 - probability + other
    children, weights = [], []
    for child in legal_heads(strides):
        changed = sum(now != was for now, was in zip(child, heads, strict=True))
        if changed:
            children.append(child)
            weights.append(other**changed * same ** (GROUPS - changed))
    return genotype(strides, rng.choices(children, weights)[0]) if children else None


def crossover_heads(first: Genotype, second: Genotype, rng: random.Random) -> Genotype | None:
    """The encoder of ``first``, and each head from either parent with probability one half; given that the result is
    legal and not that of ``first``."""
    strides, heads = first["strides"], tuple(first["heads"])
    legal = legal_heads(strides)
    mixed = product(*zip(heads, second["heads"], strict=True))
    children = [child for child in mixed if child in legal and child != heads]
    return genotype(strides, rng.choice(children)) if children else None
