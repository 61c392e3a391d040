"""``nasdet train``: train a detector with plain or searched towers on a data folder."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import fields, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from nasdet.cli import names
from nasdet.cli.search_options import parse_size
from nasdet.cli.splits import Placed, file_beside, open_divided, placed

if TYPE_CHECKING:
    from nasdet.arch import Card
    from nasdet.data import DataFolder
    from nasdet.engine.train import TrainConfig
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

# Options of the box head, which only detectors of two stages have.
_HEAD = ("box_head", "head_norm")

_DESCRIPTION = """\
Train a detector on everything of a data folder that may be trained on, then report its average precision on the test
part, which takes no part in training. It is plain, or a card stands for a part of it, published or one that you
searched: the towers of fcos and retinanet, the mask head of mask_rcnn and mask_scoring_rcnn, any detector's backbone.
The mask detectors learn masks, which the data must have: polygons or run lengths in COCO's file; digits have them.

The defaults are the papers' (COCO, 8 GPUs): ResNet-50, images of 800 by at most 1333 pixels, 16 images a step, 90,000
steps, learning rate 0.01, a tenth of it from 60,000 and again from 80,000 on (2/3 and 8/9 of any other number of
steps). The rate follows --batch: 0.01 x batch / 16. --preset tiny learns something in minutes on a CPU.

Backbones that detnas and msnas found are retrained as their papers do: in faster_rcnn with the box head 4conv1fc or
2conv1fc, synchronised norms there and in the backbone, nothing frozen, 0.02 x batch / 16 after a warm-up that rises
(one-stage detectors: 0.01 x batch / 16); msnas for 48 epochs of 32 images a step, the first as warm-up, with a tenth
of the rate after 42 and again after 47. --preset tiny keeps head and norms. Backbones that nats transformed are
retrained in faster_rcnn for 13 epochs of 16 images a step at the same rates, with a tenth after 8 and again after 11.
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

A card from a search run, card.json or one of cards/, brings the detector around it and its picture size, unless
--preset or --size is given, and the search's split, so that no picture that chose the architecture is tested on; a
card given as --backbone brings its search's split too. A backbone that was searched brings the name of its detector
with a preset too, and without one also its norm. A plain --data folder without test annotations has a fifth of its
pictures held out as the test part; another --split of the same data, which tests on pictures that chose the
architecture, is refused then, and annotations other than those that were searched on bring a warning.

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
    add("--split", type=Path, metavar="FILE", help="split.json to use (that of the card's search, else by --seed)")
    _add_model(parser.add_argument_group("model").add_argument)
    _add_training(parser.add_argument_group("training").add_argument)


def _add_model(add: Any) -> None:
    add("--detector", metavar="NAME", help=f"{names.DETECTORS} (fcos; for a searched backbone faster_rcnn)")
    add("--backbone", metavar="NAME", help=f"{names.BACKBONES}, or a card (paper: resnet50; tiny: resnet18)")
    add("--width", type=float, metavar="X", help="multiplier of the backbone's channels (paper: 1; tiny: 0.25)")
    add("--weights", type=Path, metavar="FILE", help="its weights, torchvision's or of nasdet pretrain")
    norms = "gn, with --weights frozen_bn; detnas, msnas: the search's, or sync_bn"
    add("--norm", metavar="NAME", help=f"of the backbone: gn, bn, sync_bn, frozen_bn ({norms})")
    frozen = "with --weights 2, else 0; detnas, msnas: 0"
    add("--frozen-stages", type=int, metavar="N", help=f"backbone stages that do not learn ({frozen})")
    heads = ("2fc", "4conv1fc", "2conv1fc")
    add("--box-head", choices=heads, help="of two stages: its layers (2fc; detnas: 4conv1fc; msnas: 2conv1fc)")
    head_norms = ("none", "gn", "bn", "sync_bn")
    add("--head-norm", choices=head_norms, help="of the box head's convolutions (none; detnas, msnas: that of --norm)")
    add("--fpn-channels", type=int, metavar="N", help="pyramid and tower channels (paper: 256; tiny: 48)")
    add("--levels", type=int, metavar="N", help="pyramid levels from stride 8 (two stages: 4) on (paper: 5; tiny: 4)")
    add("--tower-convs", type=int, metavar="N", help="convolutions in each plain tower (paper: 4; tiny: 2)")
    add("--inner-channels", type=int, metavar="N", help="channels inside a card's operations (the card's; tiny: 24)")
    add("--cells", type=int, metavar="N", help="cells in each group of a card (default: the card's)")
    add("--size", metavar="SHORT[xLONG]", help="picture size in pixels (paper: 800x1333; tiny: 128x192)")


