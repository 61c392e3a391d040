"""FAD's vocabulary, legal genotypes and decoding, without torch."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest

from nasdet.arch import load_card
from nasdet.spaces.fad.genotype import (
    CHAINS,
    EDGES,
    SUBSETS,
    TRANSFORMATIONS,
    check_genotype,
    decode,
    one_hot,
    random_genotype,
)

NAMES = SUBSETS["full"]


def rows(**best: tuple[str, float]) -> dict[str, list[list[float]]]:
    """Alphas of one group: all 0, but for ``e0_2=("std1", 3.0)``."""
    table = [[0.0] * (len(NAMES) + 1) for _ in EDGES]
    for edge, (name, value) in best.items():
        source, node = (int(part) for part in edge[1:].split("_"))
        table[EDGES.index((source, node))][[*NAMES, "none"].index(name)] = value
    return {"mask": table}


def test_the_twelve_chains_and_their_receptive_fields() -> None:
    fields = [CHAINS[f"std{form}"].receptive_field for form in ("1", "2", "3", "1+dil2", "2+dil2", "1+dil3")]
    assert fields == [3, 5, 7, 7, 9, 9]
    assert sum(chain.units for chain in CHAINS.values()) == 26, "representations without sharing"


def test_subsets_are_table_2() -> None:
    sizes = {name: len(names) for name, names in SUBSETS.items()}
    assert sizes == {"full": 12, "subset1": 4, "subset2": 8, "sep": 6, "std": 6, "darts": 7, "released": 10}
    for name, expected in {"subset1": {3, 5}, "subset2": {3, 5, 7}, "full": {3, 5, 7, 9}, "sep": {3, 5, 7, 9}}.items():
        assert {CHAINS[chain].receptive_field for chain in SUBSETS[name]} == expected
    assert not any("dil3" in name for name in SUBSETS["released"])


def test_nine_edges() -> None:
    assert len(EDGES) == len(set(EDGES)) == 9
    assert all(source < node for source, node in EDGES)


def test_decode_takes_the_best_transformation_and_the_two_best_edges() -> None:
    alphas = rows(
        e0_2=("std1", 1.0),
        e1_2=("sep3", 2.0),
        e0_3=("std2", 0.5),
        e1_3=("sep1+dil2", 3.0),
        e2_3=("std1+dil3", 2.0),
        e0_4=("sep2", 1.0),
        e3_4=("std2+dil2", 1.5),
    )
    assert decode(alphas, NAMES) == {
        "mask": [
            [["sep3", 1], ["std1", 0]],
            [["sep1+dil2", 1], ["std1+dil3", 2]],
            [["std2+dil2", 3], ["sep2", 0]],
        ]
    }


def test_none_is_never_chosen_and_costs_an_edge_its_place_only_by_softmax() -> None:
    alphas = rows(e0_3=("std2", 1.0), e1_3=("std1", 1.0), e2_3=("sep3", 1.5))
    alphas["mask"][EDGES.index((2, 3))][-1] = 9.0
    by_softmax, by_alpha = (decode(alphas, NAMES, score)["mask"][1] for score in ("softmax", "alpha"))
    assert by_softmax == [["std2", 0], ["std1", 1]]
    assert by_alpha == [["sep3", 2], ["std2", 0]]


def test_of_equals_the_first_wins() -> None:
    assert decode(rows(), NAMES) == {"mask": [[["std1", 0], ["std1", 1]]] * 3}


@pytest.mark.parametrize("name", ["fad-paper", "fad-alternative"])
def test_published_genotypes_survive_alphas(name: str) -> None:
    genotype = load_card(name).genotype
    assert check_genotype(genotype, NAMES) == ("box", "cls")
    found = decode(one_hot(genotype, NAMES), NAMES)
    for group, nodes in genotype.items():
        assert [sorted(node) for node in found[group]] == [sorted(node) for node in nodes]


def test_random_genotypes_are_legal_and_reach_everything() -> None:
    rng = random.Random(0)
    seen: set[tuple[str, int, int]] = set()
    for _ in range(300):
        genotype = random_genotype(rng, NAMES)
        check_genotype(genotype, NAMES)
        seen |= {(name, source, n) for nodes in genotype.values() for n, e in enumerate(nodes) for name, source in e}
    assert seen == {(name, source, node - 2) for name in NAMES for source, node in EDGES}


def test_random_genotypes_follow_their_seed() -> None:
    first, again, other = (random_genotype(random.Random(seed), NAMES) for seed in (7, 7, 8))
    assert first == again != other


def change(path: list[Any], value: Any) -> Any:
    genotype = copy.deepcopy(load_card("fad-paper").genotype)
    place = genotype
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return genotype


BAD: dict[str, tuple[Any, str]] = {
    "not-an-object": ([1], r"genotype must be an object of groups, got \[1\]"),
    "groups": (change(["mask"], []), "groups must be box and cls, or a single group, got box, cls, mask"),
    "group-name": ({"a b": []}, "groups must be named by a word, got 'a b'"),
    "nodes": (change(["box"], [[]]), "genotype.box must have 3 nodes, got 1"),
    "edges": (change(["cls", 1], [["std1", 0]]), "genotype.cls node 3 must have 2 edges, got 1"),
    "edge": (change(["cls", 1, 0], "std1"), r"edges must be \[transformation, source\], got 'std1'"),
    "name": (change(["box", 0, 0], ["std9", 0]), "node 2 transformation must be one of .*, got 'std9'"),
    "none": (change(["box", 0, 0], ["none", 0]), "transformation must be one of .*, got 'none'"),
    "forward-source": (change(["box", 0, 0], ["std1", 2]), r"node 2 source must be an integer in 0..1, got 2"),
    "bool-source": (change(["box", 0, 0], ["std1", True]), "source must be an integer in 0..1, got True"),
    "same-source": (change(["box", 0], [["std1", 0], ["sep1", 0]]), r"different sources, got \[0, 0\]"),
}


@pytest.mark.parametrize(("genotype", "words"), BAD.values(), ids=BAD)
def test_illegal_genotypes(genotype: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_genotype(genotype, TRANSFORMATIONS)


def test_illegal_alphas() -> None:
    good = rows()
    with pytest.raises(ValueError, match="alphas.mask must have 9 rows, got 8"):
        decode({"mask": good["mask"][:-1]}, NAMES)
    with pytest.raises(ValueError, match=r"alphas.mask row 0 must have 7 values \(none last\), got 13"):
        decode(good, SUBSETS["sep"])
    with pytest.raises(ValueError, match="row 0 must be finite"):
        decode(rows(e0_2=("std1", float("nan"))), NAMES)
    with pytest.raises(ValueError, match="score must be 'softmax' or 'alpha', got 'logit'"):
        decode(good, NAMES, "logit")
