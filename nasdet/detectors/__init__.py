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

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from nasdet.detectors.backbone import Backbone
from nasdet.detectors.cascade_rcnn import CASCADE_IOUS, CascadeStages, cascade_codecs
from nasdet.detectors.faster_rcnn import HEAD_CODEC, BoxStage, FasterRCNN, FixedRoIs, countable
from nasdet.detectors.fcos import FCOS
from nasdet.detectors.fpn import FPN, Pyramid
from nasdet.detectors.mask_rcnn import MaskStage
from nasdet.detectors.mask_scoring_rcnn import MaskIoUHead, MaskScoringStage
from nasdet.detectors.mobilenet import MobileNetV2
from nasdet.detectors.norm import FrozenBatchNorm2d
from nasdet.detectors.parts.anchors import AnchorGenerator, octave_sizes
from nasdet.detectors.parts.assign import size_ranges
from nasdet.detectors.parts.codec import BoxCodec
from nasdet.detectors.resnet import ResNet
from nasdet.detectors.retinanet import RetinaNet
from nasdet.detectors.roi_heads import BoxHead, BoxTrunk, MaskHead, MaskTrunk, RoIPooler
from nasdet.detectors.rpn import RPN, rpn_anchors
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

#: DetNAS's spaces by blocks: stem and widths of the stages (Table 1; the last one scaled to 3.8 G), blocks
_DETNAS: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "20": (16, (64, 160, 320, 640), (4, 4, 8, 4)),
    "40": (48, (96, 240, 480, 960), (8, 8, 16, 8)),
    "40_3_8g": (72, (172, 432, 864, 1728), (8, 8, 16, 8)),
}

#: name -> maker of a module with ``strides`` and ``channels``; torchvision's names for its nets
BACKBONES: dict[str, Callable[..., Backbone]] = {
    **{f"resnet{depth}": partial(ResNet, depth) for depth in (18, 34, 50, 101)},
    **{
        f"resnext{depth}_{groups}x{width}d": partial(ResNet, depth, groups=groups, width_per_group=width)
        for depth, groups, width in ((50, 32, 4), (101, 32, 4), (101, 32, 8), (101, 64, 4))
    },
    "mobilenet_v2": MobileNetV2,
    **{
        f"shufflenet_v2_{name}": partial(ShuffleNetV2, 24, (first, 2 * first, 4 * first))
        for name, first in (("x0_5", 48), ("x1_0", 116), ("x1_5", 176), ("x2_0", 244))
    },
    **{f"shufflenet_v2_{name}": partial(ShuffleNetV2, *sizes, shuffle="even_odd") for name, sizes in _DETNAS.items()},
}


#: level of the boxes in the first of a backbone's own maps, below 56 pixels (MSNAS, figure 2b)
FIRST_GROUP = 1
#: channels of the RPN on a backbone's own maps, as MSNAS's FLOPs have it
RPN_CHANNELS = 256

#: a backbone by name, or what makes one: ``maker(width=, norm=, frozen_stages=, outputs=)``
BackboneLike = str | Callable[..., nn.Module]


def _body(
    backbone: BackboneLike,
    outputs: Sequence[str],
    *,
    width: float,
    norm: str | None,
    weights: str | Path | None,
    frozen_stages: int | None,
) -> Any:
    """A backbone, named or made, that gives ``outputs``, with its weights."""
    if isinstance(backbone, str) and backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
    if norm is None:
        norm = "frozen_bn" if weights else "gn"
    if frozen_stages is None:
        frozen_stages = 2 if weights else 0
    make = BACKBONES[backbone] if isinstance(backbone, str) else backbone
    body = make(width=width, norm=norm, frozen_stages=frozen_stages, outputs=outputs)
    if weights:
        load_backbone_weights(body, weights)
    return body


