"""``nasdet measure tau``: whether one-shot scores rank nets as stand-alone scores do."""

from __future__ import annotations

import argparse
import csv
import json as _json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nasdet._files import read_json

HELP = "rank correlation of one-shot against stand-alone scores"
COLUMNS = "one_shot,stand_alone"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the action to its parser."""
    parser.description = (
        "Kendall's tau-b of two scores of the same nets, with a 95 % confidence interval and the two-sided p-value:\n"
        "1 where both rank the nets alike, 0 where one says nothing of the other, -1 where they contradict.\n"
        "  - FILE.csv with a header line, or FILE.json, a list of objects: two columns of numbers, by default\n"
        "    one_shot and stand_alone; others are left alone;\n"
        "  - the folder of an evolutionary search, with --nets: its scores (evolution.json) against the AP\n"
        "    (eval.json) of the training runs in that folder whose cards (card.json) it evaluated."
    )
    parser.epilog = (
        "examples:\n"
        "  nasdet measure tau scores.csv\n"
        "  nasdet measure tau scores.csv --columns before_tuning,retrained --json\n"
        "  nasdet measure tau runs/search --nets runs/retrained"
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("source", type=Path, metavar="FILE|RUN", help="a CSV or JSON file, or a search's folder")
    add("--columns", metavar="A,B", help=f"names of the two columns of a file ({COLUMNS})")
    add("--nets", type=Path, metavar="DIR", help="folder of training runs, for a search's folder")
    add("--confidence", type=float, default=0.95, metavar="X", help="of the interval (0.95)")
    add("--json", action="store_true", help="as JSON")


def run(
    source: Path, columns: str | None = None, nets: Path | None = None, confidence: float = 0.95, json: bool = False
) -> int:
    """Correlate and print."""
    from nasdet.measure.tau import rank_correlation

    if source.is_dir():
        if columns is not None or nets is None:
            raise ValueError(f"{source}: a search's folder needs --nets, the folder of training runs, and no --columns")
        x, y = _of_runs(source, nets)
    else:
        if nets is not None:
            raise ValueError(f"{source}: --nets goes with a search's folder, got a file or nothing there")
        x, y = _of_file(source, columns or COLUMNS)
    try:
        found = rank_correlation(x, y, confidence=confidence)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    print(_json.dumps(found.to_json(), indent=1) if json else in_words(found))
    return 0


def in_words(found: Any) -> str:
    """A rank correlation in one line."""
    interval = "no interval"
    if found.low is not None:
        interval = f"{found.confidence:.0%} interval {found.low:+.4f} to {found.high:+.4f}"
    ties = f", {found.tied_x} and {found.tied_y} tied" if found.tied_x or found.tied_y else ""
    pairs = f"{found.concordant} pairs agree, {found.discordant} do not{ties}"
    return f"tau-b {found.tau:+.4f}, {interval}, p {found.p:.3g} ({found.method}); {found.items} nets: {pairs}"


def _of_file(path: Path, columns: str) -> tuple[list[float], list[float]]:
    names = [name.strip() for name in columns.split(",")]
    if len(names) != 2 or not all(names):
        raise ValueError(f"columns must be two names with a comma between, got {columns!r}")
    rows = _csv(path) if path.suffix.lower() == ".csv" else read_json(path)
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise ValueError(f"{path}: must be a list of objects, one for each net")
    x, y = ([_number(path, place, row, name) for place, row in enumerate(rows, 1)] for name in names)
    for name, values in zip(names, (x, y), strict=True):
        if len(values) > 1 and len(set(values)) == 1:
            raise ValueError(f"{path}: {name} must differ between nets, got {values[0]!r} for all {len(values)}")
    return x, y


def _csv(path: Path) -> list[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file: {error}") from error


def _number(path: Path, place: int, row: Mapping[str, Any], name: str) -> float:
    if name not in row:
        raise ValueError(f"{path}: net {place} must have {name}, got {', '.join(map(str, row))}; see --columns")
    value = row[name]
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{path}: {name} of net {place} must be a finite number, got {value!r}")
    return number


def _of_runs(search: Path, nets: Path) -> tuple[list[float], list[float]]:
    """One-shot scores of a search and stand-alone AP, of the cards that have both."""
    from nasdet.arch import Card, load_card

    state = read_json(search / "evolution.json")
    try:
        told = [one for generation in state["state"]["generations"] for one in generation if one["score"] is not None]
        one_shot = {Card.from_json(one["card"]).key: float(one["score"]) for one in told}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{search / 'evolution.json'}: not the state of a search: {error!r}") from error
    if not nets.is_dir():
        raise ValueError(f"{nets}: --nets must be a folder of training runs, got no folder")
    x, y = [], []
    for card in sorted(nets.glob("*/card.json")):
        evaluation, key = card.parent / "eval.json", load_card(card).key
        if evaluation.is_file() and key in one_shot:
            x.append(one_shot[key])
            y.append(_number(evaluation, 1, read_json(evaluation), "AP"))
    if len(x) < 2:
        raise ValueError(f"{nets}: at least 2 runs must have an eval.json and a card of {search}, got {len(x)}")
    return x, y
