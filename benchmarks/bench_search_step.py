"""One FAD search step (alphas, then weights): RepShare against unshared, fused ops against their references.

The paper's setting: FCOS with ResNet-50 and an FPN of 256 channels, c' = 96, one cell a group; 416 x 416 px.
Each contestant lives in a process of its own, so that its peak memory is its own; the parent lets them step in turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from interleave import Race, WrongResult
from rows import race_once, replay

SETTING: dict[str, Any] = {"backbone": "resnet50", "fpn_channels": 256, "inner_channels": 96, "size": 416}
CONTESTANTS: dict[str, dict[str, Any]] = {
    "RepShare, nasdet": {"repshare": True, "backend": None},
    "RepShare, reference": {"repshare": True, "backend": "reference"},
    "unshared, nasdet": {"repshare": False, "backend": None},
    "unshared, reference": {"repshare": False, "backend": "reference"},
}
TWINS = (("RepShare, nasdet", "RepShare, reference"), ("unshared, nasdet", "unshared, reference"))
LOSS_TOLERANCE = 2e-3  # relative, between fused and reference after one step of each side


class Worker:
    """A contestant's process. Use as a context manager: it never outlives the block."""

    def __init__(self, options: dict[str, Any]) -> None:
        script = Path(__file__).with_name("search_worker.py")
        command = [sys.executable, str(script), json.dumps(options)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

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


def setting(scale: float) -> dict[str, Any]:
    """The paper's setting, its widths times ``scale``."""
    widths = {name: max(12, round(SETTING[name] * scale)) for name in ("fpn_channels", "inner_channels")}
    return {**SETTING, **widths}


def run_workers(common: dict[str, Any], rounds: int) -> Outcome:
    """Warm up and probe every contestant, compare the losses of fused and reference, then time the steps in turns."""
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker({**common, **options})) for name, options in CONTESTANTS.items()}
        probes = {name: worker.ask("probe") for name, worker in workers.items()}
        for ours, reference in TWINS:
            _check_losses(ours, probes[ours]["values"], probes[reference]["values"])
        seconds: dict[str, list[float]] = {name: [] for name in workers}
        resident = dict.fromkeys(workers, 0)
        for index in range(rounds):
            first = index % len(workers)
            for name in [*workers, *workers][first : first + len(workers)]:
                answer = workers[name].ask("step")
                seconds[name].append(answer["seconds"])
                resident[name] = max(resident[name], answer["peak_memory"])
    return Outcome(Race(seconds), probes, resident)


def _check_losses(name: str, got: dict[str, float], expected: dict[str, float]) -> None:
    for key, wanted in expected.items():
        if not abs(got[key] - wanted) <= LOSS_TOLERANCE * abs(wanted):
            raise WrongResult(f"{name}: {key} must be within {LOSS_TOLERANCE:g} of {wanted:.6g}, got {got[key]:.6g}")


@pytest.fixture(scope="session")
def step_threads(request: pytest.FixtureRequest) -> int:
    return int(request.config.getoption("--bench-step-threads")) or len(os.sched_getaffinity(0))


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("images", (1, 4))
def test_search_step(
    benchmark: Any,
    request: pytest.FixtureRequest,
    races: dict[Any, Any],
    bench_machine: dict[str, Any],
    bench_device: str,
    step_threads: int,
    images: int,
    contestant: str,
) -> None:
    rounds = int(request.config.getoption("--bench-step-rounds"))
    if images > 1 and bench_device == "cpu":
        rounds = max(1, rounds // 3)
    sizes = setting(request.config.getoption("--bench-step-scale"))
    common = {**sizes, "images": images, "device": bench_device, "threads": step_threads}
    outcome = race_once(races, ("search step", images), lambda: run_workers(common, rounds))
    race = outcome.race
    info = {
        "bench": "search_step",
        "case": f"{images} images" if images > 1 else "1 image",
        "contestant": contestant,
        "dtype": "fp32",
        "phase": "alpha step + w step",
        "images": images,
        "setting": sizes,
        "median_s": race.median(contestant),
        "iqr_s": race.iqr(contestant),
        "peak_memory": {"step": outcome.probes[contestant]["peak_memory"]},
        "speedup_over": {rival: race.speedup(contestant, rival) for rival in race.seconds if rival != contestant},
        "targets": [],
        "environment": {**bench_machine, "threads": step_threads},
    }
    if bench_device == "cpu":
        info["peak_memory"]["step, resident"] = outcome.resident[contestant]
    replay(benchmark, f"search step {info['case']}", race.seconds[contestant], info)