def _neck(body: Any, fpn_channels: int, **options: Any) -> tuple[FPN | Pyramid, int]:
    """The pyramid over a backbone, and its channels; a backbone that is one by itself (``pyramid``) stays as it is."""
    if getattr(body, "pyramid", False):
        neck = Pyramid(body.channels, body.strides)
        return neck, next(iter(neck.channels.values()))
    return FPN(body.channels, body.strides, fpn_channels, **options), fpn_channels


def _pooler(neck: Any, size: int) -> RoIPooler:
    """From the levels P2 to P5 by size; or from a backbone's own pyramid, a map for each group of boxes."""
    strides = tuple(neck.strides.values())
    if isinstance(neck, Pyramid):
        return RoIPooler(strides, size, lowest_level=FIRST_GROUP)
    return RoIPooler(strides[:4], size)


def _one_stage(
    backbone: BackboneLike,
    *,
    tower_norm: str | None,
    width: float = 1.0,
    fpn_channels: int = 256,
    levels: int = 5,
    tower_convs: int = 4,
    towers: nn.Module | None = None,
    norm: str | None = None,
    weights: str | Path | None = None,
    frozen_stages: int | None = None,
    **options: Any,
) -> tuple[tuple[nn.Module, nn.Module, nn.Module], dict[str, Any]]:
    """Backbone, neck and towers of a one-stage detector, and the options that are left for the detector."""
    if levels < 1:
        raise ValueError(f"levels must be positive, got {levels}")
    outputs = ("c3", "c4", "c5")[:levels]
    body = _body(backbone, outputs, width=width, norm=norm, weights=weights, frozen_stages=frozen_stages)
    neck, channels = _neck(body, fpn_channels, extra_levels=levels - len(outputs))
    towers = PlainTowers(channels, tower_convs, tower_norm) if towers is None else towers
    return (body, neck, towers), options


def build_fcos(
    backbone: BackboneLike = "resnet50", num_classes: int = 80, *, tower_norm: str | None = "gn", **options: Any
) -> FCOS:
    """FCOS on a backbone (a name or a maker): the published net by default, a small one with small numbers.

    Options, the same for every detector: ``width``, a multiplier of the backbone's channels; ``fpn_channels`` (256);
    ``levels`` of the pyramid (5) from stride 8 on (5: P3 to P7; 3: P3 to P5). ``weights`` is a local file with the
    backbone's weights in torchvision's format; with it, ``norm`` is by default ``"frozen_bn"`` and ``frozen_stages`` 2;
    without it ``"gn"`` and 0, since a frozen norm around random weights normalises nothing.

    ``towers`` default to plain ones of ``tower_convs`` (4) convolutions with ``tower_norm`` (None for none). All other
    options go to :class:`FCOS`.

    A backbone that is a pyramid by itself (``pyramid``) gets no FPN: its maps are the levels, for objects as large as
    those of the usual ones (in FCOS up to 64, 128, ... pixels), whatever their strides, each with predictors of its
    own. ``fpn_channels`` and ``levels`` are passed over.
    """
    parts, rest = _one_stage(backbone, tower_norm=tower_norm, **options)
    neck = parts[1]
    own: dict[str, Any] = {}
    if isinstance(neck, Pyramid):
        own = {"ranges": size_ranges(neck.nominal(8)), "shared": False}
    return FCOS(*parts, num_classes=num_classes, **own | rest)


def build_retinanet(
    backbone: BackboneLike = "resnet50", num_classes: int = 80, *, tower_norm: str | None = None, **options: Any
) -> RetinaNet:
    """RetinaNet on a named backbone; options as for :func:`build_fcos`, the others go to :class:`RetinaNet`.

    By default the towers have no norm, as published; from random weights ``tower_norm="gn"`` learns sooner.
    """
    parts, rest = _one_stage(backbone, tower_norm=tower_norm, **options)
    own: dict[str, Any] = {}
    if isinstance(neck := parts[1], Pyramid):
        anchors = AnchorGenerator(tuple(neck.strides.values()), octave_sizes(neck.nominal(8)))
        own = {"anchors": anchors, "shared": False}
    return RetinaNet(*parts, num_classes=num_classes, **own | rest)


