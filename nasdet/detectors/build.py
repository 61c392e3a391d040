"""Makers of whole detectors from a backbone and flat options."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from nasdet.detectors.backbones import BACKBONES
from nasdet.detectors.cascade_rcnn import CASCADE_IOUS, CascadeStages, cascade_codecs
from nasdet.detectors.faster_rcnn import HEAD_CODEC, BoxStage, FasterRCNN
from nasdet.detectors.fcos import FCOS
from nasdet.detectors.fpn import FPN, Pyramid
from nasdet.detectors.mask_rcnn import MaskStage
from nasdet.detectors.mask_scoring_rcnn import MaskIoUHead, MaskScoringStage
from nasdet.detectors.parts.anchors import AnchorGenerator, octave_sizes
from nasdet.detectors.parts.assign import size_ranges
from nasdet.detectors.parts.codec import BoxCodec
from nasdet.detectors.retinanet import RetinaNet
from nasdet.detectors.roi_heads import BoxHead, BoxTrunk, MaskHead, MaskTrunk, RoIPooler
from nasdet.detectors.rpn import RPN, rpn_anchors
from nasdet.detectors.towers import PlainTowers
from nasdet.detectors.weights import load_backbone_weights

#: level of the boxes in the first of a backbone's own maps, below 56 pixels (MSNAS, figure 2b)
FIRST_GROUP = 1
#: channels of the RPN on a backbone's own maps, as MSNAS's FLOPs have it
RPN_CHANNELS = 256

#: what makes a neck of a backbone's channels and strides by level
NeckMaker = Callable[[Mapping[str, int], Mapping[str, int]], nn.Module]

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


def _neck(body: Any, fpn_channels: int, make: NeckMaker | None, **options: Any) -> tuple[Any, int]:
    """The pyramid over a backbone, and its channels; a backbone that is one by itself (``pyramid``) stays as it is."""
    if make is not None:
        made: Any = make(body.channels, body.strides)
        return made, next(iter(made.channels.values()))
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
    neck: NeckMaker | None = None,
    **options: Any,
) -> tuple[tuple[nn.Module, nn.Module, nn.Module], dict[str, Any]]:
    """Backbone, neck and towers of a one-stage detector, and the options that are left for the detector."""
    if levels < 1:
        raise ValueError(f"levels must be positive, got {levels}")
    outputs = ("c3", "c4", "c5")[:levels]
    body = _body(backbone, outputs, width=width, norm=norm, weights=weights, frozen_stages=frozen_stages)
    pyramid, channels = _neck(body, fpn_channels, neck, extra_levels=levels - len(outputs))
    towers = PlainTowers(channels, tower_convs, tower_norm) if towers is None else towers
    return (body, pyramid, towers), options


def build_fcos(
    backbone: BackboneLike = "resnet50", num_classes: int = 80, *, tower_norm: str | None = "gn", **options: Any
) -> FCOS:
    """FCOS on a backbone (a name or a maker): the published net by default, a small one with small numbers.

    Options, the same for every detector: ``width``, a multiplier of the backbone's channels; ``fpn_channels`` (256);
    ``levels`` of the pyramid (5) from stride 8 on (5: P3 to P7; 3: P3 to P5). ``weights`` is a local file with the
    backbone's weights in torchvision's format; with it, ``norm`` is by default ``"frozen_bn"`` and ``frozen_stages`` 2;
    without it ``"gn"`` and 0, since a frozen norm around random weights normalises nothing.

    ``towers`` default to plain ones of ``tower_convs`` (4) convolutions with ``tower_norm`` (None for none). ``neck``
    makes another pyramid from the backbone's ``channels`` and ``strides``. All other options go to :class:`FCOS`.

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
    neck: NeckMaker | None = None,
    box_trunk: Callable[[], nn.Module] | None = None,
    tower_convs: int = 4,
    towers: nn.Module | None = None,
    **options: Any,
) -> FasterRCNN:
    """Faster R-CNN on a named backbone; ``width`` to ``frozen_stages`` as for :func:`build_fcos`.

    ``levels`` of the pyramid count from stride 4 on (5: P2 to P6, the last by pooling and for the RPN alone).
    ``box_head``, ``head_norm`` and ``hidden`` are :class:`BoxTrunk`'s, unless ``box_trunk`` makes another trunk;
    ``neck`` makes another pyramid; ``rpn`` are options of :class:`RPN`; the others go to :class:`BoxStage`. Several
    ``ious`` and ``codecs`` make a cascade. There are no towers: ``tower_convs`` is passed over, and ``towers`` must be
    None.

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
    extra = levels - len(outputs)
    pyramid, channels = _neck(body, fpn_channels, neck, extra_levels=extra, extra_source="pool")
    strides = tuple(pyramid.strides.values())
    own: dict[str, Any] = {}
    if isinstance(pyramid, Pyramid):
        own = {"anchors": rpn_anchors(strides, pyramid.nominal(4)), "hidden": RPN_CHANNELS, "shared": False}
    stages = [
        BoxStage(
            BoxHead(
                box_trunk() if box_trunk else BoxTrunk(channels, box_head, norm=head_norm, hidden=hidden),
                num_classes,
                class_agnostic=class_agnostic,
            ),
            _pooler(pyramid, 7),
            codec=codec,
            iou=iou,
            **options,
        )
        for iou, codec in zip(ious, codecs, strict=True)
    ]
    boxes = stages[0] if len(stages) == 1 else CascadeStages(stages)
    return FasterRCNN(body, pyramid, RPN(channels, strides, **own | dict(rpn or {})), boxes)


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
