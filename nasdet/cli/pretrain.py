"""``nasdet pretrain``: train a backbone, or a supernet, as a classifier."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from nasdet.cli import names
from nasdet.cli.splits import as_searched, placed

if TYPE_CHECKING:
    from nasdet.engine.trunks import Trunk

HELP = "pretrain a backbone or a supernet by classification"

# What --preset stands for; an option given on the command line wins.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "tiny": {
        "steps": 400,
        "batch": 64,
        "optimizer": "adamw",
        "lr": 0.004,
        "weight_decay": 0.01,
        "warmup_steps": 20,
        "label_smoothing": 0.0,
        "size": 32,
        "short": 32,
        "least_area": 0.7,
        "jitter": 0.2,
        "width": 0.25,
        "recalibration_images": 256,
        "log_every": 10,
        "checkpoint_every": 50,
    },
}

_DESCRIPTION = """\
Train a backbone as a classifier on a folder of pictures in classes, in ImageNet's layout, and write its weights for
the detectors: nasdet train --weights RUN/weights.pt. Or train the supernet of a search space: of detnas one random path
in each step, DetNAS's first step; of hit the mixture of all operations, with alphas that stay as they are. The accuracy
is reported on the val/ part of the folder, which takes no part in training; of a supernet of paths, that of one path on
the 50 images of each class (at most a fifth) that it keeps back of train/, to choose an architecture by.

The defaults are DetNAS's for ImageNet (8 GPUs): 1,024 images a step, 300,000 steps, SGD from 0.5 down to 0 along a
straight line, weight decay 0.00004 but not for norms and biases, label smoothing 0.1, pictures of 224 pixels, cut at
random, mirrored, with colours jittered by 0.4. --preset tiny learns the digits in minutes on a CPU.
"""

_EPILOG = """\
examples:
  nasdet data digits --classification --out digit_classes             make a small real data set
  nasdet pretrain --backbone resnet18 --data digit_classes --out runs/backbone --preset tiny --no-flip
  nasdet train --weights runs/backbone/weights.pt --data digits --out runs/net --preset tiny --no-flip
  nasdet pretrain --backbone resnet18 --data digit_classes --out runs/backbone --preset tiny --no-flip --resume
  torchrun --nproc-per-node 8 -m nasdet pretrain --space detnas-small --data imagenet --out runs/supernet
  nasdet pretrain --space detnas-small --data imagenet --out runs/supernet --bins 290 360 10    as the released code
  nasdet pretrain --space hit-released-half --data imagenet --out runs/half     for search hit --screen-weights
  nasdet pretrain --space hit-released --candidates runs/screen --data imagenet --out runs/mix    for --weights
  nasdet pretrain --card runs/detnas/card.json --data imagenet --out runs/found                 retrain what was found

