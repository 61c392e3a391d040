"""``nasdet search nats``: its options, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nasdet.cli.search_options import add_run, add_shared

HELP = "NATS: dilations for the channel groups of a trained backbone"

# What --preset stands for; an option given on the command line wins.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "tiny": {
        "steps": 300,
        "batch": 4,
        "short_side": 128,
        "long_side": 192,
        "clip": 20.0,
        "arch_lr": 0.03,
        "detector": "fcos",
        "width": 0.25,
        "fpn_channels": 48,
        "levels": 4,
        "tower_convs": 2,
        "log_every": 10,
        "checkpoint_every": 50,
    },
}

DESCRIPTION = (
    "NATS (Peng et al., NeurIPS 2019) transforms a trained backbone for detection: every 3x3 convolution in the\n"
    "bottlenecks of stages 3 to 5 becomes one whose channel groups have dilations of their own. The result has the\n"
    "parameters, the cost and the pretrained weights of the original. In a backbone without bottlenecks its depthwise\n"
    "convolutions are transformed, which is not in the paper. The defaults are the paper's (COCO, 8 GPUs); here one\n"
    "process on one device holds the whole --batch. --preset tiny runs in minutes on a CPU."
)
EPILOG = (
    "examples:\n"
    "  nasdet data digits --out digits                  make a small real data set\n"
    "  nasdet search nats --data digits --out runs/nats --preset tiny --no-flip\n"
    "  nasdet search nats --data coco --out runs/nats --weights resnet50.pth\n"
    "  nasdet search nats --data coco --out runs/both --backbone runs/detnas/card.json --channel-groups 8\n"
    "  nasdet search nats --data digits --out runs/nats --preset tiny --no-flip --resume   go on after a stop\n"
    "  nasdet train --card runs/nats/card.json --data digits --out runs/net --preset tiny --no-flip   retrain it\n"
    "  nasdet train --card runs/nats/card.json --detector mask_rcnn --data coco --out runs/mask --weights resnet50.pth"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the method to its parser."""
    add_run(parser, PRESETS)
    add_shared(parser, backend="")
    _add_space(parser.add_argument_group("search space"))
    _add_model(parser.add_argument_group("model"))
    _add_search(parser.add_argument_group("search"))


def _add_space(group: Any) -> None:
    add = group.add_argument
    add("--dilations", choices=("A", "B", "C"), help="the paper's sets: 2, 3 or 5 dilations (stage 5: 3, 5, 9) (C)")
    add("--channel-groups", type=int, metavar="N", help="channel groups in every layer (16; 1 is path-level)")
    add("--channels-per-group", type=int, metavar="C", help="channels of a group, in the place of their number")
    add(
        "--index-preserving",
        action="store_const",
        const=True,
        help="channel groups keep their places in the derived net (default: blocks, one per dilation)",
    )
    add_shared(group, name="nats-SET-BACKBONE-seedN")


def _add_model(group: Any) -> None:
    add_shared(
        group,
        detector="paper: faster_rcnn; tiny: fcos",
        backbone="resnet50",
        width="paper: 1; tiny: 0.25",
        weights="torchvision's format",
        norm="gn; with --weights sync_bn",
        fpn_channels="paper: 256; tiny: 48",
        levels="two stages: 4; paper: 5; tiny: 4",
        tower_convs="4; tiny: 2",
        size="paper: 800x1200; tiny: 128x192",
    )


def _add_search(group: Any) -> None:
    add = group.add_argument
    add("--epochs", type=int, metavar="N", help="epochs over the images that train the weights (25)")
    add("--frozen-epochs", type=int, metavar="N", help="of these, the first ones without steps of the alphas (10)")
    add("--final-lr", type=float, metavar="X", help="learning rate at the end of its cosine (0.0004)")
    add_shared(
        group,
        steps="in the place of epochs; the share without alphas stays; tiny: 300",
        batch="for the weights and again for the alphas; 8; tiny: 4",
        lr="0.01",
        arch_lr="paper: 0.01; tiny: 0.03",
        clip="paper: none; tiny: 20",
        no_flip="",
        amp="",
        seed="0",
        workers="2",
        log_every="20; tiny: 10",
        checkpoint_every="200; tiny: 50",
    )


def run(settings: dict[str, Any], folder: Any, out: Path, **options: Any) -> list[str]:
    """Search, and say what was found, in lines."""
    from nasdet.engine.search_nats import NATSSearchConfig, search_nats
    from nasdet.spaces.nats import NATSSpace

    card = search_nats(NATSSearchConfig(**settings), folder, out, **options)
    return [f"{card.name}: {out / 'card.json'}", *(f"  {line}" for line in NATSSpace.describe(card))]
