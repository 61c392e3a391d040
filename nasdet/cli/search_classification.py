"""``nasdet search classification``: its options, and what it prints."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from nasdet.cli.search_options import add_shared

HELP = "the baseline: paths of a pretrained supernet, by how well they classify"

# What --preset stands for; an option given on the command line wins.
PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "tiny": {"population": 16, "parents": 4, "generations": 6}}

DESCRIPTION = (
    "The search that DetNAS is compared with (SPOS, Guo et al., ECCV 2020): evolution over the paths of a supernet\n"
    "that nasdet pretrain has trained, by top-1 accuracy on images of each class that it has not seen. Each path gets\n"
    "batch norm statistics of its own. The defaults are DetNAS's."
)
EPILOG = (
    "examples:\n"
    "  nasdet pretrain --space detnas-small --data imagenet --out runs/paths\n"
    "  nasdet search classification --supernet runs/paths --data imagenet --out runs/classes\n"
    "  nasdet search classification --supernet runs/paths --data imagenet --out runs/classes --resume\n"
    "  nasdet pretrain --card runs/classes/card.json --data imagenet --out runs/found      weights for what was found\n"
    "  nasdet train --card runs/classes/card.json --data coco --out runs/net --weights runs/found/weights.pt"
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the method to its parser."""
    add = parser.add_argument
    add("--supernet", required=True, type=Path, metavar="RUN", help="run of nasdet pretrain --space detnas-...")
    add("--data", required=True, type=Path, metavar="DIR", help="the folder that it was pretrained on")
    add("--out", required=True, type=Path, metavar="RUN", help="run folder to write")
    add("--resume", action="store_true", help="go on with the run in RUN; the result is that of a run never stopped")
    add("--preset", choices=tuple(PRESETS), default="paper", help="where the other options start from (default: paper)")
    add("--skip-bad", action="store_true", help="leave out images that cannot be read, as the pretraining did")
    add("--device", metavar="DEVICE", help="such as cuda:0 or cpu (default: a GPU when there is one)")
    add("--max-macs", type=float, metavar="X", help="limit on the backbone at 224x224 (small: 3e8; large: 1.3e9)")
    add("--max-parameters", type=float, metavar="X", help="limit on the backbone's parameters (none)")
    add("--recalibration", choices=("cumulative", "momentum"), help="batch norms' statistics (cumulative)")
    sizes = {"population": "paper: 50; tiny: 16", "parents": "paper: 10; tiny: 4", "generations": "paper: 20; tiny: 6"}
    add_shared(parser, **sizes, top="5", seed="0", name="classification")


def run_alone(
    data: Path,
    out: Path,
    supernet: Path,
    *,
    resume: bool = False,
    preset: str = "paper",
    skip_bad: bool = False,
    **options: Any,
) -> list[str]:
    """Search, and say what was found, in lines."""
    from nasdet.data import ClassificationFolder, Split
    from nasdet.engine.pretrain import load_classifier
    from nasdet.engine.search_classification import (
        ClassificationSearchConfig,
        load_supernet,
        search_classification,
    )
    from nasdet.engine.search_detnas import path_limits

    device, limits = options.pop("device", None), [options.pop(f"max_{name}", None) for name in ("macs", "parameters")]
    settings = {**PRESETS[preset], **{name: value for name, value in options.items() if value is not None}}
    trained, network = load_supernet(supernet, device)
    method, _, sizes = network.named["space"].partition("-")
    if method != "detnas":
        raise ValueError(f"supernet must be of a detnas space, got {network.named['space']}")
    folder = ClassificationFolder(data, split=Split.load(supernet / "split.json"), skip_bad=skip_bad)
    model = load_classifier(supernet, trained, folder, network.make)
    assert network.paths is not None  # a supernet of paths
    card = search_classification(
        ClassificationSearchConfig(**settings),
        trained,
        folder,
        out,
        network.space,
        model,
        paths=network.paths,
        constraints=path_limits(network.space, sizes, *limits),
        resume=resume,
        command=["nasdet", *sys.argv[1:]],
    )
    lines = [f"{card.name}: {out / 'card.json'}, top-1 {card.source['top1']:.4f} on search-val"]
    return [*lines, *(f"  {line}" for line in network.space.describe(card))]
