"""Towers: what stands between the pyramid and a one-stage detector's predictors, shared by all levels.

A tower is a module ``forward(x [N, C, H, W]) -> (box_feature, cls_feature)``, both ``[N, C', H, W]``, with integers
``box_channels`` and ``cls_channels``.
"""

from __future__ import annotations

from torch import Tensor, nn

from nasdet.detectors.parts.layers import conv_norm_relu, normal_init


def _tower(channels: int, convs: int, norm: str | None) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(convs):
        conv, block = conv_norm_relu(channels, channels, norm, bias=True)
        normal_init(conv)
        layers += block
    return nn.Sequential(*layers)


class PlainTowers(nn.Module):
    """FCOS's and RetinaNet's head: two separate stacks of ``convs`` times 3x3 convolution, norm and ReLU.

    ``norm`` is one of :data:`nasdet.detectors.norm.NORMS`, or None for none (as in RetinaNet). Weights are drawn from a
    normal of deviation 0.01 (RetinaNet, section 4.1).
    """

    def __init__(self, channels: int = 256, convs: int = 4, norm: str | None = "gn") -> None:
        super().__init__()
        if channels < 1 or convs < 1:
            raise ValueError(f"channels and convs must be positive, got {channels} and {convs}")
        self.box_channels = self.cls_channels = channels
        self.box = _tower(channels, convs, norm)
        self.cls = _tower(channels, convs, norm)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """One level ``[N, C, H, W]`` to the box and the class feature, each of the same shape."""
        return self.box(x), self.cls(x)
