"""``nasdet train``: train a detector with plain or searched towers on a data folder."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nasdet.cli import names
from nasdet.cli.search_options import parse_size

if TYPE_CHECKING:
    from nasdet.arch import Card
    from nasdet.data import DataFolder
    from nasdet.spaces.assemble import ModelConfig

HELP = "train a detector, with plain towers or a searched architecture"

# What --preset stands for; an option given on the command line wins.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "tiny": {
        "steps": 600,
        "batch": 8,
        "optimizer": "adamw",
        "lr": 0.003,
        "weight_decay": 0.01,
        "decay": "cosine",
        "clip": 20.0,
        "warmup": "linear",
        "short_side": 128,
        "long_side": 192,
        "backbone": "resnet18",
        "width": 0.25,
        "fpn_channels": 48,
        "levels": 4,
        "inner_channels": 24,
        "tower_convs": 2,
        "log_every": 10,
        "checkpoint_every": 50,
    },
}

_DESCRIPTION = """\
Train a detector on everything of a data folder that may be trained on, then report its average precision on the test
part, which takes no part in training. It is plain, or a card stands for a part of it, published or one that you
searched: the towers of fcos and retinanet, the mask head of mask_rcnn and mask_scoring_rcnn, any detector's backbone.
The mask detectors learn masks, which the data must have: polygons or run lengths in COCO's file; digits have them.

The defaults are the papers' (COCO, 8 GPUs): ResNet-50, images of 800 by at most 1333 pixels, 16 images a step, 90,000
steps, learning rate 0.01, a tenth of it from 60,000 and again from 80,000 on (2/3 and 8/9 of any other number of
steps). The rate follows --batch: 0.01 x batch / 16. --preset tiny learns something in minutes on a CPU.
"""

_EPILOG = """\
examples:
  nasdet data digits --out digits                                    make a small real data set
  nasdet train --data digits --out runs/plain --preset tiny --no-flip
  nasdet train --card fad-paper --data digits --out runs/fad --preset tiny --no-flip
  nasdet train --detector mask_rcnn --data digits --out runs/masks --preset tiny --no-flip
  nasdet train --card runs/search/card.json --data digits --out runs/net --preset tiny --no-flip --steps 2000
  nasdet train --card runs/nats/card.json --detector cascade_rcnn --data coco --out runs/cascade --weights resnet50.pth
  nasdet train --data digits --out runs/plain --preset tiny --no-flip --resume   go on after a stop or a crash
  torchrun --nproc-per-node 8 -m nasdet train --card fad-paper --weights resnet50.pth --data coco --out runs/coco

then:
  nasdet eval runs/plain
  nasdet detect runs/plain picture.jpg --out found
  nasdet report runs/plain

A card from a search run brings the detector around it, with its picture size (the model.json beside it), unless
--preset or --size is given, and the search's split, so that no picture that chose the architecture is tested on. A
plain --data folder without test annotations has a fifth of its pictures held out as the test part.

RUN holds run.json, model.json, split.json, metrics.jsonl, tb/ (TensorBoard), checkpoints/last.pt, weights.safetensors,
eval.json and detections.json. A run that was killed goes on with the same command and --resume, and ends with the same
weights as one never killed, bit for bit on the CPU. A loss that is not finite stops the run; the last checkpoint stays.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb to its parser."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--data", required=True, type=Path, metavar="DIR", help="COCO or VOC folder (see 'nasdet data --help')")
    add("--out", required=True, type=Path, metavar="RUN", help="run folder to write")
    add("--card", default="plain", metavar="CARD", help="plain, a published name (nasdet arch list), or a card file")
    add("--preset", choices=tuple(PRESETS), help="where the other options start from (default: paper)")
    add("--resume", action="store_true", help="go on with the run in RUN")
    add("--skip-bad", action="store_true", help="leave out bad images and records, and report how many")
    add("--split", type=Path, metavar="FILE", help="split.json to use (default: the card's, else one by --seed)")
    _add_model(parser.add_argument_group("model").add_argument)
    _add_training(parser.add_argument_group("training").add_argument)


