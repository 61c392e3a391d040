"""``nasdet search msnas``: its options, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nasdet.cli.search_options import add_run, add_shared

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
    "  nasdet train --card runs/msnas/card.json --data digits --out runs/net --preset tiny --no-flip   retrain it\n"
    "\n"
    "Several processes and machines, and what a resumption loses: see nasdet search detnas --help. A candidate is\n"
    "trained on one device: where --tuning-batch images do not fit, --tuning-micro-batch takes fewer at a time."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the method to its parser."""
    add_run(parser, PRESETS)
    _add_space(parser.add_argument_group("search space"))
    _add_supernet(parser.add_argument_group("supernet"))
    _add_search(parser.add_argument_group("search"))


def _add_space(group: Any) -> None:
    add = group.add_argument
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
    limits = dict.fromkeys(("max_parameters", "latency_table", "max_latency"), "none")
    add_shared(group, **limits, name="msnas-VARIANT-DETECTOR-seedN")


def _add_supernet(group: Any) -> None:
    add = group.add_argument
    add("--rpn-channels", type=int, metavar="N", help="channels of the RPN (paper: 256; tiny: 48)")
    add("--head-channels", type=int, metavar="N", help="channels of the box head's last layer (paper: 1024; tiny: 128)")
    add("--epochs", type=int, metavar="N", help="epochs over the images that the supernet learns from (48)")
    add_shared(
        group,
        supernet="",
        detector="paper: faster_rcnn; tiny: fcos",
        norm="paper: sync_bn, of encoder and box head; tiny: bn",
        tower_convs="4; tiny: 2",
        size="paper: 800x1333; tiny: 128x192",
        steps="in the place of epochs; tiny: 800",
        batch="over all processes; paper: 32; tiny: 4",
        optimizer="paper: sgd; tiny: adamw, which learns sooner",
        lr="paper: 0.04; tiny: 0.003",
        clip="paper: none; tiny: 20",
        no_flip="",
        amp="",
        seed="0",
        workers="2",
        log_every="20; tiny: 10",
        checkpoint_every="500; tiny: 50",
    )


def _add_search(group: Any) -> None:
    add = group.add_argument
    add(
        "--tuning-steps",
        type=int,
        metavar="N",
        help="steps of a candidate on its own before it is scored (100; tiny: 20)",
    )
    add("--tuning-batch", type=int, metavar="N", help="images in such a step (as --batch)")
    add("--tuning-micro-batch", type=int, metavar="N", help="of which so many go through the net at a time (all)")
    add("--tuning-lr", type=float, metavar="X", help="learning rate of such steps (paper: 0.004; tiny: 0.002)")
    add_shared(
        group,
        algorithm="evolution",
        population="paper: 50; tiny: 8",
        parents="paper: 50; tiny: 4",
        generations="paper: 21; tiny: 3",
        val_images="paper: 5000; tiny: 40",
        eval_batch="4",
        top="5; tiny: 3",
    )


def run(settings: dict[str, Any], folder: Any, out: Path, **options: Any) -> list[str]:
    """Search, and say what was found, in lines."""
    from nasdet.engine.search_msnas import MSNASSearchConfig, search_msnas
    from nasdet.spaces.msnas import MSNASSpace

    card = search_msnas(MSNASSearchConfig(**settings), folder, out, **options)
    score = f"AP {card.source['score']:.4f} on search-val, {card.source['evaluations']} candidates"
    return [f"{card.name}: {out / 'card.json'}", f"  {score}", *(f"  {line}" for line in MSNASSpace.describe(card))]
