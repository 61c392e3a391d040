"""What a run folder holds, read and checked: nothing here draws."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nasdet._files import read_json

# The order in which sub-runs are told; others follow by name.
_SUB_RUNS = (
    "screen-backbone",
    "screen-neck",
    "screen-head",
    "screen-towers",
    "search",
    "train-searched",
    "train-plain",
    "train-random",
)


@dataclass
class Run:
    """The files of a run folder that the report uses; a file that is not there is empty or None."""

    path: Path
    name: str
    info: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] | None = None
    cost: dict[str, Any] | None = None
    eval: dict[str, Any] | None = None
    demo: dict[str, Any] | None = None
    split: dict[str, Any] | None = None
    erf: dict[str, Any] | None = None
    evolution: dict[str, Any] | None = None
    screening: dict[str, Any] | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    alphas: list[dict[str, Any]] = field(default_factory=list)
    detections: list[dict[str, Any]] | None = None
    children: list[Run] = field(default_factory=list)

    def all(self) -> list[Run]:
        """This run and its sub-runs, in the order of the page."""
        return [self, *self.children]


def read_run(path: str | Path) -> Run:
    """Read a run folder and its sub-runs (subfolders that hold a run.json).

    Raises:
        ValueError: the folder is not there or holds nothing of a run, or a file of it is malformed; the text names it.
    """
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"{path}: not a folder; a report is made from the folder of a run")
    run = _read_one(path, path.resolve().name)
    known = {name: index for index, name in enumerate(_SUB_RUNS)}
    folders = sorted(
        (child for child in path.iterdir() if child.is_dir() and (child / "run.json").is_file()),
        key=lambda child: (known.get(child.name, len(known)), child.name),
    )
    run.children = [_read_one(folder, folder.name) for folder in folders]
    if not (run.info or run.demo or run.card or run.metrics or run.children):
        raise ValueError(f"{path}: not a run folder: no run.json, demo.json, card.json, metrics.jsonl or sub-run in it")
    return run


def _read_one(path: Path, name: str) -> Run:
    run = Run(path, name)
    run.info = _object(path / "run.json") or {}
    run.card = _object(path / "card.json")
    run.cost = _object(path / "cost.json", parts=list)
    run.eval = _object(path / "eval.json")
    run.demo = _object(path / "demo.json", rows=list)
    run.split = _object(path / "split.json")
    run.erf = _object(path / "erf.json", maps=list)
    run.evolution = _object(path / "evolution.json", state=dict)
    run.screening = _object(path / "screening.json")
    run.metrics = [row for row in read_lines(path / "metrics.jsonl") if number(row.get("step")) is not None]
    run.alphas = [row for row in read_lines(path / "alphas.jsonl") if isinstance(row.get("alphas"), dict)]
    results = path / "detections.json"
    if results.is_file():
        found = read_json(results)
        if not isinstance(found, list):
            raise ValueError(f"{results}: must be a list of COCO results, got {_kind(found)}")
        for index, entry in enumerate(found):
            if not isinstance(entry, dict) or not isinstance(entry.get("image_id"), int):
                raise ValueError(
                    f"{results}: [{index}] must be a COCO result with an integer image_id, got {entry!r:.80}"
                )
        run.detections = found
    for content, file, key in ((run.cost, "cost.json", "parts"), (run.demo, "demo.json", "rows")):
        for index, row in enumerate(content[key] if content else []):
            if not isinstance(row, dict):
                raise ValueError(f"{path / file}: {key}[{index}] must be an object, got {_kind(row)}")
    for index, field_ in enumerate(run.erf["maps"] if run.erf else []):
        if wrong := _wrong_map(field_):
            raise ValueError(f"{path / 'erf.json'}: maps[{index}] {wrong}")
    return run


def _wrong_map(entry: Any) -> str | None:
    """What is wrong with a map of an ``erf.json``, or None."""
    if not isinstance(entry, dict):
        return f"must be an object, got {_kind(entry)}"
    rows = entry.get("rows")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        return f"must have rows, got {_kind(rows)}"
    if len({len(row) for row in rows}) != 1:
        return "must have rows of one length"
    if any(number(value) is None for row in rows for value in row):
        return "must have finite numbers in its rows"
    return None


def _object(path: Path, **required: type) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must be a JSON object, got {_kind(value)}")
    for key, kind in required.items():
        if not isinstance(value.get(key), kind):
            raise ValueError(f"{path}: {key!r} must be a {kind.__name__}, got {_kind(value.get(key))}")
    return value


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; lines that are no object (a torn last line after a kill) are left out."""
    if not path.is_file():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def number(value: Any) -> float | None:
    """``value`` as a finite float, or None for anything else (text, booleans, NaN, infinity)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        real = float(value)
    except OverflowError:
        return None
    return real if math.isfinite(real) else None
