"""From scored boxes to detections: candidates, suppression, clipping."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nasdet.detectors.parts.boxes import Size, box_area, clip_boxes
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


@dataclass(frozen=True)
class Selection:
    """How a detector chooses: as many results as there are, above its own score threshold or ``threshold``.

    A subclass may give results of one shape instead (see :mod:`nasdet.detectors.static`).
    """

    threshold: float | Tensor | None = None

    def top(self, scores: Tensor, judged: Tensor, threshold: float, limit: int) -> tuple[Tensor, Tensor, Tensor]:
        """:func:`top_candidates` of those where ``judged`` ``[L, K]`` is above the threshold."""
        return top_candidates(scores, judged > (threshold if self.threshold is None else self.threshold), limit)

    def survivors(
        self,
        boxes: Tensor,
        scores: Tensor,
        labels: Tensor,
        size: Size,
        iou_threshold: float,
        max_detections: int,
        min_side: float = 0.0,
    ) -> dict[str, Tensor]:
        """What is left of one image's candidates, clipped to ``size`` (h, w) and suppressed per label.

        Boxes that are empty, not a number, thinner than ``min_side`` pixels or scored -inf are dropped before.

        Returns ``boxes`` ``[n, 4]``, ``scores`` ``[n]`` and ``labels`` int64 ``[n]``, best first.
        """
        boxes = clip_boxes(boxes, size)
        whole = whole_boxes(boxes, min_side) & (scores > -math.inf)
        boxes, scores, labels = boxes[whole], scores[whole], labels[whole]
        kept = batched_nms(boxes, scores, labels, iou_threshold)[:max_detections]
        return {"boxes": boxes[kept], "scores": scores[kept], "labels": labels[kept]}

    def finish(self, boxes: Tensor, scores: Tensor, *rest: Any, **options: Any) -> dict[str, Tensor]:
        """One image's candidates to its detections: :meth:`survivors` in float32."""
        return self.survivors(boxes.float(), scores.float(), *rest, **options)


AS_MANY = Selection()
"""What ``detect`` takes by default."""
