"""Line-by-line records of a run: one JSON object per line, each with the ``step`` it belongs to.

``step`` counts *finished* steps: a line with ``step`` 20 was written after steps 0..19. A checkpoint of step 20
therefore owns every line up to and including 20, and resuming from it drops the later ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nasdet._files import write_atomic


def append_line(path: str | Path, record: Mapping[str, Any]) -> None:
    """Append ``record`` as one JSON line and wait until it is on the disk.

    ``record`` must hold an int ``step``; NaN and infinity are refused (``ValueError``), so is anything that is not JSON
    (``TypeError``). Missing parent folders are made.
    """
    if isinstance(record.get("step"), bool) or not isinstance(record.get("step"), int):
        raise ValueError(f"record must have an int 'step', got {record.get('step')!r}")
    path = Path(path)
    line = (json.dumps(dict(record), allow_nan=False) + "\n").encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        file.write(line)
        os.fsync(file.fileno())


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The records of a file, oldest first; an absent file has none.

    A last line cut off by a crash is left out; a damaged line anywhere else is a ``ValueError`` that names it.
    """
    return list(_records(Path(path)))


def truncate_lines(path: str | Path, step: int) -> int:
    """Drop the records whose ``step`` is greater than ``step`` (and a cut-off last line); returns how many stay.

    The file is replaced atomically, and left alone when nothing is to be dropped. ``step=-1`` drops everything.
    """
    path = Path(path)
    if not path.exists():
        return 0
    kept = [record for record in _records(path) if record["step"] <= step]
    content = "".join(json.dumps(record, allow_nan=False) + "\n" for record in kept)
    if path.read_bytes() != content.encode():
        write_atomic(path, content)
    return len(kept)


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    *whole, rest = path.read_bytes().split(b"\n")
    for number, line in enumerate(whole, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("it has no int 'step'")
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not a record: {error}") from error
        yield record
