"""The folder of a run: what was asked for, on what machine, and how it ended."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import resource
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from nasdet._files import read_json, write_json
from nasdet.engine import distributed
from nasdet.engine.signals import handled
from nasdet.measure.machine import versions


def machine(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def peak_memory(device: torch.device) -> int:
    """The most memory so far, in bytes: allocated on a GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextlib.contextmanager
def sole_writer(out: str | Path, *, lock: str = "run.lock", wait: bool = False) -> Iterator[None]:
    """Hold the folder of a run while the block runs; ``ValueError`` where another process does, or ``wait`` for it.

    ``lock`` is the file that is locked, another than a run's where the block writes a single file beside it. Of several
    processes that share the run, rank 0 holds it. What is dead holds nothing, and where the file system has no locks,
    nobody does.
    """
    if not distributed.is_main():
        yield
        return
    path = Path(out) / lock
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        try:
            # Not flock: a process that reads pictures would inherit that, and outlives a killed run for seconds.
            fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            advice = "wait until it has ended, or choose another --out"
            raise ValueError(f"{out} is being written by another process: {advice}") from error
        except OSError:
            pass
        yield


@contextlib.contextmanager
def recorded(
    out: str | Path,
    verb: str,
    arguments: Mapping[str, Any],
    *,
    seed: int,
    device: torch.device,
    command: Sequence[str] | None = None,
    resume: bool = False,
    **facts: Any,
) -> Iterator[dict[str, Any]]:
    """Keep ``out/run.json`` while the block runs; yields its content, to which the block may add plain data.

    ``status`` is ``"running"``, then ``"done"``, ``"interrupted"`` or, with ``error``, ``"failed"``. A resumed
    run keeps its first start and adds to its ``seconds``. ``facts`` (data, skipped records, deviations, ...) are
    stored as they are. Only rank 0 writes. SIGTERM is a ``KeyboardInterrupt`` in the block, as Ctrl-C is.
    """
    path = Path(out) / "run.json"
    before = read_info(out) if resume else {}
    began = time.monotonic()
    info: dict[str, Any] = {
        "verb": verb,
        "status": "running",
        "command": list(command) if command is not None else None,
        "arguments": dict(arguments),
        "seed": seed,
        "started": before.get("started") or _now(),
        "device": str(device),
        "machine": machine(device),
        "processes": distributed.world_size(),
        "versions": versions(),
        **facts,
    }
    _write(path, info)
    try:
        with handled(signal.default_int_handler, signal.SIGTERM):
            yield info
        info["status"] = "done"
    except KeyboardInterrupt:
        info["status"] = "interrupted"
        raise
    except BaseException as error:
        info["status"], info["error"] = "failed", str(error) or type(error).__name__
        raise
    finally:
        info["finished"] = _now()
        info["seconds"] = round(float(before.get("seconds") or 0) + time.monotonic() - began, 3)
        info["peak_memory"] = peak_memory(device)
        _write(path, info)


def read_info(run: str | Path) -> dict[str, Any]:
    """What ``run.json`` says, nothing where it is not there; ``ValueError`` where it is no JSON object."""
    path = Path(run) / "run.json"
    info = read_json(path) if path.is_file() else {}
    if not isinstance(info, dict):
        raise ValueError(f"{path}: must be a JSON object, got a {type(info).__name__}")
    return info


def _write(path: Path, info: Mapping[str, Any]) -> None:
    if distributed.is_main():
        write_json(path, {key: value for key, value in info.items() if value is not None})


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
