"""``nasdet search detnas``: its options, and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from nasdet.cli.search_options import add_run, add_shared

HELP = "DetNAS: a backbone of ShuffleNetV2 blocks, by evolution over the paths of a supernet"

# What --preset stands for; an option given on the command line wins.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "tiny": {
        "steps": 2000,
        "batch": 4,
        "optimizer": "adamw",
        "lr": 0.01,
        "weight_decay": 0.01,
        "decay": "cosine",
        "warmup_steps": None,
        "clip": 20.0,
        "short_side": 128,
        "long_side": 192,
        "space": "tiny",
        "detector": "fcos",
        "fpn_channels": 48,
        "levels": 4,
        "tower_convs": 2,
        "population": 16,
        "parents": 4,
        "generations": 6,
        "val_images": 60,
        "eval_batch": 10,
        "recalibration_images": 48,
        "log_every": 10,
        "checkpoint_every": 50,
    },
}

DESCRIPTION = (
    "DetNAS (Chen et al., NeurIPS 2019) searches the backbone: 20 or 40 places, each with one of four ShuffleNetV2\n"
    "blocks. A supernet of all of them learns detection, one random path a step; then an evolution scores paths with\n"
    "its weights on images that it has not seen, within a limit on multiply-accumulates. The defaults are the\n"
    "paper's, meant for COCO on 8 GPUs; --preset tiny runs in minutes on a CPU."
)
EPILOG = (
    "examples:\n"
    "  nasdet data digits --out digits                  make a small real data set\n"
    "  nasdet search detnas --data digits --out runs/detnas --preset tiny --no-flip\n"
    "  nasdet search detnas --data coco --out runs/detnas --weights supernet.pth\n"
    "  nasdet search detnas --data digits --out runs/detnas --preset tiny --no-flip --resume   go on after a stop\n"
    "  nasdet search detnas --data digits --out runs/luck --preset tiny --no-flip --supernet runs/detnas \\\n"
    "      --algorithm random                           as many random paths of the same supernet\n"
    "  torchrun --nproc-per-node 8 -m nasdet search detnas --data coco --out runs/detnas --weights supernet.pth\n"
    "  nasdet train --card runs/detnas/card.json --data digits --out runs/net --preset tiny --no-flip   retrain it\n"
    "the three steps and the retraining, on classes of digits in the place of ImageNet:\n"
    "  nasdet data digits --classification --out classes\n"
    "  nasdet pretrain --space detnas-tiny --data classes --out runs/paths --preset tiny --no-flip\n"
    "  nasdet search detnas --data digits --out runs/found --weights runs/paths/weights.pt --preset tiny --no-flip\n"
    "  nasdet pretrain --card runs/found/card.json --data classes --out runs/body --preset tiny --no-flip\n"
    "  nasdet train --card runs/found/card.json --weights runs/body/weights.pt --data digits --out runs/net2 \\\n"
    "      --preset tiny --no-flip\n"
    "\n"
    "Several processes train together, in each step the same path; then each evaluates candidates of its own. On\n"
    "several machines RUN must be a folder that all of them see, and on each of them runs\n"
    "  torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29400 -m nasdet search detnas\n"
    "with the same options.\n"
    "A search that stopped goes on with --resume, in training with as many processes, after it with any number; only\n"
    "candidates that were being evaluated are evaluated again. torchrun --max-restarts N does that by itself: when a\n"
    "process dies, it ends the others, which lose the candidate that each was at, and starts all of them again."
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the method to its parser."""
    add_run(parser, PRESETS)
    _add_space(parser.add_argument_group("search space"))
    _add_model(parser.add_argument_group("model"))
    _add_training(parser.add_argument_group("supernet"))
    _add_evolution(parser.add_argument_group("evolution"))


def _add_space(group: Any) -> None:
    add = group.add_argument
    add("--space", metavar="NAME", help="small, large, 3.8g or tiny (paper: small; tiny: tiny)")
    add("--max-macs", type=float, metavar="X", help="limit on the backbone at 224x224 (small: 3e8; large: 1.3e9)")
    add("--shuffle", choices=("even_odd", "halves"), help="permutation between blocks, that of --weights (even_odd)")
    limits = dict.fromkeys(("max_parameters", "latency_table", "max_latency"), "none")
    add_shared(group, **limits, name="detnas-SPACE-DETECTOR-seedN")


def _add_model(group: Any) -> None:
    add_shared(
        group,
        detector="paper: faster_rcnn; tiny: fcos",
        weights="a supernet's of the space; none",
        norm="sync_bn",
        fpn_channels="paper: 256; tiny: 48",
        levels="paper: 5; tiny: 4",
        tower_convs="4; tiny: 2",
        size="paper: 800x1333; tiny: 128x192",
    )


def _add_training(group: Any) -> None:
    add = group.add_argument
    add("--scratch", action="store_const", const=True, help="DetNAS-scratch: twice the steps, no pretrained weights")
    add_shared(
        group,
        supernet="",
        steps="paper: 90000; tiny: 2000",
        batch="paper: 16; tiny: 4",
        optimizer="sgd; tiny: adamw",
        lr="0.02, retinanet 0.01; tiny: 0.01",
        clip="paper: none; tiny: 20",
        no_flip="",
        amp="",
        seed="0",
        workers="2",
        log_every="20; tiny: 10",
        checkpoint_every="500; tiny: 50",
    )


def _add_evolution(group: Any) -> None:
    add = group.add_argument
    add("--offspring", choices=("paper", "released"), help="half crossover, half mutation; or 40 : 40, 20 %% random")
    add(
        "--recalibration",
        choices=("paper", "released", "none"),
        help="batch norms of a path: mean over 500 images, 500 steps with momentum, or the supernet's own (paper)",
    )
    add("--recalibration-images", type=int, metavar="N", help="images for them (500 or 4000; tiny: 48)")
    add_shared(
        group,
        algorithm="evolution",
        population="paper: 50; tiny: 16",
        parents="paper: 10; tiny: 4",
        generations="paper: 20; tiny: 6",
        val_images="paper: 5000; tiny: 60",
        eval_batch="4; tiny: 10",
        top="5",
    )


def run(settings: dict[str, Any], folder: Any, out: Path, **options: Any) -> list[str]:
    """Search, and say what was found, in lines."""
    from nasdet.engine.search_detnas import DetNASSearchConfig, search_detnas
    from nasdet.spaces.detnas import DetNASSpace

    card = search_detnas(DetNASSearchConfig(**settings), folder, out, **options)
    score = f"AP {card.source['score']:.4f} on search-val with the supernet's weights"
    return [f"{card.name}: {out / 'card.json'}, {score}", *(f"  {line}" for line in DetNASSpace.describe(card))]
