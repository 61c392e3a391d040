"""MobileNetV2 backbone (Sandler et al., 2018) with torchvision's parameter names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from nasdet.detectors.backbone import LEVELS, Backbone
from nasdet.detectors.norm import FoldingSequential, norm_layer
from nasdet.nn import DepthwiseConv2d

# expansion, channels, blocks, stride of the first (Table 2), by the level that they end in
STAGES: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "c2": ((1, 16, 1, 1), (6, 24, 2, 2)),
    "c3": ((6, 32, 3, 2),),
    "c4": ((6, 64, 4, 2), (6, 96, 3, 1)),
    "c5": ((6, 160, 3, 2), (6, 320, 1, 1)),
}


def divisible(channels: float) -> int:
    """``channels`` rounded to the nearest multiple of 8 (halves up), or the next where that would lose a tenth."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def _conv(inp: int, out: int, kernel: int, stride: int, groups: int, norm: str) -> nn.Sequential:
    conv = (
        DepthwiseConv2d(inp, kernel, stride, kernel // 2, bias=False)
        if groups > 1
        else nn.Conv2d(inp, out, kernel, stride=stride, padding=kernel // 2, bias=False)
    )
    return FoldingSequential(conv, norm_layer(norm, out), nn.ReLU6(inplace=True))


class InvertedResidual(nn.Module):
    """1x1 to ``expansion * inp`` channels, depthwise 3x3 with the stride, linear 1x1; a shortcut where shapes allow.

    Without expansion (1) there is no first convolution.
    """

    def __init__(self, inp: int, out: int, stride: int, expansion: int, norm: str) -> None:
        super().__init__()
        inner = inp * expansion
        first = [_conv(inp, inner, 1, 1, 1, norm)] if expansion != 1 else []
        last = [nn.Conv2d(inner, out, 1, bias=False), norm_layer(norm, out)]
        self.conv = FoldingSequential(*first, _conv(inner, inner, 3, stride, inner, norm), *last)
        self.shortcut = stride == 1 and inp == out

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.shortcut else y


class MobileNetV2(Backbone):
    """MobileNetV2 without its last 1x1 convolution and classifier; see :class:`Backbone` for its maps and options.

    The maps are the linear ones at the ends of the bottlenecks: 24, 32, 96 and 320 channels. ``width`` is the paper's
    width multiplier: channels are rounded by :func:`divisible`, so that torchvision's weights of every width fit.
    """

    def __init__(
        self, *, width: float = 1.0, norm: str = "bn", frozen_stages: int = 0, outputs: Sequence[str] = LEVELS
    ) -> None:
        super().__init__(width, frozen_stages, outputs)
        inp = divisible(32 * width)
        layers: list[nn.Module] = [_conv(3, inp, 3, 2, 1, norm)]
        parts, channels = {"stem": ["features.0"]}, {}
        for level in self.built:
            begin = len(layers)
            for expansion, base, blocks, stride in STAGES[level]:
                out = divisible(base * width)
                for index in range(blocks):
                    layers.append(InvertedResidual(inp, out, 1 if index else stride, expansion, norm))
                    inp = out
            parts[level], channels[level] = [f"features.{index}" for index in range(begin, len(layers))], inp
        self.features = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
        blocks = 1 + sum(stage[2] for stages in STAGES.values() for stage in stages)
        unbuilt = [f"features.{index}." for index in range(len(layers), blocks + 1)]  # with the last 1x1's
        self._assemble(parts, channels, ["classifier.", *unbuilt])
