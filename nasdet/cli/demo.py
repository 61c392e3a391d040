"""``nasdet demo``: the main job on real images, start to finish, in minutes on a CPU."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nasdet.cli.demo_spaces import SPACES, Budget, DemoSpace

if TYPE_CHECKING:
    from nasdet.arch import Card
    from nasdet.data import DataFolder
    from nasdet.engine.train import TrainConfig
    from nasdet.spaces.assemble import ModelConfig

HELP = "search a part of a detector on real digits, retrain, compare and draw, in minutes"

_DESCRIPTION = """\
Makes the digits data set, searches a part of a small FCOS (its towers with FAD, or its backbone's dilations with
NATS), and trains three detectors with the same budget: with the searched part, with the plain one, and with a random
architecture of the same space. Prints the comparison as it is, and writes one page with the architecture, the alphas
over time, curves, detections and costs.

A demo that was stopped goes on where it was when started again with the same arguments.
"""

_EPILOG = """\
examples:
  nasdet demo                                      eight minutes at most on two CPU cores -> runs/demo/report.html
  nasdet demo --out runs/longer --train-steps 3000 --search-steps 600
  nasdet demo --out runs/again --seed 1            another seed: small differences are noise
  nasdet demo --space nats                         dilations of the backbone instead -> runs/demo-nats/report.html

One seed of a small budget says little about the method; the page says so too.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb to its parser."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--space", choices=tuple(SPACES), default="fad", help="what is searched: fad towers, nats backbone (fad)")
    add("--out", type=Path, metavar="DIR", help="folder to write (default: runs/demo; nats: runs/demo-nats)")
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
    out: Path | None = None,
    space: str = "fad",
    seed: int = 0,
    search_steps: int = Budget.search_steps,
    train_steps: int = Budget.train_steps,
    images: int = Budget.images,
) -> int:
    """Run the demo, print its table and the page's place."""
    import torch

    from nasdet._checks import check_whole
    from nasdet.data import write_digits
    from nasdet.engine.loop import Interrupted
    from nasdet.engine.runs import recorded
    from nasdet.report import write_report

    if space not in SPACES:
        raise ValueError(f"space must be one of {', '.join(SPACES)}, got {space!r}")
    for name, value in (("search_steps", search_steps), ("train_steps", train_steps), ("images", images)):
        check_whole(name, value)
    check_whole("seed", seed, least=0)
    out = out or Path("runs/demo" if space == "fad" else f"runs/demo-{space}")
    began, method = time.monotonic(), SPACES[space]
    budget = Budget(search_steps=search_steps, train_steps=train_steps, images=images)
    arguments = asdict(budget) | {"size": list(budget.size), "seed": seed, "space": space}
    _check_same(out, arguments)
    with recorded(
        out, "demo", arguments, seed=seed, device=torch.device("cpu"), command=["nasdet", *sys.argv[1:]], resume=True
    ) as info:
        _say("1/5  digits: real handwritten digits over photographs")
        write_digits(out / "data", seed=seed, train=budget.images, val=budget.test_images, size=budget.size)
        info["data"] = str((out / "data").resolve())
        try:
            rows = _compare(out, method, budget, seed)
        except Interrupted:
            words = f"demo stopped; everything is in {out}; run the same command again to go on"
            raise Interrupted(words) from None
        _write_table(out, method, rows, budget, seed)
        if method.fields:
            _write_fields(out, method)
    page = write_report(out)
    _print_table(rows)
    _say(f"\n{(time.monotonic() - began) / 60:.1f} minutes. Look at {page}")
    return 0


def _check_same(out: Path, arguments: dict[str, Any]) -> None:
    """Go on only with a demo of the same arguments: results of different budgets must not mix in one table."""
    from nasdet._files import read_json

    if (out / "run.json").is_file() and read_json(out / "run.json").get("arguments") != arguments:
        raise ValueError(f"out must be a new folder, or one of a demo with the same arguments, got {out}")


def _compare(out: Path, method: DemoSpace, budget: Budget, seed: int) -> list[dict[str, Any]]:
    """Search, then train the searched, the plain and a random architecture alike."""
    from nasdet.data import open_data

    split = _stored_split(out / "search")
    folder = open_data(out / "data", split=split, seed=seed)
    halves = "half of the training images, alphas on the other half"
    _say(f"2/5  search: {method.title}, {budget.search_steps} steps on {halves}")
    card = _search(out / "search", method, folder, budget, seed)
    rivals: tuple[tuple[str, str, Card | None], ...] = (
        (method.searched, "train-searched", card),
        (method.plain, "train-plain", None),
        (method.drawn, "train-random", method.random_card(card, seed)),
    )
    rows = []
    for number, (name, place, rival) in enumerate(rivals, 3):
        _say(f"{number}/5  train: {name}, {budget.train_steps} steps of {budget.batch} images")
        config = _model(folder, method, rival)
        rows.append(_train(name, out / place, folder, config, budget, seed))
    return rows


def _stored_split(run: Path) -> Any:
    from nasdet.data import Split

    return Split.load(run / "split.json") if (run / "split.json").is_file() else None


def _search(out: Path, method: DemoSpace, folder: DataFolder, budget: Budget, seed: int) -> Card:
    from nasdet.arch import load_card

    if (out / "card.json").is_file():
        return load_card(out / "card.json")
    return method.search(out, folder, budget, seed)


def _train(name: str, out: Path, folder: DataFolder, model: ModelConfig, budget: Budget, seed: int) -> dict[str, Any]:
    """Train one detector unless it is there already, and return its row of the table."""
    from nasdet._files import read_json
    from nasdet.engine.train import train

    config = _train_config(budget, seed)
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


def _model(folder: DataFolder, method: DemoSpace, card: Card | None) -> ModelConfig:
    from nasdet.spaces.assemble import ModelConfig, searched_fields

    names = tuple(folder.categories)
    config = ModelConfig(norm="gn", num_classes=len(names), categories=names, tower_convs=4, **method.model)
    return replace(config, **searched_fields(card))


def _write_fields(out: Path, method: DemoSpace) -> None:
    """The receptive fields of the backbones that were trained, beside each other on the page."""
    from nasdet.engine.evaluate import load_run
    from nasdet.engine.receptive_field import measure_field, write_fields

    rivals = (("train-plain", method.plain), ("train-searched", method.searched))
    fields = [measure_field(load_run(out / run)[0].get_submodule("backbone"), name) for run, name in rivals]
    write_fields(out, fields, "each backbone's own, trained here")


def _write_table(out: Path, method: DemoSpace, rows: list[dict[str, Any]], budget: Budget, seed: int) -> None:
    from nasdet._files import write_json

    write_json(
        out / "demo.json",
        {
            "rows": rows,
            "budget": {"train_steps": budget.train_steps, "images_per_step": budget.batch, "seed": seed},
            "notes": [
                f"Trained from random weights on {budget.images} small images, tested on {budget.test_images}.",
                method.note,
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
