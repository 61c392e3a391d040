"""MSNAS's genotypes: what follows from strides, exact counts, and uniform draws."""

from __future__ import annotations

from collections import Counter
from itertools import product
from math import prod, sqrt
from random import Random
from typing import Any

import pytest

from nasdet.arch import load_card, published
from nasdet.spaces.msnas import (
    FPN_HEADS,
    VARIANTS,
    MSNASSpace,
    chain_count,
    check_genotype,
    encoder_macs,
    genotype,
    head_blocks,
    head_vectors,
    laterals,
    legal_heads,
    macs_range,
    pair_count,
    random_genotype,
    random_strides,
    resolutions,
    rpn_macs,
    stage_ends,
)

H = 0.5
WORKED = [1, 2, 1, 2, 1, 1, 2, 1, 2, 1, H, H, 1, 1, 2, H, H, H, 1, 2, 2]

# The published R18 nets by AP: strides, heads, resolutions, stage ends, laterals.
R18 = [
    (
        [1, 2, H, 2, 1, 2, 1, 2, 1, H, 1, H, 2],
        [8, 8, 16, 16, 32],
        [4, 8, 4, 8, 8, 16, 16, 32, 32, 16, 16, 8, 16],
        [1, 2, 3, 5, 7, 9, 11, 12, 13],
        [[3, 1], [5, 2], [11, 7], [12, 5], [13, 11]],
    ),
    (
        [1, 2, 2, 2, 1, 1, H, 1, H, H, 2, 1, 2],
        [8, 8, 16, 16, 16],
        [4, 8, 16, 32, 32, 32, 16, 16, 8, 4, 8, 8, 16],
        [1, 2, 3, 6, 8, 9, 10, 12, 13],
        [[8, 3], [9, 2], [10, 1], [12, 9], [13, 8]],
    ),
    (
        [1, 2, 2, 2, H, 2, H, 1, 1, H, 1, H, 2],
        [8, 8, 16, 16, 32],
        [4, 8, 16, 32, 16, 32, 16, 16, 16, 8, 8, 4, 8],
        [1, 2, 3, 4, 5, 6, 9, 11, 12, 13],
        [[5, 3], [6, 4], [9, 5], [11, 2], [12, 1], [13, 11]],
    ),
    (
        [1, 2, 2, 2, H, 2, H, 1, H, 1, H, 2, 2],
        [8, 8, 16, 16, 32],
        [4, 8, 16, 32, 16, 32, 16, 16, 8, 8, 4, 8, 16],
        [1, 2, 3, 4, 5, 6, 8, 10, 11, 12, 13],
        [[5, 3], [6, 4], [8, 5], [10, 2], [11, 1], [12, 10], [13, 8]],
    ),
    (
        [1, 2, 2, 1, 2, 1, H, 1, 1, H, 1, 1, H],
        [8, 8, 16, 16, 32],
        [4, 8, 16, 16, 32, 32, 16, 16, 16, 8, 8, 8, 4],
        [1, 2, 4, 6, 9, 12, 13],
        [[9, 4], [12, 2], [13, 1]],
    ),
]


@pytest.mark.parametrize("rank", range(1, 6))
def test_published_r18_nets(rank: int) -> None:
    card = load_card(f"msnas-r18-{rank}")
    strides, heads, maps, ends, added = R18[rank - 1]
    assert card.genotype == {"strides": strides, "heads": heads, "laterals": added}
    assert (resolutions(strides), stage_ends(strides), laterals(strides)) == (maps, ends, added)


