"""``nasdet search nats``: its options, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

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
    "NATS (Peng et al., NeurIPS 2019) transforms a trained backbone for detection: every 3x3 convolution in the "
    "bottlenecks of stages 3 to 5 becomes one whose channel groups have dilations of their own. The result has the "
    "parameters, the cost and the pretrained weights of the original. The defaults are the paper's, meant for COCO on "
    "8 GPUs; --preset tiny runs in minutes on a CPU."
)
EPILOG = (
    "examples:\n"
    "  nasdet data digits --out digits                  make a small real data set\n"
    "  nasdet search nats --data digits --out runs/nats --preset tiny --no-flip\n"
    "  nasdet search nats --data coco --out runs/nats --weights resnet50.pth\n"
    "  nasdet search nats --data digits --out runs/nats --preset tiny --no-flip --resume   go on after a stop\n"
    "  nasdet train --card runs/nats/card.json --data digits --out runs/net     retrain the result\n"
    "  nasdet train --card runs/nats/card.json --detector mask_rcnn --data coco --out runs/mask --weights resnet50.pth"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the method to its parser."""
    add = parser.add_argument
    add("--data", required=True, type=Path, metavar="DIR", help="COCO or VOC folder (see 'nasdet data --help')")
    add("--out", required=True, type=Path, metavar="RUN", help="run folder to write")
    add("--resume", action="store_true", help="go on with the run in RUN; the result is that of a run never stopped")
    add("--preset", choices=tuple(PRESETS), default="paper", help="where the other options start from (default: paper)")
    add("--skip-bad", action="store_true", help="leave out bad images and records, and report how many")
    add("--device", metavar="DEVICE", help="such as cuda:0 or cpu (default: a GPU when there is one)")
    add("--backend", metavar="NAME", help="backend of the convolutions, such as reference (default: the best one)")
    _add_space(parser.add_argument_group("search space").add_argument)
    _add_model(parser.add_argument_group("model").add_argument)
    _add_search(parser.add_argument_group("search").add_argument)


def _add_space(add: Any) -> None:
    add("--dilations", choices=("A", "B", "C"), help="the paper's sets: 2, 3 or 5 dilations (stage 5: 3, 5, 9) (C)")
    add("--channel-groups", type=int, metavar="N", help="channel groups in every layer (16; 1 is path-level)")
    add("--channels-per-group", type=int, metavar="C", help="channels of a group, in the place of their number")
    add(
        "--index-preserving",
        action="store_const",
        const=True,
        help="channel groups keep their places in the derived net (default: blocks, one per dilation)",
    )
    add("--name", metavar="NAME", help="name of the card (default: nats-SET-BACKBONE-seedN)")


def _add_model(add: Any) -> None:
    add("--detector", metavar="NAME", help="detector around the backbone, any of them (paper: faster_rcnn; tiny: fcos)")
    add("--backbone", metavar="NAME", help="resnet{50,101}, resnext50_32x4d, resnext101_{32x4d,32x8d,64x4d} (resnet50)")
    add("--width", type=float, metavar="X", help="multiplier of the backbone's channels (paper: 1; tiny: 0.25)")
    add("--weights", metavar="FILE", help="its ImageNet weights, torchvision's format, .pth or .safetensors")
    add("--norm", metavar="NAME", help="of the backbone: gn, bn, sync_bn, frozen_bn (gn; with --weights sync_bn)")
    add("--fpn-channels", type=int, metavar="N", help="pyramid and tower channels (paper: 256; tiny: 48)")
    add("--levels", type=int, metavar="N", help="pyramid levels from stride 8 on, two stages: 4 (paper: 5; tiny: 4)")
    add("--tower-convs", type=int, metavar="N", help="convolutions in each tower, where there are any (4; tiny: 2)")
    add("--size", metavar="SHORT[xLONG]", help="picture size in pixels (paper: 800x1200; tiny: 128x192)")


def _add_search(add: Any) -> None:
    add("--epochs", type=int, metavar="N", help="epochs over the images that train the weights (25)")
    add("--frozen-epochs", type=int, metavar="N", help="of these, the first ones without steps of the alphas (10)")
    add(
        "--steps",
        type=int,
        metavar="N",
        help="steps in the place of epochs; the share without alphas stays (tiny: 300)",
    )
    add("--batch", type=int, metavar="N", help="images a step, for the weights and again for the alphas (8; tiny: 4)")
    add("--lr", type=float, metavar="X", help="learning rate of the weights (0.01)")
    add("--final-lr", type=float, metavar="X", help="and at the end of its cosine (0.0004)")
    add("--arch-lr", type=float, metavar="X", help="learning rate of the alphas (paper: 0.01; tiny: 0.03)")
    add("--clip", type=float, metavar="X", help="largest norm of the gradient (paper: none; tiny: 20)")
    add("--no-flip", action="store_false", dest="flip", default=None, help="do not mirror pictures (for digits, text)")
    add("--amp", action="store_const", const=True, help="bfloat16 autocast")
    add("--seed", type=int, metavar="N", help="of everything random (0)")
    add("--workers", type=int, metavar="N", help="processes that read pictures (2)")
    add("--log-every", type=int, metavar="N", help="steps between two lines of metrics.jsonl and alphas.jsonl")
    add("--checkpoint-every", type=int, metavar="N", help="steps between two checkpoints")


def run(settings: dict[str, Any], folder: Any, out: Path, **options: Any) -> list[str]:
    """Search, and say what was found, in lines."""
    from nasdet.engine.search_nats import NATSSearchConfig, search_nats
    from nasdet.spaces.nats import NATSSpace

    card = search_nats(NATSSearchConfig(**settings), folder, out, **options)
    return [f"{card.name}: {out / 'card.json'}", *(f"  {line}" for line in NATSSpace.describe(card))]
