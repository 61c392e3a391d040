"""What an MSNAS net is made of, piece by piece, and the whole of it, to be timed; see :mod:`nasdet.spaces.msnas.costs`
for what the paper leaves open."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nasdet.detectors.norm import FoldingSequential, norm_layer
from nasdet.detectors.resnet import BasicBlock, Bottleneck
from nasdet.spaces.msnas.costs import RPN_CHANNELS, STEM_CHANNELS
from nasdet.spaces.msnas.genotype import head_blocks


def stem() -> nn.Module:
    """7x7 stride 2 and max-pooling."""
    layers = [*_conv_norm(3, STEM_CHANNELS, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, stride=2, padding=1)]
    return FoldingSequential(*layers)


def block(inp: int, channels: int, stride: float, kind: str) -> nn.Module:
    """A residual block; upsampling comes before it."""
    made = (BasicBlock if kind == "basic" else Bottleneck)(
        inp, channels, 2 if stride == 2 else 1, "bn", False, 1, channels
    )
    if stride != 0.5:
        return made
    if made.downsample is None:
        made.downsample = FoldingSequential(*_conv_norm(inp, inp))
    return nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), made)


def reduction(inp: int, out: int) -> nn.Module:
    """From a bottleneck's channels to those that heads read."""
    return FoldingSequential(*_conv_norm(inp, out))


class Lateral(nn.Module):
    """A 1x1 convolution of one map, added to another; called with one map, both are that."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = FoldingSequential(*_conv_norm(channels, channels))

    def forward(self, x: Tensor, to: Tensor | None = None) -> Tensor:
        """``x`` is the earlier map."""
        y: Tensor = (x if to is None else to) + self.conv(x)
        return y


class RPNHead(nn.Module):
    """The RPN on one map: a 3x3 convolution, 3 scores and 12 offsets."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, RPN_CHANNELS, 3, padding=1)
        self.cls, self.box = nn.Conv2d(RPN_CHANNELS, 3, 1), nn.Conv2d(RPN_CHANNELS, 12, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and offsets."""
        hidden = F.relu(self.conv(x), inplace=True)
        return self.cls(hidden), self.box(hidden)


class Network(nn.Module):
    """The encoder of a genotype with its RPN: images to the RPN's scores and offsets for each head."""

    def __init__(self, genotype: Mapping[str, Any], channels: int, kind: str) -> None:
        super().__init__()
        strides, heads = genotype["strides"], genotype["heads"]
        out = channels if kind == "basic" else 4 * channels
        self.stem = stem()
        self.blocks = nn.ModuleList(
            block(out if place else STEM_CHANNELS, channels, stride, kind) for place, stride in enumerate(strides)
        )
        self.origins = {to: origin for to, origin in genotype["laterals"]}
        self.laterals = nn.ModuleDict({str(to): Lateral(out) for to in self.origins})
        self.reads = head_blocks(strides, heads)
        reduced = set(self.reads) if kind == "bottleneck" else set()
        self.reductions = nn.ModuleDict({str(place): reduction(out, channels) for place in reduced})
        self.rpn = RPNHead(channels)

    def forward(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Images ``[N, 3, H, W]`` with sides divisible by 64."""
        x, kept = self.stem(images), dict[int, Tensor]()
        for place, module in enumerate(self.blocks, 1):
            x = module(x)
            if place in self.origins:
                x = self.laterals[str(place)](kept[self.origins[place]], x)
            if place in self.reads or place in self.origins.values():
                kept[place] = x
        maps = {place: self._reduced(place, kept[place]) for place in set(self.reads)}
        return [self.rpn(maps[place]) for place in self.reads]

    def _reduced(self, place: int, x: Tensor) -> Tensor:
        return self.reductions[str(place)](x) if self.reductions else x


def _conv_norm(inp: int, out: int, kernel: int = 1, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    conv = nn.Conv2d(inp, out, kernel, stride=stride, padding=kernel // 2, bias=False)
    return conv, norm_layer("bn", out)
