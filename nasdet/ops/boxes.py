"""Pairwise overlap of boxes: ``box_iou`` and ``generalized_box_iou``, in plain differentiable PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of every pair, ``intersection / (area1 + area2 - intersection)``; no epsilon.

    Two boxes without area give 0/0 = NaN. Inverted boxes (x2 < x1) overlap nothing, and their area counts with its
    sign. Values as torchvision's, which subtracts 16-bit coordinates before it widens them and so rounds once more.

    Args:
        boxes1: ``[N, 4]``: x1, y1, x2, y2 in any unit; any real dtype and device.
        boxes2: ``[M, 4]``, on the same device.

    Returns:
        ``[N, M]``: float64 when a box list is float64, else float32. Float16 and bfloat16 are widened to float32
        first, integers to int64; areas of integers are taken in float64. Differentiable.

    Raises:
        TypeError: no tensor, or bool or complex. ValueError: another shape, or two devices.
    """
    boxes1, boxes2 = _checked(boxes1, boxes2)
    intersection, union = _areas(boxes1, boxes2)
    wanted = _result_type(boxes1, boxes2)
    return intersection.to(wanted) / union.to(wanted)


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """GIoU of every pair, ``IoU - (hull - union) / hull``, hull the smallest box around both; from -1 to 1.

    Rezatofighi et al. 2019, "Generalized Intersection over Union", Algorithm 1. No epsilon: two equal boxes without
    area give NaN, as in torchvision.

    Args:
        boxes1: ``[N, 4]`` as for ``box_iou``.
        boxes2: ``[M, 4]``.

    Returns:
        ``[N, M]``, dtype as for ``box_iou``. Differentiable, also where boxes do not overlap.

    Raises:
        TypeError, ValueError: as ``box_iou``.
    """
    boxes1, boxes2 = _checked(boxes1, boxes2)
    intersection, union = _areas(boxes1, boxes2)
    left1, top1, right1, bottom1 = boxes1[:, :, None].unbind(1)
    left2, top2, right2, bottom2 = boxes2.unbind(1)
    width = (torch.maximum(right1, right2) - torch.minimum(left1, left2)).clamp(min=0)
    height = (torch.maximum(bottom1, bottom2) - torch.minimum(top1, top2)).clamp(min=0)
    hull, wanted = _area(width, height), _result_type(boxes1, boxes2)
    gap = (hull - union).to(wanted)
    return intersection.to(wanted) / union.to(wanted) - gap / hull.to(wanted)


def _checked(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    for name, boxes in (("boxes1", boxes1), ("boxes2", boxes2)):
        if not isinstance(boxes, Tensor) or boxes.is_complex() or boxes.dtype == torch.bool:
            kind = boxes.dtype if isinstance(boxes, Tensor) else type(boxes).__name__
            raise TypeError(f"{name} must be a tensor of real numbers, got {kind}")
        if boxes.dim() != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{name} must have shape (N, 4), got {tuple(boxes.shape)}")
    if boxes1.device != boxes2.device:
        raise ValueError(f"boxes2 must be on {boxes1.device}, got {boxes2.device}")
    return _widened(boxes1), _widened(boxes2)


def _widened(boxes: Tensor) -> Tensor:
    if boxes.is_floating_point():
        return boxes if boxes.dtype in (torch.float32, torch.float64) else boxes.float()
    return boxes.long()


def _result_type(boxes1: Tensor, boxes2: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (boxes1.dtype, boxes2.dtype) else torch.float32


def _area(width: Tensor, height: Tensor) -> Tensor:
    """In float64 for whole sides, whose product can be beyond every integer."""
    return width * height if width.is_floating_point() else width.double() * height.double()


def _areas(boxes1: Tensor, boxes2: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and union ``[N, M]``; coordinate by coordinate, which needs no ``[N, M, 2]`` in between."""
    left1, top1, right1, bottom1 = boxes1[:, :, None].unbind(1)
    left2, top2, right2, bottom2 = boxes2.unbind(1)
    width = (torch.minimum(right1, right2) - torch.maximum(left1, left2)).clamp(min=0)
    height = (torch.minimum(bottom1, bottom2) - torch.maximum(top1, top2)).clamp(min=0)
    intersection = _area(width, height)
    union = _area(right1 - left1, bottom1 - top1) + _area(right2 - left2, bottom2 - top2) - intersection
    return intersection, union
