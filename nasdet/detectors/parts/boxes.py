"""Box arithmetic. Boxes are ``[..., 4]`` as (x1, y1, x2, y2) in pixels unless said otherwise."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Size: TypeAlias = tuple[int, int] | Tensor
"""Height and width in pixels; a tensor where a program is exported, which shall serve every size."""


def box_area(boxes: Tensor) -> Tensor:
    """``(x2 - x1) * (y2 - y1)``, negative sides counted as 0: ``[..., 4]`` to ``[...]``."""
    size = (boxes[..., 2:] - boxes[..., :2]).clamp(min=0)
    return size[..., 0] * size[..., 1]


def _overlap(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and union of boxes that broadcast."""
    size = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    intersection = size[..., 0] * size[..., 1]
    return intersection, box_area(a) + box_area(b) - intersection


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes that broadcast: ``[..., 4]`` and ``[..., 4]`` to ``[...]``; 0 for no union."""
    intersection, union = _overlap(a, b)
    return intersection / union.clamp(min=torch.finfo(union.dtype).tiny)


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of every pair: ``[N, 4]`` and ``[M, 4]`` to ``[N, M]``."""
    return iou(a[:, None], b[None])


def giou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """Generalised IoU of boxes that broadcast: ``I / U - (E - U) / E``, E the smallest enclosing box's area.

    In [-1, 1]; finite, with finite gradients, for boxes without area. (Rezatofighi et al., 2019, algorithm 1.)
    """
    intersection, union = _overlap(a, b)
    size = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    hull = (size[..., 0] * size[..., 1]).clamp(min=eps)
    return intersection / union.clamp(min=eps) - (hull - union) / hull


def clip_boxes(boxes: Tensor, size: Size) -> Tensor:
    """Boxes moved inside an image of ``size`` (height, width)."""
    if isinstance(size, Tensor):
        limit = size.flip(0).repeat(2).to(boxes.dtype)
    else:
        height, width = size
        limit = boxes.new_tensor([width, height, width, height])
    return torch.minimum(boxes.clamp(min=0), limit)


def encode_ltrb(points: Tensor, boxes: Tensor) -> Tensor:
    """Distances (left, top, right, bottom) from points ``[..., 2]`` to the sides of boxes ``[..., 4]``."""
    return torch.cat([points - boxes[..., :2], boxes[..., 2:] - points], dim=-1)


def decode_ltrb(points: Tensor, distances: Tensor) -> Tensor:
    """The boxes whose sides lie at ``distances`` (left, top, right, bottom) from the points: undoes the encoding."""
    return torch.cat([points - distances[..., :2], points + distances[..., 2:]], dim=-1)
