"""DetNAS's genotypes, their variation, and MACs and parameters by table against the blocks themselves."""

from __future__ import annotations

from itertools import product
from random import Random
from typing import Any

import pytest
import torch

from nasdet.arch import Card, load_card, published
from nasdet.detectors import ShuffleNetV2
from nasdet.detectors import shufflenet as blocks_of
from nasdet.measure import count, total
from nasdet.spaces.detnas import (
    CHOICES,
    SPACES,
    DetNASSpace,
    Sizes,
    card_sizes,
    check_genotype,
    from_genes,
    macs_table,
    parameters_table,
    to_genes,
)
from nasdet.spaces.detnas.costs import block_layers
from nasdet.spaces.detnas.genotype import crossover, mutate, random_genotype

TINY = Sizes(4, (8, 12, 16, 20), (1, 2, 1, 1), 32)
# name: space, genes, MACs of the backbone at 224 x 224, and with last convolution and classifier where published
NETS = {
    "detnasnet": ("large", "0031210203123320211320222131033313333333", 1_269_181_536, 1_318_374_496),
    "detnasnet-3.8g": ("3.8g", "0031210203123320211320222131033313333333", 3_937_832_864, None),
    "detnas-coco-fpn-300m": ("small", "21202112331300313132", 288_082_368, 321_219_008),
    "detnas-coco-retinanet-300m": ("small", "23113213311133203333", 291_205_824, 324_342_464),
}


@pytest.mark.parametrize("name", NETS)
def test_published_nets(name: str) -> None:
    space_name, genes, macs, whole = NETS[name]
    space, card = DetNASSpace(space_name), load_card(name)
    space.check(card)
    assert to_genes(card.genotype) == [int(gene) for gene in genes]
    assert space.macs(card.genotype) == macs
    if whole is not None:
        assert macs_table(space.sizes, classes=1000)(card.genotype) == whole
    assert card_sizes(card) == space.sizes
    assert [len(line.split(": ")[1].split()) for line in space.describe(card)] == list(space.sizes.blocks)
    assert space.describe(card)[0].startswith(f"stage 1 ({space.sizes.channels[0]} channels): {card.genotype[0]} ")


def test_all_published_nets_are_tested() -> None:
    assert {name for name in published() if load_card(name).method == "detnas"} == set(NETS)


def on_meta(sizes: Sizes, genotype: Any) -> ShuffleNetV2:
    with torch.device("meta"):
        return ShuffleNetV2(sizes.stem, sizes.channels, sizes.blocks, genotype, shuffle="even_odd")


@pytest.mark.parametrize("size", [(224, 224), (200, 333), (33, 65)])
@pytest.mark.parametrize("name", ["small", "large", "3.8g"])
def test_costs_are_those_of_the_network(name: str, size: tuple[int, int]) -> None:
    sizes = SPACES[name]
    genotype = random_genotype(sizes.depth, Random(name))
    network = on_meta(sizes, genotype)
    assert macs_table(sizes, size)(genotype) == total(count(network, torch.empty(1, 3, *size, device="meta"))).macs
    assert parameters_table(sizes)(genotype) == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("choice", CHOICES)
def test_a_block_is_counted_layer_by_layer(choice: str) -> None:
    for inp, out, stride in ((16, 64, 2), (12, 12, 1), (6, 20, 2)):
        with torch.device("meta"):
            block = blocks_of.ShuffleBlock(inp, out, stride, choice=choice)
        layers = block_layers(choice, inp, out, (9, 14), stride)
        assert sum(x.macs for x in layers) == total(count(block, torch.empty(1, inp, 9, 14, device="meta"))).macs
        assert sum(x.parameters for x in layers) == sum(p.numel() for p in block.parameters())
        assert len(layers) == sum(isinstance(module, torch.nn.Conv2d) for module in block.modules())


# The released table's entries of the small space, by its blocks: sh3, sh5, sh7, xcep with a middle of half the output.
RELEASED = {
    0: (13396992, 15805440, 19418112, 13146112),
    1: (7325696, 8931328, 11339776, 12343296),
    4: (26304768, 28111104, 30820608, 20296192),
    5: (10599680, 11603200, 13108480, 16746240),
    8: (30670080, 31673600, 33178880, 21199360),
    9: (10317440, 10819200, 11571840, 15899520),
    16: (30387840, 30889600, 31642240, 20634880),
    17: (10176320, 10427200, 10803520, 15476160),
}


def test_the_table_has_the_released_entries() -> None:
    rows = macs_table(SPACES["small"]).rows
    of_a_kind = [max(first for first in RELEASED if first <= block) for block in range(20)]
    assert [tuple(row.values()) for row in rows] == [RELEASED[first] for first in of_a_kind]
    assert all(tuple(row) == CHOICES for row in rows)
    assert macs_table(SPACES["small"]).fixed == 5_419_008
    assert macs_table(SPACES["small"], classes=1000).fixed == 5_419_008 + 33_136_640
    small, large = macs_table(SPACES["small"]), macs_table(SPACES["large"])
    assert [small([c] * 20) for c in CHOICES] == [262_705_856, 280_518_336, 307_237_056, 325_689_280]
    assert [large([c] * 40) for c in CHOICES] == [1_036_681_632, 1_087_785_888, 1_164_442_272, 1_391_231_520]


@pytest.mark.parametrize("table", [macs_table(TINY), parameters_table(TINY)], ids=["macs", "parameters"])
def test_the_reachable_range_is_exact(table: Any) -> None:
    costs = [table(path) for path in product(CHOICES, repeat=5)]
    assert table.reachable() == (min(costs), max(costs))


