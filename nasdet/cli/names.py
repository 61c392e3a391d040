"""Names of the registries for the help of the verbs, which must not load torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

DETECTORS = "fcos, retinanet, {faster,cascade,mask,mask_scoring}_rcnn"
BACKBONES = (
    "resnet{18,34,50,101}, resnext50_32x4d, resnext101_{32x4d,32x8d,64x4d}, mobilenet_v2, "
    "shufflenet_v2_{x0_5,x1_0,x1_5,x2_0,20,40,40_3_8g}"
)


def is_card(text: str) -> bool:
    """Whether ``text`` names a card: a published one, or a file."""
    from nasdet.arch import published

    return text in published() or Path(text).is_file()


def backbone_option(text: str) -> str | dict[str, Any]:
    """What ``--backbone`` names: a backbone of the library, or the JSON of a card (a published name, or a file)."""
    from nasdet.arch import load_card

    return load_card(text).to_json() if is_card(text) else text