def _add_training(add: Any) -> None:
    add("--steps", type=int, metavar="N", help="training steps (paper: 90000, msnas: 48 epochs, nats: 13; tiny: 600)")
    add("--batch", type=int, metavar="N", help="images a step, over all processes (paper: 16, msnas: 32; tiny: 8)")
    rates = "paper: 0.01 x batch / 16, detnas, msnas and nats in two stages 0.02 x batch / 16; tiny: 0.003"
    add("--lr", type=float, metavar="X", help=f"learning rate ({rates})")
    add("--optimizer", choices=("sgd", "adamw"), help="sgd, or adamw, quicker from random weights (sgd; tiny: adamw)")
    add("--decay", choices=("step", "cosine", "constant"), help="of the learning rate (step; tiny: cosine)")
    warmup = "steps at a third of the rate, or for detnas, msnas and nats in which it rises"
    add("--warmup-steps", type=int, metavar="N", help=f"{warmup} (500, at most a tenth of the run; msnas: an epoch)")
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
    from nasdet.detectors import WITH_MASKS
    from nasdet.engine.distributed import is_main, restarted
    from nasdet.engine.train import TrainConfig, train

    resume = resume or restarted()
    given = {name: value for name, value in options.items() if value is not None}
    if "backbone" in given:
        given["backbone"] = names.backbone_option(given["backbone"])
    settings = {**_preset(preset, card), **given}
    if size is not None:
        settings["short_side"], settings["long_side"] = parse_size(size)
    known = {field.name for field in fields(TrainConfig)}
    training = {name: value for name, value in settings.items() if name in known}
    around = {name: value for name, value in settings.items() if name not in known}
    usual = _around(card, preset is None)
    masks = settings.get("detector", usual.detector) in WITH_MASKS
    seed = TrainConfig(**training).seed  # which refuses nonsense before the data are read
    if split is None and resume and (out / "split.json").is_file():
        split = out / "split.json"
    cards = _cards(card, options.get("backbone"), settings.get("backbone", usual.backbone))
    folder = open_divided(data, cards, split=split, seed=seed, skip_bad=skip_bad, masks=masks)
    model = model_config(card, folder, around, weights, beside=preset is None)
    config = train_config(card, folder, model.detector, training, paper=preset != "tiny")
    if is_main():
        _announce(data, out, folder, model, config)
    train(config, folder, model, out, weights=weights, resume=resume, command=["nasdet", *sys.argv[1:]])
    if is_main():
        from nasdet._files import read_json

        summary = read_json(out / "eval.json")
        for part, figures in (("test", summary), ("masks", summary.get("masks"))):
            if figures is not None:
                print(f"{part}: AP {figures['AP']:.4f}, AP50 {figures['AP50']:.4f}, AP75 {figures['AP75']:.4f}")
        run_folder = quote(str(out))
        print(f"next: nasdet detect {run_folder} IMAGE --out DIR, or nasdet report {run_folder}")
    return 0


def _announce(data: Path, out: Path, folder: DataFolder, model: ModelConfig, config: TrainConfig) -> None:
    """Say what is about to be trained."""
    from nasdet.data.errors import format_counts
    from nasdet.detectors import parts_of
    from nasdet.spaces.assemble import backbone_name

    skipped = f", skipped {format_counts(folder.skipped)}" if folder.skipped else ""
    print(f"{data}: {len(folder.train())} images to train on, {len(folder.test())} to test{skipped}")
    plain = "plain towers" if "towers" in parts_of(model.detector) else "plain heads"
    searched = plain if model.card is None else f"{model.card.name} ({model.card.method})"
    size = f"{model.short_side}x{model.long_side} pixels"
    print(f"{model.detector} {backbone_name(model.backbone)} x{model.width:g}, {searched}, {size}")
    rate = config.schedule().lr
    print(f"{config.steps} steps of {config.batch} images, learning rate {rate:g} -> {out}", flush=True)


