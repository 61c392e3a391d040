"""Faster R-CNN with a pyramid (Ren et al., 2015; Lin et al., 2017), and what every two-stage detector shares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdet.detectors.parts.boxes import Size
from nasdet.detectors.parts.codec import BoxCodec
from nasdet.detectors.parts.locations import canvas
from nasdet.detectors.parts.losses import at_least_float32
from nasdet.detectors.parts.objects import Objects, batch_objects, check_sizes
from nasdet.detectors.parts.postprocess import AS_MANY, Selection
from nasdet.detectors.parts.sampler import Samples, sample_proposals
from nasdet.detectors.roi_heads import BoxHead, RoIPooler
from nasdet.detectors.rpn import RPN

Outputs = dict[str, list[Tensor]]
HEAD_CODEC = BoxCodec((10.0, 10.0, 5.0, 5.0))
"""The box codec of R-CNN's heads."""
MIN_SIDE = 1e-2
"""Thinner detections, in pixels, are dropped, as in torchvision."""


def box_losses(
    logits: Tensor, deltas: Tensor, samples: Samples, batch: Sequence[Objects], codec: BoxCodec, beta: float
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the classes and smooth L1 of the positives' deltas, both divided by the number of samples.

    ``logits`` ``[R, K + 1]`` and ``deltas`` ``[R, K + 1, 4]``, or ``[R, 1, 4]`` class-agnostic, of all images' samples
    in turn.
    """
    labels = torch.cat(samples.labels)
    count = max(1, len(labels))
    classes = F.cross_entropy(at_least_float32(logits), labels, reduction="sum") / count
    positives = samples.positives()
    wanted = [
        codec.encode(boxes, objects.boxes[match])
        for boxes, match, objects in zip(positives.boxes, positives.matches, batch, strict=True)
    ]
    rows = (labels > 0).nonzero()[:, 0]
    column = labels[rows] if deltas.shape[1] > 1 else torch.zeros_like(rows)
    predicted = at_least_float32(deltas[rows, column])
    return classes, F.smooth_l1_loss(predicted, torch.cat(wanted), reduction="sum", beta=beta) / count


class BoxStage(nn.Module):
    """The second stage: proposals sampled and learnt from, or classified, refined and suppressed.

    At training ``samples`` proposals and objects of each image are drawn, at most ``positive_fraction`` of them
    positive (IoU from ``iou``); ``box_beta`` is the smooth L1 loss's. At detection a box needs a class probability
    above ``score_threshold``; suppression is per class at IoU ``nms_threshold``, to ``max_detections`` per image.
    """

    def __init__(
        self,
        head: BoxHead,
        pooler: RoIPooler,
        *,
        codec: BoxCodec = HEAD_CODEC,
        iou: float = 0.5,
        samples: int = 512,
        positive_fraction: float = 0.25,
        box_beta: float = 1 / 9,
        score_threshold: float = 0.05,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        self.head, self.pooler, self.codec = head, pooler, codec
        self.num_classes = head.num_classes
        self.iou, self.samples, self.positive_fraction, self.box_beta = iou, samples, positive_fraction, box_beta
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.max_detections = max_detections

    def forward(self, features: Sequence[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The head's logits and deltas for the boxes of all images in turn."""
        return self.head(self.pooler(features, boxes))

    def draw(self, features: Sequence[Tensor], proposals: Sequence[Tensor], batch: Sequence[Objects]) -> Samples:
        """The boxes to learn from."""
        size = canvas(features, self.pooler.strides)
        return sample_proposals(proposals, batch, size, self.iou, self.samples, self.positive_fraction)

    def losses(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], batch: Sequence[Objects]
    ) -> tuple[dict[str, Tensor], Samples]:
        """``loss_cls`` and ``loss_box``, and the samples that they were computed on."""
        samples = self.draw(features, proposals, batch)
        logits, deltas = self(features, samples.boxes)
        classes, boxes = box_losses(logits, deltas, samples, batch, self.codec, self.box_beta)
        return {"loss_cls": classes, "loss_box": boxes}, samples

    def predict(
        self, features: Sequence[Tensor], proposals: Sequence[Tensor], sizes: Sequence[Size]
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Class probabilities ``[R, K + 1]``, deltas, and the boxes per image that these are relative to."""
        logits, deltas = self(features, proposals)
        return at_least_float32(logits).softmax(dim=1), deltas, proposals

    def select(
        self,
        probabilities: Tensor,
        deltas: Tensor,
        proposals: Sequence[Tensor],
        sizes: Sequence[Size],
        selection: Selection = AS_MANY,
    ) -> list[dict[str, Tensor]]:
        """What ``predict`` gave to each image's boxes, scores and labels."""
        counts = [len(boxes) for boxes in proposals]
        images = zip(probabilities.split(counts), deltas.split(counts), proposals, sizes, strict=True)
        found = []
        for table, moves, boxes, size in images:
            scores = table[:, 1:]
            scores, rows, labels = selection.top(scores, scores, self.score_threshold, scores.numel())
            column = labels + 1 if moves.shape[1] > 1 else torch.zeros_like(labels)
            decoded = self.codec.decode(boxes[rows], at_least_float32(moves[rows, column]))
            limits = (self.nms_threshold, self.max_detections, MIN_SIDE)
            found.append(selection.finish(decoded, scores, labels, size, *limits))
        return found


class FasterRCNN(nn.Module):
    """A two-stage detector, composed of a backbone, a neck, an RPN, a box stage and, where it has masks, a mask stage.

    ``neck(maps)`` gives the pyramid, all of whose levels the RPN slides over; ``boxes`` is a :class:`BoxStage` or
    :class:`~nasdet.detectors.CascadeStages`, ``masks`` a :class:`~nasdet.detectors.MaskStage` or None. Each pools from
    the levels that its pooler names.
    """

    def __init__(
        self, backbone: nn.Module, neck: nn.Module, rpn: RPN, boxes: nn.Module, masks: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.neck = neck
        self.rpn = rpn
        self.boxes = boxes
        self.masks = masks
        self.num_classes: int = boxes.num_classes  # type: ignore[assignment]  # nn.Module's attributes have no types
        if masks is not None and masks.num_classes != self.num_classes:
            raise ValueError(f"masks must be for {self.num_classes} classes as boxes, got {masks.num_classes}")

    def set_strides(self, strides: Sequence[int]) -> None:
        """Say the strides of the pyramid's maps anew, where the backbone is a pyramid whose strides have changed: a
        supernet. Anchors and groups of boxes stay as large as they are."""
        self.neck.set_strides(strides)  # type: ignore[operator]  # a Pyramid's
        self.rpn.anchors = self.rpn.anchors.at_strides(strides)
        for stage in self.modules():
            if isinstance(pooler := getattr(stage, "pooler", None), RoIPooler):
                stage.pooler = replace(pooler, strides=tuple(strides))  # type: ignore[assignment]  # not a module

    def forward(self, images: Tensor) -> Outputs:
        """Images ``[N, 3, H, W]`` to per-level lists: ``features``, the pyramid, and what the RPN says of it.

        ``rpn_cls`` are objectness logits ``[N, A, H, W]``, ``rpn_box`` deltas ``[N, A * 4, H, W]``. The rest depends
        on boxes, and happens in ``loss`` and ``detect``.
        """
        features = list(self.neck(self.backbone(images)).values())
        cls, box = self.rpn(features)
        return {"features": features, "rpn_cls": cls, "rpn_box": box}

    def loss(self, outputs: Outputs, targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The losses as scalars: ``loss_rpn_cls``, ``loss_rpn_box``, then the box stage's and the mask stage's.

        Targets as for :meth:`FCOS.loss`; mask stages also need ``masks`` bool ``[M, h, w]``. Which anchors and
        proposals are learnt from is drawn from torch's global generator. Proposals are clipped to the padded canvas.
        Every parameter gets a gradient, also when no image has an object. The heads run in the dtype of the features;
        losses are float32.
        """
        features = outputs["features"]
        batch = batch_objects(targets, len(features[0]), self.num_classes)
        with torch.autocast(features[0].device.type, enabled=False):
            losses = self.rpn.loss(outputs["rpn_cls"], outputs["rpn_box"], batch)
            sizes = [canvas(features, self.rpn.anchors.strides)] * len(batch)
            proposals = self.rpn.proposals(outputs["rpn_cls"], outputs["rpn_box"], sizes, training=True)
        with _precision_of(features):
            stage, samples = self.boxes.losses(features, proposals, batch)  # type: ignore[operator]  # a stage's method
            losses |= stage
            if self.masks is not None:
                losses |= self.masks.losses(features, samples, batch, targets)  # type: ignore[operator]  # as above
        return losses

    @torch.no_grad()
    def detect(
        self, outputs: Outputs, sizes: Sequence[Size], selection: Selection = AS_MANY
    ) -> list[dict[str, Tensor]]:
        """Detections per image, best first, inside the valid area ``sizes`` ``[(h, w)]`` of the batch.

        Each has ``boxes`` float32 ``[n, 4]`` in batch pixels, ``scores`` ``[n]``, ``labels`` int64 ``[n]``, and with a
        mask stage what :meth:`MaskStage.complete` adds. To be called in evaluation mode.
        """
        features = outputs["features"]
        sizes = check_sizes(sizes, len(features[0]))
        with torch.autocast(features[0].device.type, enabled=False):
            proposals = self.rpn.proposals(outputs["rpn_cls"], outputs["rpn_box"], sizes, training=False)
        with _precision_of(features):
            predicted = self.boxes.predict(features, proposals, sizes)  # type: ignore[operator]  # as above
            found: list[dict[str, Tensor]] = self.boxes.select(*predicted, sizes, selection)  # type: ignore[operator]  # as above
            if self.masks is not None:
                found = self.masks.complete(features, found)  # type: ignore[operator]  # as above
        return found


def _precision_of(features: Sequence[Tensor]) -> Any:
    """The heads compute as the backbone did, wherever ``loss`` and ``detect`` are called."""
    dtype = features[0].dtype
    half = dtype in (torch.float16, torch.bfloat16)
    return torch.autocast(features[0].device.type, dtype if half else torch.bfloat16, enabled=half)


class FixedRoIs(nn.Module):
    """A two-stage detector run on as many boxes as it is told, so that :func:`nasdet.measure.count` sees all of it.

    ``forward(images)`` runs backbone, neck and RPN, the box stage on ``proposals`` boxes per image and the mask stage
    on ``detections``; where they lie does not matter. The parts keep their names.
    """

    def __init__(self, model: FasterRCNN, proposals: int = 1000, detections: int = 100) -> None:
        super().__init__()
        self.proposals, self.detections = proposals, detections
        for name, part in model.named_children():
            self.add_module(name, part)

    def forward(self, images: Tensor) -> None:
        model: Any = self
        features = list(model.neck(model.backbone(images)).values())
        model.rpn(features)
        box = images.new_tensor([0.0, 0.0, 64.0, 64.0]) if images.device.type != "meta" else images.new_empty(4)
        model.boxes(features, [box.expand(self.proposals, 4)] * len(images))
        if getattr(model, "masks", None) is not None:
            model.masks(features, [box.expand(self.detections, 4)] * len(images))


def countable(model: nn.Module) -> nn.Module:
    """What :func:`nasdet.measure.count` is given for a detector: a two-stage one on fixed RoIs, others as they are."""
    return FixedRoIs(model) if isinstance(model, FasterRCNN) else model
