"""``nasdet demo``: the main job on real images, start to finish, in minutes on a CPU."""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nasdet.arch import Card
    from nasdet.data import DataFolder
    from nasdet.engine.train import TrainConfig
    from nasdet.spaces.assemble import ModelConfig

HELP = "search a detector's towers on real digits, retrain, compare and draw, in minutes"

_DESCRIPTION = """\
Makes the digits data set, searches the towers of a small FCOS with FAD, and trains three detectors with the same
budget: the searched towers, plain ones, and a random architecture of the same space. Prints the comparison as it is,
and writes one page with the cell graph, the alphas over time, curves, detections and costs.

A demo that was stopped goes on where it was when started again with the same arguments.
"""

_EPILOG = """\
examples:
  nasdet demo                                      eight minutes at most on two CPU cores -> runs/demo/report.html
  nasdet demo --out runs/longer --train-steps 3000 --search-steps 600
  nasdet demo --out runs/again --seed 1            another seed: small differences are noise

One seed of a small budget says little about the method; the page says so too.
"""


@dataclass(frozen=True)
class Budget:
    """What every part of the demo gets. The same ``train_steps`` and batch for all three detectors."""

    search_steps: int = 100
    train_steps: int = 600
    batch: int = 8
    search_batch: int = 4
    images: int = 400
    test_images: int = 100
    size: tuple[int, int] = (128, 160)


_MODEL: dict[str, Any] = {
    "backbone": "resnet18",
    "width": 0.25,
    "fpn_channels": 32,
    "levels": 3,
    "short_side": 128,
    "long_side": 160,
}
_INNER_CHANNELS = 24


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb to its parser."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/demo"), metavar="DIR", help="folder to write (default: runs/demo)")
    add("--seed", type=int, default=0, metavar="N", help="of data, search and training (0)")
    add("--search-steps", type=int, default=Budget.search_steps, metavar="N", help=f"({Budget.search_steps})")
    add(
        "--train-steps",
        type=int,
        default=Budget.train_steps,
        metavar="N",
        help=f"of each detector ({Budget.train_steps})",
    )
    add("--images", type=int, default=Budget.images, metavar="N", help=f"training images ({Budget.images})")


def run(
    *,
    out: Path = Path("runs/demo"),
    seed: int = 0,
    search_steps: int = Budget.search_steps,
    train_steps: int = Budget.train_steps,
    images: int = Budget.images,
) -> int:
    """Run the demo, print its table and the page's place."""
    import torch

    from nasdet.data import write_digits
    from nasdet.engine.runs import recorded
    from nasdet.report import write_report

    began = time.monotonic()
    budget = Budget(search_steps=search_steps, train_steps=train_steps, images=images)
    arguments = asdict(budget) | {"size": list(budget.size), "seed": seed}
    _check_same(out, arguments)
    with recorded(
        out, "demo", arguments, seed=seed, device=torch.device("cpu"), command=["nasdet", *sys.argv[1:]], resume=True
    ) as info:
        _say("1/5  digits: real handwritten digits over photographs")
        write_digits(out / "data", seed=seed, train=budget.images, val=budget.test_images, size=budget.size)
        info["data"] = str((out / "data").resolve())
        rows = _compare(out, budget, seed)
        _write_table(out, rows, budget, seed)
    page = write_report(out)
    _print_table(rows)
    _say(f"\n{(time.monotonic() - began) / 60:.1f} minutes. Look at {page}")
    return 0


def _check_same(out: Path, arguments: dict[str, Any]) -> None:
    """Go on only with a demo of the same arguments: results of different budgets must not mix in one table."""
    from nasdet._files import read_json

    if (out / "run.json").is_file() and read_json(out / "run.json").get("arguments") != arguments:
        raise ValueError(f"out must be a new folder, or one of a demo with the same arguments, got {out}")


def _compare(out: Path, budget: Budget, seed: int) -> list[dict[str, Any]]:
    """Search, then train the searched, the plain and a random architecture alike."""
    from nasdet.data import open_data

    split = _stored_split(out / "search")
    folder = open_data(out / "data", split=split, seed=seed)
    _say(f"2/5  search: FAD, {budget.search_steps} steps on half of the training images, alphas on the other half")
    card = _search(out / "search", folder, budget, seed)
    rivals: tuple[tuple[str, str, Card | None], ...] = (
        ("searched towers", "train-searched", card),
        ("plain towers", "train-plain", None),
        ("random architecture", "train-random", _random_card(card, seed)),
    )
    rows = []
    for number, (name, place, rival) in enumerate(rivals, 3):
        _say(f"{number}/5  train: {name}, {budget.train_steps} steps of {budget.batch} images")
        rows.append(_train(name, out / place, folder, rival, budget, seed))
    return rows