def model_config(
    card: str, folder: DataFolder, settings: dict[str, Any], weights: Path | None, *, beside: bool
) -> ModelConfig:
    """The model for the folder's categories: ``settings`` over the model.json beside the card over the paper's."""
    from nasdet.spaces import is_backbone, part_of, retraining
    from nasdet.spaces.assemble import searched_fields

    chosen, stored = _chosen(card), _stored(card) if beside else None
    body = chosen is not None and is_backbone(chosen)
    if chosen is not None and body and "backbone" in settings:
        raise ValueError(f"backbone must be left out, as {chosen.name} is one, got {settings['backbone']!r}")
    around = _around(card, beside)
    detector = settings.get("detector", around.detector)
    recipe = retraining(chosen, detector).model
    norms: dict[str, Any]
    if stored is not None and body and (weights or stored.norm != "frozen_bn"):  # what is random must not be frozen
        norms = {"norm": stored.norm, "frozen_stages": stored.frozen_stages if weights else 0}
    else:
        # A searched backbone is retrained with norms that learn; other cards leave a pretrained one's as they are.
        learning = chosen is not None and (part_of(chosen) == "backbone" or body)
        usual = ("sync_bn" if learning else "frozen_bn", 2) if weights else ("gn", 0)
        norms = {"norm": recipe.get("norm", usual[0]), "frozen_stages": recipe.get("frozen_stages", usual[1])}
    own = {name: value for name, value in settings.items() if name not in _HEAD}
    own["options"] = _options(chosen, detector, settings, stored, recipe.get("options", {}))
    own |= {"num_classes": len(folder.categories), "categories": folder.categories}
    return replace(around, **{**norms, **searched_fields(chosen), **own})


def _options(
    card: Card | None, detector: str, settings: dict[str, Any], stored: ModelConfig | None, recipe: dict[str, Any]
) -> dict[str, Any]:
    """The detector's own options: what ``settings`` say of the box head, over the search's or else the recipe's."""
    from nasdet.detectors import TWO_STAGE
    from nasdet.spaces import pieces_of

    two_stage = detector in TWO_STAGE
    head = {name: settings[name] for name in _HEAD if name in settings}
    for name, value in head.items():
        if not two_stage:
            raise ValueError(f"{name} must be left out for {detector}, which has no box head, got {value!r}")
        if card is not None and "head" in pieces_of(card):
            raise ValueError(f"{name} must be left out, as {card.name} has a box head, got {value!r}")
    options = dict(recipe)
    # They mean the same in every detector of two stages, and nothing in another of one.
    if stored is not None and (stored.detector == detector or two_stage and stored.detector in TWO_STAGE):
        options = dict(stored.options)
    if "head_norm" in options and "norm" in settings:  # goes with the backbone's, but a frozen one would be of no use
        options["head_norm"] = "sync_bn" if settings["norm"] == "frozen_bn" else settings["norm"]
    return options | {name: None if value == "none" else value for name, value in head.items()}


def train_config(card: str, folder: DataFolder, detector: str, settings: dict[str, Any], *, paper: bool) -> TrainConfig:
    """How the card is trained in the detector: ``settings`` over, with ``paper``, the recipe of the card's paper."""
    from nasdet.engine.train import TrainConfig
    from nasdet.spaces import Retraining, retraining

    recipe = retraining(_chosen(card), detector) if paper else Retraining()
    settings = {**recipe.training, **settings}
    if recipe.epochs is not None:
        settings.setdefault("steps", recipe.epochs * math.ceil(len(folder.train()) / settings["batch"]))
        settings.setdefault("warmup_steps", math.ceil(settings["steps"] / recipe.epochs))
    return TrainConfig(**settings)


def _chosen(card: str) -> Card | None:
    from nasdet.arch import load_card

    return None if card == "plain" else load_card(card)


def _cards(card: str, given: str | None, body: Any) -> list[Placed]:
    """The cards of a model: its own, and that of the backbone ``body``, which --backbone may have ``given``."""
    from nasdet.arch import Card
    from nasdet.spaces import is_backbone

    chosen = _chosen(card)
    own = [] if chosen is None else placed(card)
    if given is not None:
        return [*own, *placed(given)]
    if isinstance(body, str) or (chosen is not None and is_backbone(chosen)):
        return own
    return [*own, Placed(Card.from_json(body))]


def _stored(card: str) -> ModelConfig | None:
    """The model of the search that made the card, where that is known."""
    from nasdet.spaces.assemble import ModelConfig

    file = file_beside(card, "model.json")
    return None if file is None else ModelConfig.load(file)


def _around(card: str, beside: bool) -> ModelConfig:
    """The paper's model for the card, or with ``beside`` that of the search that made it; a backbone, searched or
    transformed, is built into the detector of its search in any case."""
    from nasdet.spaces import is_backbone, part_of, usual_detector
    from nasdet.spaces.assemble import ModelConfig

    stored, chosen = _stored(card), _chosen(card)
    if stored is not None and beside:
        return stored
    if stored is not None and chosen is not None and (is_backbone(chosen) or part_of(chosen) == "backbone"):
        return ModelConfig(detector=stored.detector)
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
