"""ResNet backbones (He et al., 2015) with torchvision's parameter names and stride placement."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from nasdet.detectors.backbone import LEVELS, Backbone, scaled
from nasdet.detectors.norm import FoldingSequential, conv_norm, norm_layer


def _conv(inp: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inp, out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the first carries the stride."""

    expansion = 1

    def __init__(self, inp: int, planes: int, stride: int, norm: str, stride_in_1x1: bool, groups: int, inner: int):
        super().__init__()
        self.conv1 = _conv(inp, planes, 3, stride)
        self.bn1 = norm_layer(norm, planes)
        self.conv2 = _conv(planes, planes, 3)
        self.bn2 = norm_layer(norm, planes)
        self.downsample = _shortcut(inp, planes, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(conv_norm(self.conv1, self.bn1, x), inplace=True)
        return _joined(conv_norm(self.conv2, self.bn2, y), x, self.downsample)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 and a shortcut; the 3x3 carries the stride, or the first 1x1 with ``stride_in_1x1``.

    The 3x3 has ``inner`` channels in ``groups`` convolution groups.
    """

    expansion = 4

    def __init__(self, inp: int, planes: int, stride: int, norm: str, stride_in_1x1: bool, groups: int, inner: int):
        super().__init__()
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        out = planes * self.expansion
        self.conv1 = _conv(inp, inner, 1, first)
        self.bn1 = norm_layer(norm, inner)
        self.conv2 = _conv(inner, inner, 3, second, groups)
        self.bn2 = norm_layer(norm, inner)
        self.conv3 = _conv(inner, out, 1)
        self.bn3 = norm_layer(norm, out)
        self.downsample = _shortcut(inp, out, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(conv_norm(self.conv1, self.bn1, x), inplace=True)
        y = F.relu(conv_norm(self.conv2, self.bn2, y), inplace=True)
        return _joined(conv_norm(self.conv3, self.bn3, y), x, self.downsample)


def _joined(y: Tensor, x: Tensor, downsample: nn.Module | None) -> Tensor:
    """``relu(y + shortcut(x))``, into ``y``, which nobody else holds: a map less to make."""
    return F.relu(y.add_(x if downsample is None else downsample(x)), inplace=True)


def _shortcut(inp: int, out: int, stride: int, norm: str) -> nn.Sequential | None:
    if stride == 1 and inp == out:
        return None
    return FoldingSequential(_conv(inp, out, 1, stride), norm_layer(norm, out))


BLOCKS: dict[int, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, int, int, int]]] = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (Bottleneck, (3, 4, 6, 3)),
    101: (Bottleneck, (3, 4, 23, 3)),
}


class ResNet(Backbone):
    """A ResNet without its classifier; see :class:`Backbone` for its maps and for ``norm`` and ``frozen_stages``.

    ``width`` multiplies the channels, rounded to a multiple of 8. ``stride_in_1x1`` moves a bottleneck's stride to its
    first convolution, as in the paper and in Caffe's weights. ``groups`` and ``width_per_group`` make it a ResNeXt (Xie
    et al., 2017): a bottleneck's 3x3 has ``width_per_group * groups`` channels in c2, twice that in c3 and so on, in
    ``groups`` convolution groups; 32 and 4 is the 32x4d.
    """

    def __init__(
        self,
        depth: int = 50,
        *,
        width: float = 1.0,
        norm: str = "bn",
        frozen_stages: int = 0,
        outputs: Sequence[str] = LEVELS,
        stride_in_1x1: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
    ) -> None:
        super().__init__(width, frozen_stages, outputs)
        if depth not in BLOCKS:
            raise ValueError(f"depth must be one of {sorted(BLOCKS)}, got {depth}")
        plain = (groups, width_per_group) == (1, 64)
        if min(groups, width_per_group) < 1 or (BLOCKS[depth][0] is BasicBlock and not plain):
            raise ValueError(
                f"groups and width_per_group must be positive, and 1 and 64 without bottlenecks (depth {depth}), got "
                f"{groups} and {width_per_group}"
            )
        block, counts = BLOCKS[depth]
        planes = [scaled(64 * 2**stage, width) for stage in range(4)]
        self.conv1 = nn.Conv2d(3, planes[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(norm, planes[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        parts, channels = {"stem": ["conv1", "bn1", "relu", "maxpool"]}, {}
        inp = planes[0]
        for stage, level in enumerate(self.built):
            inner = max(1, int(planes[stage] * width_per_group / 64)) * groups
            blocks = []
            for index in range(counts[stage]):
                stride = 2 if stage > 0 and index == 0 else 1
                blocks.append(block(inp, planes[stage], stride, norm, stride_in_1x1, groups, inner))
                inp = planes[stage] * block.expansion
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
            parts[level], channels[level] = [f"layer{stage + 1}"], inp
        self._initialise()
        self._assemble(parts, channels, ["fc.", *(f"layer{stage + 1}." for stage in range(len(self.built), 4))])

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