def build_faster_rcnn(
    backbone: BackboneLike = "resnet50",
    num_classes: int = 80,
    *,
    width: float = 1.0,
    fpn_channels: int = 256,
    levels: int = 5,
    norm: str | None = None,
    weights: str | Path | None = None,
    frozen_stages: int | None = None,
    box_head: str = "2fc",
    head_norm: str | None = None,
    hidden: int = 1024,
    class_agnostic: bool = False,
    ious: Sequence[float] = (0.5,),
    codecs: Sequence[BoxCodec] = (HEAD_CODEC,),
    rpn: Mapping[str, Any] | None = None,
    tower_convs: int = 4,
    towers: nn.Module | None = None,
    **options: Any,
) -> FasterRCNN:
    """Faster R-CNN on a named backbone; ``width`` to ``frozen_stages`` as for :func:`build_fcos`.

    ``levels`` of the pyramid count from stride 4 on (5: P2 to P6, the last by pooling and for the RPN alone).
    ``box_head``, ``head_norm`` and ``hidden`` are :class:`BoxTrunk`'s; ``rpn`` are options of :class:`RPN`; the others
    go to :class:`BoxStage`. Several ``ious`` and ``codecs`` make a cascade. There are no towers: ``tower_convs`` is
    passed over, and ``towers`` must be None.

    On a backbone's own pyramid of five maps the RPN has anchors of 32 to 512 pixels, 256 channels and layers of its own
    on each, and boxes are pooled by their level k (of 224 pixels: 4) from the map of k < 2, of 2, 3, 4, or k >= 5, with
    one head for all.
    """
    if levels < 1:
        raise ValueError(f"levels must be positive, got {levels}")
    if towers is not None:
        raise ValueError("towers must be None, got a module: a two-stage detector has none")
    outputs = ("c2", "c3", "c4", "c5")[:levels]
    body = _body(backbone, outputs, width=width, norm=norm, weights=weights, frozen_stages=frozen_stages)
    neck, channels = _neck(body, fpn_channels, extra_levels=levels - len(outputs), extra_source="pool")
    strides = tuple(neck.strides.values())
    own: dict[str, Any] = {}
    if isinstance(neck, Pyramid):
        own = {"anchors": rpn_anchors(strides, neck.nominal(4)), "hidden": RPN_CHANNELS, "shared": False}
    stages = [
        BoxStage(
            BoxHead(
                BoxTrunk(channels, box_head, norm=head_norm, hidden=hidden),
                num_classes,
                class_agnostic=class_agnostic,
            ),
            _pooler(neck, 7),
            codec=codec,
            iou=iou,
            **options,
        )
        for iou, codec in zip(ious, codecs, strict=True)
    ]
    boxes = stages[0] if len(stages) == 1 else CascadeStages(stages)
    return FasterRCNN(body, neck, RPN(channels, strides, **own | dict(rpn or {})), boxes)


def build_cascade_rcnn(backbone: BackboneLike = "resnet50", num_classes: int = 80, **options: Any) -> FasterRCNN:
    """Cascade R-CNN: :func:`build_faster_rcnn` with three class-agnostic stages for IoU 0.5, 0.6 and 0.7."""
    stages: dict[str, Any] = {"class_agnostic": True, "ious": CASCADE_IOUS, "codecs": cascade_codecs()}
    return build_faster_rcnn(backbone, num_classes, **stages | options)


