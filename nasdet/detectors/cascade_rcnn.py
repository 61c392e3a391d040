"""Cascade R-CNN (Cai and Vasconcelos, 2018): a sequence of box heads, each for better boxes than the one before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nasdet.detectors.faster_rcnn import BoxStage, box_losses
from nasdet.detectors.parts.boxes import Size, clip_boxes
from nasdet.detectors.parts.codec import BoxCodec
from nasdet.detectors.parts.locations import canvas
from nasdet.detectors.parts.losses import at_least_float32
from nasdet.detectors.parts.objects import Objects
from nasdet.detectors.parts.sampler import Samples, label_proposals

CASCADE_IOUS = (0.5, 0.6, 0.7)


def cascade_codecs() -> list[BoxCodec]:
    """Weights (10, 10, 5, 5) times 1, 2 and 3: the deltas shrink from stage to stage."""
    return [BoxCodec((10.0 * k, 10.0 * k, 5.0 * k, 5.0 * k)) for k in (1, 2, 3)]


class CascadeStages(nn.Module):
    """Box stages in a row: each refines the boxes of the one before, and learns from those it overlaps more.

    Every stage's head must be class-agnostic; its ``iou`` and ``codec`` are its own. The first stage draws the samples,
    and they go on from stage to stage, refined and labelled anew. A stage's losses count ``weights`` times. At
    detection the boxes are the last stage's and the class probabilities the mean over the stages, each on its own
    boxes; thresholds are the last stage's.
    """

    def __init__(self, stages: Sequence[BoxStage], weights: Sequence[float] = (1.0, 0.5, 0.25)) -> None:
        super().__init__()
        if not stages or len(weights) != len(stages):
            raise ValueError(f"weights must have one entry per stage ({len(stages)}), got {len(weights)}")
        if len({stage.num_classes for stage in stages}) > 1 or not all(s.head.class_agnostic for s in stages):
            raise ValueError("stages must be class-agnostic and for the same classes")
        self.stages = nn.ModuleList(stages)
        self.weights = tuple(weights)
        self.num_classes = stages[0].num_classes

    def _each(self) -> list[BoxStage]:
        return [stage for stage in self.stages if isinstance(stage, BoxStage)]

    def forward(self, features: Sequence[Tensor], boxes: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Every stage's logits and deltas, each on the boxes that the stage before refined."""
        size = canvas(features, self._each()[0].pooler.strides)
        return [(logits, deltas) for logits, deltas, _ in self._run(features, boxes, [size] * len(boxes))]

    def _run(
        self, features: Sequence[Tensor], boxes: Sequence[Tensor], sizes: Sequence[Size]
    ) -> list[tuple[Tensor, Tensor, Sequence[Tensor]]]:
        """Every stage's logits, deltas, and the boxes that it saw."""
        results = []
        for stage in self._each():
            logits, deltas = stage(features, boxes)
            results.append((logits, deltas, boxes))
            boxes = refine(boxes, deltas, stage.codec, sizes)
        return results

    def losses(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], batch: Sequence[Objects]
    ) -> tuple[dict[str, Tensor], Samples]:
        """``loss_cls_1``, ``loss_box_1``, ``loss_cls_2``, ... per stage, and the first stage's samples."""
        each = self._each()
        sizes = [canvas(features, each[0].pooler.strides)] * len(batch)
        first = samples = each[0].draw(features, proposals, batch)
        losses: dict[str, Tensor] = {}
        for index, (stage, weight) in enumerate(zip(each, self.weights, strict=True), 1):
            logits, deltas = stage(features, samples.boxes)
            classes, moves = box_losses(logits, deltas, samples, batch, stage.codec, stage.box_beta)
            losses |= {f"loss_cls_{index}": weight * classes, f"loss_box_{index}": weight * moves}
            if index < len(each):
                refined = refine(samples.boxes, deltas, stage.codec, sizes)
                samples = label_proposals(refined, batch, each[index].iou)
        return losses, first

    def predict(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[Size]
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """The stages' mean probabilities, the last one's deltas, and the boxes per image that it saw."""
        results = self._run(features, proposals, sizes)
        tables = [at_least_float32(logits).softmax(dim=1) for logits, _, _ in results]
        _, deltas, boxes = results[-1]
        return torch.stack(tables).mean(dim=0), deltas, boxes

    def select(self, *predicted: Any, **options: Any) -> list[dict[str, Tensor]]:
        """As :meth:`BoxStage.select`, with the last stage's thresholds."""
        return self._each()[-1].select(*predicted, **options)


@torch.no_grad()
def refine(boxes: Sequence[Tensor], deltas: Tensor, codec: BoxCodec, sizes: Sequence[Size]) -> list[Tensor]:
    """The boxes per image that class-agnostic deltas ``[R, 1, 4]`` of all images in turn say, clipped; no gradient."""
    moves = at_least_float32(deltas[:, 0]).split([len(image) for image in boxes])
    return [clip_boxes(codec.decode(image, move), size) for image, move, size in zip(boxes, moves, sizes, strict=True)]
