"""Fuzz of ``box_iou`` and ``generalized_box_iou`` against NumPy's float64, written for it."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from drawing import DTYPES, EPS32, Draw
from torch import Tensor

from nasdet.ops import box_iou, generalized_box_iou

WHOLE = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def _boxes(draw: Draw, count: int, dtype: torch.dtype, whole: bool) -> Tensor:
    """Some equal, without area, inverted, NaN or infinite; up to 60 pixels wide, none below 0 for unsigned integers."""
    corner = draw.uniform(count, 2, low=0 if dtype == torch.uint8 else -40, high=60)
    boxes = torch.cat([corner, corner + draw.uniform(count, 2, low=-0.05, high=1.0) * draw.choice((5, 60))], 1)
    boxes = boxes.clamp(min=0) if dtype == torch.uint8 else boxes
    boxes = boxes.round() if whole else boxes
    for row in range(count):
        if row and draw.chance(0.1):
            boxes[row] = boxes[draw.random.randrange(row)]
        if draw.chance(0.05):
            boxes[row, 2:] = boxes[row, :2]
        if dtype.is_floating_point and draw.chance(0.04):
            boxes[row, draw.random.randrange(4)] = draw.choice((math.nan, math.inf, -math.inf))
    return boxes.to(dtype)


def _exact(boxes1: Tensor, boxes2: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Intersection over union, its generalized form, union and hull of every pair."""
    a, b = boxes1.double().numpy()[:, None], boxes2.double().numpy()[None]
    with np.errstate(all="ignore"):
        inner = np.maximum(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0).prod(-1)
        hull = np.maximum(np.maximum(a[..., 2:], b[..., 2:]) - np.minimum(a[..., :2], b[..., :2]), 0).prod(-1)
        union = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1) - inner
        iou = inner / union
        return iou, iou - (hull - union) / hull, union, hull


def _check(draw: Draw, function: Callable[[Tensor, Tensor], Tensor], generalized: bool) -> None:
    whole = draw.chance(0.6)
    dtypes = [draw.choice((*DTYPES, *WHOLE) if whole else DTYPES) for _ in range(2)]
    boxes = [_boxes(draw, draw.size(30), dtype, whole) for dtype in dtypes]
    draw.note(dtypes=dtypes, whole=whole, counts=[len(b) for b in boxes])
    if max(len(b) for b in boxes) <= 6:
        draw.note(boxes=[b.tolist() for b in boxes])
    values = function(*(draw.laid_out(b) for b in boxes))
    result = torch.float64 if torch.float64 in dtypes else torch.float32
    assert values.dtype == result, f"dtype {values.dtype}, expected {result}"
    iou, giou, union, hull = _exact(*boxes)
    wanted = giou if generalized else iou
    with np.errstate(all="ignore"):
        outside = np.abs((hull - union) / hull) * generalized
        if whole:  # sides and areas are exact: what is rounded are the quotients and their difference
            room, checked = torch.finfo(result).eps * (np.abs(iou) + outside), np.ones_like(union, dtype=bool)
        else:  # each area is a product of rounded sides of up to 160 pixels
            eps = torch.finfo(torch.float64).eps if set(dtypes) == {torch.float64} else EPS32
            room = 2e5 * eps * ((1 + np.abs(iou)) / np.abs(union) + generalized * (1 + outside) / hull)
            checked = (room < 1) | np.isnan(union)
        same = (values.numpy() == wanted) | (np.isnan(values.numpy()) & np.isnan(wanted))
        wrong = checked & ~same & ~(np.abs(values.double().numpy() - wanted) <= room)
    assert values.shape == wanted.shape and not wrong.any(), f"got {values.numpy()[wrong]}, expected {wanted[wrong]}"


def fuzz_box_iou(draw: Draw) -> None:
    _check(draw, box_iou, False)


def fuzz_generalized_box_iou(draw: Draw) -> None:
    _check(draw, generalized_box_iou, True)