def _add_model(add: Any) -> None:
    add("--detector", metavar="NAME", help=f"{names.DETECTORS} (fcos)")
    add("--backbone", metavar="NAME", help=f"{names.BACKBONES}, or a card (paper: resnet50; tiny: resnet18)")
    add("--width", type=float, metavar="X", help="multiplier of the backbone's channels (paper: 1; tiny: 0.25)")
    add("--weights", type=Path, metavar="FILE", help="torchvision's ImageNet weights for it, .pth or .safetensors")
    add("--norm", metavar="NAME", help="of the backbone: gn, bn, sync_bn, frozen_bn (gn; with --weights frozen_bn)")
    add("--frozen-stages", type=int, metavar="N", help="backbone stages that do not learn (with --weights 2, else 0)")
    add("--fpn-channels", type=int, metavar="N", help="pyramid and tower channels (paper: 256; tiny: 48)")
    add("--levels", type=int, metavar="N", help="pyramid levels from stride 8 (two stages: 4) on (paper: 5; tiny: 4)")
    add("--tower-convs", type=int, metavar="N", help="convolutions in each plain tower (paper: 4; tiny: 2)")
    add("--inner-channels", type=int, metavar="N", help="channels inside a card's operations (the card's; tiny: 24)")
    add("--cells", type=int, metavar="N", help="cells in each group of a card (default: the card's)")
    add("--size", metavar="SHORT[xLONG]", help="picture size in pixels (paper: 800x1333; tiny: 128x192)")


def _add_training(add: Any) -> None:
    add("--steps", type=int, metavar="N", help="training steps (paper: 90000; tiny: 600)")
    add("--batch", type=int, metavar="N", help="images a step, over all processes (paper: 16; tiny: 8)")
    add("--lr", type=float, metavar="X", help="learning rate (paper: 0.01 x batch / 16; tiny: 0.003)")
    add("--optimizer", choices=("sgd", "adamw"), help="sgd, or adamw, quicker from random weights (sgd; tiny: adamw)")
    add("--decay", choices=("step", "cosine", "constant"), help="of the learning rate (step; tiny: cosine)")
    add("--warmup-steps", type=int, metavar="N", help="steps at a third of the rate (500, at most a tenth of the run)")
    add("--weight-decay", type=float, metavar="X", help="(0.0001; tiny: 0.01)")
    add("--clip", type=float, metavar="X", help="largest norm of the gradient (paper: none; tiny: 20)")
    add("--no-flip", action="store_false", dest="flip", default=None, help="do not mirror pictures (for digits, text)")
    add("--amp", action="store_const", const=True, help="compute the model in bfloat16")
    add("--seed", type=int, metavar="N", help="of everything random (0)")
    add("--workers", type=int, metavar="N", help="processes that read pictures (2)")
    add("--device", metavar="DEVICE", help="such as cuda:0 or cpu (default: a GPU when there is one)")
    add("--eval-every", type=int, metavar="N", help="steps between evaluations for the AP curve (0: only at the end)")
    add("--log-every", type=int, metavar="N", help="steps between two lines of metrics.jsonl (paper: 20; tiny: 10)")
    add("--checkpoint-every", type=int, metavar="N", help="steps between two checkpoints (paper: 500; tiny: 50)")


def run(
    *,
    data: Path,
    out: Path,
    card: str = "plain",
    preset: str | None = None,
    resume: bool = False,
    skip_bad: bool = False,
    split: Path | None = None,
    size: str | None = None,
    weights: Path | None = None,
    **options: Any,
) -> int:
    """Train, and print the average precision and where everything lies."""
    from nasdet.data.errors import format_counts
    from nasdet.detectors import WITH_MASKS, parts_of
    from nasdet.engine.distributed import is_main, restarted
    from nasdet.engine.train import TrainConfig, train
    from nasdet.spaces.assemble import backbone_name

    resume = resume or restarted()
    given = {name: value for name, value in options.items() if value is not None}
    if "backbone" in given:
        given["backbone"] = names.backbone_option(given["backbone"])
    settings = {**_preset(preset, card), **given}
    if size is not None:
        settings["short_side"], settings["long_side"] = parse_size(size)
    known = {field.name for field in fields(TrainConfig)}
    config = TrainConfig(**{name: value for name, value in settings.items() if name in known})
    masks = settings.get("detector", _around(card, preset is None).detector) in WITH_MASKS
    folder = open_folder(data, out, card, resume=resume, skip_bad=skip_bad, split=split, seed=config.seed, masks=masks)
    around = {name: value for name, value in settings.items() if name not in known}
    model = model_config(card, folder, around, weights, beside=preset is None)
    if is_main():
        skipped = f", skipped {format_counts(folder.skipped)}" if folder.skipped else ""
        print(f"{data}: {len(folder.train())} images to train on, {len(folder.test())} to test{skipped}")
        plain = "plain towers" if "towers" in parts_of(model.detector) else "plain heads"
        searched = plain if model.card is None else f"{model.card.name} ({model.card.method})"
        size = f"{model.short_side}x{model.long_side} pixels"
        body = backbone_name(model.backbone)
        print(f"{model.detector} {body} x{model.width:g}, {searched}, {size}")
        rate = config.schedule().lr
        print(f"{config.steps} steps of {config.batch} images, learning rate {rate:g} -> {out}", flush=True)
    train(config, folder, model, out, weights=weights, resume=resume, command=["nasdet", *sys.argv[1:]])
    if is_main():
        from nasdet._files import read_json

        summary = read_json(out / "eval.json")
        for part, figures in (("test", summary), ("masks", summary.get("masks"))):
            if figures is not None:
                print(f"{part}: AP {figures['AP']:.4f}, AP50 {figures['AP50']:.4f}, AP75 {figures['AP75']:.4f}")
        print(f"next: nasdet detect {out} IMAGE --out DIR, or nasdet report {out}")
    return 0


