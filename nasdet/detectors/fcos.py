"""FCOS (Tian et al., 2019) with its later improvements.

Centre sampling, GIoU loss, centerness on the box branch, and regression targets normalised by the stride.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdet.detectors.one_stage import OneStage, Outputs
from nasdet.detectors.parts.assign import assign_locations, size_ranges
from nasdet.detectors.parts.boxes import decode_ltrb, encode_ltrb
from nasdet.detectors.parts.locations import check_convention, flatten_levels, pyramid_points
from nasdet.detectors.parts.losses import (
    at_least_float32,
    centerness_loss,
    centerness_target,
    giou_loss,
    mean_over_ranks,
    sigmoid_focal_loss,
    world_size,
)
from nasdet.detectors.parts.objects import batch_objects
from nasdet.detectors.parts.postprocess import Selection


class FCOSHead(nn.Module):
    """The predictors: class logits on the class feature, distances and centerness on the box feature.

    ``distances = relu(scale_level * conv(box_feature))`` in strides, with one learnable scale per level.
    """

    def __init__(self, box_channels: int, cls_channels: int, num_classes: int, levels: int, prior: float) -> None:
        super().__init__()
        self.cls_logits = nn.Conv2d(cls_channels, num_classes, 3, padding=1)
        self.box_pred = nn.Conv2d(box_channels, 4, 3, padding=1)
        self.centerness = nn.Conv2d(box_channels, 1, 3, padding=1)
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(())) for _ in range(levels))
        biases = ((self.cls_logits, math.log(prior / (1 - prior))), (self.box_pred, 0.0), (self.centerness, 0.0))
        for conv, bias in biases:
            nn.init.normal_(conv.weight, std=0.01)
            if conv.bias is not None:
                nn.init.constant_(conv.bias, bias)

    def forward(self, box_feature: Tensor, cls_feature: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        """One level's features to logits ``[N, K, H, W]``, distances ``[N, 4, H, W]``, centerness ``[N, 1, H, W]``."""
        box = self.box_pred(box_feature)
        distances = F.relu(box * self.scales[level].to(box.dtype))
        return self.cls_logits(cls_feature), distances, self.centerness(box_feature)