def _stored_split(run: Path) -> Any:
    from nasdet.data import Split

    return Split.load(run / "split.json") if (run / "split.json").is_file() else None


def _search(out: Path, folder: DataFolder, budget: Budget, seed: int) -> Card:
    from nasdet.arch import load_card
    from nasdet.engine.search import FADSearchConfig, search_fad

    config = FADSearchConfig(
        steps=budget.search_steps,
        batch=budget.search_batch,
        lr=0.01,
        arch_lr=0.01,
        inner_channels=_INNER_CHANNELS,
        retrain_cells=1,
        flip=False,
        log_every=5,
        checkpoint_every=25,
        workers=0,
        seed=seed,
        name=f"fad-demo-seed{seed}",
        **_MODEL,
    )
    if (out / "card.json").is_file():
        return load_card(out / "card.json")
    return search_fad(config, folder, out, resume=(out / "checkpoints").exists())


def _random_card(like: Card, seed: int) -> Card:
    """A random genotype with the searched card's settings."""
    from nasdet.spaces.fad import FADSpace

    return FADSpace("full").random(random.Random(seed), "fad-random", settings=like.settings)


def _train(name: str, out: Path, folder: DataFolder, card: Card | None, budget: Budget, seed: int) -> dict[str, Any]:
    """Train one detector unless it is there already, and return its row of the table."""
    from nasdet._files import read_json
    from nasdet.engine.train import train

    config = _train_config(budget, seed)
    model = _model(folder, card)
    if not (out / "eval.json").is_file():
        train(config, folder, model, out, resume=(out / "checkpoints").exists())
    scores, costs = read_json(out / "eval.json"), read_json(out / "cost.json")
    return {
        "name": name,
        "run": out.name,
        "AP": scores["AP"],
        "AP50": scores["AP50"],
        "parameters": sum(part["parameters"] for part in costs["parts"]),
        "macs": sum(part["macs"] for part in costs["parts"]),
        "train_seconds": read_json(out / "run.json").get("seconds"),
    }


def _train_config(budget: Budget, seed: int) -> TrainConfig:
    from nasdet.engine.train import TrainConfig

    return TrainConfig(
        steps=budget.train_steps,
        batch=budget.batch,
        optimizer="adamw",  # from random weights SGD learns next to nothing in this budget
        lr=0.01,
        weight_decay=0.01,
        decay="cosine",
        warmup="linear",
        clip=20.0,
        flip=False,
        seed=seed,
        workers=0,
        log_every=10,
        checkpoint_every=100,
        eval_every=max(1, budget.train_steps // 3),
        eval_batch=8,
    )


def _model(folder: DataFolder, card: Card | None) -> ModelConfig:
    from nasdet.spaces.assemble import PLAIN, ModelConfig

    categories = tuple(folder.categories)
    config = ModelConfig(norm="gn", num_classes=len(categories), categories=categories, tower_convs=4, **_MODEL)
    return replace(config, towers=PLAIN if card is None else card.to_json())


def _write_table(out: Path, rows: list[dict[str, Any]], budget: Budget, seed: int) -> None:
    from nasdet._files import write_json

    write_json(
        out / "demo.json",
        {
            "rows": rows,
            "budget": {"train_steps": budget.train_steps, "images_per_step": budget.batch, "seed": seed},
            "notes": [
                f"Trained from random weights on {budget.images} small images, tested on {budget.test_images}.",
                "The plain towers have four convolutions each; the others one cell in each of their two groups.",
            ],
        },
    )


def _print_table(rows: list[Mapping[str, Any]] | list[dict[str, Any]]) -> None:
    print(f"\n{'':<22}{'AP':>8}{'AP50':>8}{'parameters':>13}{'MMACs':>9}{'train s':>9}")
    for row in rows:
        print(
            f"{row['name']:<22}{100 * row['AP']:>8.1f}{100 * row['AP50']:>8.1f}{row['parameters']:>13,}"
            f"{row['macs'] / 1e6:>9.0f}{row['train_seconds'] or 0:>9.0f}"
        )
    print("One seed and a small budget: differences of a few points are noise.")


def _say(text: str) -> None:
    print(text, flush=True)
