"""From scored boxes to detections: candidates, suppression, clipping."""

from __future__ import annotations

from torch import Tensor

from nasdet.detectors.parts.boxes import box_area, clip_boxes
from nasdet.ops.nms import batched_nms


def top_candidates(scores: Tensor, eligible: Tensor, limit: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best ``limit`` eligible entries of a score table ``[L, K]``, best first; NaN never is.

    Returns their scores, rows (locations) and columns (labels), each ``[at most limit]``. Equal scores keep the
    table's order.
    """
    rows, columns = eligible.nonzero(as_tuple=True)
    values = scores[rows, columns]
    finite = values.isfinite().nonzero()[:, 0]  # of the few that are eligible: the table may have millions
    values, order = values[finite].sort(descending=True, stable=True)
    order = finite[order[:limit]]
    return values[:limit], rows[order], columns[order]


def whole_boxes(boxes: Tensor, min_side: float = 0.0) -> Tensor:
    """Which of ``boxes`` ``[N, 4]`` are numbers, not empty, and at least ``min_side`` wide and high: bool ``[N]``."""
    thin = (boxes[:, 2:] - boxes[:, :2]).amin(dim=1)
    return (box_area(boxes) > 0) & (thin >= min_side) & ~boxes.isnan().any(dim=1)


def finish_image(
    boxes: Tensor,
    scores: Tensor,
    labels: Tensor,
    size: tuple[int, int],
    iou_threshold: float,
    max_detections: int,
    min_side: float = 0.0,
) -> dict[str, Tensor]:
    """One image's candidates to its detections: clipped to ``size`` (h, w), suppressed per label.

    Boxes that are empty, not a number, or thinner than ``min_side`` pixels are dropped before.

    Returns ``boxes`` float32 ``[n, 4]``, ``scores`` float32 ``[n]`` and ``labels`` int64 ``[n]``, best first.
    """
    boxes = clip_boxes(boxes.float(), size)
    whole = whole_boxes(boxes, min_side)
    boxes, scores, labels = boxes[whole], scores[whole].float(), labels[whole]
    kept = batched_nms(boxes, scores, labels, iou_threshold)[:max_detections]
    return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}