class FCOS(OneStage):
    """The one-stage detector FCOS, composed of a backbone, a neck and towers (see :class:`OneStage`).

    ``ranges`` are the object sizes each level answers for, in pixels; by default FCOS's own. ``center_radius`` of
    centre sampling is in strides. ``convention="torchvision"`` places the locations as torchvision's FCOS does (see
    :func:`pyramid_points`) and compares the detection's score with the threshold. The remaining options are
    :class:`OneStage`'s. A location with class probability p above the threshold scores ``sqrt(p * centerness)``.
    """

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module,
        towers: nn.Module,
        *,
        num_classes: int,
        ranges: Sequence[tuple[float, float]] | None = None,
        center_radius: float = 1.5,
        nms_threshold: float = 0.6,
        convention: str = "centre",
        **options: Any,
    ) -> None:
        super().__init__(backbone, neck, towers, num_classes=num_classes, nms_threshold=nms_threshold, **options)
        self.convention = check_convention(convention)
        self.ranges = list(ranges) if ranges is not None else size_ranges(self.strides)
        if len(self.ranges) != len(self.strides):
            raise ValueError(f"ranges must have one entry per level ({len(self.strides)}), got {len(self.ranges)}")
        self.center_radius = center_radius
        sizes, levels = (self.box_channels, self.cls_channels, num_classes), len(self.strides)
        self.head: Any = (
            FCOSHead(*sizes, levels, self.prior)
            if self.shared
            else nn.ModuleList(FCOSHead(*sizes, 1, self.prior) for _ in range(levels))
        )

    def forward(self, images: Tensor) -> Outputs:
        """Images ``[N, 3, H, W]`` to per-level lists.

        ``cls`` logits ``[N, K, H, W]``, ``box`` distances (l, t, r, b) in strides ``[N, 4, H, W]``, ``centerness``
        logits ``[N, 1, H, W]``.
        """
        outputs: Outputs = {"cls": [], "box": [], "centerness": []}
        for index, level in enumerate(self.neck(self.backbone(images)).values()):
            head, scale = (self.head, index) if self.shared else (self.head[index], 0)
            cls, box, centerness = head(*self.towers(level), scale)
            outputs["cls"].append(cls)
            outputs["box"].append(box)
            outputs["centerness"].append(centerness)
        return outputs

    def loss(self, outputs: Outputs, targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The three losses as scalars: ``loss_cls`` (focal), ``loss_box`` (GIoU), ``loss_centerness`` (cross-entropy).

        Targets hold ``boxes`` ``[M, 4]`` in batch pixels, int64 ``labels`` ``[M]`` in 0..K-1, and may hold ``iscrowd``
        ``[M]``: crowds are left out. The class and centerness sums are divided by the number of positive locations,
        the box sum, weighted by the centerness target, by the sum of those weights; both are means over the ranks of
        a distributed run. Every parameter gets a gradient, also when no image has an object. Float32 inside.
        """
        with torch.autocast(outputs["cls"][0].device.type, enabled=False):
            logits, boxes, centerness = (
                at_least_float32(flatten_levels(outputs[name])) for name in ("cls", "box", "centerness")
            )
            labels, distances = self._targets(outputs["cls"], targets)
            positive = (labels >= 0).to(logits.dtype)
            quality = centerness_target(distances) * positive
            positives = mean_over_ranks(positive.sum()).clamp(min=1.0 / world_size())
            weight = mean_over_ranks(quality.sum()).clamp(min=1e-6)
            origin = distances.new_zeros(2)
            box = giou_loss(decode_ltrb(origin, boxes), decode_ltrb(origin, distances), quality)
            return {
                "loss_cls": sigmoid_focal_loss(logits, labels, self.focal_alpha, self.focal_gamma) / positives,
                "loss_box": box / weight,
                "loss_centerness": centerness_loss(centerness.squeeze(-1), quality, positive) / positives,
            }

    @torch.no_grad()
    def _targets(self, maps: Sequence[Tensor], targets: Sequence[Mapping[str, Tensor]]) -> tuple[Tensor, Tensor]:
        """Labels ``[N, L]`` (-1: background) and distances in strides ``[N, L, 4]`` (1 where background)."""
        batch = batch_objects(targets, maps[0].shape[0], self.num_classes)
        points = self.places(maps)
        flat = torch.cat(points)
        scale = torch.cat([flat.new_full((len(p), 1), s) for p, s in zip(points, self.strides, strict=True)])
        labels = flat.new_full((len(targets), len(flat)), -1, dtype=torch.int64)
        distances = flat.new_ones((len(targets), len(flat), 4))
        for index, (objects, classes, _) in enumerate(batch):
            if not len(objects):
                continue
            match = assign_locations(points, self.strides, self.ranges, objects, self.center_radius)
            found = match >= 0
            match = match.clamp(min=0)
            labels[index] = torch.where(found, classes[match], -1)
            encoded = encode_ltrb(flat, objects[match]) / scale
            distances[index] = torch.where(found[:, None], encoded, 1.0)
        return labels, distances

    def places(self, maps: Sequence[Tensor]) -> list[Tensor]:
        return pyramid_points(maps, self.strides, self.convention)

    def level_candidates(
        self, outputs: Outputs, level: int, image: int, places: Tensor, selection: Selection
    ) -> tuple[Tensor, ...]:
        cls, box, centerness = (
            at_least_float32(outputs[name][level][image]).flatten(1).T for name in ("cls", "box", "centerness")
        )
        probability = cls.sigmoid()
        scores = (probability * centerness.sigmoid()).sqrt()
        judged = probability if self.convention == "centre" else scores
        scores, location, labels = selection.top(scores, judged, self.score_threshold, self.candidates)
        return decode_ltrb(places[location], box[location] * self.strides[level]), scores, labels
