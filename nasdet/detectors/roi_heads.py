"""What is computed on regions of interest: pooling, and the networks of the box and the mask branch.

A *box trunk* is a module ``forward([R, C, S, S]) -> [R, D]`` that says ``out_channels`` D, a *mask trunk* one
``forward([R, C, S, S]) -> [R, D, S, S]`` that does; searched heads take their place.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from nasdet.detectors.parts.layers import conv_norm_relu, described, he_init, normal_init
from nasdet.ops import multilevel_roi_align


@dataclass(frozen=True)
class RoIPooler:
    """RoIAlign of boxes from the finest ``len(strides)`` levels of a pyramid, each box from the level of its size.

    ``size`` is the side of the result; the other options are :func:`nasdet.ops.multilevel_roi_align`'s. With
    ``lowest_level`` strides may repeat.
    """

    strides: tuple[int, ...]
    size: int
    sampling_ratio: int = 2
    aligned: bool = False
    canonical_scale: float = 224
    canonical_level: int = 4
    lowest_level: int | None = None

    def __call__(self, features: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Levels ``[N, C, H, W]``, finest first, and boxes ``[R_i, 4]`` per image to ``[sum R_i, C, size, size]``."""
        return multilevel_roi_align(
            features[: len(self.strides)],
            boxes,
            self.size,
            [1.0 / stride for stride in self.strides],
            self.sampling_ratio,
            self.aligned,
            canonical_scale=self.canonical_scale,
            canonical_level=self.canonical_level,
            lowest_level=self.lowest_level,
        )


class BoxTrunk(nn.Module):
    """``kind`` is ``"<n>conv<m>fc"`` or ``"<m>fc"``: 3x3 convolutions with ``norm``, then fully connected layers.

    ``2fc`` is FPN's head, ``4conv1fc`` DetNAS's and ``2conv1fc`` MSNAS's. Each convolution has ``channels`` outputs and
    is followed by norm (None for none) and ReLU, each fully connected layer has ``hidden`` and is followed by ReLU.
    ``size`` is the side of the pooled map.
    """

    def __init__(
        self, channels: int = 256, kind: str = "2fc", *, norm: str | None = None, hidden: int = 1024, size: int = 7
    ) -> None:
        super().__init__()
        counts = re.fullmatch(r"(?:(\d)conv)?([1-9])fc", kind)
        if not counts:
            raise ValueError(f"kind must be like '2fc', '4conv1fc' or '2conv1fc', got {kind!r}")
        layers: list[nn.Module] = []
        for _ in range(int(counts[1] or 0)):
            layers += conv_norm_relu(channels, channels, norm)[1]
        self.convs = nn.Sequential(*layers)
        widths = [channels * size * size, *[hidden] * int(counts[2])]
        self.fcs = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.out_channels = hidden
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """``[R, channels, size, size]`` to ``[R, hidden]``."""
        x = self.convs(x).flatten(1)
        for layer in self.fcs:
            x = F.relu(layer(x), inplace=True)
        return x


class BoxHead(nn.Module):
    """A box trunk and its two predictors: class logits, background first, and box deltas per class or for all.

    Weights are drawn from normals of deviation 0.01 and 0.001 (Girshick, 2015). The background has deltas too, as in
    Detectron and torchvision; nothing reads them, and their gradient is 0.
    """

    def __init__(self, trunk: nn.Module, num_classes: int, *, class_agnostic: bool = False) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be positive, got {num_classes}")
        self.num_classes, self.class_agnostic = num_classes, class_agnostic
        self.trunk = trunk
        width = described(trunk, "trunk", "out_channels")
        self.cls_score = nn.Linear(width, num_classes + 1)
        self.box_pred = nn.Linear(width, 4 if class_agnostic else 4 * (num_classes + 1))
        normal_init(self.cls_score)
        normal_init(self.box_pred, std=0.001)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """``[R, C, S, S]`` to logits ``[R, K + 1]`` and deltas ``[R, K + 1, 4]``, or ``[R, 1, 4]`` class-agnostic."""
        x = self.trunk(pooled)
        return self.cls_score(x), self.box_pred(x).unflatten(1, (-1, 4))


class MaskTrunk(nn.Module):
    """``convs`` times 3x3 convolution, norm (None for none) and ReLU (He et al., 2017, figure 4)."""

    def __init__(self, channels: int = 256, convs: int = 4, *, hidden: int = 256, norm: str | None = None) -> None:
        super().__init__()
        if convs < 1:
            raise ValueError(f"convs must be positive, got {convs}")
        layers: list[nn.Module] = []
        for index in range(convs):
            layers += conv_norm_relu(hidden if index else channels, hidden, norm)[1]
        self.convs = nn.Sequential(*layers)
        self.out_channels = hidden
        he_init(self)

    def forward(self, x: Tensor) -> Tensor:
        """``[R, channels, S, S]`` to ``[R, hidden, S, S]``."""
        return self.convs(x)


class MaskHead(nn.Module):
    """A mask trunk, a 2x2 deconvolution of stride 2 with ReLU, and a 1x1 predictor of one mask per class.

    The background has a mask too, the first, as in Detectron and torchvision; its gradient is 0.
    """

    def __init__(self, trunk: nn.Module, num_classes: int, *, hidden: int = 256) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be positive, got {num_classes}")
        self.num_classes = num_classes
        self.trunk = trunk
        self.deconv = nn.ConvTranspose2d(described(trunk, "trunk", "out_channels"), hidden, 2, stride=2)
        self.logits = nn.Conv2d(hidden, num_classes + 1, 1)
        he_init(self.deconv)
        he_init(self.logits)

    def forward(self, pooled: Tensor) -> Tensor:
        """``[R, C, S, S]`` to logits ``[R, K + 1, 2 S, 2 S]``."""
        return self.logits(F.relu(self.deconv(self.trunk(pooled)), inplace=True))
