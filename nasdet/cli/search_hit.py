"""``nasdet search hit``: its options, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path
from shlex import quote
from typing import Any

from nasdet.cli.search_options import add_run, add_shared

HELP = "Hit-Detector: backbone, neck and head together, on operations screened for each"

# What --preset stands for; an option given on the command line wins.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "tiny": {
        "steps": 240,
        "batch": 2,
        "short_side": 128,
        "long_side": 192,
        "lr": 0.02,
        "arch_lr": 0.02,
        "clip": 20.0,
        "norm": "gn",
        "layout": "tiny",
        "backbone": "resnet18",
        "width": 0.25,
        "target": 0.01,
        "proposals": 64,
        "rois": 64,
        "memory": "sampled",
        "log_every": 10,
        "checkpoint_every": 40,
    },
}

DESCRIPTION = (
    "Hit-Detector (Guo et al., CVPR 2020) searches backbone, neck and head of a detector together: at every layer the\n"
    "weighted sum of candidate operations, whose weights learn by gradient on images of their own, against a cost.\n"
    "Not all of the 32 operations are worth it in every part, so they are screened first, part by part:\n"
    "  --stage screen   which 8 of the 32 operations each part keeps (screening.json)\n"
    "  --stage joint    the search of all parts together, on the published sub-spaces or --candidates (card.json)\n"
    "  --stage all      one after the other\n"
    "The defaults are the paper's (COCO, 8 GPUs); here one process on one device holds the whole --batch.\n"
    "--preset tiny runs in minutes on a CPU."
)
EPILOG = (
    "examples:\n"
    "  nasdet data digits --out digits                  make a small real data set\n"
    "  nasdet search hit --data digits --out runs/hit --preset tiny --stage all --no-flip\n"
    "  nasdet search hit --data digits --out runs/hit --preset tiny --stage all --no-flip --resume\n"
    "  nasdet search hit --data coco --out runs/screen --stage screen --memory recompute\n"
    "  nasdet search hit --data coco --out runs/hit --candidates runs/screen --memory recompute\n"
    "  nasdet search hit --data coco --out runs/retina --detector retinanet      backbone, neck and towers\n"
    "  nasdet search hit --data coco --out runs/neck --parts neck --weights resnet50.pth     a part alone\n"
    "  nasdet train --card runs/hit/card.json --data digits --out runs/net --preset tiny --no-flip   retrain it\n"
    "\n"
    "--stage all begins its backbones at random (screening: at --screen-weights). The paper pretrains both supernets:\n"
    "  nasdet pretrain --space hit-released-half --data imagenet --out runs/half\n"
    "  nasdet search hit --data coco --out runs/screen --stage screen --screen-weights runs/half/weights.pt\n"
    "  nasdet pretrain --space hit-released --candidates runs/screen --data imagenet --out runs/mix\n"
    "  nasdet search hit --data coco --out runs/hit --candidates runs/screen --weights runs/mix/weights.pt\n"
    "\n"
    "A mixed layer keeps the maps of all its candidates for backward. --memory recompute keeps those of one at a\n"
    "time, for one more forward, with the same result; --memory sampled runs --samples candidates of each layer a\n"
    "step. What a step will need is told before the run, and what it took after it."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the method to its parser."""
    add_run(parser, PRESETS)
    parser.add_argument("--stage", choices=("screen", "joint", "all"), help="what to do, see above (joint)")
    add_shared(parser, backend="")
    _add_space(parser.add_argument_group("search space"))
    _add_model(parser.add_argument_group("model"))
    _add_search(parser.add_argument_group("search"))


def _add_space(group: Any) -> None:
    add = group.add_argument
    add(
        "--parts",
        nargs="+",
        metavar="PART",
        help="of backbone, neck, head (RetinaNet: towers); the others are plain (all)",
    )
    add(
        "--candidates",
        nargs="+",
        metavar="OP",
        help="screened (the published 8 of each part), full (all 32), a run of --stage screen, or any operations, for "
        "all parts alike, such as ir_k3_d1_e6 sep_k5_d2 ir_k9_d1_e4 (joint: screened; screening: full)",
    )
    add("--layout", choices=("released", "paper", "tiny"), help="sizes of all parts (paper: released; tiny: tiny)")
    add("--keep", type=int, metavar="N", help="operations that screening keeps (8)")
    add("--screen-weights", metavar="FILE", help="pretrained weights of the backbone that is screened (random)")
    add("--removal-epoch", type=int, metavar="N", help="epoch at whose end screening begins to remove (7)")
    add_shared(group, fpn_channels="the layout's", name="hit-LAYOUT-DETECTOR-seedN")


