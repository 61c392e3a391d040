"""The blocks of Hit-Detector's parts, for a table of measured latencies (:mod:`nasdet.measure.latency`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

from nasdet.arch import Card
from nasdet.spaces import Block
from nasdet.spaces.hit.costs import INPUT, PROPOSALS, CostTable, table
from nasdet.spaces.hit.genotype import LAYOUTS, LEVELS, ONE_STAGE, TWO_STAGE, Place, places
from nasdet.spaces.hit.space import HitSpace
from nasdet.spaces.hit.timed import Whole, fixed_layers, operation_on

#: what every net of a part runs besides its places
FIXED = {"backbone": ("stem", "tail"), "neck": ("neck's other layers",), "head": ("fully connected layer",)}


class HitBlocks:
    """The parts of a Hit-Detector without its predictors: at each place one of its operations, and what is fixed.

    The head's run on ``proposals`` RoIs, and those of towers on all levels of the pyramid. In a block of several levels
    the coarser maps are cut out of the finest: a copy that a detector does not make is in it.
    """

    variants = tuple(
        f"{layout}{detector}{candidates}"
        for layout in LAYOUTS
        for detector in ("", "-retinanet")
        for candidates in ("", "-screened")
    )
    usual_size = (-(-INPUT[0] // 32) * 32, -(-INPUT[1] // 32) * 32)
    """The paper's 800 x 1200, padded to a multiple of 32."""

    def __init__(self, space: HitSpace, proposals: int = PROPOSALS) -> None:
        self.space, self.proposals = space, proposals
        # Not the candidates: a table of all operations serves every choice of them.
        self.settings: dict[str, Any] = {"method": space.method, **space.settings(), "proposals": proposals}
        self.fixed = tuple(key for part in space.parts for key in self._fixed(part))
        self.places = tuple(
            {name: _key(name, place, where) for name in space.candidates[part]}
            for part in space.parts
            for place, where, _ in self._places(part)
        )

    @classmethod
    def of(cls, variant: str, proposals: int = PROPOSALS) -> HitBlocks:
        """Those of a layout by name: all 32 operations, or with ``-screened`` the published sub-spaces; the parts of a
        two-stage detector, or of ``-retinanet``."""
        layout, *words = variant.split("-")
        candidates = "screened" if "screened" in words else "full"
        if "retinanet" not in words:
            return cls(HitSpace(layout, candidates, TWO_STAGE), proposals)
        sizes = replace(LAYOUTS[layout], inputs=LEVELS[1:], extra="convs")
        return cls(HitSpace(sizes, candidates, ONE_STAGE), proposals)

    def costs(self, ms: Mapping[str, float]) -> CostTable:
        """Measured milliseconds, by key of a block, as a cost by part, place and operation."""
        where = {part: [where for _, where, _ in self._places(part)] for part in self.space.parts}
        return table(
            self.space.sizes,
            self.space.candidates,
            lambda place, name: ms[_key(name, place, where[place.part][place.index])],
            {part: math.fsum(ms[key] for key in self._fixed(part)) for part in self.space.parts},
        )

    def _fixed(self, part: str) -> tuple[str, ...]:
        keys = FIXED.get(part, ())
        return keys if part != "backbone" or self.space.sizes.tail else keys[:1]

    def _places(self, part: str) -> Iterator[tuple[Place, str, tuple[int, ...]]]:
        """Each place with where it stands in words, and the strides of the maps that it reads; none for RoIs."""
        sizes, reads = self.space.sizes, 2
        for place in places(part, sizes):
            if part == "head":
                yield place, f"on {self.proposals} RoIs", ()
            elif part == "towers":
                strides = tuple(4 << (int(level[1:]) - 2) for level in sizes.pyramid())
                yield place, f"on {len(strides)} levels", strides
            else:
                if part == "neck":
                    reads = 4 << LEVELS.index(sizes.inputs[place.index % len(sizes.inputs)])
                yield place, f"at 1/{reads}", (reads,)
                reads *= place.stride

    def blocks(self, size: tuple[int, int]) -> Iterator[Block]:
        """The fixed layers, and the operations at places that differ; sides of ``size`` divide by 32."""
        if min(size) < 32 or any(side % 32 for side in size):
            raise ValueError(f"size must be (height, width) divisible by 32, got {tuple(size)}")
        seen = set()
        for part in self.space.parts:
            for key in self._fixed(part):
                yield key, partial(fixed_layers, self.space.sizes, key, size), self._fixed_shape(key, size)
            for place, where, strides in self._places(part):
                shape = self._shape(place, strides, size)
                levels = [_level(size, stride) for stride in strides]
                for name in self.space.candidates[part]:
                    if (key := _key(name, place, where)) not in seen:
                        seen.add(key)
                        yield key, partial(operation_on, name, place, levels), shape

    def _shape(self, place: Place, strides: tuple[int, ...], size: tuple[int, int]) -> tuple[int, ...]:
        if not strides:
            return self.proposals, place.inp, self.space.sizes.pooled, self.space.sizes.pooled
        return 1, place.inp, *_level(size, strides[0])

    def _fixed_shape(self, key: str, size: tuple[int, int]) -> tuple[int, ...]:
        sizes = self.space.sizes
        if key == FIXED["head"][0]:
            return self.proposals, sizes.channels, sizes.pooled, sizes.pooled
        if key == FIXED["neck"][0]:
            return 1, sizes.channels, *_level(size, 4 << LEVELS.index(sizes.inputs[0]))
        return (1, 3, *size) if key == "stem" else (1, sizes.stages[-1][0], *_level(size, 32))

    def keys(self, card: Card) -> list[str]:
        """What a card's parts run."""
        self.space.check(card)
        names = [name for part in self.space.parts for name in card.genotype[part]]
        return [*self.fixed, *(place[name] for place, name in zip(self.places, names, strict=True))]

    def network(self, card: Card, size: tuple[int, int]) -> Block:
        """A card's backbone, its neck on that, and its head on RoIs of noise or its towers on the neck's maps."""
        self.space.check(card)
        if self.space.parts not in (TWO_STAGE, ONE_STAGE):
            raise ValueError(f"parts must be all of a detector, to be timed as one, got {', '.join(self.space.parts)}")
        return card.key, partial(Whole, card, self.proposals), (1, 3, *size)

    def random(self, rng: Random) -> Card:
        """A uniformly random architecture."""
        return self.space.random(rng)


def _key(name: str, place: Place, where: str) -> str:
    return f"{name} {place.inp}>{place.out} stride {place.stride} {where}"


def _level(size: tuple[int, int], stride: int) -> tuple[int, int]:
    return -(-size[0] // stride), -(-size[1] // stride)
