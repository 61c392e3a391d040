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
    rows, columns = (eligible & scores.isfinite()).nonzero(as_tuple=True)
    values, order = scores[rows, columns].sort(descending=True, stable=True)
    order = order[:limit]
    return values[:limit], rows[order], columns[order]


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
    kept = batched_nms(boxes, scores, labels, iou_threshold)[:max_detections]
    return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}
