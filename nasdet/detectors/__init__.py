"""Detectors: backbones, pyramid, towers, and one file per detector over shared parts.

A detector is composed of parts, each a plain ``torch.nn.Module``::

    backbone = ResNet(18, norm="gn", outputs=("c3", "c4", "c5"))
    neck = FPN(backbone.channels, backbone.strides, 64)
    model = FCOS(backbone, neck, PlainTowers(64), num_classes=10)

    outputs = model(images)                      # per-level maps
    losses = model.loss(outputs, targets)        # dict of scalars; their sum is the loss
    detections = model.detect(outputs, sizes)    # boxes, scores, labels per image

The registries name parts on the command line, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from nasdet.detectors.fcos import FCOS
from nasdet.detectors.fpn import FPN
from nasdet.detectors.resnet import ResNet
from nasdet.detectors.towers import PlainTowers
from nasdet.detectors.weights import load_backbone_weights

__all__ = ["BACKBONES", "DETECTORS", "FCOS", "FPN", "PlainTowers", "ResNet", "build_fcos", "load_backbone_weights"]

#: name -> maker of a module with ``strides`` and ``channels``
BACKBONES: dict[str, Callable[..., Any]] = {
    **{f"resnet{depth}": partial(ResNet, depth) for depth in (18, 34, 50, 101)},
    **{f"resnext{depth}_32x4d": partial(ResNet, depth, groups=32, width_per_group=4) for depth in (50, 101)},
}


def build_fcos(
    backbone: str = "resnet50",
    num_classes: int = 80,
    *,
    width: float = 1.0,
    fpn_channels: int = 256,
    levels: int = 5,
    tower_convs: int = 4,
    towers: nn.Module | None = None,
    norm: str | None = None,
    weights: str | Path | None = None,
    frozen_stages: int | None = None,
    **options: Any,
) -> FCOS:
    """FCOS on a named backbone: the published net by default, a small one with small numbers.

    ``levels`` of the pyramid from stride 8 on (5: P3 to P7; 3: P3 to P5). ``towers`` default to plain ones of
    ``tower_convs`` convolutions. ``weights`` is a local file in torchvision's format; with it, ``norm`` is by default
    ``"frozen_bn"`` and ``frozen_stages`` 2; without it ``"gn"`` and 0, since a frozen norm around random weights
    normalises nothing. ``options`` go to :class:`FCOS`.
    """
    if backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(sorted(BACKBONES))}, got {backbone!r}")
    if levels < 1:
        raise ValueError(f"levels must be positive, got {levels}")
    if norm is None:
        norm = "frozen_bn" if weights else "gn"
    if frozen_stages is None:
        frozen_stages = 2 if weights else 0
    outputs = ("c3", "c4", "c5")[:levels]
    body = BACKBONES[backbone](width=width, norm=norm, frozen_stages=frozen_stages, outputs=outputs)
    if weights:
        load_backbone_weights(body, weights)
    neck = FPN(body.channels, body.strides, fpn_channels, extra_levels=levels - len(outputs))
    if towers is None:
        towers = PlainTowers(fpn_channels, tower_convs)
    return FCOS(body, neck, towers, num_classes=num_classes, **options)


#: name -> maker of a detector: ``maker(backbone, num_classes, ...)``
DETECTORS: dict[str, Callable[..., nn.Module]] = {"fcos": build_fcos}
