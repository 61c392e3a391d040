"""Interleaved timing of contestants in one process: every round runs each once, so that noise hits all alike."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Clock = Callable[[Callable[[], Any]], float]  # runs the call, returns its seconds
AHEAD = 8_000_000  # clock cycles that a GPU waits while the host queues a call: 4 ms at 2 GHz


class WrongResult(AssertionError):
    """A contestant's result differs from the reference's: no speed is reported for it."""


def wall_clock(call: Callable[[], Any]) -> float:
    """Seconds of a call on the CPU; what it returns is freed within the time, as a user's program would."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def cuda_clock(call: Callable[[], Any]) -> float:
    """Seconds that a call occupies the device, between events before and after it on the current CUDA stream.

    The device is kept waiting while the host queues the call, as it is behind other work in a program. So the host's
    time counts only where the device must wait for it: beyond ``AHEAD``, and after the call itself has waited for the
    device, as NMS does, which returns a size. What the host does before that wait is hidden; the copy, the wait's end
    and whatever the host does afterwards count, for nothing can be queued ahead of them in any program.
    """
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()  # else what is still running would hide more of the host's time, each time as it happens
    torch.cuda._sleep(AHEAD)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def make_clock(device: str) -> Clock:
    """The clock for calls that work on ``device``."""
    return cuda_clock if device == "cuda" else wall_clock


@dataclass(frozen=True)
class Race:
    """Seconds by contestant, one per round: entry i of all of them comes from round i."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def iqr(self, name: str) -> float:
        """The middle half's width; 0 for a single round."""
        times = self.seconds[name]
        if len(times) < 2:
            return 0.0
        low, _, high = statistics.quantiles(times, n=4, method="inclusive")
        return high - low

    def speedup(self, name: str, over: str) -> float:
        """How many times faster ``name`` is than ``over``: the median of the ratios within each round."""
        pairs = zip(self.seconds[over], self.seconds[name], strict=True)
        return statistics.median(slow / fast for slow, fast in pairs)


def run_race(
    calls: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    clock: Clock = wall_clock,
    prepare: Callable[[], Any] | None = None,
    warmup: int = 2,
) -> Race:
    """Time ``calls`` in ``rounds`` rounds, each round starting one contestant later than the one before.

    ``prepare`` runs, untimed, before every call (it restores inputs that a call overwrites); ``warmup`` rounds are
    thrown away. The garbage collector is off meanwhile.
    """
    if rounds < 1 or warmup < 0:
        raise ValueError(f"rounds must be at least 1 and warmup at least 0, got {rounds} and {warmup}")
    if not calls:
        raise ValueError("calls must name at least one contestant, got none")
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for index in range(-warmup, rounds):
            first = index % len(names)
            for name in names[first:] + names[:first]:
                if prepare is not None:
                    prepare()
                elapsed = clock(calls[name])
                if index >= 0:
                    seconds[name].append(elapsed)
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return Race(seconds)


def check_result(name: str, got: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> list[float]:
    """Refuse a contestant whose tensors are not the reference's, in relative L2 distance and in their finiteness.

    Returns the distances. Raises WrongResult, which names the contestant, the tensor and the distance.
    """
    distances = []
    if len(got) != len(expected):
        raise WrongResult(f"{name}: results must be {len(expected)} tensors, got {len(got)}")
    for index, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        if ours.shape != theirs.shape:
            raise WrongResult(f"{name}: result {index} must have shape {tuple(theirs.shape)}, got {tuple(ours.shape)}")
        wanted = theirs.detach().double()
        distance = (ours.detach().double() - wanted).norm() / wanted.norm().clamp(min=1e-30)
        if not distance <= tolerance:  # a NaN is not
            raise WrongResult(
                f"{name}: result {index} must be within {tolerance:g} of the reference, got {distance:.3g}"
            )
        distances.append(float(distance))
    return distances


class ReplayClock:
    """A clock for pytest-benchmark that shows times measured before: ``benchmark.pedantic(clock.step, rounds=n)``
    under ``clock.read`` records exactly the seconds loaded."""

    def __init__(self) -> None:
        self._now = 0.0
        self._pending: list[float] = []

    def load(self, seconds: Sequence[float]) -> None:
        self._now, self._pending = 0.0, list(seconds)[::-1]

    def read(self) -> float:
        return self._now

    def step(self) -> None:
        self._now += self._pending.pop()
