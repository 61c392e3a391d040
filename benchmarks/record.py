"""Turns pytest-benchmark's JSON into compact result files: ``results/<machine>/<bench>.json``.

    python benchmarks/record.py .benchmarks/mix.json ... [--results FOLDER]

One file per benchmark and machine; rows of a case that was measured again replace the older ones, others stay. What was
measured with torchvision in the environment stands beside what was measured without. No host name and no path is
written.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from nasdet._files import read_json, write_json

FOLDER = Path(__file__).resolve().parent
RACE = ("case", "dtype", "phase")
_LEFT_OUT = ("bench", "environment")
_SAFE = re.compile(r"[a-z0-9_-]+")


def record(source: Path, results: Path) -> list[Path]:
    """Write the rows of ``source`` below ``results``; returns the files written.

    Raises ValueError for a file that pytest-benchmark did not write, or without a row.
    """
    document = read_json(source)
    if not isinstance(document, dict) or not isinstance(document.get("benchmarks"), list):
        raise ValueError(f"{source}: must be pytest-benchmark's JSON, got no list 'benchmarks'")
    rows = [item["extra_info"] for item in document["benchmarks"] if "environment" in item.get("extra_info", {})]
    if not rows:
        raise ValueError(f"{source}: benchmarks must hold at least one row of this project, got none")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["environment"]["machine"], row["bench"]), []).append(row)
    written = []
    for (machine, bench), members in groups.items():
        for name in (machine, bench):
            if not _SAFE.fullmatch(name):
                raise ValueError(f"{source}: names must be lower-case letters, digits, '-' and '_', got {name!r}")
        path = results / machine / f"{bench}.json"
        date = str(document.get("datetime", ""))[:10]
        fresh = [_compact(row) | {"date": date, "environment": row["environment"]} for row in members]
        old = read_json(path)["rows"] if path.is_file() else []
        written.append(write_json(path, {"bench": bench, "machine": machine, "rows": merge(old, fresh)}))
    return written


def merge(old: list[dict[str, Any]], fresh: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Old rows, but for those of a race (case, dtype, phase) that was run again: its contestants belong together."""
    again = {_race(row) for row in fresh}
    return sorted([*(row for row in old if _race(row) not in again), *fresh], key=_race)


def _race(row: dict[str, Any]) -> tuple[Any, ...]:
    """What was raced, and in which of the two environments: the one that holds the rival libraries, or the other."""
    return *(_natural(row[key]) for key in RACE), bool(row["environment"].get("torchvision"))


def _natural(text: str) -> tuple[Any, ...]:
    """Sorts numbers within names by value: ``nms-5000`` before ``nms-20000``."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text))


def _compact(value: Any) -> Any:
    """Floats to four significant digits; the environment goes apart."""
    if isinstance(value, dict):
        return {key: _compact(item) for key, item in value.items() if key not in _LEFT_OUT}
    if isinstance(value, list):
        return [_compact(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Turn pytest-benchmark's JSON into benchmarks/results/.")
    parser.add_argument("sources", nargs="+", type=Path, help="pytest-benchmark's JSON")
    parser.add_argument("--results", type=Path, default=FOLDER / "results", help="folder of the result files")
    options = parser.parse_args(arguments)
    try:
        written = [path for source in options.sources for path in record(source, options.results)]
    except (OSError, ValueError, KeyError, json.JSONDecodeError) as error:
        sys.stderr.write(f"record: {error}\n")
        return 1
    for path in written:
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
