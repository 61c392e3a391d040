from __future__ import annotations

import itertools
import random
import re
from typing import Any

import pytest

from nasdet.report.graph import Edge, cell_svg, find_cells, transformation

STREAMS = ("std", "sep")
FORMS = ("1", "2", "3", "1+dil2", "2+dil2", "1+dil3")


@pytest.mark.parametrize(
    ("name", "stream", "field"),
    [
        ("std1", "std", 3),
        ("sep2", "sep", 5),
        ("std3", "std", 7),
        ("sep1+dil2", "sep", 7),
        ("std2+dil2", "std", 9),
        ("sep1+dil3", "sep", 9),
        ("none", "none", 0),
        ("max_pool_3x3", "other", 0),
        ("std", "other", 0),
    ],
)
def test_transformation(name: str, stream: str, field: int) -> None:
    shown = transformation(name)
    assert (shown.stream, shown.field) == (stream, field)


def random_cell(seed: int, nodes: int = 3, most: int = 2) -> list[list[Edge]]:
    rng = random.Random(seed)
    names = [stream + form for stream in STREAMS for form in FORMS] + ["a_transformation_with_a_long_name"]
    return [
        [Edge(rng.choice(names), source) for source in rng.sample(range(2 + i), min(most, 2 + i))] for i in range(nodes)
    ]


def numbers(pattern: str, svg: str) -> list[tuple[float, ...]]:
    return [tuple(float(value) for value in found) for found in re.findall(pattern, svg)]


@pytest.mark.parametrize("nodes, most", [(3, 2), (3, 4), (1, 1), (5, 3)], ids=str)
def test_nothing_lies_on_a_label(nodes: int, most: int) -> None:
    for seed in range(12):
        cell = random_cell(seed, nodes, most)
        svg = cell_svg(cell, "cell")
        labels = numbers(r'<rect x="([\d.-]+)" y="([\d.-]+)" width="([\d.]+)" height="([\d.]+)" rx="9"', svg)
        assert len(labels) == sum(len(node) for node in cell)
        boxes = [(x, y, x + w, y + h) for x, y, w, h in labels]
        for a, b in itertools.combinations(boxes, 2):
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        discs = numbers(r'class="node" cx="([\d.]+)" cy="([\d.]+)" r="([\d.]+)"', svg)
        for (x, y, r), box in itertools.product(discs, boxes):
            assert x + r <= box[0] or box[2] <= x - r or y + r <= box[1] or box[3] <= y - r
        lines = numbers(r'<path d="M([\d.]+) ([\d.]+)H([\d.-]+)Q([\d.]+) [\d.]+ [\d.]+ [\d.]+V([\d.]+)"', svg)
        assert len(lines) == len(boxes)
        for start, bus, _, x, top in lines:
            for left, upper, right, lower in boxes:
                assert not (upper < bus < lower)
                assert not (left < x < right and upper < top and lower > bus)
            assert not any(box[0] < start < box[2] for box in boxes)
        assert len({(x, top) for *_, x, top in lines}) == len(lines)
        width, height = numbers(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0]
        assert all(0 <= box[0] and box[2] <= width and box[3] <= height for box in boxes)


def test_lines_of_one_node_do_not_cross() -> None:
    for seed in range(12):
        svg = cell_svg(random_cell(seed, 5, 4), "cell")
        lines = numbers(r'<path d="M([\d.]+) ([\d.]+)H([\d.-]+)Q([\d.]+) [\d.]+ [\d.]+ [\d.]+V([\d.]+)"', svg)
        for a, b in itertools.permutations(lines, 2):
            if a[4] == b[4]:  # two labels of the same node: a's level line against b's drop
                assert not (min(a[0], a[3]) < b[3] < max(a[0], a[3]) and b[1] < a[1] < b[4])


def test_words_for_those_who_cannot_see_it() -> None:
    svg = cell_svg([[Edge("sep3", 0), Edge("std3", 1)]], "Cell of group box")
    assert 'aria-label="Cell of group box: node 2: sep3 of 0 plus std3 of 1"' in svg


NODES = [[["sep3", 0], ["std3", 1]], [["std1", 2], ["sep1", 1]]]
EDGES = [[Edge("sep3", 0), Edge("std3", 1)], [Edge("std1", 2), Edge("sep1", 1)]]
NAMED = [
    [{"op": "sep3", "source": 0}, {"op": "std3", "source": 1}],
    [{"name": "std1", "input": 2}, {"op": "sep1", "from": 1}],
]


@pytest.mark.parametrize(
    ("card", "groups"),
    [
        ({"genotype": {"box": NODES, "cls": NODES}}, ["box", "cls"]),
        ({"genotype": {"mask": {"nodes": NODES}}}, ["mask"]),
        ({"genotype": {"box": NAMED}}, ["box"]),
        ({"genotype": {"box": [[["sep3", 3]]]}}, []),
        ({"genotype": {"box": [[["sep3", True]]]}}, []),
        ({"genotype": {"box": [[]]}}, []),
        ({"genotype": [1, 2]}, []),
        ({"genotype": None}, []),
        ([], []),
    ],
    ids=["fad", "nodes", "objects", "later source", "boolean", "empty", "list", "null", "no card"],
)
def test_find_cells(card: Any, groups: list[str]) -> None:
    cells = find_cells(card)
    assert list(cells) == groups
    assert all(cell == EDGES for cell in cells.values())
