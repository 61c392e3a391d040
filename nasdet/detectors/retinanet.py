"""RetinaNet (Lin et al., 2017): anchors on a pyramid, two towers, and the focal loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdet.detectors.one_stage import OneStage, Outputs
from nasdet.detectors.parts.anchors import AnchorGenerator, octave_sizes
from nasdet.detectors.parts.codec import PLAIN_CODEC, BoxCodec
from nasdet.detectors.parts.layers import normal_init
from nasdet.detectors.parts.locations import flatten_levels
from nasdet.detectors.parts.losses import at_least_float32, mean_over_ranks, sigmoid_focal_loss, world_size
from nasdet.detectors.parts.matcher import IGNORED, match_boxes
from nasdet.detectors.parts.objects import Objects, batch_objects
from nasdet.detectors.parts.postprocess import Selection

_NO_LOSS = -100.0  # a logit that background agrees with: the focal loss and its gradient are 0


class RetinaNet(OneStage):
    """The one-stage detector RetinaNet, composed of a backbone, a neck and towers (see :class:`OneStage`).

    ``anchors`` default to 3 sizes of 4 to 6.3 strides times 3 ratios at every cell, with torchvision's rounding.
    ``loss`` takes an anchor for positive from IoU ``positive_iou`` with an object, for background below
    ``negative_iou``; the anchors that overlap an object most are positive anyway. ``box_beta`` is where the smooth L1
    loss of the box deltas turns from squared to linear (0: L1). The remaining options are :class:`OneStage`'s. The
    score of a detection is the class probability.
    """

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module,
        towers: nn.Module,
        *,
        num_classes: int,
        anchors: AnchorGenerator | None = None,
        codec: BoxCodec = PLAIN_CODEC,
        positive_iou: float = 0.5,
        negative_iou: float = 0.4,
        box_beta: float = 0.0,
        nms_threshold: float = 0.5,
        **options: Any,
    ) -> None:
        super().__init__(backbone, neck, towers, num_classes=num_classes, nms_threshold=nms_threshold, **options)
        self.anchors = anchors if anchors is not None else AnchorGenerator(self.strides, octave_sizes(self.strides))
        if self.anchors.strides != self.strides:
            raise ValueError(f"anchors must be for the neck's strides {self.strides}, got {self.anchors.strides}")
        self.codec, self.box_beta = codec, box_beta
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        each = self.anchors.per_cell
        sizes = ((self.cls_channels, each * num_classes), (self.box_channels, each * 4))
        count = 1 if self.shared else len(self.strides)
        cls, box = ([nn.Conv2d(*pair, 3, padding=1) for _ in range(count)] for pair in sizes)
        normal_init(*cls, bias=math.log(self.prior / (1 - self.prior)))
        normal_init(*box)
        self.cls_logits: Any = cls[0] if self.shared else nn.ModuleList(cls)
        self.box_pred: Any = box[0] if self.shared else nn.ModuleList(box)

    def set_strides(self, strides: Sequence[int]) -> None:
        super().set_strides(strides)
        self.anchors = self.anchors.at_strides(strides)

    def forward(self, images: Tensor) -> Outputs:
        """Images ``[N, 3, H, W]`` to per-level lists over A anchors a cell.

        ``cls`` logits ``[N, A * K, H, W]`` and ``box`` deltas ``[N, A * 4, H, W]``, the anchor varying slowest.
        """
        outputs: Outputs = {"cls": [], "box": []}
        for index, level in enumerate(self.neck(self.backbone(images)).values()):
            box_feature, cls_feature = self.towers(level)
            predictors = (self.cls_logits, self.box_pred)
            cls, box = predictors if self.shared else (own[index] for own in predictors)
            outputs["cls"].append(cls(cls_feature))
            outputs["box"].append(box(box_feature))
        return outputs

    def loss(self, outputs: Outputs, targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The two losses as scalars: ``loss_cls`` (focal) and ``loss_box`` (smooth L1 of the deltas).

        Targets as for :meth:`FCOS.loss`; crowds and empty boxes are left out. Both sums are divided by the number of
        positive anchors of the batch (at least 1), its mean over the ranks of a distributed run. Every parameter gets
        a gradient, also when no image has an object. Float32 inside.
        """
        with torch.autocast(outputs["cls"][0].device.type, enabled=False):
            logits = at_least_float32(flatten_levels(outputs["cls"], self.num_classes))
            deltas = at_least_float32(flatten_levels(outputs["box"], 4))
            batch = batch_objects(targets, len(logits), self.num_classes)
            labels, places, wanted = self._targets(outputs["cls"], batch)
            count = mean_over_ranks(logits.new_tensor(float(len(places)))).clamp(min=1.0 / world_size())
            logits = logits.masked_fill((labels == IGNORED)[..., None], _NO_LOSS)
            box = F.smooth_l1_loss(deltas.flatten(0, 1)[places], wanted, reduction="sum", beta=self.box_beta)
            return {
                "loss_cls": sigmoid_focal_loss(logits, labels, self.focal_alpha, self.focal_gamma) / count,
                "loss_box": box / count,
            }

    @torch.no_grad()
    def _targets(self, maps: Sequence[Tensor], batch: Sequence[Objects]) -> tuple[Tensor, Tensor, Tensor]:
        """Labels ``[N, L]`` (-1 background, -2 ignored), the positives' places in the flat batch, and their deltas."""
        anchors = torch.cat(self.places(maps))
        labels, places, deltas = [], [], []
        for image, (boxes, classes, _) in enumerate(batch):
            match = match_boxes(anchors, boxes, self.negative_iou, self.positive_iou, keep_best=True)
            positive = (match >= 0).nonzero()[:, 0]
            taken = match[positive]
            match[positive] = classes[taken]
            labels.append(match)
            places.append(positive + image * len(anchors))
            deltas.append(self.codec.encode(anchors[positive], boxes[taken]))
        return torch.stack(labels), torch.cat(places), torch.cat(deltas)

    def places(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return self.anchors(maps)

    def level_candidates(
        self, outputs: Outputs, level: int, image: int, places: Tensor, selection: Selection
    ) -> tuple[Tensor, ...]:
        here = slice(image, image + 1)
        logits = flatten_levels([outputs["cls"][level][here]], self.num_classes)[0]
        deltas = flatten_levels([outputs["box"][level][here]], 4)[0]
        scores = at_least_float32(logits).sigmoid()
        scores, place, labels = selection.top(scores, scores, self.score_threshold, self.candidates)
        return self.codec.decode(places[place], at_least_float32(deltas[place])), scores, labels
