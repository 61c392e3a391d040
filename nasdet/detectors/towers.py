"""Towers: what stands between the pyramid and a one-stage detector's predictors, shared by all levels.

A tower is a module ``forward(x [N, C, H, W]) -> (box_feature, cls_feature)``, both ``[N, C', H, W]``, with integers
``box_channels`` and ``cls_channels``.
"""

from __future__ import annotations

from torch import Tensor, nn

from nasdet.detectors.norm import group_count, norm_layer
from nasdet.nn import GroupNormReLU


def _tower(channels: int, convs: int, norm: str) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(convs):
        conv = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.normal_(conv.weight, std=0.01)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        if norm == "gn":
            layers += [conv, GroupNormReLU(group_count(channels), channels)]
        else:
            layers += [conv, norm_layer(norm, channels), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class PlainTowers(nn.Module):
    """FCOS's and RetinaNet's head: two separate stacks of ``convs`` times 3x3 convolution, norm and ReLU.

    Weights are drawn from a normal of deviation 0.01 (RetinaNet, section 4.1).
    """

    def __init__(self, channels: int = 256, convs: int = 4, norm: str = "gn") -> None:
        super().__init__()
        if channels < 1 or convs < 1:
            raise ValueError(f"channels and convs must be positive, got {channels} and {convs}")
        self.box_channels = self.cls_channels = channels
        self.box = _tower(channels, convs, norm)
        self.cls = _tower(channels, convs, norm)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One level ``[N, C, H, W]`` to the box and the class feature, each of the same shape."""
        return self.box(x), self.cls(x)
