"""``nasdet arch``: list the published architectures, and say what a net costs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from nasdet.cli import arch_info

HELP = "list published architectures, show what a net costs, export a card to plain PyTorch"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb to its parser."""
    parser.description = "Architecture cards: JSON files that a search writes (card.json), and published nets by name."
    parser.epilog = (
        "examples:\n"
        "  nasdet arch list\n"
        "  nasdet arch info fad-paper --size 800x1280\n"
        "  nasdet arch info runs/tiny/card.json --size 128x192 --backbone resnet18 --classes 10 --json\n"
        "  nasdet arch info --detector faster_rcnn --backbone shufflenet_v2_40      a plain detector\n"
        "  nasdet arch export runs/nats/card.json --out my_backbone.py     a NATS card for a program without nasdet"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser(
        "list", help="the published architectures", description="List the published architectures."
    )
    listing.add_argument("--json", action="store_true", help="as JSON")
    arch_info.configure(actions.add_parser("info", help=arch_info.HELP))
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
    """List, count one net, or export a card."""
    actions: dict[str, Callable[..., int]] = {"list": _list, "info": arch_info.run, "export": _export}
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


def _dumps(value: Any) -> str:
    return json.dumps(value, indent=1)
