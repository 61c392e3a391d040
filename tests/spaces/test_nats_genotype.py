"""NATS's genotypes: the paper's sets, decoding by intensity, what is legal. Plain data."""

from __future__ import annotations

import random
from typing import Any

import pytest

from nasdet.spaces.nats.genotype import (
    SETS,
    check_genotype,
    choices,
    decode,
    genotype_set,
    intensities,
    random_choices,
    runs,
    splits,
)

C3 = SETS["C"][3]


def test_the_papers_sets() -> None:
    counts = {name: [len(stages[stage]) for stage in (3, 4, 5)] for name, stages in SETS.items()}
    assert counts == {"A": [2, 2, 3], "B": [3, 3, 5], "C": [5, 5, 9]}
    assert C3 == ((1, 1), (2, 2), (3, 3), (1, 3), (3, 1)) == SETS["C"][4]
    assert SETS["C"][5][5:] == ((1, 3), (3, 1), (1, 5), (5, 1))
    assert SETS["A"][5] == ((1, 1), (3, 3), (5, 5))
    for stages in SETS.values():
        assert all(dilations[0] == (1, 1) for dilations in stages.values())


def rows(*chosen: int, width: int = 5) -> list[list[float]]:
    return [[1.0 if index == choice else 0.1 * index for index in range(width)] for choice in chosen]


def test_decode_in_block_order() -> None:
    """Figure 3: intensities become counts, in the order of the set; intensity 0 is left out."""
    alphas = {"a": rows(3, 0, 3, 1, 0, 0, 3, 0)}
    assert decode(alphas, {"a": C3}) == {"a": [[1, 4], [2, 1], [[1, 3], 3]]}
    assert intensities([[1, 4], [2, 1], [[1, 3], 3]]) == {(1, 1): 0.5, (2, 2): 0.125, (1, 3): 0.375}


def test_decode_in_place() -> None:
    alphas = {"a": rows(3, 0, 3, 1, 0, 0, 3, 0)}
    entries = decode(alphas, {"a": C3}, index_preserving=True)["a"]
    assert entries == [[[1, 3], 1], [1, 1], [[1, 3], 1], [2, 1], [1, 2], [[1, 3], 1], [1, 1]]
    assert choices(entries, C3) == [3, 0, 3, 1, 0, 0, 3, 0]


def test_path_level_is_one_group() -> None:
    assert decode({"a": [[0.0, 0.5, 0.2]]}, {"a": SETS["B"][3]}) == {"a": [[2, 1]]}


def test_of_equals_the_first_wins() -> None:
    assert decode({"a": [[0.0] * 5] * 4}, {"a": C3}) == {"a": [[1, 4]]}


@pytest.mark.parametrize("in_place", [False, True])
def test_layers_decide_independently(in_place: bool) -> None:
    found = decode({"a": rows(0, 0), "b": rows(1, 1)}, {"a": C3, "b": C3}, in_place)
    assert found == {"a": [[1, 2]], "b": [[2, 2]]}


def test_runs_and_choices_are_inverse() -> None:
    rng = random.Random(0)
    for _ in range(50):
        chosen = random_choices(rng, rng.randint(1, 12), SETS["C"][5])
        assert choices(runs(chosen, SETS["C"][5]), SETS["C"][5]) == chosen


def test_splits_are_shares_of_the_channels() -> None:
    entries = [[1, 4], [2, 1], [[1, 3], 3]]
    assert splits("a", entries, 128) == [64, 16, 48]
    assert splits("a", entries, 8) == [4, 1, 3]
    assert splits("a", entries, 256, width=32) == [128, 32, 96]
    with pytest.raises(ValueError, match="a: counts must sum to a divisor of its 12 output channels, got 8"):
        splits("a", entries, 12)
    with pytest.raises(ValueError, match="a: dilation 2 must cover whole convolution groups of 32 channels, got 16"):
        splits("a", entries, 128, width=32)


@pytest.mark.parametrize(
    ("alphas", "message"),
    [
        ({"a": [[0.0] * 4]}, "alphas.a row 0 must have 5 values, got 4"),
        ({"a": [[0.0] * 5, [0.0, float("nan"), 0.0, 0.0, 0.0]]}, "alphas.a row 1 must be finite"),
        ({"a": []}, "alphas.a must have a row for each channel group, got none"),
    ],
)
def test_bad_alphas(alphas: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode(alphas, {"a": C3})


@pytest.mark.parametrize(
    ("genotype", "message"),
    [
        ({}, "genotype must be an object of layers"),
        ([[1, 2]], "genotype must be an object of layers"),
        ({"": [[1, 2]]}, "genotype layers must be module paths, got ''"),
        ({"a": []}, r"genotype.a must be a list of \[dilation, count\], got \[\]"),
        ({"a": [[1, 2, 3]]}, r"genotype.a must be a list of \[dilation, count\], got \[1, 2, 3\]"),
        ({"a": [[0, 2]]}, "genotype.a dilation must be a positive integer or two of them, got 0"),
        ({"a": [[[1, 0], 2]]}, r"genotype.a dilation must be .*got \[1, 0\]"),
        ({"a": [[True, 2]]}, "genotype.a dilation must be .*got True"),
        ({"a": [[1, 0]]}, "genotype.a count must be a positive integer, got 0"),
        ({"a": [[1, 2], [2, 1.5]]}, "genotype.a count must be a positive integer, got 1.5"),
    ],
)
def test_illegal_genotypes(genotype: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_genotype(genotype)


def test_own_sets() -> None:
    assert genotype_set({"3": [1, [2, 1]], "5": [1]}) == {3: ((1, 1), (2, 1)), 5: ((1, 1),)}
    for value, message in (
        ("D", "dilations must be one of A, B, C, or lists by stage, got 'D'"),
        ({}, "dilations must be one of A, B, C"),
        ({2: [1]}, "dilations must have the stages 3, 4 and 5, got 2"),
        ({3: []}, "dilations of stage 3 must be a non-empty list"),
        ({3: [1, 0]}, "dilations of stage 3 must be a positive integer or two of them, got 0"),
        ({3: [1, (1, 1)]}, "dilations of stage 3 must differ"),
    ):
        with pytest.raises(ValueError, match=message):
            genotype_set(value)
