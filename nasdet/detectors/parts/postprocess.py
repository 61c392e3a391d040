"""From scored boxes to detections: candidates, suppression, clipping."""

from __future__ import annotations

import torch
from torch import Tensor

from nasdet.detectors.parts.boxes import box_area, clip_boxes, iou


def top_candidates(scores: Tensor, eligible: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best ``limit`` eligible entries of a score table ``[L, K]``, best first; NaN never is.

    Returns their scores, rows (locations) and columns (labels), each ``[at most limit]``. Equal scores keep the
    table's order.
    """
    rows, columns = (eligible & scores.isfinite()).nonzero(as_tuple=True)
    values, order = scores[rows, columns].sort(descending=True, stable=True)
    order = order[:limit]
    return values[:limit], rows[order], columns[order]


def class_nms(
    boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, max_kept: int | None = None
) -> Tensor:
    """Greedy non-maximum suppression within each class: int64 indices of the kept boxes, best first.

    A box is dropped if its IoU with a better kept box of the same label is greater than ``iou_threshold``. At most
    ``max_kept`` are kept. ``boxes`` ``[N, 4]``, ``scores`` ``[N]``, ``labels`` ``[N]``; of equal scores the first
    wins. Only boxes of one class are ever compared; coordinates may have any sign.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes.float()
    kept: list[Tensor] = []
    while len(order) and (max_kept is None or len(kept) < max_kept):
        best, order = order[0], order[1:]
        kept.append(best)
        clash = (iou(boxes[best], boxes[order]) > iou_threshold) & (labels[order] == labels[best])
        order = order[~clash]
    return torch.stack(kept) if kept else order.new_empty(0)


def finish_image(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    size: tuple[int, int],
    iou_threshold: float,
    max_detections: int,
) -> dict[str, Tensor]:
    """One image's candidates to its detections: clipped to ``size`` (h, w), without empty or NaN boxes, suppressed.

    Returns ``boxes`` float32 ``[n, 4]``, ``scores`` float32 ``[n]`` and ``labels`` int64 ``[n]``, best first.
    """
    boxes = clip_boxes(boxes.float(), size)
    whole = (box_area(boxes) > 0) & ~boxes.isnan().any(dim=1)
    boxes, scores, labels = boxes[whole], scores[whole].float(), labels[whole]
    kept = class_nms(boxes, scores, labels, iou_threshold, max_detections)
    return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}
