"""Chooses a launch's tiles: the best of a few configurations, measured once per kind of call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Generic, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

REPEATS, ROUNDS = 5, 3
AHEAD = 1_000_000  # clock cycles that the device waits while the launches of a round are queued: half a millisecond
PREFERENCE = 0.97  # for the first candidate, where the others are not clearly faster
INTERPRETING = triton.knobs.runtime.interpret


class Config(NamedTuple):
    """Tile of a matrix product: rows, columns, terms of the sum at a time; warps; stages of the software pipeline."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    least: int = 0  # compute capabilities that it is for
    most: int = 999
    uneven: int = 0  # the least compute capability that it is for where tiles or steps have several widths

    def cut(self, m: int, n: int, k: int) -> Config:
        """For a product of which no tile needs to be larger than this."""
        m, n, k = min(self.block_m, m), min(self.block_n, n), min(self.block_k, k)
        return Config(m, n, k, self.warps if m * n > 4096 else 4, self.stages)

    def shared_memory(self, element_bytes: int) -> int:
        """Bytes of the operands in flight, which is most of what the compiler will ask for."""
        return self.stages * (self.block_m + self.block_n) * self.block_k * element_bytes


T = TypeVar("T")


class Choice(Generic[T]):
    """The configurations of one launch on one device, best first, and what each makes of it once it is needed.

    Calls of one ``key`` share what was measured.
    """

    def __init__(self, key: Hashable, find: Callable[[], Sequence[Config]], prepare: Callable[[Config], T]):
        self.key, self._find, self._prepare = key, find, prepare
        self._known: dict[Config, T] = {}
        self.fastest: T | None = None

    @cached_property
    def candidates(self) -> Sequence[Config]:
        return self._find()

    def prepared(self, config: Config) -> T:
        if config not in self._known:
            self._known[config] = self._prepare(config)
        return self._known[config]


_fastest: dict[Hashable, Config] = {}


def may_measure(like: Tensor) -> bool:
    """Not without a GPU, not while a graph is recorded, and not where results must not depend on a measurement."""
    if INTERPRETING or not like.is_cuda or torch.are_deterministic_algorithms_enabled():
        return False
    return not torch.cuda.is_current_stream_capturing()


def run_fastest(choice: Choice[T], like: Tensor, launch: Callable[[T], None]) -> None:
    """``launch`` with the fastest candidate for calls of this kind; with the first where nothing may be measured.

    ``launch`` may run several times, each of which writes the same results to the same place.
    """
    if torch.are_deterministic_algorithms_enabled():
        launch(choice.prepared(choice.candidates[0]))
        return
    if choice.fastest is None:
        config = _decided(choice, like, launch)
        if config is None:
            launch(choice.prepared(choice.candidates[0]))
            return
        choice.fastest = choice.prepared(config)
    launch(choice.fastest)


def _decided(choice: Choice[T], like: Tensor, launch: Callable[[T], None]) -> Config | None:
    """What is known of calls of this kind, or is measured now; None where it may not be measured yet."""
    measured = (like.device, choice.key)
    if measured not in _fastest:
        candidates = choice.candidates
        if len(candidates) == 1:
            return candidates[0]
        if not may_measure(like):
            return None
        times = {config: _milliseconds(choice.prepared(config), launch) for config in candidates}
        times[candidates[0]] *= PREFERENCE
        _fastest[measured] = min(candidates, key=times.__getitem__)
    return _fastest[measured]


def _milliseconds(prepared: T, launch: Callable[[T], None]) -> float:
    try:
        launch(prepared)  # compiles
    except triton.OutOfResources:
        return float("inf")
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(AHEAD)  # else a small product would wait for Python, which the time would then be of
        start.record()
        for _ in range(REPEATS):
            launch(prepared)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)
