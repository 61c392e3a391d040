"""Detectors: backbones, pyramid, towers, and one file per detector over shared parts.

A detector is composed of parts, each a plain ``torch.nn.Module``::

    backbone = ResNet(18, norm="gn", outputs=("c3", "c4", "c5"))
    neck = FPN(backbone.channels, backbone.strides, 64)
    model = FCOS(backbone, neck, PlainTowers(64), num_classes=10)

    outputs = model(images)                      # per-level maps
    losses = model.loss(outputs, targets)        # dict of scalars; their sum is the loss
    detections = model.detect(outputs, sizes)    # boxes, scores, labels per image

Two-stage detectors are composed of a backbone, a neck, an RPN, a box stage and a mask stage: see :class:`FasterRCNN`.

The registries name parts on the command line, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from nasdet.detectors.backbone import Backbone
from nasdet.detectors.backbones import BACKBONES
from nasdet.detectors.build import (
    BackboneLike,
    build_cascade_rcnn,
    build_faster_rcnn,
    build_fcos,
    build_mask_rcnn,
    build_mask_scoring_rcnn,
    build_retinanet,
)
from nasdet.detectors.cascade_rcnn import CascadeStages
from nasdet.detectors.faster_rcnn import BoxStage, FasterRCNN, FixedRoIs, countable
from nasdet.detectors.fcos import FCOS
from nasdet.detectors.fpn import FPN, Pyramid
from nasdet.detectors.mask_rcnn import MaskStage
from nasdet.detectors.mask_scoring_rcnn import MaskIoUHead, MaskScoringStage
from nasdet.detectors.mobilenet import MobileNetV2
from nasdet.detectors.norm import FrozenBatchNorm2d
from nasdet.detectors.parts.anchors import AnchorGenerator
from nasdet.detectors.parts.codec import BoxCodec
from nasdet.detectors.resnet import ResNet
from nasdet.detectors.retinanet import RetinaNet
from nasdet.detectors.roi_heads import BoxHead, BoxTrunk, MaskHead, MaskTrunk, RoIPooler
from nasdet.detectors.rpn import RPN
from nasdet.detectors.shufflenet import ShuffleNetV2
from nasdet.detectors.towers import PlainTowers
from nasdet.detectors.weights import load_backbone_weights, load_torchvision_detector

__all__ = [
    "BACKBONES",
    "DETECTORS",
    "FCOS",
    "FPN",
    "RPN",
    "AnchorGenerator",
    "Backbone",
    "BackboneLike",
    "BoxCodec",
    "BoxHead",
    "BoxStage",
    "BoxTrunk",
    "CascadeStages",
    "FasterRCNN",
    "FixedRoIs",
    "MaskHead",
    "MaskIoUHead",
    "MaskScoringStage",
    "MaskStage",
    "MaskTrunk",
    "MobileNetV2",
    "PlainTowers",
    "Pyramid",
    "ResNet",
    "RetinaNet",
    "RoIPooler",
    "ShuffleNetV2",
    "TWO_STAGE",
    "WITH_MASKS",
    "build_cascade_rcnn",
    "build_faster_rcnn",
    "build_fcos",
    "build_mask_rcnn",
    "build_mask_scoring_rcnn",
    "build_retinanet",
    "countable",
    "from_torchvision",
    "load_backbone_weights",
    "load_torchvision_detector",
    "parts_of",
]

#: torchvision's name without its backbone -> maker, options
_TORCHVISION: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "fasterrcnn": (build_faster_rcnn, {}),
    "maskrcnn": (build_mask_rcnn, {}),
    "retinanet": (build_retinanet, {"max_detections": 300}),
    "fcos": (build_fcos, {"convention": "torchvision", "score_threshold": 0.2}),
}


def from_torchvision(
    name: str, state: Mapping[str, Tensor], *, norm: str = "frozen_bn", eps: float | None = None, **options: Any
) -> nn.Module:
    """Our detector with the weights, and the detections, of a torchvision one; in evaluation mode.

    ``name`` is like ``"fasterrcnn_resnet50_fpn"``, with ``maskrcnn``, ``retinanet`` and ``fcos`` in its place, and a
    ResNet or ResNeXt of :data:`BACKBONES`; ``state`` is its state dict, which also says how many classes there are.
    ``eps`` is the batch norms', which no state dict tells: torchvision sets it to 0 for its ``COCO_V1`` weights of all
    but FCOS. By default it is 0 for those files (frozen norms, names of torchvision's older format) and 1e-5 for all
    else: say 0 for the state of a model that was made from them. ``options`` go to the maker.
    Labels of two-stage detectors are torchvision's less 1 (it counts the background). Images are those that
    torchvision's own transform makes. Boxes without area, which its one-stage detectors keep, are dropped.
    """
    kind, _, body = name.removesuffix("_fpn").partition("_")
    if kind not in _TORCHVISION or body not in BACKBONES or not name.endswith("_fpn"):
        raise ValueError(f"name must be {'|'.join(_TORCHVISION)}_<backbone>_fpn, got {name!r}")
    maker, defaults = _TORCHVISION[kind]
    box, classes = "roi_heads.box_predictor.cls_score.bias", "head.classification_head.cls_logits.bias"
    if box not in state and classes not in state:
        raise ValueError(f"state must have {box} or {classes}, got {len(state)} other names")
    if box in state:
        count = len(state[box]) - 1
    else:
        count = len(state[classes]) // (9 if kind == "retinanet" else 1)
    model = maker(body, count, norm=norm, **defaults | options)
    load_torchvision_detector(model, state)
    if eps is None:
        eps = 0.0 if kind != "fcos" and _as_published(state) else 1e-5
    for module in model.modules():
        if isinstance(module, (FrozenBatchNorm2d, nn.modules.batchnorm._BatchNorm)):
            module.eps = eps
    return model.eval()


def _as_published(state: Mapping[str, Tensor]) -> bool:
    """Whether ``state`` is of frozen norms, which count no batches, and in the older format of torchvision's files."""
    counted = any(key.endswith("num_batches_tracked") for key in state)
    return "backbone.fpn.inner_blocks.0.weight" in state and not counted


#: detectors that learn masks: their data set must give them
WITH_MASKS = ("mask_rcnn", "mask_scoring_rcnn")

#: detectors without towers: their heads see regions
TWO_STAGE = ("faster_rcnn", "cascade_rcnn", "mask_rcnn", "mask_scoring_rcnn")


def parts_of(detector: str) -> tuple[str, ...]:
    """The parts of a named detector that can be searched: ``"backbone"`` (transformed), ``"body"`` (the backbone as a
    whole), ``"detector"`` (several parts together), and ``"towers"`` or ``"mask_trunk"``."""
    towers = () if detector in TWO_STAGE else ("towers",)
    return ("backbone", "body", "detector", *towers, *(("mask_trunk",) if detector in WITH_MASKS else ()))


#: name -> maker of a detector: ``maker(backbone, num_classes, ...)``
DETECTORS: dict[str, Callable[..., nn.Module]] = {
    "fcos": build_fcos,
    "retinanet": build_retinanet,
    "faster_rcnn": build_faster_rcnn,
    "cascade_rcnn": build_cascade_rcnn,
    "mask_rcnn": build_mask_rcnn,
    "mask_scoring_rcnn": build_mask_scoring_rcnn,
}
