"""The blocks that spaces give for tables of latencies: what they compute, against exact counts and whole nets."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from torch import nn

from nasdet.arch import Card, load_card
from nasdet.measure import count, total
from nasdet.spaces.detnas.latency import DetNASBlocks
from nasdet.spaces.hit import LAYOUTS, HitSpace
from nasdet.spaces.hit.latency import HitBlocks
from nasdet.spaces.msnas import MSNASSpace
from nasdet.spaces.msnas.latency import MSNASBlocks


def block_macs(blocks: Any, size: tuple[int, int]) -> dict[str, int]:
    found = {}
    for key, make, shape in blocks.blocks(size):
        with torch.device("meta"):
            module, x = nn.Sequential(make()), torch.empty(shape)
        found[key] = total(count(module, x)).macs
    return found


def net_macs(blocks: Any, card: Card, size: tuple[int, int]) -> int:
    with torch.device("meta"):
        key, make, shape = blocks.network(card, size)
        assert key == card.key
        return total(count(nn.Sequential(make()), torch.empty(shape))).macs


@pytest.mark.parametrize(
    ("variant", "name"),
    [("small", "detnas-coco-fpn-300m"), ("large", "detnasnet"), ("3.8g", "detnasnet-3.8g")],
)
def test_detnas_blocks_have_the_macs_of_the_published_nets(variant: str, name: str) -> None:
    blocks, card = DetNASBlocks.of(variant), load_card(name)
    macs = block_macs(blocks, (224, 224))
    assert sum(macs[key] for key in blocks.keys(card)) == blocks.space.macs(card.genotype)
    assert net_macs(blocks, card, (224, 224)) == blocks.space.macs(card.genotype)
    assert [len({macs[key] for key in place.values()}) for place in blocks.places] == [4] * len(card.genotype)


@pytest.mark.parametrize("variant", ["r18", "r34", "r50"])
def test_msnas_blocks_have_the_macs_of_the_published_nets(variant: str) -> None:
    blocks = MSNASBlocks.of(variant)
    macs = block_macs(blocks, (256, 320))
    for net in range(1, 6):
        card = load_card(f"msnas-{variant}-{net}")
        expected = blocks.space.macs(card, (256, 320))
        assert sum(macs[key] for key in blocks.keys(card)) == expected
        if net == 1:
            assert net_macs(blocks, card, (256, 320)) == expected


def test_msnas_keys_are_all_among_its_blocks() -> None:
    for space in (MSNASSpace("r18"), MSNASSpace("r50"), MSNASSpace(blocks=2), MSNASSpace(blocks=3, channels=8)):
        blocks = MSNASBlocks(space)
        parts = list(blocks.blocks((128, 64)))
        keys = {key for key, _, _ in parts}
        assert len(keys) == len(parts)
        used = {key for seed in range(300) for key in blocks.keys(blocks.random(Random(seed)))}
        assert used <= keys and {"stem", "rpn at 1/4", "rpn at 1/8"} <= used
        assert not [key for key in keys if "reduction" in key] or space.block == "bottleneck"


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_msnas_nets_run_and_compute_what_their_blocks_do(block: str) -> None:
    blocks, size = MSNASBlocks(MSNASSpace(blocks=6, channels=4, block=block)), (64, 128)
    macs = block_macs(blocks, size)
    for seed in range(5):
        card = blocks.random(Random(seed))
        assert net_macs(blocks, card, size) == sum(macs[key] for key in blocks.keys(card))
    _, make, shape = blocks.network(card, size)
    for head, scores, offsets in zip(card.genotype["heads"], *make().eval()(torch.zeros(shape)), strict=True):
        assert scores.shape == (1, 3, 64 // head, 128 // head) and offsets.shape == (1, 12, 64 // head, 128 // head)


@pytest.mark.parametrize(
    "variant", ["released-screened", "paper-retinanet-screened", "tiny", "tiny-retinanet-screened"]
)
def test_hit_blocks_have_the_macs_of_its_nets(variant: str) -> None:
    """Of a random net in every layout and detector; each operation is a block of its own."""
    assert variant in HitBlocks.variants
    blocks, size = HitBlocks.of(variant), (64, 96)
    card, macs = blocks.random(Random(1)), block_macs(blocks, size)
    expected = blocks.space.macs(size, blocks.proposals)
    assert sum(macs[key] for key in blocks.keys(card)) == expected(card.genotype) == net_macs(blocks, card, size)
    assert [len(set(place.values())) for place in blocks.places] == [len(place) for place in blocks.places]
    in_parts = blocks.costs(macs).by_part(card.genotype)
    assert in_parts == expected.by_part(card.genotype)


def test_hit_blocks_have_the_macs_of_the_published_net() -> None:
    blocks, card = HitBlocks.of("released-screened"), load_card("hit-detector")
    macs = block_macs(blocks, (800, 1216))
    assert sum(macs[key] for key in blocks.keys(card)) == blocks.space.macs((800, 1216), 1000)(card.genotype)


@pytest.mark.parametrize("variant", ["tiny", "tiny-retinanet"])
def test_hit_nets_run(variant: str) -> None:
    blocks = HitBlocks(HitBlocks.of(variant).space, proposals=3)
    _, make, shape = blocks.network(blocks.random(Random(2)), (64, 96))
    found = make().eval()(torch.zeros(shape))
    if variant == "tiny":
        assert [tuple(map_.shape[-2:]) for map_ in found[:-1]] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
        assert found[-1].shape == (3, blocks.space.sizes.hidden)
    else:
        assert len(found) == 10 and found[0].shape == found[1].shape == (1, 32, 8, 12)
    with pytest.raises(ValueError, match="parts must be all of a detector, to be timed as one, got neck"):
        alone = HitBlocks(HitSpace(LAYOUTS["tiny"], parts=("neck",)))
        alone.network(alone.random(Random(3)), (64, 96))


@pytest.mark.parametrize(
    "blocks",
    [DetNASBlocks.of("small"), MSNASBlocks.of("r18"), HitBlocks.of("released")],
    ids=["detnas", "msnas", "hit"],
)
def test_blocks_are_for_their_own_cards(blocks: Any) -> None:
    foreign = load_card("msnas-r18-1" if isinstance(blocks, DetNASBlocks) else "detnasnet")
    for other in (foreign, load_card("msnas-r34-1" if isinstance(blocks, MSNASBlocks) else "detnasnet")):
        with pytest.raises(ValueError, match="must"):
            blocks.keys(other)
        with pytest.raises(ValueError, match="must"):
            blocks.network(other, blocks.usual_size)


@pytest.mark.parametrize(
    ("blocks", "size", "message"),
    [
        (DetNASBlocks.of("small"), (0, 64), "size must be a positive"),
        (MSNASBlocks.of("r18"), (800, 1216), "size must be .* divisible by 64"),
        (HitBlocks.of("tiny"), (800, 1200), "size must be .* divisible by 32"),
    ],
    ids=["detnas", "msnas", "hit"],
)
def test_sizes_that_do_not_fit(blocks: Any, size: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(blocks.blocks(size))
    assert list(blocks.blocks(blocks.usual_size))
