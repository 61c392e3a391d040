"""The options that searches share, and where the help of a method says what their values are."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nasdet.cli import names

_WHOLE: dict[str, Any] = {"type": int, "metavar": "N"}
_REAL: dict[str, Any] = {"type": float, "metavar": "X"}
_NAME: dict[str, Any] = {"metavar": "NAME"}
_OPTIONS: dict[str, dict[str, Any]] = {
    "size": {"metavar": "SHORT[xLONG]", "help": "picture size in pixels"},
    "detector": {**_NAME, "help": names.DETECTORS},
    "backbone": {**_NAME, "help": f"{names.BACKBONES}, or a card that is one, with its search's split"},
    "width": {**_REAL, "help": "multiplier of the backbone's channels"},
    "norm": {**_NAME, "help": "of the backbone: gn, bn, sync_bn, frozen_bn"},
    "weights": {"metavar": "FILE", "help": "pretrained weights of the backbone, .pth or .safetensors"},
    "fpn_channels": {**_WHOLE, "help": "channels of the pyramid and the towers"},
    "levels": {**_WHOLE, "help": "pyramid levels from stride 8 on, two stages from 4"},
    "tower_convs": {**_WHOLE, "help": "convolutions in each tower, where there are any"},
    "steps": {**_WHOLE, "help": "steps of training"},
    "batch": {**_WHOLE, "help": "images a step"},
    "optimizer": {**_NAME, "help": "sgd or adamw"},
    "lr": {**_REAL, "help": "learning rate of the weights"},
    "arch_lr": {**_REAL, "help": "learning rate of the alphas"},
    "clip": {**_REAL, "help": "largest norm of the gradient"},
    "no_flip": {
        "action": "store_false",
        "dest": "flip",
        "default": None,
        "help": "do not mirror pictures (for digits, text)",
    },
    "amp": {"action": "store_const", "const": True, "help": "bfloat16 autocast"},
    "seed": {**_WHOLE, "help": "of everything random"},
    "workers": {**_WHOLE, "help": "processes that read pictures"},
    "log_every": {**_WHOLE, "help": "steps between two lines of metrics.jsonl, and of alphas.jsonl"},
    "checkpoint_every": {**_WHOLE, "help": "steps between two checkpoints"},
    "name": {**_NAME, "help": "name of the card"},
    "max_parameters": {**_REAL, "help": "limit on the backbone's parameters"},
    "latency_table": {"metavar": "FILE", "help": "of nasdet measure latency: milliseconds of every candidate"},
    "max_latency": {"type": float, "metavar": "MS", "help": "limit on them"},
    "supernet": {"metavar": "RUN", "help": "take the supernet of a finished run of the same space, and train none"},
    "algorithm": {"choices": ("evolution", "random"), "help": "random: as many random candidates, within the limits"},
    "population": {**_WHOLE, "help": "size of the population"},
    "parents": {**_WHOLE, "help": "of it, the best that have children"},
    "generations": {**_WHOLE, "help": "generations, the first included"},
    "val_images": {**_WHOLE, "help": "search-val images to score on"},
    "eval_batch": {**_WHOLE, "help": "images at once when scoring"},
    "top": {**_WHOLE, "help": "best cards to write to RUN/cards"},
    "backend": {**_NAME, "help": "backend of the searched operators, such as reference (default: the best one)"},
}


def add_run(parser: argparse.ArgumentParser, presets: Iterable[str]) -> None:
    """What every search asks for first: data, folder, resumption, preset, device."""
    add = parser.add_argument
    add("--data", required=True, type=Path, metavar="DIR", help="COCO or VOC folder (see 'nasdet data --help')")
    add("--out", required=True, type=Path, metavar="RUN", help="run folder to write")
    add("--resume", action="store_true", help="go on with the run in RUN; the result is that of a run never stopped")
    add("--preset", choices=tuple(presets), default="paper", help="where the other options start from (default: paper)")
    add("--skip-bad", action="store_true", help="leave out bad images and records, and report how many")
    add("--device", metavar="DEVICE", help="such as cuda:0 or cpu (default: a GPU when there is one)")


def add_shared(parser: Any, **notes: str) -> None:
    """Options of the table by name, in the order given; ``notes`` are the values by default, ``""`` for none to tell.

    ``parser`` may be a group of one.
    """
    for name, note in notes.items():
        settings = dict(_OPTIONS[name])
        settings["help"] += f" ({note})" if note else ""
        parser.add_argument(f"--{name.replace('_', '-')}", **settings)


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
