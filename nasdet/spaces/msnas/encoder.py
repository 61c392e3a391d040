"""MSNAS's encoder: a stem and a chain of residual blocks that halve, keep or double the resolution, with laterals.

What the paper leaves open, and :mod:`nasdet.spaces.msnas.costs` infers from its FLOPs: which residual blocks, and that
a bottleneck's maps are reduced for the heads. Left open as well, and set here: upsampling is nearest, norms follow the
1x1 convolutions of laterals and reductions, and a reduction belongs to its resolution.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from nasdet._checks import check_whole
from nasdet.detectors.backbone import scaled
from nasdet.detectors.norm import FoldingSequential, in_sequence, norm_layer
from nasdet.detectors.resnet import BasicBlock, Bottleneck
from nasdet.spaces.msnas.costs import BLOCKS, STEM_CHANNELS
from nasdet.spaces.msnas.genotype import GROUPS, START, check_genotype, head_blocks, resolutions

HEADS = tuple(f"h{group}" for group in range(1, GROUPS + 1))
"""Names of the maps: one for each head, of small objects first."""


def residual_block(inp: int, inner: int, stride: float, kind: str, norm: str) -> nn.Module:
    """A block of a chain, ``"basic"`` to ``inner`` channels, ``"bottleneck"`` to four times as many; one of stride 1/2
    reads a map that was upsampled before."""
    made = (BasicBlock if kind == "basic" else Bottleneck)(inp, inner, 2 if stride == 2 else 1, norm, False, 1, inner)
    if stride == 0.5 and made.downsample is None:  # the paper's FLOPs have one wherever the resolution changes
        made.downsample = conv_norm(inp, inp, norm)
    return made


def conv_norm(inp: int, out: int, norm: str) -> FoldingSequential:
    """A 1x1 convolution and its norm."""
    return FoldingSequential(nn.Conv2d(inp, out, 1, bias=False), norm_layer(norm, out))


class StrideChain(nn.Module, ABC):
    """What an encoder and the supernet of encoders share: the stem, and the way of one genotype.

    Images ``[N, 3, H, W]`` become a dict of five maps ``h1`` to ``h5``, ``[N, C, H / stride, W / stride]`` with sizes
    rounded up, one for each detection head; heads of one resolution get the same tensor. ``strides`` (the genotype's
    ``heads``) and ``channels`` say the same by name. They are a pyramid by themselves (``pyramid``), without an FPN.

    Args:
        channels: C, of every block; ``width`` multiplies it and the stem's 64, to multiples of 8.
        block: ``"basic"``, or ``"bottleneck"`` with 4 C channels between the blocks, reduced to C for the heads.
        norm: one of :data:`nasdet.detectors.norm.NORMS`.
        frozen_stages: parts from the stem on that do not train and whose norms stay in evaluation mode: 0 none, 1 the
            stem, 1 + k the stem and the first k blocks.
        blocks: how many blocks there are.
    """

    pyramid = True
    strides: dict[str, int]
    channels: dict[str, int]
    reductions: nn.ModuleDict

    def __init__(self, channels: int, block: str, width: float, norm: str, frozen_stages: int, blocks: int) -> None:
        super().__init__()
        if block not in BLOCKS:
            raise ValueError(f"block must be one of {', '.join(BLOCKS)}, got {block!r}")
        check_whole("channels", channels)
        if not width > 0:
            raise ValueError(f"width must be positive, got {width}")
        if not 0 <= frozen_stages <= blocks + 1:
            raise ValueError(f"frozen_stages must be in 0..{blocks + 1}, got {frozen_stages}")
        self.block, self.norm, self.frozen_stages = block, norm, frozen_stages
        self.stem_channels, self.inner = scaled(STEM_CHANNELS, width), scaled(channels, width)
        self.out = self.inner if block == "basic" else 4 * self.inner
        self.channels = dict.fromkeys(HEADS, self.inner)
        self.conv1 = nn.Conv2d(3, self.stem_channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(norm, self.stem_channels)

    def _follow(self, genotype: Mapping[str, Any], whole: bool) -> None:
        """Take the way of a legal genotype; only as far as heads read it unless ``whole``."""
        strides, heads = genotype["strides"], genotype["heads"]
        self.genotype = genotype
        reads = head_blocks(strides, heads)
        way = list(zip(strides, resolutions(strides), strict=True))
        self._way = way if whole else way[: max(reads)]
        self._laterals: dict[int, int] = {to: origin for to, origin in genotype["laterals"] if to <= len(self._way)}
        self._reads = dict(zip(HEADS, reads, strict=True))
        self.strides = dict(zip(HEADS, heads, strict=True))

    @abstractmethod
    def _block(self, place: int, stride: float) -> nn.Module:
        """The block at a place (from 1)."""

    @abstractmethod
    def _lateral(self, origin: int) -> nn.Module:
        """The lateral connection that begins at a block."""

    @abstractmethod
    def _blocks_at(self, place: int) -> Iterable[nn.Module]:
        """All blocks at a place."""

    def _make_block(self, place: int, stride: float) -> nn.Module:
        return residual_block(self.stem_channels if place == 1 else self.out, self.inner, stride, self.block, self.norm)

    def _make_lateral(self) -> nn.Module:
        return conv_norm(self.out, self.out, self.norm)

    def _make_reductions(self, present: Iterable[int]) -> nn.ModuleDict:
        """By resolution; empty where maps have C channels as they are."""
        needed = () if self.out == self.inner else sorted(present)
        return nn.ModuleDict({str(place): conv_norm(self.out, self.inner, self.norm) for place in needed})

    def sizes(self) -> dict[str, Any]:
        """What two chains must have in common to share weights."""
        return {"channels": self.inner, "stem": self.stem_channels, "block": self.block, "norm": self.norm}

    def _finish(self) -> None:
        """To be called when all modules are made."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self._freeze()

    def _freeze(self) -> None:
        if self.frozen_stages:
            for module in (self.conv1, self.bn1):
                module.requires_grad_(False).eval()
        for place in range(1, self.frozen_stages):
            for block in self._blocks_at(place):
                block.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> StrideChain:
        """As for any module, but frozen stages stay in evaluation mode."""
        super().train(mode)
        self._freeze()
        return self

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Images ``[N, 3, H, W]`` to the five maps."""
        x = F.relu(in_sequence([self.conv1, self.bn1], images), inplace=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        sizes = {START: x.shape[-2:]}
        origins, reads = set(self._laterals.values()), set(self._reads.values())
        kept: dict[int, Tensor] = {}
        for place, (stride, resolution) in enumerate(self._way, 1):
            if stride == 0.5:
                # To the size that the resolution had before: one row or column less than twice, where that was odd.
                x = F.interpolate(x, size=sizes[resolution], mode="nearest")
            x = self._block(place, stride)(x)
            sizes.setdefault(resolution, x.shape[-2:])
            if place in self._laterals:
                origin = self._laterals[place]
                x = x + self._lateral(origin)(kept[origin])
            if place in origins or place in reads:
                kept[place] = x
        maps = {place: self._reduced(kept[place], self._way[place - 1][1]) for place in sorted(reads)}
        return {name: maps[place] for name, place in self._reads.items()}

    def _reduced(self, x: Tensor, resolution: int) -> Tensor:
        """A map on its way to the heads."""
        y: Tensor = self.reductions[str(resolution)](x) if self.reductions else x
        return y


class MSNASEncoder(StrideChain):
    """The encoder of a genotype, to be trained by itself; see :class:`StrideChain` for its maps and other options.

    Blocks after the last one that a head reads do nothing. The paper counts them (its net msnas-r18-5 has one, of 28 %
    of its FLOPs), and so they are there, but do not train; ``whole=False`` leaves them out, with the same maps.
    """

    def __init__(
        self,
        genotype: Mapping[str, Any],
        channels: int,
        block: str = "basic",
        *,
        width: float = 1.0,
        norm: str = "bn",
        frozen_stages: int = 0,
        whole: bool = True,
    ) -> None:
        check_genotype(genotype)
        strides: Sequence[float] = genotype["strides"]
        super().__init__(channels, block, width, norm, frozen_stages, len(strides))
        self._follow(genotype, whole)
        way = self._way
        self.blocks = nn.ModuleList(self._make_block(place, stride) for place, (stride, _) in enumerate(way, 1))
        self.laterals = nn.ModuleDict({str(origin): self._make_lateral() for origin in sorted(self._laterals.values())})
        self.reductions = self._make_reductions(set(genotype["heads"]))
        self._finish()

    def _freeze(self) -> None:
        super()._freeze()
        last = max(self._reads.values())
        idle = [*self.blocks[last:], *(self._lateral(origin) for to, origin in self._laterals.items() if to > last)]
        for module in idle:
            module.requires_grad_(False).eval()

    def _block(self, place: int, stride: float) -> nn.Module:
        return self.blocks[place - 1]

    def _lateral(self, origin: int) -> nn.Module:
        return self.laterals[str(origin)]

    def _blocks_at(self, place: int) -> Iterable[nn.Module]:
        return self.blocks[place - 1 : place]