# Tables 8 and 9 as printed: strides, heads, AP.
TABLES = {
    "r34": (
        8,
        ("1,2,1,2,1,1,2,1,0.5,0.5,1,1,2,1,0.5,1,0.5,2,2,2,1", "4,8,16,32,32", "39.0"),
        ("1,2,1,2,1,2,1,1,0.5,0.5,1,1,2,1,0.5,1,0.5,2,2,2,2", "4,8,16,32,64", "38.7"),
        ("1,2,1,2,1,2,1,1,0.5,0.5,1,1,2,1,0.5,1,0.5,2,2,2,2", "4,8,16,16,64", "38.4"),
        ("1,2,1,2,1,1,2,1,2,1,0.5,0.5,1,1,2,0.5,0.5,0.5,1,2,2", "4,8,16,32,32", "39.2"),
        ("1,2,1,2,1,2,1,1,0.5,0.5,1,1,2,1,0.5,1,0.5,2,2,2,0.5", "4,8,16,32,32", "39.0"),
    ),
    "r50": (
        9,
        ("1,2,1,2,1,1,2,1,1,1,1,2,0.5,0.5,1,0.5,0.5,2,2,1,2", "8,8,16,32,32", "39.4"),
        ("1,2,1,2,1,1,2,1,1,1,1,2,0.5,0.5,1,0.5,0.5,2,1,2,2", "8,16,32,32,32", "39.1"),
        ("1,2,1,2,1,1,2,1,1,1,1,2,0.5,0.5,1,0.5,0.5,2,1,2,2", "8,8,32,32,64", "39.5"),
        ("1,2,1,2,1,1,2,1,1,1,1,2,0.5,0.5,1,0.5,0.5,2,2,1,2", "8,8,16,32,64", "39.4"),
        ("1,2,1,2,1,1,1,2,1,1,0.5,0.5,1,0.5,2,2,2,2,0.5,1,1", "8,8,32,32,32", "39.1"),
    ),
}


@pytest.mark.parametrize("variant", TABLES)
def test_published_r34_and_r50_nets(variant: str) -> None:
    number, *rows = TABLES[variant]
    cards = {card.source["detail"]: card for card in (load_card(f"msnas-{variant}-{rank}") for rank in range(1, 6))}
    for row, (strides, heads, precision) in enumerate(rows, 1):
        found = cards[f"Table {number}, row {row}: {precision} AP on COCO, {variant.upper()}-sized encoder"].genotype
        assert found["strides"] == [H if stride == "0.5" else int(stride) for stride in strides.split(",")]
        assert found["heads"] == [int(head) for head in heads.split(",")]
    precisions = [detail.partition(": ")[2] for detail in cards]
    assert precisions == sorted(precisions, reverse=True), "named by AP"


def test_the_worked_example() -> None:
    assert load_card("msnas-r34-1").genotype["strides"] == WORKED
    assert resolutions(WORKED) == [4, 8, 8, 16, 16, 16, 32, 32, 64, 64, 32, 16, 16, 16, 32, 16, 8, 4, 4, 8, 16]
    assert stage_ends(WORKED) == [1, 3, 6, 8, 10, 11, 14, 15, 16, 17, 19, 20, 21]
    added = [[11, 8], [14, 6], [15, 11], [16, 14], [17, 3], [19, 1], [20, 17], [21, 16]]
    assert laterals(WORKED) == added
    assert head_blocks(WORKED, [4, 8, 16, 32, 32]) == [19, 20, 21, 15, 15]


def test_all_fifteen_published_nets_are_of_their_space() -> None:
    found = {name: load_card(name) for name in published() if name.startswith("msnas-")}
    assert Counter(name[:9] for name in found) == {"msnas-r18": 5, "msnas-r34": 5, "msnas-r50": 5}
    assert len({card.key for card in found.values()}) == 15
    for name, card in found.items():
        space = MSNASSpace(name.split("-")[1])
        space.check(card)
        assert "AP on COCO" in card.source["detail"]
        lines = space.describe(card)
        assert [line.split(":")[0] for line in lines] == ["strides", "resolutions", "laterals", "heads"]


def test_down_then_up_is_a_plain_pyramid() -> None:
    strides = [1, 1, 2, 1, 2, 1, 2, 1, H, H, H]
    assert laterals(strides) == [[9, 6], [10, 4], [11, 2]]
    assert laterals([1, 2, 2, 2, 2]) == [] and laterals([1]) == []


def literal_laterals(strides: list[float]) -> list[list[int]]:
    """Equations 4 to 6 word for word, blocks from 1, stride past the end other than 1."""
    stride = {**dict(enumerate(strides, 1)), len(strides) + 1: 2}
    found = []
    for i in range(1, len(strides) + 1):
        if stride[i + 1] != 1:
            same = [k for k in range(1, i) if stride[k + 1] != 1 and prod(stride[j] for j in range(k + 1, i + 1)) == 1]
            found += [[i, max(same)]] if same else []
    return found


