"""Races of whole steps, of a search or a detector: each contestant lives in a process of its own, so that its peak
memory is its own; the parent lets them step in turns."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from backends import check_backends
from interleave import Race, WrongResult

LOSS_TOLERANCE = 2e-3  # relative, between fused and reference after one step of each side


class Worker:
    """A contestant's process. Use as a context manager: it never outlives the block.

    ``options["worker"]`` names the script beside this one that it runs.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        script = Path(__file__).with_name(options.get("worker", "search_worker.py"))
        command = [sys.executable, str(script), json.dumps(options)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            self.facts = self._answer()
        except BaseException:  # an interruption too: nobody else knows of the process yet
            self._process.kill()
            raise

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *error: Any) -> None:
        self._process.kill()
        self._process.communicate()

    def ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker died with exit status {self._process.wait()}")
        return dict(json.loads(line))


@dataclass
class Outcome:
    """Times and answers of a race between workers."""

    race: Race
    probes: dict[str, dict[str, Any]]
    resident: dict[str, int]
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)


def run_workers(
    contestants: Mapping[str, Mapping[str, Any]], common: Mapping[str, Any], twins: Mapping[str, str], rounds: int
) -> Outcome:
    """Warm up every contestant, compare the losses of each with its twin's, probe it, then time the steps in turns.

    On a CUDA device ops must have run on their kernels for it, where a contestant does not ask for others.
    The first step also makes the optimisers' state; the probe counts the tensors of a later one.

    ``contestants``: a worker's options by name, besides the ``common`` ones; ``twins``: the reference of each.
    """
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker({**common, **options})) for name, options in contestants.items()}
        first_values = {name: worker.ask("step")["values"] for name, worker in workers.items()}
        for ours, reference in twins.items():
            check_losses(ours, first_values[ours], first_values[reference])
        probes = {name: worker.ask("probe") for name, worker in workers.items()}
        for name, probe in probes.items():
            if contestants[name].get("backend") is None:
                check_backends(name, probe["backends"], common["device"])
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        resident = dict.fromkeys(workers, 0)
        for index in range(rounds):
            first = index % len(workers)
            for name in [*workers, *workers][first : first + len(workers)]:
                answer = workers[name].ask("step")
                seconds[name].append(answer["seconds"])
                resident[name] = max(resident[name], answer["peak_memory"])
        facts = {name: worker.facts for name, worker in workers.items()}
    return Outcome(Race(seconds), probes, resident, facts)


def check_losses(name: str, got: Mapping[str, float], expected: Mapping[str, float]) -> None:
    """Raise ``WrongResult`` where a loss of a contestant is not its reference's."""
    for key, wanted in expected.items():
        if not abs(got[key] - wanted) <= LOSS_TOLERANCE * abs(wanted):
            raise WrongResult(f"{name}: {key} must be within {LOSS_TOLERANCE:g} of {wanted:.6g}, got {got[key]:.6g}")


def step_info(outcome: Outcome, contestant: str, **facts: Any) -> dict[str, Any]:
    """A contestant's row: its times, the peak of its tensors, and on the CPU of its process; and ``facts``."""
    race = outcome.race
    info = {
        "contestant": contestant,
        "dtype": "fp32",
        **facts,
        "median_s": race.median(contestant),
        "iqr_s": race.iqr(contestant),
        "backends": outcome.probes[contestant]["backends"],
        "peak_memory": {"step": outcome.probes[contestant]["peak_memory"]},
        "speedup_over": {rival: race.speedup(contestant, rival) for rival in race.seconds if rival != contestant},
        "targets": [],
    }
    if facts["environment"]["device"] == "cpu":
        info["peak_memory"]["step, resident"] = outcome.resident[contestant]
    return info


def time_target(info: Mapping[str, Any], over: str, at_least: float) -> list[dict[str, Any]]:
    """The promise that a row's contestant is ``at_least`` times as fast as another; none where that one was absent on
    the CPU, where it is measured in an environment of its own, and not met where it was absent on another device."""
    ratio = info["speedup_over"].get(over)
    target = {"quantity": "time", "over": over, "at_least": at_least}
    if ratio is not None:
        return [target | {"ratio": ratio, "met": ratio >= at_least}]
    reason = f"{over} took no part"
    return [] if info["environment"]["device"] == "cpu" else [target | {"absent": reason, "met": False}]


def step_threads(asked: int) -> int:
    """Threads of a step: all processors where none are asked for."""
    return asked or len(os.sched_getaffinity(0))
