"""Backbones by name."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from nasdet.detectors.backbone import Backbone
from nasdet.detectors.mobilenet import MobileNetV2
from nasdet.detectors.resnet import ResNet
from nasdet.detectors.shufflenet import ShuffleNetV2

#: DetNAS's spaces by blocks: stem and widths of the stages (Table 1; the last one scaled to 3.8 G), blocks
_DETNAS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "20": (16, (64, 160, 320, 640), (4, 4, 8, 4)),
    "40": (48, (96, 240, 480, 960), (8, 8, 16, 8)),
    "40_3_8g": (72, (172, 432, 864, 1728), (8, 8, 16, 8)),
}

#: name -> maker of a module with ``strides`` and ``channels``; torchvision's names for its nets
BACKBONES: dict[str, Callable[..., Backbone]] = {
    **{f"resnet{depth}": partial(ResNet, depth) for depth in (18, 34, 50, 101)},
    **{
        f"resnext{depth}_{groups}x{width}d": partial(ResNet, depth, groups=groups, width_per_group=width)
        for depth, groups, width in ((50, 32, 4), (101, 32, 4), (101, 32, 8), (101, 64, 4))
    },
    "mobilenet_v2": MobileNetV2,
    **{
        f"shufflenet_v2_{name}": partial(ShuffleNetV2, 24, (first, 2 * first, 4 * first))
        for name, first in (("x0_5", 48), ("x1_0", 116), ("x1_5", 176), ("x2_0", 244))
    },
    **{f"shufflenet_v2_{name}": partial(ShuffleNetV2, *sizes, shuffle="even_odd") for name, sizes in _DETNAS.items()},
}