def test_sizes_of_the_spaces() -> None:
    assert tuple(blocks_of.CHOICES) == CHOICES
    assert DetNASSpace("small").size() == 4**20 == 1_099_511_627_776
    assert DetNASSpace("large").size() == DetNASSpace("3.8g").size() == 4**40
    assert DetNASSpace(TINY).size() == 4**5


def test_variation_has_the_papers_probabilities() -> None:
    """A mutated gene comes out as it was in one of four cases; within 4 standard deviations, as below."""
    rng, genes = Random(0), 40_000
    parent = ["sh3"] * genes
    child = mutate(parent, rng)
    for choice, expected in {"sh3": 0.925, "sh5": 0.025, "sh7": 0.025, "xcep": 0.025}.items():
        assert abs(child.count(choice) - expected * genes) < 4 * (expected * (1 - expected) * genes) ** 0.5
    crossed = crossover(parent, ["xcep"] * genes, rng)
    assert set(crossed) == {"sh3", "xcep"} and abs(crossed.count("sh3") - genes / 2) < 4 * (genes / 4) ** 0.5
    drawn = random_genotype(genes, rng)
    assert all(abs(drawn.count(choice) - genes / 4) < 4 * (genes * 3 / 16) ** 0.5 for choice in CHOICES)
    assert set(mutate(parent, rng, 1.0)) == set(CHOICES)


def test_children_are_of_the_space() -> None:
    space, rng = DetNASSpace("small"), Random(1)
    first, second = space.random(rng), space.random(rng)
    for child in (space.mutate(first, rng), space.crossover(first, second, rng)):
        space.check(child)
    both = zip(space.crossover(first, second, rng).genotype, first.genotype, second.genotype, strict=True)
    assert all(gene in pair for gene, *pair in both)
    assert from_genes(to_genes(first.genotype)) == first.genotype


SMALL = DetNASSpace("small")
GOOD = SMALL.random(Random(0))
CALLS: dict[str, tuple[Any, str]] = {
    "object": (lambda: check_genotype({}), "genotype must be a list of choices, got {}"),
    "choice": (
        lambda: check_genotype(["sh3", "sh9"]),
        "genotype choices must be among sh3, sh5, sh7, xcep, got 'sh9' for block 2",
    ),
    "number": (lambda: check_genotype([0, 1]), "genotype choices must be among .*, got 0 for block 1"),
    "length": (lambda: check_genotype(["sh3"] * 19, 20), "genotype must have 20 choices, one for each block, got 19"),
    "gene": (lambda: from_genes([0, 4]), "genes must be integers in 0..3, got 4 for block 2"),
    "negative": (lambda: from_genes([-1]), "genes must be integers in 0..3, got -1 for block 1"),
    "bool": (lambda: from_genes([True]), "genes must be integers in 0..3, got True for block 1"),
    "macs": (lambda: SMALL.macs(["sh3"] * 40), "genotype must have 20 choices"),
    "picture": (lambda: macs_table(TINY, (0, 5)), r"size must be a positive \(height, width\), got \(0, 5\)"),
    "space": (lambda: DetNASSpace("medium"), "sizes must be one of small, large, 3.8g, tiny, or Sizes, got 'medium'"),
    "mutation": (lambda: DetNASSpace(mutation=0), r"mutation must be in \(0, 1\], got 0"),
    "probability": (lambda: mutate(["sh3"], Random(0), 2), r"probability must be in \(0, 1\], got 2"),
    "stages": (lambda: Sizes(4, (8, 16), (1, 1), 8), "channels must be four positive integers, got .8, 16."),
    "blocks": (lambda: Sizes(4, (8, 12, 16, 20), (1, 0, 1, 1), 8), "blocks must be four positive integers"),
    "stem": (lambda: Sizes(0, (8, 12, 16, 20), (1, 1, 1, 1), 8), "stem must be a positive integer, got 0"),
    "odd": (lambda: Sizes(4, (8, 13, 16, 20), (1, 1, 1, 1), 8), "channels must be even and grow"),
    "shrinking": (lambda: Sizes(9, (8, 12, 16, 20), (1, 1, 1, 1), 8), "channels must be even and grow"),
    "other-space": (lambda: DetNASSpace("large").check(GOOD), "detnas-random: settings must have .*'stem': 48"),
    "other-method": (lambda: SMALL.check(load_card("fad-paper")), "fad-paper: method must be 'detnas', got 'fad'"),
    "settings": (lambda: card_sizes(Card("detnas", "x", ["sh3"])), "x: settings.channels must be a list, got None"),
    "card-sizes": (
        lambda: card_sizes(Card("detnas", "x", ["sh3"], {**GOOD.settings, "stem": "wide"})),
        "x: settings.stem must be a positive integer, got 'wide'",
    ),
    "card-genes": (
        lambda: SMALL.check(Card("detnas", "x", GOOD.genotype[1:], GOOD.settings)),
        "x: genotype must have 20 choices, one for each block, got 19",
    ),
}


@pytest.mark.parametrize(("call", "words"), CALLS.values(), ids=CALLS)
def test_bad_genes_and_arguments(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_a_wrong_type_of_sizes() -> None:
    with pytest.raises(TypeError, match="sizes must be one of small, large, 3.8g, tiny, or Sizes, got int"):
        DetNASSpace(20)  # type: ignore[arg-type]  # wrong on purpose
