"""What a Hit-Detector is made of, piece by piece, and the whole of it, to be timed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nasdet.arch import Card
from nasdet.spaces.hit.genotype import LEVELS, Place, Sizes
from nasdet.spaces.hit.networks import HitBackbone, HitHead, HitNeck
from nasdet.spaces.hit.operations import operation
from nasdet.spaces.hit.space import HitSpace, card_sizes

Level = tuple[int, int]


class OnLevels(nn.Module):
    """A module on maps of several sizes (height, width), all cut out of one."""

    def __init__(self, module: nn.Module, levels: Sequence[Level]) -> None:
        super().__init__()
        self.module, self.levels = module, tuple(levels)

    def cut(self, x: Tensor) -> list[Tensor]:
        """The maps, dense in the memory order of ``x``."""
        dense = torch.preserve_format if x.is_contiguous() else torch.channels_last
        return [x[..., :height, :width].clone(memory_format=dense) for height, width in self.levels]

    def forward(self, x: Tensor) -> list[Tensor]:
        """``x`` is the largest map."""
        return [self.module(map_) for map_ in self.cut(x)]


class _Neck(OnLevels):
    def forward(self, x: Tensor) -> list[Tensor]:
        neck: HitNeck = self.module  # type: ignore[assignment]
        return list(neck(dict(zip(neck.inputs, self.cut(x), strict=True))).values())


class Whole(nn.Module):
    """All parts of a card without predictors, the head on as many RoIs of noise."""

    def __init__(self, card: Card, proposals: int) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({part: HitSpace.build(card, part) for part in card.genotype})
        sizes = card_sizes(card)
        if "head" in self.parts:
            self.register_buffer("rois", torch.randn(proposals, sizes.channels, sizes.pooled, sizes.pooled))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Images to what predictors would read."""
        maps = list(self.parts["neck"](self.parts["backbone"](x)).values())
        if "head" in self.parts:
            return [*maps, self.parts["head"](self.rois)]
        return [feature for map_ in maps for feature in self.parts["towers"](map_)]


def operation_on(name: str, place: Place, levels: Sequence[Level]) -> nn.Module:
    """An operation at a place, on each of ``levels``; without any on RoIs."""
    made = operation(name, place.inp, place.out, place.stride)
    return OnLevels(made, levels) if len(levels) > 1 else made


def fixed_layers(sizes: Sizes, key: str, size: Level) -> nn.Module:
    """The layers of a part that are not searched, by their name in :class:`~nasdet.spaces.hit.latency.HitBlocks`."""
    if key in ("stem", "tail"):
        made: nn.Module = getattr(HitBackbone(sizes, lambda place: nn.Identity()), key)
        return made
    if key == "fully connected layer":
        head = HitHead(sizes, lambda place: nn.Identity())
        return nn.Sequential(head.blocks, nn.Flatten(), head.fc, nn.ReLU(inplace=True))
    strides = {level: 4 << index for index, level in enumerate(LEVELS)}
    neck = HitNeck(sizes, lambda place: nn.Identity(), sizes.level_channels(), strides)
    levels = [(-(-size[0] // strides[level]), -(-size[1] // strides[level])) for level in sizes.inputs]
    return _Neck(neck, levels)
