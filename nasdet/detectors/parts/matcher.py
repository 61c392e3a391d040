"""Which object each anchor or proposal stands for, by overlap."""

from __future__ import annotations

import torch
from torch import Tensor

from nasdet.ops import box_iou

BACKGROUND = -1
IGNORED = -2
_PAIRS = 1 << 20  # overlaps looked at in one go: bounds the memory to about 40 MB


def match_boxes(anchors: Tensor, boxes: Tensor, low: float, high: float, *, keep_best: bool = False) -> Tensor:
    """The object of each anchor: int64 ``[A]``, ``BACKGROUND`` (-1) or ``IGNORED`` (-2) where there is none.

    An anchor ``[A, 4]`` takes the box ``[M, 4]`` that it overlaps most, of equal ones the first, where that IoU is at
    least ``high``; it is background below ``low`` and ignored between. With ``keep_best`` an anchor that overlaps some
    box most of all anchors, or as much as the best, takes a box however little it overlaps it: the one that it itself
    overlaps most, which may be another, as in Detectron and torchvision. A box that no anchor touches gets none. All
    boxes are to have an area; an anchor that is empty or not a number is background. (Ren et al., 2015, section 3.1.2.)
    """
    if not 0 <= low <= high:
        raise ValueError(f"low and high must be 0 <= low <= high, got {low} and {high}")
    best = anchors.new_zeros(len(anchors))
    index = torch.zeros(len(anchors), dtype=torch.int64, device=anchors.device)
    forced = torch.zeros(len(anchors), dtype=torch.bool, device=anchors.device)
    step = max(1, _PAIRS // max(1, len(anchors)))
    for start in range(0, len(boxes) if len(anchors) else 0, step):
        overlap = box_iou(boxes[start : start + step], anchors).nan_to_num_(nan=0.0)
        value, row = overlap.max(dim=0)
        index = torch.where(value > best, row + start, index)
        best = torch.maximum(best, value)
        if keep_best:
            highest = overlap.amax(dim=1, keepdim=True)
            forced |= ((overlap == highest) & (highest > 0)).any(dim=0)
    unmatched = torch.where(best < low, BACKGROUND, IGNORED)
    return torch.where((best >= high) & (best > 0) | forced, index, unmatched)
