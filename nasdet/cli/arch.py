"""``nasdet arch``: list the published architectures, and say what a card's net costs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

HELP = "list published architectures, show what a card's net costs, export it to plain PyTorch"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb to its parser."""
    parser.description = "Architecture cards: JSON files that a search writes (card.json), and published nets by name."
    parser.epilog = (
        "examples:\n"
        "  nasdet arch list\n"
        "  nasdet arch info fad-paper --size 800x1280\n"
        "  nasdet arch info runs/tiny/card.json --size 128x192 --backbone resnet18 --classes 10 --json\n"
        "  nasdet arch export runs/nats/card.json --out my_backbone.py     a NATS card for a program without nasdet"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser(
        "list", help="the published architectures", description="List the published architectures."
    )
    listing.add_argument("--json", action="store_true", help="as JSON")
    info = actions.add_parser(
        "info",
        help="a card's cells, parameters and MACs by part",
        description=(
            "Show a card's architecture, and the parameters and multiply-accumulates (MACs; convolutions and linear "
            "layers, one picture) of the detector around it, by part. 'subnet' is what the card replaces plus the "
            "predictors, as the papers count it."
        ),
    )
    info.add_argument("card", metavar="CARD|NAME", help="a card's JSON file, or a name from 'nasdet arch list'")
    info.add_argument("--size", default="800x1280", metavar="HxW", help="picture size in pixels (default: 800x1280)")
    info.add_argument("--backbone", metavar="NAME", help="backbone (default: the card's, or resnet50)")
    info.add_argument("--width", type=float, metavar="X", help="multiplier of its channels (default: the card's, or 1)")
    info.add_argument("--classes", type=int, default=80, metavar="N", help="object classes (default: 80)")
    info.add_argument("--levels", type=int, default=5, metavar="N", help="pyramid levels from stride 8 on (default: 5)")
    info.add_argument("--inner-channels", type=int, metavar="N", help="c' in the place of the card's own")
    info.add_argument("--cells", type=int, metavar="N", help="cells a group in the place of the card's own")
    info.add_argument("--json", action="store_true", help="as JSON")
    export = actions.add_parser(
        "export",
        help="a NATS card as a Python file that needs torch alone",
        description=(
            "Write a Python file, torch its only import, with the card's GENOTYPE and transform(network, GENOTYPE), "
            "which gives a network's convolutions their dilations: your own ResNet, torchvision's, timm's. Weights and "
            "their names stay those of the network."
        ),
    )
    export.add_argument("card", metavar="CARD|NAME", help="a NATS card's JSON file, or a name from 'nasdet arch list'")
    export.add_argument("--out", required=True, metavar="FILE", help="the Python file to write")


def run(action: str, **arguments: Any) -> int:
    """List, describe one card, or export it."""
    actions: dict[str, Callable[..., int]] = {"list": _list, "info": _info, "export": _export}
    return actions[action](**arguments)


def _export(card: str, out: str) -> int:
    from nasdet.arch import load_card
    from nasdet.spaces.nats import save_plain_source

    print(save_plain_source(load_card(card), out))
    return 0


def _list(json: bool = False) -> int:
    from nasdet.arch import load_card, published

    cards = [load_card(name) for name in published()]
    if json:
        print(_dumps([card.to_json() for card in cards]))
        return 0
    for card in cards:
        print(f"{card.name:<20} {card.method:<8} {card.source.get('detail') or card.source.get('paper', '')}")
    return 0


def _info(
    card: str,
    size: str = "800x1280",
    backbone: str | None = None,
    width: float | None = None,
    classes: int = 80,
    levels: int = 5,
    inner_channels: int | None = None,
    cells: int | None = None,
    json: bool = False,
) -> int:
    from nasdet.arch import load_card
    from nasdet.spaces import space_class

    chosen = load_card(card)
    backbone = str(chosen.settings.get("backbone", "resnet50")) if backbone is None else backbone
    width = float(chosen.settings.get("width", 1.0)) if width is None else width
    costs = card_costs(chosen, parse_size(size), backbone, width, classes, levels, inner_channels, cells)
    if json:
        print(_dumps(costs))
        return 0
    settings = ", ".join(f"{key} {value}" for key, value in chosen.settings.items())
    print(f"{chosen.name} ({chosen.method}){': ' + settings if settings else ''}")
    for line in space_class(chosen.method).describe(chosen):
        print(f"  {line}")
    print(f"\n{'part':<12}{'parameters':>14}{'MACs':>20}   at {size}, {classes} classes, {backbone}")
    for part in [*costs["parts"], costs["subnet"], costs["total"]]:
        print(f"{part['name']:<12}{part['parameters']:>14,}{part['macs']:>20,}")
    print(f"\nsubnet: {costs['macs_per_location']:,} MACs at each of {costs['locations']:,} locations")
    return 0


def card_costs(
    card: Any,
    size: tuple[int, int],
    backbone: str,
    width: float,
    classes: int,
    levels: int,
    inner_channels: int | None,
    cells: int | None,
) -> dict[str, Any]:
    """Parameters and MACs of the detector around a card, by part, with the sum over towers and predictors
    (``subnet``)."""
    import torch

    from nasdet.measure import PartCost, count, total
    from nasdet.spaces import part_of
    from nasdet.spaces.assemble import ModelConfig, build_model

    config = ModelConfig(
        backbone=backbone,
        width=width,
        fpn_channels=card.settings.get("channels", 256),
        levels=levels,
        num_classes=classes,
        inner_channels=inner_channels,
        cells=cells,
    )
    config = replace(config, **{"backbone_card" if part_of(card.method) == "backbone" else "towers": card.to_json()})
    height, long = size
    with torch.device("meta"):
        model = build_model(config)
    parts = count(model, torch.empty(1, 3, height, long, device="meta"))
    subnet = total(part for part in parts if part.name in ("towers", "head"))
    locations = sum(-(-height // stride) * -(-long // stride) for stride in (8 * 2**level for level in range(levels)))
    return {
        "card": card.name,
        "method": card.method,
        "size": [height, long],
        "backbone": backbone,
        "classes": classes,
        "parts": [part._asdict() for part in parts],
        "subnet": PartCost("subnet", subnet.parameters, subnet.macs)._asdict(),
        "total": total(parts)._asdict(),
        "locations": locations,
        "macs_per_location": subnet.macs // locations,
    }


def parse_size(text: str) -> tuple[int, int]:
    """``"800x1280"`` as (height, width)."""
    words = text.lower().split("x")
    if len(words) != 2 or not all(word.isdecimal() and int(word) for word in words):
        raise ValueError(f"size must be HEIGHTxWIDTH in pixels, got {text!r}")
    return int(words[0]), int(words[1])


def _dumps(value: Any) -> str:
    return json.dumps(value, indent=1)
