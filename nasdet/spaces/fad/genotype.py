"""FAD's vocabulary: transformations by name, their subsets, the legal genotypes, and decoding. Plain Python, no torch.

A genotype is ``{group: [node, node, node]}``; a node is two edges ``[transformation, source]``; sources 0 and 1 are
the cell's inputs, 2, 3 and 4 its nodes. ``{"box": ..., "cls": ...}`` replaces both towers of a one-stage detector; a
single group of any other name (such as ``"mask"``) replaces a plain stack of convolutions.

Source: Zhong et al., "Representation Sharing for Fast Object Detector Search and Beyond", ECCV 2020, section 3.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STREAMS = ("std", "sep")
NODES = 3
INPUTS = 2
EDGES_PER_NODE = 2
DETECTION_GROUPS = ("box", "cls")
NONE = "none"

# Every edge of the search cell: a node takes all earlier states, 2 + 3 + 4 = 9.
EDGES: tuple[tuple[int, int], ...] = tuple(
    (source, node) for node in range(INPUTS, INPUTS + NODES) for source in range(node)
)


@dataclass(frozen=True)
class Chain:
    """One transformation: ``depth`` stacked 3x3 units of a ``stream``, then, with ``dilation``, one separable 3x3
    unit of that dilation."""

    stream: str
    depth: int
    dilation: int | None = None

    @property
    def name(self) -> str:
        """``"std2"``, ``"sep1+dil2"``: what genotypes and cards say."""
        return f"{self.stream}{self.depth}" + (f"+dil{self.dilation}" if self.dilation else "")

    @property
    def receptive_field(self) -> int:
        """Side of the receptive field: 1 + 2 per plain unit + 2 * dilation."""
        return 1 + 2 * self.depth + 2 * (self.dilation or 0)

    @property
    def units(self) -> int:
        """Representations it computes on its own: one per unit."""
        return self.depth + (1 if self.dilation else 0)


# (depth, dilation) of t1 .. t6.
_FORMS: tuple[tuple[int, int | None], ...] = ((1, None), (2, None), (3, None), (1, 2), (2, 2), (1, 3))
CHAINS: dict[str, Chain] = {
    chain.name: chain for chain in (Chain(stream, *form) for stream in STREAMS for form in _FORMS)
}

# The operations of DARTS (Liu et al., ICLR 2019), which FAD's Figure 2 compares with; separable convolutions are
# applied twice there.
DARTS = (
    "max_pool_3x3",
    "avg_pool_3x3",
    "skip_connect",
    "sep_conv_3x3",
    "sep_conv_5x5",
    "dil_conv_3x3",
    "dil_conv_5x5",
)
TRANSFORMATIONS = (*CHAINS, *DARTS)


def _chains(streams: Sequence[str], keep: Sequence[str]) -> tuple[str, ...]:
    return tuple(
        name for name, chain in CHAINS.items() if chain.stream in streams and name.removeprefix(chain.stream) in keep
    )


_ALL = ("1", "2", "3", "1+dil2", "2+dil2", "1+dil3")
SUBSETS: dict[str, tuple[str, ...]] = {
    "full": _chains(STREAMS, _ALL),
    "subset1": _chains(STREAMS, ("1", "2")),
    "subset2": _chains(STREAMS, ("1", "2", "3", "1+dil2")),
    "sep": _chains(("sep",), _ALL),
    "std": _chains(("std",), _ALL),
    "darts": DARTS,
    "released": _chains(STREAMS, ("1", "2", "3", "1+dil2", "2+dil2")),
}
"""Transformations by subset (Table 2; ``none`` comes on top): full 12, subset1 4 (receptive fields 3 and 5), subset2
8 (3, 5, 7), sep 6, std 6, darts 7, and the released code's 10, which leave dilation 3 out."""


def check_genotype(genotype: Any, transformations: Sequence[str] = TRANSFORMATIONS) -> tuple[str, ...]:
    """The group names of a legal genotype; ``ValueError`` with the place and the reason otherwise."""
    if not isinstance(genotype, Mapping) or not genotype:
        raise ValueError(f"genotype must be an object of groups, got {genotype!r}")
    groups = tuple(genotype)
    if len(groups) > 1 and set(groups) != set(DETECTION_GROUPS):
        raise ValueError(f"genotype groups must be box and cls, or a single group, got {', '.join(map(str, groups))}")
    for group, nodes in genotype.items():
        if not isinstance(group, str) or not group.isidentifier():
            raise ValueError(f"genotype groups must be named by a word, got {group!r}")
        if not isinstance(nodes, (list, tuple)) or len(nodes) != NODES:
            raise ValueError(f"genotype.{group} must have {NODES} nodes, got {_count(nodes)}")
        for index, edges in enumerate(nodes):
            _check_node(edges, INPUTS + index, f"genotype.{group} node {INPUTS + index}", transformations)
    return DETECTION_GROUPS if len(groups) > 1 else groups


