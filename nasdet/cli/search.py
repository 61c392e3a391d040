"""``nasdet search METHOD``: search an architecture on a data folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from nasdet.cli import names, search_msnas, search_nats

HELP = "search a detector's architecture on a data folder"

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


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb to its parser."""
    parser.description = (
        "Search an architecture: a supernet that holds every choice is trained on one half of the training images, "
        "and the choices on the other half. Test images are never used. The run folder gets the derived architecture "
        "(card.json), and everything to resume, retrain and report."
    )
    methods = parser.add_subparsers(dest="method", required=True, metavar="METHOD")
    fad = methods.add_parser(
        "fad",
        help="FAD: the sub-network in a one-stage detector's towers, or in a mask head",
        description=(
            "FAD (Zhong et al., ECCV 2020) searches the module that replaces the box and class towers of a one-stage "
            "detector, or the convolutions of a mask head before its deconvolution: 9 edges a cell, 12 transformations "
            "and 'none' an edge, representations shared between them. The defaults are the paper's for towers, meant "
            "for VOC 2012 on one GPU; --preset tiny runs in minutes on a CPU."
        ),
        epilog=(
            "examples:\n"
            "  nasdet data digits --out digits                  make a small real data set\n"
            "  nasdet search fad --data digits --out runs/tiny --preset tiny --no-flip\n"
            "  nasdet search fad --data VOCdevkit/VOC2012 --out runs/voc --weights resnet50.pth\n"
            "  nasdet search fad --data coco --out runs/masks --detector mask_rcnn --weights resnet50.pth\n"
            "  nasdet search fad --data digits --out runs/tiny --preset tiny --no-flip --resume   go on after a stop\n"
            "  nasdet train --card runs/tiny/card.json --data digits --out runs/net     retrain the result"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_common(fad)
    _add_fad(fad)
    for name, method in _METHODS.items():
        method.configure(
            methods.add_parser(
                name,
                help=method.HELP,
                description=method.DESCRIPTION,
                epilog=method.EPILOG,
                formatter_class=argparse.RawDescriptionHelpFormatter,
            )
        )


_METHODS: dict[str, Any] = {"msnas": search_msnas, "nats": search_nats}
"""Methods with a module of their own."""


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, type=Path, metavar="DIR", help="COCO or VOC folder (see 'nasdet data --help')")
    add("--out", required=True, type=Path, metavar="RUN", help="run folder to write")
    add("--resume", action="store_true", help="go on with the run in RUN; the result is that of a run never stopped")
    add("--preset", choices=tuple(PRESETS), default="paper", help="where the other options start from (default: paper)")
    add("--steps", type=int, metavar="N", help="search steps (paper: 17500; tiny: 300)")
    add("--batch", type=int, metavar="N", help="images a step, for the weights and again for the alphas (4)")
    add("--size", metavar="SHORT[xLONG]", help="picture size in pixels (paper: 416x693; tiny: 128x192)")
    add("--backbone", metavar="NAME", help=f"{names.BACKBONES} (paper: resnet50; tiny: resnet18)")
    add("--width", type=float, metavar="X", help="multiplier of the backbone's channels (paper: 1; tiny: 0.25)")
    add(
        "--weights", metavar="FILE", help="ImageNet weights of the backbone, torchvision's format, .pth or .safetensors"
    )
    add("--lr", type=float, metavar="X", help="learning rate of the weights (paper: 0.004; tiny: 0.01)")
    add("--arch-lr", type=float, metavar="X", help="learning rate of the alphas (paper: 0.0003; tiny: 0.003)")
    add("--no-flip", action="store_false", dest="flip", default=None, help="do not mirror pictures (for digits, text)")
    add("--seed", type=int, metavar="N", help="of everything random (0)")
    add("--workers", type=int, metavar="N", help="processes that read pictures (2)")
    add("--amp", action="store_const", const=True, help="bfloat16 autocast")
    add("--device", metavar="DEVICE", help="such as cuda:0 or cpu (default: a GPU when there is one)")
    add("--skip-bad", action="store_true", help="leave out bad images and records, and report how many")
    add("--log-every", type=int, metavar="N", help="steps between two lines of metrics.jsonl and alphas.jsonl")
    add("--checkpoint-every", type=int, metavar="N", help="steps between two checkpoints")


def _add_fad(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
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
    add("--fpn-channels", type=int, metavar="N", help="pyramid and node channels c (paper: 256; tiny: 48)")
    add("--inner-channels", type=int, metavar="N", help="channels c' inside the transformations (paper: 96; tiny: 24)")
    add("--levels", type=int, metavar="N", help="pyramid levels from stride 8 on; masks: 4 (paper: 5; tiny: 4)")
    add("--score", choices=("softmax", "alpha"), help="how edges are compared when decoding (default: softmax)")
    add("--name", metavar="NAME", help="name of the card (default: fad-SPACE-seedN)")
    add("--backend", metavar="NAME", help="backend of the mixing ops, such as reference (default: the best one)")


def parse_size(text: str) -> tuple[int, int]:
    """``"416x693"`` as (short, long); ``"128"`` as (128, 213), the papers' ratio of 5 : 3."""
    words = text.lower().split("x")
    if len(words) > 2 or not all(word.isdecimal() for word in words) or not all(int(word) for word in words):
        raise ValueError(f"size must be SHORT or SHORTxLONG in pixels, got {text!r}")
    short = int(words[0])
    long = int(words[1]) if len(words) == 2 else round(short * 5 / 3)
    if long < short:
        raise ValueError(f"size must have its short side first, got {text!r}")
    return short, long


def run(
    method: str,
    data: Path,
    out: Path,
    resume: bool = False,
    preset: str = "paper",
    size: str | None = None,
    no_repshare: bool = False,
    no_decouple: bool = False,
    weights: str | None = None,
    device: str | None = None,
    backend: str | None = None,
    skip_bad: bool = False,
    **options: Any,
) -> int:
    """Search, and print the derived architecture and where it lies."""
    from nasdet.data import Split, open_data
    from nasdet.detectors import WITH_MASKS

    presets = {"fad": PRESETS, **{name: module.PRESETS for name, module in _METHODS.items()}}
    if method not in presets:
        raise ValueError(f"method must be one of {', '.join(presets)}, got {method!r}")
    given = {name: value for name, value in options.items() if value is not None}
    settings = {**presets[method][preset], **given}
    if size is not None:
        settings["short_side"], settings["long_side"] = parse_size(size)
    if no_repshare:
        settings["repshare"] = False
    if no_decouple:
        settings["decouple"] = False
    stored = out / "split.json"
    split = Split.load(stored) if resume and stored.is_file() else None
    masks = settings.get("detector") in WITH_MASKS
    folder = open_data(data, split=split, seed=settings.get("seed", 0), skip_bad=skip_bad, masks=masks)
    if folder.skipped:
        print("skipped: " + ", ".join(f"{number} {reason}" for reason, number in folder.skipped.items()))
    search = _search_fad if method == "fad" else _METHODS[method].run
    command = ["nasdet", *sys.argv[1:]]
    places = {"weights": weights, "device": device, "backend": backend}
    for line in search(settings, folder, out, resume=resume, command=command, **places):
        print(line)
    recipe = "" if preset == "paper" else f" --preset {preset}"
    print(f"retrain it:  nasdet train --card {out / 'card.json'} --data {data} --out RUN{recipe}")
    return 0


def _search_fad(settings: dict[str, Any], folder: Any, out: Path, **options: Any) -> list[str]:
    from nasdet.engine.search import FADSearchConfig, search_fad
    from nasdet.spaces.fad import FADSpace

    card = search_fad(FADSearchConfig(**settings), folder, out, **options)
    return [f"{card.name}: {out / 'card.json'}", *(f"  {line}" for line in FADSpace.describe(card))]