def valid_chains(blocks: int) -> list[list[float]]:
    """Brute force: every prefix product times 4 in 4, 8, 16, 32, 64."""
    chains = (list(strides) for strides in product((H, 1, 2), repeat=blocks))
    allowed = {1, 2, 4, 8, 16}
    return [s for s in chains if all(prod(s[: end + 1]) in allowed for end in range(blocks))]


def brute_heads(maps: list[int]) -> list[tuple[int, ...]]:
    """Equation 7 over all vectors."""
    vectors = product((4, 8, 16, 32, 64), repeat=5)
    rising = [s for s in vectors if all(a <= b for a, b in zip(s, s[1:], strict=False))]
    assert len(rising) == 126
    return [s for s in rising if min(s) <= 8 <= max(s) and min(s) != max(s) and set(s) <= set(maps)]


@pytest.mark.parametrize("blocks", range(1, 8))
def test_counts_and_laterals_against_brute_force(blocks: int) -> None:
    chains = valid_chains(blocks)
    assert chain_count(blocks) == len(chains)
    heads = {maps: brute_heads(list(maps)) for maps in {tuple(sorted(set(resolutions(s)))) for s in chains}}
    assert pair_count(blocks) == sum(len(heads[tuple(sorted(set(resolutions(s))))]) for s in chains)
    for strides in chains:
        assert laterals(strides) == literal_laterals(strides)
        assert sorted(legal_heads(strides)) == heads[tuple(sorted(set(resolutions(strides))))]


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("blocks", range(2, 7))
def test_the_reachable_macs_are_exact(blocks: int, block: str) -> None:
    """Over all architectures, whatever costs most: the blocks and their laterals, the heads, or neither."""
    chains, size = valid_chains(blocks), (64, 128)
    legal = {maps: brute_heads(list(maps)) for maps in {tuple(sorted(set(resolutions(s)))) for s in chains}}
    for channels, rpn_channels in ((32, 1), (2, 256), (64, 64)):
        rpn = {
            maps: [rpn_macs(heads, channels, block, size, rpn_channels) for heads in vectors]
            for maps, vectors in legal.items()
        }
        costs = [
            encoder_macs(strides, channels, block, size) + heads
            for strides in chains
            for heads in rpn[tuple(sorted(set(resolutions(strides))))]
        ]
        assert len(costs) == pair_count(blocks)
        space = MSNASSpace(blocks=blocks, channels=channels, block=block)
        assert space.macs_range(size, rpn_channels) == (min(costs), max(costs))


def test_the_reachable_macs_of_the_papers_spaces() -> None:
    """What the paper's windows lie within, and its nets."""
    for variant in VARIANTS:
        space = MSNASSpace(variant)
        least, most = space.macs_range()
        assert space.target is not None and least < 0.99 * space.target and 1.01 * space.target < most
        for rank in range(1, 6):
            assert least < space.macs(load_card(f"msnas-{variant}-{rank}")) < most
    with pytest.raises(ValueError, match="blocks must be an integer of at least 2, got 1"):
        macs_range(1, 180)


def test_published_counts() -> None:
    assert chain_count(13) == 293_867
    assert chain_count(21) == 912_137_899
    assert len(head_vectors()) == 103 and FPN_HEADS in head_vectors()
    assert MSNASSpace("r18").size() == pair_count(13) == 13_003_499
    assert MSNASSpace("r34").size() == pair_count(21) == 57_229_409_266


def chi_square(counts: Counter[Any], expected: dict[Any, float]) -> float:
    """Standard deviations by which Pearson's statistic exceeds its mean."""
    assert set(counts) <= set(expected)
    statistic = sum((counts[key] - wanted) ** 2 / wanted for key, wanted in expected.items())
    freedom = len(expected) - 1
    return (statistic - freedom) / sqrt(2 * freedom)


def test_chains_are_uniform() -> None:
    chains, draws = valid_chains(6), 20_000
    assert len(chains) > 100
    rng = Random(5)
    counts = Counter(tuple(random_strides(6, rng)) for _ in range(draws))
    assert abs(chi_square(counts, {tuple(s): draws / len(chains) for s in chains})) < 4
    # The test has teeth: drawing each stride evenly among those that are possible fails it.
    counts = Counter(tuple(_greedy(6, rng)) for _ in range(draws))
    assert chi_square(counts, {tuple(s): draws / len(chains) for s in chains}) > 15


