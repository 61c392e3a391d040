"""``nasdet search msnas``: its options, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "MSNAS: strides of a detector's encoder, and the maps that its heads read"

# What --preset stands for; an option given on the command line wins.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "tiny": {
        "steps": 800,
        "batch": 4,
        "short_side": 128,
        "long_side": 192,
        "optimizer": "adamw",
        "lr": 0.003,
        "clip": 20.0,
        "detector": "fcos",
        "tower_convs": 2,
        "blocks": 7,
        "channels": 24,
        "rpn_channels": 48,
        "head_channels": 128,
        "norm": "bn",
        "target_macs": 120e6,
        "tolerance": 0.1,
        "macs_height": 128,
        "macs_width": 192,
        "tuning_steps": 20,
        "tuning_lr": 0.002,
        "population": 8,
        "parents": 4,
        "generations": 3,
        "val_images": 40,
        "top": 3,
        "log_every": 10,
        "checkpoint_every": 50,
    },
}

DESCRIPTION = (
    "MSNAS (under review, ICLR 2021) searches an encoder whose blocks each halve, keep or double the resolution, with\n"
    "lateral connections that follow, and for each of five detection heads the map that it reads. A supernet learns\n"
    "one random encoder a step; then an evolution under a window of multiply-accumulates scores encoders, each of\n"
    "them trained on its own for some steps from the supernet's weights. The defaults are the paper's, meant for COCO\n"
    "on 16 GPUs; --preset tiny runs in minutes on a CPU. torchrun starts it in several processes."
)
EPILOG = (
    "examples:\n"
    "  nasdet data digits --out digits                  make a small real data set\n"
    "  nasdet search msnas --data digits --out runs/msnas --preset tiny --no-flip\n"
    "  nasdet search msnas --data coco --out runs/r34 --variant r34\n"
    "  torchrun --nproc-per-node 16 -m nasdet search msnas --data coco --out runs/r18\n"
    "  nasdet search msnas --data coco --out runs/random --supernet runs/r18 --algorithm random  the same supernet\n"
    "  nasdet search msnas --data digits --out runs/msnas --preset tiny --no-flip --resume    go on after a stop\n"
    "  nasdet train --card runs/msnas/card.json --data digits --out runs/net    retrain it"
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
    _add_space(parser.add_argument_group("search space").add_argument)
    _add_supernet(parser.add_argument_group("supernet").add_argument)
    _add_search(parser.add_argument_group("search").add_argument)


def _add_space(add: Any) -> None:
    add("--variant", choices=("r18", "r34", "r50"), help="the paper's sizes: 13 x 180, 21 x 160, bottlenecks 21 x 144")
    add("--blocks", type=int, metavar="N", help="blocks, in the place of the variant's (tiny: 7)")
    add("--channels", type=int, metavar="N", help="channels of every block, likewise (tiny: 24)")
    add("--block", choices=("basic", "bottleneck"), help="kind of block, likewise")
    add("--target-macs", type=float, metavar="X", help="MACs of encoder and RPN (the variant's: 145.45e9 for r18)")
    add(
        "--tolerance", type=float, metavar="X", help="share by which a candidate may miss them (paper: 0.01; tiny: 0.1)"
    )
    add(
        "--macs-height", type=int, metavar="N", help="height of the picture that they count for (paper: 832; tiny: 128)"
    )
    add("--macs-width", type=int, metavar="N", help="and its width (paper: 1280; tiny: 192)")
    add("--max-parameters", type=float, metavar="X", help="parameters of the encoder at most (no limit)")
    add("--name", metavar="NAME", help="name of the card (default: msnas-VARIANT-DETECTOR-seedN)")


def _add_supernet(add: Any) -> None:
    add("--supernet", metavar="RUN", help="take the trained supernet of a finished run of the same space")
    add("--detector", metavar="NAME", help="detector around the encoder, any of them (paper: faster_rcnn; tiny: fcos)")
    add("--norm", metavar="NAME", help="of encoder and box head: sync_bn, bn, gn (paper: sync_bn; tiny: bn)")
    add("--rpn-channels", type=int, metavar="N", help="channels of the RPN (paper: 256; tiny: 48)")
    add("--head-channels", type=int, metavar="N", help="channels of the box head's last layer (paper: 1024; tiny: 128)")
    add("--tower-convs", type=int, metavar="N", help="convolutions in each tower of a one-stage detector (4; tiny: 2)")
    add("--size", metavar="SHORT[xLONG]", help="picture size in pixels (paper: 800x1333; tiny: 128x192)")
    add("--epochs", type=int, metavar="N", help="epochs over the images that the supernet learns from (48)")
    add("--steps", type=int, metavar="N", help="steps in the place of epochs (tiny: 800)")
    add("--batch", type=int, metavar="N", help="images a step, over all processes (paper: 32; tiny: 4)")
    add("--optimizer", choices=("sgd", "adamw"), help="paper: sgd; tiny: adamw, which learns sooner")
    add("--lr", type=float, metavar="X", help="learning rate (paper: 0.04; tiny: 0.003)")
    add("--clip", type=float, metavar="X", help="largest norm of the gradient (paper: none; tiny: 20)")
    add("--no-flip", action="store_false", dest="flip", default=None, help="do not mirror pictures (for digits, text)")
    add("--amp", action="store_const", const=True, help="bfloat16 autocast")
    add("--log-every", type=int, metavar="N", help="steps between two lines of metrics.jsonl")
    add("--checkpoint-every", type=int, metavar="N", help="steps between two checkpoints")


def _add_search(add: Any) -> None:
    add("--algorithm", choices=("evolution", "random"), help="random: as many random encoders within the same limits")
    add("--population", type=int, metavar="N", help="size of the population (paper: 50; tiny: 8)")
    add("--parents", type=int, metavar="N", help="the best of it, which have children (paper: 50; tiny: 4)")
    add("--generations", type=int, metavar="N", help="generations, the first included (paper: 21; tiny: 3)")
    add(
        "--tuning-steps",
        type=int,
        metavar="N",
        help="steps of a candidate on its own before it is scored (100; tiny: 20)",
    )
    add("--tuning-batch", type=int, metavar="N", help="images in such a step (as --batch)")
    add("--tuning-lr", type=float, metavar="X", help="learning rate of such steps (paper: 0.004; tiny: 0.002)")
    add("--val-images", type=int, metavar="N", help="images to score on, of the search-val ones (5000; tiny: 40)")
    add("--eval-batch", type=int, metavar="N", help="images at once when scoring (4)")
    add("--top", type=int, metavar="N", help="best cards to write (5; tiny: 3)")
    add("--seed", type=int, metavar="N", help="of everything random (0)")
    add("--workers", type=int, metavar="N", help="processes that read pictures (2)")


def run(settings: dict[str, Any], folder: Any, out: Path, **options: Any) -> list[str]:
    """Search, and say what was found, in lines."""
    from nasdet.engine.search_msnas import MSNASSearchConfig, search_msnas
    from nasdet.spaces.msnas import MSNASSpace

    card = search_msnas(MSNASSearchConfig(**settings), folder, out, **options)
    score = f"AP {100 * card.source['score']:.2f} on search-val, {card.source['evaluations']} candidates"
    return [f"{card.name}: {out / 'card.json'}", f"  {score}", *(f"  {line}" for line in MSNASSpace.describe(card))]