def _count(value: Any) -> str:
    return str(len(value)) if isinstance(value, (list, tuple)) else repr(value)


def _check_node(edges: Any, node: int, where: str, transformations: Sequence[str]) -> None:
    if not isinstance(edges, (list, tuple)) or len(edges) != EDGES_PER_NODE:
        raise ValueError(f"{where} must have {EDGES_PER_NODE} edges, got {_count(edges)}")
    sources = []
    for edge in edges:
        if not isinstance(edge, (list, tuple)) or len(edge) != 2:
            raise ValueError(f"{where} edges must be [transformation, source], got {edge!r}")
        name, source = edge
        if not isinstance(name, str) or name not in transformations:
            raise ValueError(f"{where} transformation must be one of {', '.join(transformations)}, got {name!r}")
        if isinstance(source, bool) or not isinstance(source, int) or not 0 <= source < node:
            raise ValueError(f"{where} source must be an integer in 0..{node - 1}, got {source!r}")
        sources.append(source)
    if len(set(sources)) != len(sources):
        raise ValueError(f"{where} edges must come from different sources, got {sources}")


def softmax(row: Sequence[float]) -> list[float]:
    """The softmax of one edge's alphas."""
    top = max(row)
    exps = [math.exp(value - top) for value in row]
    total = sum(exps)
    return [value / total for value in exps]


def decode(
    alphas: Mapping[str, Sequence[Sequence[float]]], transformations: Sequence[str], score: str = "softmax"
) -> dict[str, list[list[list[Any]]]]:
    """Alphas to a genotype: per edge the best transformation but ``none``, per node the two edges whose best is
    largest.

    ``alphas`` has, per group, one row per edge in the order of :data:`EDGES`, and per row one value per
    transformation and a last one for ``none``. ``score="softmax"`` compares edges by the softmax over all choices, so
    that an edge that prefers ``none`` loses (the paper's words); ``score="alpha"`` compares raw alphas, as the
    released code does. Of equals, the first wins.
    """
    if score not in ("softmax", "alpha"):
        raise ValueError(f"score must be 'softmax' or 'alpha', got {score!r}")
    genotype: dict[str, list[list[list[Any]]]] = {}
    for group, rows in alphas.items():
        _check_rows(rows, len(transformations), f"alphas.{group}")
        best: dict[tuple[int, int], tuple[float, str]] = {}
        for edge, row in zip(EDGES, rows, strict=True):
            values = list((softmax(row) if score == "softmax" else row)[:-1])
            index = max(range(len(values)), key=values.__getitem__)
            best[edge] = (values[index], transformations[index])
        nodes = []
        for node in range(INPUTS, INPUTS + NODES):
            ranked = sorted(range(node), key=[-best[source, node][0] for source in range(node)].__getitem__)
            nodes.append([[best[source, node][1], source] for source in ranked[:EDGES_PER_NODE]])
        genotype[group] = nodes
    return genotype


def _check_rows(rows: Sequence[Sequence[float]], choices: int, where: str) -> None:
    if len(rows) != len(EDGES):
        raise ValueError(f"{where} must have {len(EDGES)} rows, got {len(rows)}")
    for index, row in enumerate(rows):
        if len(row) != choices + 1:
            raise ValueError(f"{where} row {index} must have {choices + 1} values ({NONE} last), got {len(row)}")
        if not all(math.isfinite(value) for value in row):
            raise ValueError(f"{where} row {index} must be finite, got {list(row)}")


def one_hot(genotype: Mapping[str, Any], transformations: Sequence[str]) -> dict[str, list[list[float]]]:
    """The alphas whose softmax is exactly the genotype: 0 for its choice, -1e4 for the rest, ``none`` on every edge
    it drops."""
    rows: dict[str, list[list[float]]] = {}
    for group, nodes in genotype.items():
        chosen = {(source, INPUTS + index): name for index, edges in enumerate(nodes) for name, source in edges}
        names = [*transformations, NONE]
        rows[group] = [[0.0 if name == chosen.get(edge, NONE) else -1e4 for name in names] for edge in EDGES]
    return rows


def random_genotype(
    rng: random.Random, transformations: Sequence[str], groups: Sequence[str] = DETECTION_GROUPS
) -> dict[str, list[list[list[Any]]]]:
    """The paper's random baseline: per node two different sources, per kept edge one transformation, all uniform."""
    return {
        group: [
            [[rng.choice(list(transformations)), source] for source in rng.sample(range(node), EDGES_PER_NODE)]
            for node in range(INPUTS, INPUTS + NODES)
        ]
        for group in groups
    }
