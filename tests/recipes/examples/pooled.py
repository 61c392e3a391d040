"""A dummy backbone: means of ever larger squares, and a 1x1 convolution each."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from nasdet.detectors.backbone import LEVELS, Backbone, scaled
from nasdet.detectors.norm import norm_layer


class Pooled(Backbone):
    """A mean over 4 x 4 pixels, and of 2 x 2 of those from level to level; see :class:`Backbone` for the options."""

    def __init__(
        self, *, width: float = 1.0, norm: str = "bn", frozen_stages: int = 0, outputs: Sequence[str] = LEVELS
    ) -> None:
        super().__init__(width, frozen_stages, outputs)
        inp = scaled(16, width)
        self.stem = nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), nn.Conv2d(3, inp, 1, bias=False))
        parts, channels = {"stem": ["stem"]}, {}
        for level in self.built:
            out = 2 * inp
            conv = nn.Conv2d(inp, out, 1, bias=False)
            self.add_module(level, nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), conv, norm_layer(norm, out)))
            parts[level], channels[level] = [level], out
            inp = out
        self._assemble(parts, channels, ["fc."])
