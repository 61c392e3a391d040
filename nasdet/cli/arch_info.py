"""``nasdet arch info``: what a card's net, a plain detector or a backbone costs, by part."""

from __future__ import annotations

import argparse
import json as _json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nasdet.cli import names

HELP = "parameters and MACs of a card's net, a detector or a backbone, by part"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the action to its parser."""
    parser.description = (
        "Parameters and multiply-accumulates (MACs; convolutions and linear layers, one picture), by part, of\n"
        "  - the detector around a card: CARD|NAME, with --detector and --backbone as you like;\n"
        "  - a plain detector: --detector without a card;\n"
        "  - a backbone alone, without its classifier: its name, without --detector.\n"
        "Two-stage detectors are counted at a fixed number of boxes. 'subnet' is what a card replaces with the\n"
        "predictors, as the papers count it; of a plain one-stage detector, towers and predictors."
    )
    parser.epilog = (
        "examples:\n"
        "  nasdet arch info fad-paper --size 800x1280\n"
        "  nasdet arch info --detector faster_rcnn --backbone shufflenet_v2_40 --proposals 1000\n"
        "  nasdet arch info --detector mask_rcnn --detections 50 --json\n"
        "  nasdet arch info mobilenet_v2 --size 224x224"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add(
        "card", nargs="?", metavar="CARD|NAME", help="a card's JSON file, a name from 'nasdet arch list', or a backbone"
    )
    usual = "around a card: fcos; for masks mask_rcnn, for a backbone faster_rcnn"
    add("--detector", metavar="NAME", help=f"{names.DETECTORS} ({usual})")
    add("--backbone", metavar="NAME", help=f"{names.BACKBONES}, or a card that is one (the card's, or resnet50)")
    add("--width", type=float, metavar="X", help="multiplier of its channels (the card's, or 1)")
    add("--norm", metavar="NAME", help="of the backbone: bn, sync_bn, gn, frozen_bn without parameters (frozen_bn; bn)")
    add("--size", default="800x1280", metavar="HxW", help="picture size in pixels (default: 800x1280)")
    add("--classes", type=int, default=80, metavar="N", help="object classes (default: 80)")
    add("--levels", type=int, default=5, metavar="N", help="pyramid levels, from stride 8, two-stage from 4 (5)")
    add("--proposals", type=int, metavar="N", help="two-stage: boxes that the box stage is run on (1000)")
    add("--detections", type=int, metavar="N", help="with masks: boxes that the mask stage is run on (100)")
    add("--inner-channels", type=int, metavar="N", help="c' in the place of the card's own")
    add("--cells", type=int, metavar="N", help="cells a group in the place of the card's own")
    add("--json", action="store_true", help="as JSON")


def run(
    card: str | None = None,
    *,
    detector: str | None = None,
    backbone: str | None = None,
    width: float | None = None,
    norm: str | None = None,
    size: str = "800x1280",
    json: bool = False,
    **options: Any,
) -> int:
    """Count what is named and print it; ``options`` are the other ones of :func:`detector_costs`."""
    from nasdet.spaces import is_backbone, usual_detector

    chosen, backbone = _subject(card, backbone)
    pixels = parse_size(size)
    if chosen is None and detector is None:
        if backbone is None:
            raise ValueError("there must be something to count: a card, --detector or --backbone")
        costs = backbone_costs(backbone, pixels, width=1.0 if width is None else width, norm=norm or "bn")
    else:
        if chosen is not None and is_backbone(chosen) and backbone is not None:
            raise ValueError(f"backbone must be left out, as {chosen.name} is one, got {backbone!r}")
        settings = {} if chosen is None else chosen.settings
        costs = detector_costs(
            chosen,
            detector or usual_detector(chosen),
            settings.get("backbone", "resnet50") if backbone is None else names.backbone_option(backbone),
            pixels,
            width=settings.get("width", 1.0) if width is None else width,
            norm=norm or "frozen_bn",
            **options,
        )
    if json:
        print(_json.dumps(costs, indent=1))
    else:
        _describe(chosen)
        _print(costs, size)
    return 0


def _subject(name: str | None, backbone: str | None) -> tuple[Any, str | None]:
    """The card, if one is meant, and the backbone's name: ``name`` may be either's."""
    from nasdet.arch import load_card, published
    from nasdet.detectors import BACKBONES

    if name is None:
        return None, backbone
    if name in BACKBONES:
        if backbone is not None:
            raise ValueError(f"backbone must be given once, got {name} and {backbone}")
        return None, name
    if name not in published() and not Path(name).is_file():
        nets = ", ".join([*published(), *BACKBONES])
        raise ValueError(f"name must be a card's JSON file or one of {nets}, got {name!r}")
    return load_card(name), backbone


def _describe(card: Any) -> None:
    from nasdet.spaces import space_class

    if card is None:
        return
    settings = ", ".join(f"{key} {value}" for key, value in card.settings.items())
    print(f"{card.name} ({card.method}){': ' + settings if settings else ''}")
    for line in space_class(card.method).describe(card):
        print(f"  {line}")
    print()


def _print(costs: dict[str, Any], size: str) -> None:
    conditions = [f"at {size}"]
    if "detector" in costs:
        conditions += [f"{costs['classes']} classes", f"{costs['backbone']} in {costs['detector']}"]
    else:
        conditions += [str(costs["backbone"])]
    conditions += [f"{costs[what]:,} {what}" for what in ("proposals", "detections") if what in costs]
    print(f"{'part':<12}{'parameters':>14}{'MACs':>20}   {', '.join(conditions)}")
    subnet = [costs["subnet"]] if "subnet" in costs else []
    for part in [*costs["parts"], *subnet, costs["total"]]:
        print(f"{part['name']:<12}{part['parameters']:>14,}{part['macs']:>20,}")
    if "locations" in costs:
        print(f"\nsubnet: {costs['macs_per_location']:,} MACs at each of {costs['locations']:,} locations")


def backbone_costs(backbone: str, size: tuple[int, int], *, width: float = 1.0, norm: str = "bn") -> dict[str, Any]:
    """Parameters and MACs of a backbone by level, without a classifier."""
    import torch
    from torch import nn

    from nasdet.detectors import BACKBONES
    from nasdet.measure import count, total

    if backbone not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
    with torch.device("meta"):
        parts = BACKBONES[backbone](width=width, norm=norm).parts()
        whole = nn.Sequential()
        for name, modules in parts.items():
            whole.add_module(name, modules)
        costs = count(whole, torch.empty(1, 3, *size))
    return {
        "backbone": backbone,
        "width": width,
        "norm": norm,
        "size": [*size],
        "parts": [cost._asdict() for cost in costs],
        "total": total(costs)._asdict(),
    }


def detector_costs(
    card: Any,
    detector: str,
    backbone: str | Mapping[str, Any],
    size: tuple[int, int],
    *,
    width: float = 1.0,
    norm: str = "frozen_bn",
    classes: int = 80,
    levels: int = 5,
    proposals: int | None = None,
    detections: int | None = None,
    inner_channels: int | None = None,
    cells: int | None = None,
) -> dict[str, Any]:
    """Parameters and MACs of a detector by part, around a card or (None) plain.

    A two-stage one's are for ``proposals`` boxes (1000) in the box stage and ``detections`` (100) in the mask stage.
    ``subnet`` is the sum of what the card replaces with the predictors: the heads of a one-stage detector (also of a
    plain one), the mask stage, or the backbone.
    """
    import torch

    from nasdet.detectors import WITH_MASKS, FasterRCNN, FixedRoIs
    from nasdet.measure import count, total
    from nasdet.spaces import is_backbone, retraining
    from nasdet.spaces.assemble import ModelConfig, backbone_name, build_model, searched_fields

    around: dict[str, Any] = {"backbone": backbone, "options": retraining(card, detector).model.get("options", {})}
    if card is not None:
        own = card.settings.get("channels", 256)
        around |= {"fpn_channels": own if isinstance(own, int) else 256} | searched_fields(card)
    config = ModelConfig(
        detector=detector,
        width=width,
        norm=norm,
        levels=levels,
        num_classes=classes,
        inner_channels=inner_channels,
        cells=cells,
        **around,
    )
    with torch.device("meta"):
        model: Any = build_model(config)
    strides = tuple(model.neck.strides.values())
    two_stage = isinstance(model, FasterRCNN)
    boxes = {"proposals": _boxes("proposals", proposals, 1000, two_stage, detector)}
    boxes["detections"] = _boxes("detections", detections, 100, detector in WITH_MASKS, detector)
    boxes = {name: number for name, number in boxes.items() if number}
    if two_stage:
        model = FixedRoIs(model, **boxes)
    parts = count(model, torch.empty(1, 3, *size, device="meta"))
    costs = {
        "card": None if card is None else card.name,
        "method": None if card is None else card.method,
        "detector": detector,
        "backbone": card.name if card is not None and is_backbone(card) else backbone_name(backbone),
        "width": width,
        "norm": norm,
        "size": [*size],
        "classes": classes,
        **boxes,
        "parts": [part._asdict() for part in parts],
        "total": total(parts)._asdict(),
    }
    return costs | _subnet(card, parts, boxes, size, () if two_stage else strides)


def _subnet(card: Any, parts: Any, boxes: dict[str, int], size: tuple[int, int], strides: Any) -> dict[str, Any]:
    """The cost of what is searched, and per location that it sees; ``strides`` of a one-stage detector's levels."""
    from nasdet.measure import total
    from nasdet.spaces import part_of

    searched = part_of(card) if card is not None else "towers" if strides else None
    if searched is None:
        return {}
    belongs = {
        "backbone": lambda name: name == "backbone",
        "body": lambda name: name == "backbone",
        "detector": lambda name: name != "rpn",
        "mask_trunk": lambda name: name == "masks",
        "towers": lambda name: name not in ("backbone", "neck"),
    }[searched]
    subnet = total(part for part in parts if belongs(part.name))._replace(name="subnet")
    if searched in ("backbone", "body", "detector"):
        return {"subnet": subnet._asdict()}
    pooled = 14 * 14  # pixels of the maps that the mask stage sees
    towers = sum(-(-size[0] // stride) * -(-size[1] // stride) for stride in strides)
    locations = towers if searched == "towers" else boxes["detections"] * pooled
    return {"subnet": subnet._asdict(), "locations": locations, "macs_per_location": subnet.macs // locations}


def _boxes(name: str, given: int | None, default: int, wanted: bool, detector: str) -> int:
    """How many boxes a stage is run on; 0 where the detector has no such stage."""
    if given is not None and (not wanted or given < 1):
        where = "positive" if wanted else f"left out for {detector}, which has no stage that takes them"
        raise ValueError(f"{name} must be {where}, got {given}")
    return (default if given is None else given) if wanted else 0


def parse_size(text: str) -> tuple[int, int]:
    """``"800x1280"`` as (height, width)."""
    words = text.lower().split("x")
    if len(words) != 2 or not all(word.isdecimal() and int(word) for word in words):
        raise ValueError(f"size must be HEIGHTxWIDTH in pixels, got {text!r}")
    return int(words[0]), int(words[1])
