"""Operators and detectors of other libraries in the races.

Without the library a contestant is absent, and the row says why.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from op_race import Call, Contestant
from torch import Tensor, nn


def torchvision_contestant(make: Callable[[Any], Call], **options: Any) -> Contestant:
    """``make(torchvision.ops)`` returns a function with the arguments of the op that is raced."""

    def build() -> Call:
        import torchvision

        return make(torchvision.ops)

    return Contestant("torchvision", build, may_fail=True, library="torchvision", **options)


def pooler(ops: Any) -> Call:
    """torchvision's ``MultiScaleRoIAlign`` with the arguments of ``multilevel_roi_align``, for one image.

    It is handed the boxes as a list, a view of the same memory, and adds the batch index itself, as its users let it.
    """
    modules: dict[Any, Any] = {}

    def call(
        features: Sequence[Tensor], rois: Tensor, output_size: int, spatial_scales: Any, sampling_ratio: int
    ) -> Tensor:
        key = output_size, sampling_ratio
        names = [str(level) for level in range(len(features))]
        if key not in modules:  # it infers the strides in its first call and keeps them
            modules[key] = ops.MultiScaleRoIAlign(names, output_size, sampling_ratio)
        size = round(features[0].shape[2] / spatial_scales[0]), round(features[0].shape[3] / spatial_scales[0])
        pooled: Tensor = modules[key](dict(zip(names, features, strict=True)), [rois[:, 1:]], [size])
        return pooled

    return call


def padded_loop(ops: Any) -> Call:
    """What a user of torchvision writes for a batch: ``batched_nms`` per image, padded to ``max_out`` with -1."""

    def call(
        boxes: Tensor, scores: Tensor, iou_threshold: float, max_out: int, *, idxs: Tensor
    ) -> tuple[Tensor, Tensor]:
        index = torch.full((len(boxes), max_out), -1, device=boxes.device)
        count = torch.empty(len(boxes), dtype=torch.int64, device=boxes.device)
        for image in range(len(boxes)):
            kept = ops.batched_nms(boxes[image], scores[image], idxs[image], iou_threshold)[:max_out]
            index[image, : len(kept)] = kept
            count[image] = len(kept)
        return index, count

    return call


TORCHVISION_DETECTORS = {"fcos": "FCOS", "retinanet": "RetinaNet", "faster_rcnn": "FasterRCNN", "mask_rcnn": "MaskRCNN"}


def torchvision_detector(name: str, classes: int, size: Sequence[int]) -> nn.Module:
    """torchvision's detector on ResNet-50 as it is fine-tuned: frozen batch norms, stem and first stage frozen.

    Random weights. Pictures are of ``size`` (height, width), and not resized; masks stay probabilities per box, and are
    not pasted into the picture.
    """
    from torchvision.models import detection
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    options: dict[str, Any] = {"backbone_name": "resnet50", "weights": None, "trainable_layers": 3}
    two_stage = name.endswith("rcnn")
    if not two_stage:
        options |= {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)}
    made: nn.Module = getattr(detection, TORCHVISION_DETECTORS[name])(
        resnet_fpn_backbone(**options), num_classes=classes + int(two_stage), min_size=min(size), max_size=max(size)
    )
    if name == "mask_rcnn":
        made.transform.postprocess = lambda result, *sizes: result
    return made
