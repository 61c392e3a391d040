"""The blocks of MSNAS's encoders and RPN, for a table of measured latencies (:mod:`nasdet.measure.latency`)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any

from nasdet.arch import Card
from nasdet.spaces import Block
from nasdet.spaces.msnas.costs import INPUT, STEM_CHANNELS, VARIANTS
from nasdet.spaces.msnas.genotype import RESOLUTIONS, START, STRIDES, resolutions
from nasdet.spaces.msnas.space import MSNASSpace

if TYPE_CHECKING:
    from torch import nn



class MSNASBlocks:
    """The encoder and RPN of an MSNAS card: what the search constrains.

    What a block costs depends on the strides before it, so there are no places with choices of their own: blocks are
    told apart by stride and by the resolution of the map that they read. The RPN runs once for each head.
    """

    variants = tuple(VARIANTS)
    usual_size = INPUT
    fixed = ("stem",)
    places: tuple[dict[str, str], ...] = ()

    def __init__(self, space: MSNASSpace) -> None:
        self.space = space
        self.settings: dict[str, Any] = {"method": space.method, "blocks": space.blocks, **space.settings()}
        self._reduces = space.block == "bottleneck"
        self._out = 4 * space.channels if self._reduces else space.channels

    @classmethod
    def of(cls, variant: str) -> MSNASBlocks:
        """Those of an encoder of the paper by name."""
        return cls(MSNASSpace(variant))

    def blocks(self, size: tuple[int, int]) -> Iterator[Block]:
        """All blocks of all encoders, laterals, and the RPN on each resolution; sides of ``size`` divide by 64."""
        if min(size) < 64 or any(side % 64 for side in size):
            raise ValueError(f"size must be (height, width) divisible by 64, got {tuple(size)}")
        maps = RESOLUTIONS[: self.space.blocks + 1]
        yield "stem", partial(_made, "stem"), (1, 3, *size)
        block, channels = self.space.block, self.space.channels
        for inp, reads in dict.fromkeys([(STEM_CHANNELS, START), *((self._out, reads) for reads in maps)]):
            for stride in STRIDES:
                if int(reads * stride) in maps:
                    make = partial(_made, "block", inp, channels, stride, block)
                    yield _key(inp, self._out, stride, reads), make, _shape(inp, size, reads)
        for reads in maps:
            yield f"lateral at 1/{reads}", partial(_made, "Lateral", self._out), _shape(self._out, size, reads)
            if self._reduces:
                make = partial(_made, "reduction", self._out, channels)
                yield f"reduction at 1/{reads}", make, _shape(self._out, size, reads)
            yield f"rpn at 1/{reads}", partial(_made, "RPNOn", channels, (reads,)), _shape(channels, size, reads)

    def keys(self, card: Card) -> list[str]:
        """What a card's net runs, in the order in which it does."""
        self.space.check(card)
        strides, heads = card.genotype["strides"], card.genotype["heads"]
        maps = resolutions(strides)
        found, inp = ["stem"], STEM_CHANNELS
        for stride, reads in zip(strides, [START, *maps], strict=False):
            found.append(_key(inp, self._out, stride, reads))
            inp = self._out
        found += [f"lateral at 1/{maps[to - 1]}" for to, _ in card.genotype["laterals"]]
        if self._reduces:
            found += [f"reduction at 1/{head}" for head in sorted(set(heads))]
        return found + [f"rpn at 1/{head}" for head in heads]

    def network(self, card: Card, size: tuple[int, int]) -> Block:
        """A card's encoder with its RPN."""
        self.space.check(card)
        return card.key, partial(_made, "network", card), (1, 3, *size)

    def random(self, rng: Random) -> Card:
        """A uniformly random architecture."""
        return self.space.random(rng)


def _made(name: str, *sizes: Any) -> nn.Module:
    """What :mod:`nasdet.spaces.msnas.timed` calls ``name``; it needs torch, the rest here does not."""
    from nasdet.spaces.msnas import timed

    made: nn.Module = getattr(timed, name)(*sizes)
    return made


def _key(inp: int, out: int, stride: float, reads: int) -> str:
    return f"block {inp}>{out} stride {'1/2' if stride == 0.5 else stride} at 1/{reads}"


def _shape(channels: int, size: tuple[int, int], reads: int) -> tuple[int, ...]:
    return 1, channels, size[0] // reads, size[1] // reads