def open_folder(
    data: Path,
    out: Path,
    card: str,
    *,
    resume: bool,
    skip_bad: bool,
    split: Path | None,
    seed: int,
    masks: bool = False,
) -> DataFolder:
    """The data folder with the split of the run, of ``split``, of the search that made the card, or a new one."""
    from nasdet.data import Split, open_data

    stored, searched = out / "split.json", Path(card).parent / "split.json"
    if split is None and resume and stored.is_file():
        split = stored
    if split is not None:
        return open_data(data, split=Split.load(split), skip_bad=skip_bad, masks=masks)
    folder = open_data(data, seed=seed, skip_bad=skip_bad, masks=masks)
    return with_split(folder, searched) if Path(card).is_file() else folder


def with_split(folder: DataFolder, file: Path) -> DataFolder:
    """The folder divided as in ``file``, where that is there and was made for this very data; else as it is."""
    from nasdet.data import Split

    if not file.is_file():
        return folder
    split = Split.load(file)
    if split.fingerprint != folder.split.fingerprint:
        return folder
    split.check(folder)
    return replace(folder, split=split)


def model_config(
    card: str, folder: DataFolder, settings: dict[str, Any], weights: Path | None, *, beside: bool
) -> ModelConfig:
    """The model for the folder's categories: ``settings`` over the model.json beside the card over the paper's."""
    from nasdet.spaces import is_backbone, part_of
    from nasdet.spaces.assemble import searched_fields

    chosen = _chosen(card)
    if chosen is not None and is_backbone(chosen) and "backbone" in settings:
        raise ValueError(f"backbone must be left out, as {chosen.name} is one, got {settings['backbone']!r}")
    # A searched backbone is retrained with norms that learn; cards of other parts leave a pretrained one's as they are.
    learning = chosen is not None and (part_of(chosen) == "backbone" or is_backbone(chosen))
    norm = ("sync_bn" if learning else "frozen_bn") if weights else "gn"
    settings = {"norm": norm, "frozen_stages": 2 if weights else 0, **searched_fields(chosen), **settings}
    return replace(_around(card, beside), num_classes=len(folder.categories), categories=folder.categories, **settings)


def _chosen(card: str) -> Card | None:
    from nasdet.arch import load_card

    return None if card == "plain" else load_card(card)


def _around(card: str, beside: bool) -> ModelConfig:
    """The paper's model for the card, or with ``beside`` the one of the model.json beside it, if there is one."""
    from nasdet.spaces import usual_detector
    from nasdet.spaces.assemble import ModelConfig

    stored, chosen = Path(card).parent / "model.json", _chosen(card)
    if beside and Path(card).is_file() and stored.is_file():
        return ModelConfig.load(stored)
    return ModelConfig(detector=usual_detector(chosen))


def _preset(name: str | None, card: str) -> dict[str, Any]:
    """The settings of a preset; the card's own backbone, the one that it transforms or is, takes the preset's place."""
    from nasdet.spaces import is_backbone, part_of

    settings, chosen = dict(PRESETS[name or "paper"]), _chosen(card)
    if chosen is not None and is_backbone(chosen):
        return {key: value for key, value in settings.items() if key not in ("backbone", "width")}
    if chosen is not None and part_of(chosen) == "backbone":
        settings |= {key: chosen.settings[key] for key in ("backbone", "width") if key in chosen.settings}
    return settings
