"""``sigmoid_focal_loss``: RetinaNet's anchors, against eager PyTorch, torch.compile and torchvision. ``make bench``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from interleave import Race, check_result, make_clock, run_race
from machine import pinned
from rows import race_once, replay
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from nasdet.measure.memory import peak_memory
from nasdet.ops.sigmoid_focal_loss import OP, sigmoid_focal_loss

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PHASES = ("forward", "forward+backward")
# Relative L2 distance to the float64 reference; rivals in bfloat16 round every intermediate.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}
# case -> shape, reduction, gamma, calls per timing
CASES: dict[str, tuple[tuple[int, ...], str, float, int]] = {
    "2x76725x80": ((2, 76725, 80), "none", 2.0, 1),
    "2x76725x80 sum": ((2, 76725, 80), "sum", 2.0, 1),
    "2x76725x80 sum, gamma 1.5": ((2, 76725, 80), "sum", 1.5, 1),
    "100 sum": ((100,), "sum", 2.0, 100),
}
# Contestants' promises (CPU, float32): over whom, how many times faster, on the large cases.
TARGETS = {"eager": 5.0, "torchvision": 5.0, "torch.compile": 1.0}

Call = Callable[..., Tensor]


def eager(inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: str) -> Tensor:
    """What a user writes."""
    p = torch.sigmoid(inputs)
    right = p * targets + (1 - p) * (1 - targets)
    entropy = binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    loss = (alpha * targets + (1 - alpha) * (1 - targets)) * (1 - right) ** gamma * entropy
    return loss if reduction == "none" else loss.sum()


def _torchvision() -> Call:
    return pytest.importorskip("torchvision.ops").sigmoid_focal_loss


CONTESTANTS: dict[str, Callable[[], Call]] = {
    "nasdet": lambda: sigmoid_focal_loss,
    "eager": lambda: eager,
    "torch.compile": lambda: torch.compile(eager, fullgraph=True, dynamic=False),
    "torchvision": _torchvision,
}


@dataclass
class Outcome:
    race: Race
    memory: dict[str, int]
    absent: dict[str, str]


def _step(call: Call, x: Tensor, t: Tensor, grad: Tensor, gamma: float, reduction: str, phase: str) -> list[Tensor]:
    if phase == PHASES[0]:
        with torch.no_grad():
            return [call(x, t, 0.25, gamma, reduction)]
    y = call(x, t, 0.25, gamma, reduction)
    return [y.detach(), *torch.autograd.grad(y, x, grad)]


def run(case: str, dtype: str, phase: str, *, device: str, threads: int, rounds: int) -> Outcome:
    """Check every contestant against the reference in float64, then time them interleaved, then probe their memory."""
    torch._dynamo.reset()
    shape, reduction, gamma, calls = CASES[case]
    generator = torch.Generator().manual_seed(0)
    # As at the start of training: logits about -4.6, one anchor in fifty positive.
    x = torch.randn(shape, generator=generator).sub_(4.6).to(device, DTYPES[dtype]).requires_grad_()
    t = (torch.rand(shape, generator=generator) < 0.02).to(device, DTYPES[dtype])
    grad = torch.randn(shape if reduction == "none" else (), generator=generator).to(device, DTYPES[dtype])
    exact = x.detach().double().requires_grad_()
    expected = _step(OP.reference, exact, t.double(), grad.double(), gamma, reduction, phase)
    timed: dict[str, Callable[[], Any]] = {}
    absent: dict[str, str] = {}
    for name, make in CONTESTANTS.items():
        try:
            step = functools.partial(_step, make(), x, t, grad, gamma, reduction, phase)
            results = step()
        except (pytest.skip.Exception, RuntimeError) as error:  # no torchvision, or no compiler
            if name in ("nasdet", "eager"):
                raise
            absent[name] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        check_result(name, results, expected, TOLERANCE[dtype])
        timed[name] = step
    del expected, exact, results
    with pinned(threads):
        repeated = {name: functools.partial(_repeat, step, calls) for name, step in timed.items()}
        race = run_race(repeated, rounds=rounds, clock=make_clock(device))
        memory = {name: peak_memory(step, device=device, tensors_only=True) for name, step in timed.items()}
    return Outcome(Race({name: [s / calls for s in times] for name, times in race.seconds.items()}), memory, absent)


def _repeat(step: Callable[[], Any], calls: int) -> None:
    for _ in range(calls):
        step()


def row(outcome: Outcome, case: str, dtype: str, phase: str, name: str, device: str) -> dict[str, Any]:
    """What a row says beside its times."""
    race, seconds = outcome.race, outcome.race.median(name)
    shape, reduction, *_ = CASES[case]
    maps = 2 + (reduction == "none") + (0 if phase == PHASES[0] else 3 + (reduction == "none"))
    moved = maps * torch.Size(shape).numel() * DTYPES[dtype].itemsize
    speedups = {rival: race.speedup(name, rival) for rival in race.seconds if rival != name}
    judged = name == "nasdet" and device == "cpu" and dtype == "fp32" and len(shape) > 1
    return {
        "bench": "sigmoid_focal_loss",
        "case": case,
        "contestant": name,
        "dtype": dtype,
        "phase": phase,
        "median_s": seconds,
        "iqr_s": race.iqr(name),
        "bytes_floor": moved,
        "bytes_per_s": moved / seconds,
        "peak_memory": {phase: outcome.memory[name]},
        "speedup_over": speedups,
        "targets": [
            {"quantity": "time", "over": rival, "at_least": factor, "ratio": speedups[rival]}
            | {"met": speedups[rival] >= factor}
            for rival, factor in TARGETS.items()
            if judged and rival in speedups
        ],
    }


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_sigmoid_focal_loss(
    benchmark: Any,
    request: pytest.FixtureRequest,
    races: dict[Any, Any],
    bench_machine: dict[str, Any],
    bench_device: str,
    bench_threads: int,
    case: str,
    dtype: str,
    phase: str,
    contestant: str,
) -> None:
    rounds = int(request.config.getoption("--bench-rounds"))
    outcome = race_once(
        races,
        ("sigmoid_focal_loss", case, dtype, phase),
        lambda: run(case, dtype, phase, device=bench_device, threads=bench_threads, rounds=rounds),
    )
    if contestant in outcome.absent:
        benchmark.skipped = True
        pytest.skip(outcome.absent[contestant])
    info = row(outcome, case, dtype, phase, contestant, bench_device) | {"environment": bench_machine}
    info["copy_share"] = info["bytes_per_s"] / bench_machine["peaks"]["copy_bytes_per_s"]
    replay(benchmark, f"sigmoid_focal_loss {case} {dtype} {phase}", outcome.race.seconds[contestant], info)
