"""``nasdet search fad``: its options, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nasdet.cli.search_options import add_run, add_shared

HELP = "FAD: the sub-network in a one-stage detector's towers, or in a mask head"

# What --preset stands for; an option given on the command line wins.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "tiny": {
        "steps": 300,
        "batch": 4,
        "short_side": 128,
        "long_side": 192,
        "lr": 0.01,
        "arch_lr": 0.003,
        "backbone": "resnet18",
        "width": 0.25,
        "fpn_channels": 48,
        "levels": 4,
        "inner_channels": 24,
        "log_every": 10,
        "checkpoint_every": 50,
    },
}

DESCRIPTION = (
    "FAD (Zhong et al., ECCV 2020) searches the module that replaces the box and class towers of a one-stage\n"
    "detector, or the convolutions of a mask head before its deconvolution: 9 edges a cell, 12 transformations\n"
    "and 'none' an edge, representations shared between them. The defaults are the paper's for towers, meant\n"
    "for VOC 2012 on one GPU; --preset tiny runs in minutes on a CPU."
)
EPILOG = (
    "examples:\n"
    "  nasdet data digits --out digits                  make a small real data set\n"
    "  nasdet search fad --data digits --out runs/tiny --preset tiny --no-flip\n"
    "  nasdet search fad --data VOCdevkit/VOC2012 --out runs/voc --weights resnet50.pth\n"
    "  nasdet search fad --data coco --out runs/masks --detector mask_rcnn --weights resnet50.pth\n"
    "  nasdet search fad --data coco --out runs/both --backbone runs/msnas/card.json     towers on a searched encoder\n"
    "  nasdet search fad --data digits --out runs/tiny --preset tiny --no-flip --resume   go on after a stop\n"
    "  nasdet train --card runs/tiny/card.json --data digits --out runs/net --preset tiny --no-flip   retrain it"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the method to its parser."""
    add_run(parser, PRESETS)
    add_shared(
        parser,
        steps="paper: 17500; tiny: 300",
        batch="for the weights and again for the alphas; 4",
        size="paper: 416x693; tiny: 128x192",
        backbone="paper: resnet50; tiny: resnet18",
        width="paper: 1; tiny: 0.25",
        weights="torchvision's format",
        lr="paper: 0.004; tiny: 0.01",
        arch_lr="paper: 0.0003; tiny: 0.003",
        no_flip="",
        seed="0",
        workers="2",
        amp="",
        log_every="20; tiny: 10",
        checkpoint_every="200; tiny: 50",
    )
    _add_space(parser.add_argument)
    add_shared(
        parser,
        fpn_channels="paper: 256; tiny: 48",
        levels="masks: 4; paper: 5; tiny: 4",
        name="fad-SPACE-seedN",
        backend="",
    )


def _add_space(add: Any) -> None:
    add(
        "--space",
        choices=("full", "subset1", "subset2", "sep", "std", "darts", "released"),
        help=(
            "transformations (Table 2): full 12; subset1 4 (receptive fields 3, 5); subset2 8 (3, 5, 7); sep or std 6 "
            "of one stream; darts 7 operations of DARTS; released 10, without dilation 3 (default: full)"
        ),
    )
    add("--detector", metavar="NAME", help="fcos, retinanet, mask_rcnn or mask_scoring_rcnn (default: fcos)")
    add("--part", choices=("towers", "mask_trunk"), help="what is searched (default: what the detector has of the two)")
    add("--no-repshare", action="store_true", help="compute every transformation by itself: 26 representations, not 12")
    add("--no-decouple", action="store_true", help="without H between a shared representation and its transformation")
    add("--released-h", action="store_const", const=True, help="H without ReLU, as the released code has it")
    add("--inner-channels", type=int, metavar="N", help="channels c' inside the transformations (paper: 96; tiny: 24)")
    add("--score", choices=("softmax", "alpha"), help="how edges are compared when decoding (default: softmax)")


def run(
    settings: dict[str, Any],
    folder: Any,
    out: Path,
    no_repshare: bool = False,
    no_decouple: bool = False,
    **options: Any,
) -> list[str]:
    """Search, and say what was found, in lines."""
    from nasdet.engine.search import FADSearchConfig, search_fad
    from nasdet.spaces.fad import FADSpace

    if no_repshare:
        settings = settings | {"repshare": False}
    if no_decouple:
        settings = settings | {"decouple": False}
    card = search_fad(FADSearchConfig(**settings), folder, out, **options)
    return [f"{card.name}: {out / 'card.json'}", *(f"  {line}" for line in FADSpace.describe(card))]
