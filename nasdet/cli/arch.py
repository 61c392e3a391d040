"""``nasdet arch``: list the published architectures, and say what a net costs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from nasdet.cli import arch_info
from nasdet.cli import export as exporting

HELP = "list published architectures, show what a net costs, export a card to plain PyTorch, a detector to ONNX"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb to its parser."""
    parser.description = "Architecture cards: JSON files that a search writes (card.json), and published nets by name."
    parser.epilog = (
        "examples:\n"
        "  nasdet arch list\n"
        "  nasdet arch info fad-paper --size 800x1280\n"
        "  nasdet arch info runs/tiny/card.json --size 128x192 --backbone resnet18 --classes 10 --json\n"
        "  nasdet arch info --detector faster_rcnn --backbone shufflenet_v2_40      a plain detector\n"
        "  nasdet arch export runs/nats/card.json --out my_backbone.py     a NATS card for a program without nasdet\n"
        "  nasdet arch export runs/net --out net.onnx                      a trained detector, whole, for any program"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    listing = actions.add_parser(
        "list", help="the published architectures", description="List the published architectures."
    )
    listing.add_argument("--json", action="store_true", help="as JSON")
    arch_info.configure(actions.add_parser("info", help=arch_info.HELP))
    exporting.configure(actions.add_parser("export", help=exporting.HELP))


def run(action: str, **arguments: Any) -> int:
    """List, count one net, or export."""
    actions: dict[str, Callable[..., int]] = {"list": _list, "info": arch_info.run, "export": exporting.run}
    return actions[action](**arguments)


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
