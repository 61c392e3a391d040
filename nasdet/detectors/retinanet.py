"""RetinaNet (Lin et al., 2017): anchors on a pyramid, two towers, and the focal loss."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdet.detectors.parts.anchors import AnchorGenerator, octave_sizes
from nasdet.detectors.parts.codec import PLAIN_CODEC, BoxCodec
from nasdet.detectors.parts.layers import described, normal_init
from nasdet.detectors.parts.locations import flatten_levels
from nasdet.detectors.parts.losses import at_least_float32, mean_over_ranks, sigmoid_focal_loss, world_size
from nasdet.detectors.parts.matcher import IGNORED, match_boxes
from nasdet.detectors.parts.objects import Objects, batch_objects, check_sizes
from nasdet.detectors.parts.postprocess import finish_image, top_candidates

Outputs = dict[str, list[Tensor]]
_NO_LOSS = -100.0  # a logit that background agrees with: the focal loss and its gradient are 0


class RetinaNet(nn.Module):
    """The one-stage detector RetinaNet, composed of a backbone, a neck and towers.

    The parts are :class:`~nasdet.detectors.FCOS`'s. ``anchors`` default to 3 sizes of 4 to 6.3 strides times 3 ratios
    at every cell, with torchvision's rounding. ``loss`` takes an anchor for positive from IoU ``positive_iou`` with an
    object, for background below ``negative_iou``; the anchors that overlap an object most are positive anyway.

    The remaining options: ``prior``, the class probability at the start; ``focal_alpha`` and ``focal_gamma``;
    ``box_beta``, where the smooth L1 loss of the box deltas turns from squared to linear (0: L1); at detection,
    ``score_threshold`` on the class probability, ``candidates`` per level before and ``max_detections`` per image after
    suppression at IoU ``nms_threshold``.
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
        prior: float = 0.01,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        box_beta: float = 0.0,
        score_threshold: float = 0.05,
        candidates: int = 1000,
        nms_threshold: float = 0.5,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be positive, got {num_classes}")
        if not 0 < prior < 1:
            raise ValueError(f"prior must be between 0 and 1, got {prior}")
        strides = tuple(described(neck, "neck", "strides").values())
        self.anchors = anchors if anchors is not None else AnchorGenerator(strides, octave_sizes(strides))
        if self.anchors.strides != strides:
            raise ValueError(f"anchors must be for the neck's strides {strides}, got {self.anchors.strides}")
        self.num_classes = num_classes
        self.codec = codec
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.focal_alpha, self.focal_gamma, self.box_beta = focal_alpha, focal_gamma, box_beta
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.candidates, self.max_detections = candidates, max_detections
        self.backbone = backbone
        self.neck = neck
        self.towers = towers
        each = self.anchors.per_cell
        self.cls_logits = nn.Conv2d(described(towers, "towers", "cls_channels"), each * num_classes, 3, padding=1)
        self.box_pred = nn.Conv2d(described(towers, "towers", "box_channels"), each * 4, 3, padding=1)
        normal_init(self.cls_logits, bias=math.log(prior / (1 - prior)))
        normal_init(self.box_pred)

    def forward(self, images: Tensor) -> Outputs:
        """Images ``[N, 3, H, W]`` to per-level lists over A anchors a cell.

        ``cls`` logits ``[N, A * K, H, W]`` and ``box`` deltas ``[N, A * 4, H, W]``, the anchor varying slowest.
        """
        outputs: Outputs = {"cls": [], "box": []}
        for level in self.neck(self.backbone(images)).values():
            box_feature, cls_feature = self.towers(level)
            outputs["cls"].append(self.cls_logits(cls_feature))
            outputs["box"].append(self.box_pred(box_feature))
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
        anchors = torch.cat(self.anchors(maps))
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

    @torch.no_grad()
    def detect(self, outputs: Outputs, sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Detections per image, best first, inside the valid area ``sizes`` ``[(h, w)]`` of the batch.

        Each has ``boxes`` float32 ``[n, 4]`` in batch pixels, ``scores`` ``[n]`` (the class probability, above the
        threshold) and ``labels`` int64 ``[n]``; suppression is per class.
        """
        anchors = self.anchors(outputs["cls"])
        results = []
        for image, size in enumerate(check_sizes(sizes, len(outputs["cls"][0]))):
            levels = [self._level_candidates(outputs, level, image, anchors[level]) for level in range(len(anchors))]
            boxes, scores, labels = (torch.cat(parts) for parts in zip(*levels, strict=True))
            results.append(finish_image(boxes, scores, labels, size, self.nms_threshold, self.max_detections))
        return results

    def _level_candidates(
        self, outputs: Outputs, level: int, image: int, anchors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        here = slice(image, image + 1)
        logits = flatten_levels([outputs["cls"][level][here]], self.num_classes)[0]
        deltas = flatten_levels([outputs["box"][level][here]], 4)[0]
        scores = at_least_float32(logits).sigmoid()
        scores, place, labels = top_candidates(scores, scores > self.score_threshold, self.candidates)
        return self.codec.decode(anchors[place], at_least_float32(deltas[place])), scores, labels