def build_mask_rcnn(
    backbone: BackboneLike = "resnet50",
    num_classes: int = 80,
    *,
    mask_trunk: nn.Module | None = None,
    mask_norm: str | None = None,
    cascade: bool = False,
    scoring: bool = False,
    **options: Any,
) -> FasterRCNN:
    """Mask R-CNN: :func:`build_faster_rcnn`, or with ``cascade`` :func:`build_cascade_rcnn`, and a mask stage.

    ``mask_trunk`` stands before the deconvolution, by default four convolutions with ``mask_norm``; it sees 14 x 14
    maps of ``fpn_channels`` channels. ``scoring`` adds the head of Mask Scoring R-CNN.
    """
    build = build_cascade_rcnn if cascade else build_faster_rcnn
    model = build(backbone, num_classes, **options)
    channels = next(iter(model.neck.channels.values()))  # type: ignore[union-attr, operator]  # the FPN's
    head = MaskHead(mask_trunk or MaskTrunk(channels, hidden=channels, norm=mask_norm), num_classes, hidden=channels)
    pooler = _pooler(model.neck, 14)
    if scoring:
        masks: MaskStage = MaskScoringStage(head, MaskIoUHead(channels, num_classes, hidden=channels), pooler)
    else:
        masks = MaskStage(head, pooler)
    return FasterRCNN(model.backbone, model.neck, model.rpn, model.boxes, masks)


def build_mask_scoring_rcnn(backbone: BackboneLike = "resnet50", num_classes: int = 80, **options: Any) -> FasterRCNN:
    """Mask Scoring R-CNN: :func:`build_mask_rcnn` with a head that predicts the masks' IoU."""
    return build_mask_rcnn(backbone, num_classes, scoring=True, **options)


#: torchvision's name without its backbone -> maker, options
_TORCHVISION: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "fasterrcnn": (build_faster_rcnn, {}),
    "maskrcnn": (build_mask_rcnn, {}),
    "retinanet": (build_retinanet, {"max_detections": 300}),
    "fcos": (build_fcos, {"convention": "torchvision", "score_threshold": 0.2}),
}


def from_torchvision(
    name: str, state: Mapping[str, Tensor], *, norm: str = "frozen_bn", eps: float = 1e-5, **options: Any
) -> nn.Module:
    """Our detector with the weights, and the detections, of a torchvision one; in evaluation mode.

    ``name`` is like ``"fasterrcnn_resnet50_fpn"``, with ``maskrcnn``, ``retinanet`` and ``fcos`` in its place, and a
    ResNet or ResNeXt of :data:`BACKBONES`; ``state`` is its state dict, which also says how many classes there are.
    ``eps`` is the batch norms': torchvision sets it to 0 for the ``COCO_V1`` weights of all but FCOS. ``options`` go to
    the maker.
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
    for module in model.modules():
        if isinstance(module, (FrozenBatchNorm2d, nn.modules.batchnorm._BatchNorm)):
            module.eps = eps
    return model.eval()


#: detectors that learn masks: their data set must give them
WITH_MASKS = ("mask_rcnn", "mask_scoring_rcnn")

#: detectors without towers: their heads see regions
TWO_STAGE = ("faster_rcnn", "cascade_rcnn", "mask_rcnn", "mask_scoring_rcnn")


def parts_of(detector: str) -> tuple[str, ...]:
    """The parts of a named detector that can be searched: ``"backbone"`` (transformed), ``"body"`` (the backbone as a
    whole), and ``"towers"`` or ``"mask_trunk"``."""
    towers = () if detector in TWO_STAGE else ("towers",)
    return ("backbone", "body", *towers, *(("mask_trunk",) if detector in WITH_MASKS else ()))


#: name -> maker of a detector: ``maker(backbone, num_classes, ...)``
DETECTORS: dict[str, Callable[..., nn.Module]] = {
    "fcos": build_fcos,
    "retinanet": build_retinanet,
    "faster_rcnn": build_faster_rcnn,
    "cascade_rcnn": build_cascade_rcnn,
    "mask_rcnn": build_mask_rcnn,
    "mask_scoring_rcnn": build_mask_scoring_rcnn,
}
