"""Chooses a launch's tiles: the best of a few configurations, measured once per kind of call."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

REPEATS, ROUNDS = 5, 3
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

    def cut(self, m: int, n: int, k: int) -> Config:
        """For a product of which no tile needs to be larger than this."""
        m, n, k = min(self.block_m, m), min(self.block_n, n), min(self.block_k, k)
        return Config(m, n, k, self.warps if m * n > 4096 else 4, self.stages)

    def shared_memory(self, element_bytes: int) -> int:
        """Bytes of the operands in flight, which is most of what the compiler will ask for."""
        return self.stages * (self.block_m + self.block_n) * self.block_k * element_bytes


_fastest: dict[Hashable, Config] = {}


def may_measure(like: Tensor) -> bool:
    """Not without a GPU, not while a graph is recorded, and not where results must not depend on a measurement."""
    if INTERPRETING or not like.is_cuda or torch.are_deterministic_algorithms_enabled():
        return False
    return not torch.cuda.is_current_stream_capturing()


def run_fastest(key: Hashable, candidates: Sequence[Config], like: Tensor, launch: Callable[[Config], None]) -> None:
    """``launch`` with the fastest candidate for calls of this ``key``; with the first where nothing may be measured.

    ``launch`` may run several times, each of which writes the same results to the same place.
    """
    measured = (like.device, key)
    if torch.are_deterministic_algorithms_enabled():
        chosen = candidates[0]
    elif measured in _fastest:
        chosen = _fastest[measured]
    elif len(candidates) > 1 and may_measure(like):
        times = {config: _milliseconds(config, launch) for config in candidates}
        times[candidates[0]] *= PREFERENCE
        chosen = _fastest[measured] = min(candidates, key=times.__getitem__)
    else:
        chosen = candidates[0]
    launch(chosen)


def _milliseconds(config: Config, launch: Callable[[Config], None]) -> float:
    try:
        launch(config)  # compiles
    except triton.OutOfResources:
        return float("inf")
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(REPEATS):
            launch(config)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return min(times)