def _add_model(group: Any) -> None:
    add = group.add_argument
    add_shared(
        group,
        detector="faster_rcnn or retinanet; faster_rcnn",
        backbone="where it is not searched; paper: resnet50; tiny: resnet18",
        width="of a plain backbone; paper: 1; tiny: 0.25",
        weights="joint: the supernet's where the backbone is searched; else the plain backbone's",
        norm="paper: sync_bn; tiny: gn",
        tower_convs="where towers are not searched; 4",
        size="paper: 800x1200; tiny: 128x192",
    )
    add("--memory", choices=("full", "recompute", "sampled"), help="see below (paper: full; tiny: sampled)")
    add("--samples", type=int, metavar="K", help="candidates of each layer a step with --memory sampled (2)")


def _add_search(group: Any) -> None:
    add = group.add_argument
    add("--epochs", type=int, metavar="N", help="epochs over the images that train the weights, of each run (12)")
    add("--frozen-epochs", type=int, metavar="N", help="of these, the first ones without steps of the alphas (5)")
    add("--cost-weight", type=float, metavar="X", help="lambda, the weight of the expected cost (0.01)")
    add("--target", type=float, metavar="X", help="G multiply-accumulates, or ms, that count as 1 (1; tiny: 0.01)")
    add("--latency-table", metavar="FILE", help="of nasdet measure latency: cost in milliseconds (MACs)")
    add("--proposals", type=int, metavar="N", help="RoIs in the head's cost (1000; tiny: 64)")
    add("--rois", type=int, metavar="N", help="RoIs of each image that train the head (512; tiny: 64)")
    add("--penalty", type=float, metavar="X", help="mu, the weight of the column penalty while screening (0.1)")
    add_shared(
        group,
        steps="in the place of epochs, which are then equal shares; tiny: 240",
        batch="for the weights and again for the alphas; 32; tiny: 2",
        lr="paper: 0.04; tiny: 0.02",
        arch_lr="paper: 0.0004; tiny: 0.02",
        clip="paper: 35; tiny: 20",
        no_flip="",
        amp="",
        seed="0",
        workers="2",
        log_every="20; tiny: 10",
        checkpoint_every="200; tiny: 40",
    )


def run(settings: dict[str, Any], folder: Any, out: Path, **options: Any) -> list[str]:
    """Search, and say what was found, in lines."""
    from nasdet.engine.hit_config import HitSearchConfig
    from nasdet.engine.screen_hit import screen_hit
    from nasdet.engine.search_hit import search_hit
    from nasdet.spaces.hit import HitSpace

    config = HitSearchConfig(**settings | {"candidates": parse_candidates(settings.get("candidates"))})
    if config.stage == "screen":
        kept = screen_hit(config, folder, out, **options)
        lines = [f"{out / 'screening.json'}", *(f"  {part}: {' '.join(names)}" for part, names in kept.items())]
        again = [f"--detector {config.detector}", f"--layout {config.layout}"]
        again += ["--parts " + " ".join(config.parts)] if config.parts is not None else []
        words = f"--candidates {quote(str(out))} --data {quote(str(folder.path))} --out RUN {' '.join(again)}"
        return [*lines, f"search them (as here with --preset):  nasdet search hit {words}"]
    card = search_hit(config, folder, out, **options)
    return [f"{card.name}: {out / 'card.json'}", *(f"  {line}" for line in HitSpace.describe(card))]


def parse_candidates(words: list[str] | None) -> Any:
    """A name of the space's, what a screening kept, or the operations themselves."""
    if words is None or len(words) > 1:
        return words
    if words[0] in ("screened", "full"):
        return words[0]
    if Path(words[0]).exists():
        from nasdet.engine.screen_hit import load_screening

        return load_screening(words[0])
    return words
