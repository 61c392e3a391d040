"""The blocks of DetNAS's backbones, for a table of measured latencies (:mod:`nasdet.measure.latency`)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from nasdet.arch import Card
from nasdet.spaces import Block
from nasdet.spaces.detnas.genotype import CHOICES, SPACES
from nasdet.spaces.detnas.space import DetNASSpace

if TYPE_CHECKING:
    from torch import nn

_STEM = "stem"


class DetNASBlocks:
    """The backbone of a DetNAS card, stem to last stage: the stem, and at each place one of four blocks."""

    variants = tuple(SPACES)
    usual_size = (800, 1216)
    """The paper's 800 x 1200, padded to a multiple of 32."""

    def __init__(self, space: DetNASSpace) -> None:
        self.space = space
        self.settings: dict[str, Any] = {"method": space.method, **space.settings(), "shuffle": space.shuffle}
        self.fixed = (_STEM,)
        self.places = tuple({choice: _key(choice, *place) for choice in CHOICES} for place in self._places())

    @classmethod
    def of(cls, variant: str, **ways: Any) -> DetNASBlocks:
        """Those of a space of the paper by name, shuffled in its ``ways``."""
        return cls(DetNASSpace(variant, **ways))

    def _places(self) -> Iterator[tuple[int, int, int, int]]:
        """Channels in and out, stride, and the resolution of the map that it reads, of each place."""
        inp, reads, sizes = self.space.sizes.stem, 2, self.space.sizes
        for out, blocks in zip(sizes.channels, sizes.blocks, strict=True):
            for block in range(blocks):
                stride = 1 if block else 2
                yield inp, out, stride, reads
                inp, reads = out, reads * stride

    def blocks(self, size: tuple[int, int]) -> Iterator[Block]:
        """The stem, and the blocks that differ: the first of each stage, and one for all others of it."""
        if min(size) < 1:
            raise ValueError(f"size must be a positive (height, width), got {tuple(size)}")
        yield _STEM, self._stem, (1, 3, *size)
        for inp, out, stride, reads in dict.fromkeys(self._places()):
            shape = (1, inp, *(-(-side // reads) for side in size))
            for choice in CHOICES:
                make = partial(_block, choice, inp, out, stride, self.space.shuffle)
                yield _key(choice, inp, out, stride, reads), make, shape

    def _stem(self) -> nn.Module:
        return self.space.backbone(self.space.card([CHOICES[0]] * self.space.sizes.depth)).conv1

    def keys(self, card: Card) -> list[str]:
        """The stem, and a card's choice at each place."""
        self.space.check(card)
        return [_STEM, *(place[choice] for place, choice in zip(self.places, card.genotype, strict=True))]

    def network(self, card: Card, size: tuple[int, int]) -> Block:
        """A card's backbone."""
        self.space.check(card)
        return card.key, partial(self.space.backbone, card), (1, 3, *size)

    def random(self, rng: Random) -> Card:
        """A uniformly random path."""
        return self.space.random(rng)


def _key(choice: str, inp: int, out: int, stride: int, reads: int) -> str:
    return f"{choice} {inp}>{out} stride {stride} at 1/{reads}"


def _block(choice: str, inp: int, out: int, stride: int, shuffle: str) -> nn.Module:
    from nasdet.detectors.shufflenet import ShuffleBlock

    return ShuffleBlock(inp, out, stride, choice=choice, shuffle=shuffle)