def _greedy(blocks: int, rng: Random) -> list[float]:
    strides: list[float] = []
    for _ in range(blocks):
        possible = [s for s in (H, 1, 2) if prod([*strides, s]) in (1, 2, 4, 8, 16)]
        strides.append(rng.choice(possible))
    return strides


def test_architectures_are_uniform() -> None:
    pairs = [(tuple(s), heads) for s in valid_chains(4) for heads in brute_heads(resolutions(s))]
    draws, rng = 20_000, Random(6)
    counts: Counter[Any] = Counter()
    for _ in range(draws):
        drawn = random_genotype(4, rng)
        counts[tuple(drawn["strides"]), tuple(drawn["heads"])] += 1
    assert abs(chi_square(counts, dict.fromkeys(pairs, draws / len(pairs)))) < 4


@pytest.mark.parametrize("blocks", [2, 13, 21, 60])
def test_random_architectures_are_legal(blocks: int) -> None:
    rng = Random(1)
    for _ in range(100):
        check_genotype(random_genotype(blocks, rng))
        assert len(resolutions(random_strides(blocks, rng))) == blocks


GOOD = genotype(WORKED, [4, 8, 16, 32, 32])
BAD: dict[str, tuple[Any, str]] = {
    "list": ([1, 2], r"genotype must be an object of strides, heads and laterals, got \[1, 2\]"),
    "keys": ({"strides": [1, 2]}, "genotype must be an object of strides, heads and laterals, got strides"),
    "empty": ({**GOOD, "strides": []}, "genotype.strides must be a non-empty list of 0.5, 1 and 2, got"),
    "stride": ({**GOOD, "strides": [1, 3]}, "genotype.strides must be 0.5, 1 or 2, got 3 for block 2"),
    "float": ({**GOOD, "strides": [1.0, 2]}, "genotype.strides must be 0.5, 1 or 2, got 1.0 for block 1"),
    "bool": ({**GOOD, "strides": [True, 2]}, "genotype.strides must be 0.5, 1 or 2, got True for block 1"),
    "word": ({**GOOD, "strides": ["1"]}, "genotype.strides must be 0.5, 1 or 2, got '1' for block 1"),
    "fine": ({**GOOD, "strides": [1, H]}, "must keep resolutions within 4 to 64, got 2 after block 2"),
    "coarse": ({**GOOD, "strides": [2] * 5}, "must keep resolutions within 4 to 64, got 128 after block 5"),
    "four": ({**GOOD, "heads": [4, 8, 16, 32]}, "genotype.heads must have 5 resolutions"),
    "head": ({**GOOD, "heads": [4, 8, 16, 32, 128]}, "genotype.heads must be among 4, 8, 16, 32, 64, got 128"),
    "falling": ({**GOOD, "heads": [8, 4, 16, 32, 32]}, "genotype.heads must not fall"),
    "coarse-heads": ({**GOOD, "heads": [16, 16, 32, 32, 64]}, "a smallest of at most 8"),
    "one": ({**GOOD, "heads": [8] * 5}, "genotype.heads must not fall, .* and differ"),
    "absent": (
        {"strides": [1, 2, 2], "heads": [4, 8, 16, 16, 32], "laterals": []},
        r"genotype.heads must be among the encoder's resolutions \[4, 8, 16\], got 32",
    ),
    "laterals": ({**GOOD, "laterals": [[11, 7]]}, r"genotype.laterals must be \[\[11, 8\], .* got \[\[11, 7\]\]"),
    "no-laterals": ({**GOOD, "laterals": None}, "genotype.laterals must be .*, got None"),
}


@pytest.mark.parametrize(("value", "words"), BAD.values(), ids=BAD)
def test_bad_genotypes(value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_genotype(value)


def test_bad_numbers_of_blocks() -> None:
    for blocks in (0, -1, True, 1.0, 201):
        with pytest.raises(ValueError, match="blocks must be an integer in 1..200, got"):
            chain_count(blocks)  # type: ignore[arg-type]  # wrong on purpose
    assert pair_count(1) == 0
    with pytest.raises(ValueError, match="blocks must be enough for two resolutions"):
        random_genotype(1, Random(0))
    with pytest.raises(ValueError, match="heads must be among the encoder's resolutions .4, 8., got 16"):
        head_blocks([1, 2], [4, 16])
