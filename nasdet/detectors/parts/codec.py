"""Boxes as four numbers relative to an anchor or proposal."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BoxCodec:
    """``(wx (x - xa) / wa, wy (y - ya) / ha, ww log(w / wa), wh log(h / ha))`` of centres and sizes; Ren et al., 2015.

    ``weights`` are (wx, wy, ww, wh): R-CNN's heads use (10, 10, 5, 5), the inverse of the deviations that they
    normalise by. Decoding takes at most ``limit`` for the two logarithms, 1000 / 16 times the anchor's side, so that a
    wild prediction stays finite.
    """

    weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0)
    limit: float = math.log(1000.0 / 16)

    def encode(self, anchors: Tensor, boxes: Tensor) -> Tensor:
        """Targets ``[..., 4]`` of boxes ``[..., 4]`` with an area, relative to anchors ``[..., 4]`` with one."""
        size, centre = _size_and_centre(anchors)
        wanted_size, wanted_centre = _size_and_centre(boxes)
        shift, growth = (wanted_centre - centre) / size, (wanted_size / size).log()
        return torch.cat([shift, growth], dim=-1) * anchors.new_tensor(self.weights)

    def decode(self, anchors: Tensor, deltas: Tensor) -> Tensor:
        """The boxes that ``deltas`` say relative to ``anchors``, all ``[..., 4]``: undoes ``encode``."""
        size, centre = _size_and_centre(anchors)
        deltas = deltas / deltas.new_tensor(self.weights)
        centre = deltas[..., :2] * size + centre
        half = deltas[..., 2:].clamp(max=self.limit).exp() * size * 0.5
        return torch.cat([centre - half, centre + half], dim=-1)


PLAIN_CODEC = BoxCodec()
"""The RPN's and RetinaNet's codec."""


def _size_and_centre(boxes: Tensor) -> tuple[Tensor, Tensor]:
    size = boxes[..., 2:] - boxes[..., :2]
    return size, boxes[..., :2] + size * 0.5