A data folder holds train/CLASS/*.jpg (or jpeg, png, bmp) and val/CLASS/*.jpg; without val/ a fifth of each class is
held out in its place, for --card the one that its search in these classes held out. Broken images stop the run with
their names, or with --skip-bad are left out and counted.

RUN holds run.json, classifier.json, split.json, metrics.jsonl, tb/ (TensorBoard), checkpoints/last.pt, weights.pt and
eval.json. A run that was killed goes on with the same command and --resume, and ends with the same weights as one never
killed, bit for bit on the CPU. With --preset tiny a named backbone has --width 0.25: give nasdet train the same. Spaces
and cards keep their own width, that of nasdet search and nasdet train --card. These refuse weights that were learnt
with another --shuffle, by the classifier.json beside them.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb to its parser."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--backbone", metavar="NAME", help=names.BACKBONES)
    spaces = "detnas-{small,large,3.8g,tiny}, hit-{released,paper,tiny}[-half]"
    what.add_argument("--space", metavar="NAME", help=f"a supernet: {spaces}")
    what.add_argument("--card", metavar="CARD", help="a searched backbone: a published name or a card file")
    add("--data", required=True, type=Path, metavar="DIR", help="folder with train/CLASS/* and val/CLASS/*")
    add("--out", required=True, type=Path, metavar="RUN", help="run folder to write")
    add("--preset", choices=tuple(PRESETS), help="where the other options start from (default: paper)")
    add("--resume", action="store_true", help="go on with the run in RUN")
    add("--skip-bad", action="store_true", help="leave out images that cannot be read, and report how many")
    _add_network(parser.add_argument_group("network").add_argument)
    _add_pictures(parser.add_argument_group("pictures").add_argument)
    _add_training(parser.add_argument_group("training").add_argument)


def _add_network(add: Any) -> None:
    add("--width", type=float, metavar="X", help="multiplier of the channels (1; --backbone with tiny: 0.25)")
    add(
        "--last",
        type=int,
        metavar="N",
        help="channels of a 1x1 convolution before the classifier (the space's, or none)",
    )
    add(
        "--bins",
        nargs=3,
        type=float,
        metavar=("LOW", "HIGH", "WIDTH"),
        help="of a space: draw the MACs of a step's path (at width 1) first, uniformly by bins, in millions (any path)",
    )
    add("--shuffle", choices=("even_odd", "halves"), help="of detnas: permutation between blocks (even_odd)")
    add("--candidates", nargs="+", metavar="OP", help="of hit: as for nasdet search hit (screened; -half: full)")
    add("--memory", choices=("full", "recompute"), help="of hit: how activations are held (recompute)")


def _add_pictures(add: Any) -> None:
    add("--size", type=int, metavar="N", help="height and width in pixels (paper: 224; tiny: 32)")
    add(
        "--short",
        type=int,
        metavar="N",
        help="shorter side before the centre is cut out to evaluate (8/7 of --size; tiny: 32)",
    )
    add("--least-area", type=float, metavar="X", help="least share of a picture to cut out (paper: 0.08; tiny: 0.7)")
    add("--jitter", type=float, metavar="X", help="of brightness, contrast, saturation (paper: 0.4; tiny: 0.2)")
    add("--no-flip", action="store_false", dest="flip", default=None, help="do not mirror pictures (for digits, text)")
    add("--part", choices=("train", "search-train"), help="what learns (train; of a supernet search-train)")


def _add_training(add: Any) -> None:
    add("--steps", type=int, metavar="N", help="training steps (paper: 300000; tiny: 400)")
    add("--batch", type=int, metavar="N", help="images a step, over all processes (paper: 1024; tiny: 64)")
    add("--lr", type=float, metavar="X", help="learning rate (paper: 0.5; tiny: 0.004)")
    add("--optimizer", choices=("sgd", "adamw"), help="sgd, or adamw, quicker from random weights (sgd; tiny: adamw)")
    add("--decay", choices=("linear", "cosine", "step", "constant"), help="of the learning rate (linear)")
    add("--warmup-steps", type=int, metavar="N", help="steps in which the rate rises from a third (paper: 0; tiny: 20)")
    add("--weight-decay", type=float, metavar="X", help="but for norms and biases (paper: 0.00004; tiny: 0.01)")
    add("--label-smoothing", type=float, metavar="X", help="(paper: 0.1; tiny: 0)")
    add("--clip", type=float, metavar="X", help="largest norm of the gradient (none)")
    add("--amp", action="store_const", const=True, help="compute the model in bfloat16")
    add("--seed", type=int, metavar="N", help="of everything random (0)")
    add("--workers", type=int, metavar="N", help="processes that read pictures (2)")
    add("--device", metavar="DEVICE", help="such as cuda:0 or cpu (default: a GPU when there is one)")
    add("--eval-every", type=int, metavar="N", help="steps between evaluations for the curve (0: only at the end)")
    add("--log-every", type=int, metavar="N", help="steps between two lines of metrics.jsonl (paper: 20; tiny: 10)")
    add("--checkpoint-every", type=int, metavar="N", help="steps between two checkpoints (paper: 1000; tiny: 50)")


def run(
    *,
    data: Path,
    out: Path,
    preset: str | None = None,
    resume: bool = False,
    skip_bad: bool = False,
    **options: Any,
) -> int:
    """Pretrain, and print the accuracy and where everything lies."""
    from nasdet.data import ClassificationFolder, Split
    from nasdet.data.errors import format_counts
    from nasdet.detectors.weights import PRETRAINED
    from nasdet.engine.distributed import is_main, restarted
    from nasdet.engine.pretrain import PretrainConfig, pretrain
    from nasdet.engine.search_classification import SEARCH

    resume = resume or restarted()
    given = {name: value for name, value in options.items() if value is not None}
    # The searches, and nasdet train --card, read the weights of spaces and cards, which are as wide as they say.
    own: dict[str, Any] = {} if "backbone" in given else {"width": 1.0}
    settings = {**PRESETS[preset or "paper"], **own, **given}
    seed, stored = settings.get("seed", 0), out / "split.json"
    split = Split.load(stored) if resume and stored.is_file() else None
    folder = ClassificationFolder(data, split=split, seed=seed, skip_bad=skip_bad)
    if split is None:  # searches on detection data have seen no classifier's pictures
        cards = [one for one in placed(settings.get("card")) if one.card.source.get("search") == SEARCH]
        folder = as_searched(folder, cards)
    network = _network(settings, len(folder.categories))
    settings.setdefault("last", network.last)
    known = {field.name for field in fields(PretrainConfig)}
    config = PretrainConfig(**{name: value for name, value in settings.items() if name in known})
    if is_main():
        skipped = f", skipped {format_counts(folder.skipped)}" if folder.skipped else ""
        images = f"{len(folder.train())} images to train on, {len(folder.test())} to test"
        print(f"{data}: {images}, {len(folder.categories)} classes{skipped}")
        print(f"{config.steps} steps of {config.batch} images, learning rate {config.lr:g} -> {out}", flush=True)
    rest: dict[str, Any] = {"paths": network.paths, "named": network.named, "resume": resume}
    pretrain(config, folder, out, network.make, **rest, command=["nasdet", *sys.argv[1:]])
    if is_main():
        _report(out, network)
        if verb := _next(network.named, settings):
            print(f"next: nasdet {verb} --weights {quote(str(out / PRETRAINED))} --data DIR --out RUN")
    return 0


def _next(named: dict[str, Any], settings: dict[str, Any]) -> str | None:
    """The verb that takes the weights, and the options with which it makes the same network; None for no such verb."""
    width = settings.get("width", 1.0)
    if "backbone" in named:
        return f"train --backbone {named['backbone']} --width {width:g}"
    if "card" in named:
        return f"train --card {settings['card']}" + (f" --width {width:g}" if width != 1 else "")
    method, _, sizes = str(named["space"]).partition("-")
    shuffle = f" --shuffle {named['shuffle']}" if "shuffle" in named else ""
    searched = method == "detnas" and named["width"] == 1  # the supernet of a search has no other width
    return f"search detnas --space {sizes}{shuffle}" if searched else None


def _network(settings: dict[str, Any], classes: int) -> Trunk:
    from nasdet.arch import load_card
    from nasdet.cli.search_hit import parse_candidates
    from nasdet.engine.trunks import trunk

    card, bins = settings.get("card"), settings.get("bins")
    return trunk(
        backbone=settings.get("backbone"),
        space=settings.get("space"),
        card=None if card is None else load_card(card),
        width=1.0 if str(settings.get("space")).startswith("hit-") else settings.get("width", 1.0),
        classes=classes,
        bins=None if bins is None else (bins[0] * 1e6, bins[1] * 1e6, bins[2] * 1e6),
        shuffle=settings.get("shuffle"),
        candidates=parse_candidates(settings.get("candidates")),
        memory=settings.get("memory"),
        seed=settings.get("seed", 0),
    )


def _report(out: Path, network: Trunk) -> None:
    from nasdet._files import read_json

    supernet = network.paths is not None
    found = read_json(out / ("eval-search-val.json" if supernet else "eval.json"))
    what = "one path on search-val" if supernet else "test"
    print(f"{what}: top-1 {found['top1']:.4f}, top-5 {found['top5']:.4f} of {found['images']} images")
