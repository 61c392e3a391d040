"""Peak memory of a call, over what was held before it.

On a CUDA device torch's allocator counts. On the CPU the kernel does (Linux): the high-water mark of the resident set,
reset before the call; it sees every allocation, whoever made it. Where the mark cannot be reset, or on request, torch's
profiler adds up the allocations of torch's own CPU allocator instead.
"""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def peak_memory(
    fn: Callable[[], Any], *, device: str | torch.device = "cpu", warmup: int = 0, tensors_only: bool = False
) -> int:
    """The most bytes that ``fn()`` held at one time beyond those held when it was called, at least 0.

    What ``fn`` returns is alive when the measurement ends. Memory that exists before the call (inputs, parameters,
    optimiser state) is not counted unless the call replaces it. ``warmup`` calls come first: libraries allocate their
    work space, and compilers their code, in a first call.

    On the CPU the resident set is that of the whole process: call from a process in which nothing else is at work. A
    page counts when it is touched, and pages are counted in small batches per core: differences below 1 MB mean
    nothing. The heap's holes count too: freed blocks that malloc keeps for later. ``tensors_only`` leaves them out, and
    with them whatever does not come from torch's allocator: the exact bytes of the tensors in use, from torch's
    profiler; a tensor older than the call that is freed in it does not make room.

    Raises ValueError for a device that is neither ``cpu`` nor ``cuda`` and for a negative ``warmup``.
    """
    where = torch.device(device)
    if where.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be a cpu or cuda device, got {str(device)!r}")
    if warmup < 0:
        raise ValueError(f"warmup must be at least 0, got {warmup}")
    for _ in range(warmup):
        fn()
    gc.collect()
    peak = watch_peak(where, tensors_only=tensors_only)
    try:
        result = fn()
    finally:
        found = peak()
    del result
    return found


def watch_peak(device: torch.device, *, tensors_only: bool = False) -> Callable[[], int]:
    """From now on, the most bytes held beyond those held now: as :func:`peak_memory`, for what is not one call.

    The result is called once, at the end.
    """
    if device.type == "cuda":
        return _watch_cuda(device)
    return _watch_profiled() if tensors_only or not can_reset_high_water() else _watch_resident()


def can_reset_high_water() -> bool:
    """Whether this system lets a process reset its own high-water mark (Linux, unless a sandbox forbids it)."""
    try:
        _reset_high_water()
        _status_bytes("VmHWM")
    except (OSError, ValueError):
        return False
    return True


def _watch_cuda(device: torch.device) -> Callable[[], int]:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)

    def peak() -> int:
        torch.cuda.synchronize(device)
        return max(0, torch.cuda.max_memory_allocated(device) - before)

    return peak


def _watch_resident() -> Callable[[], int]:
    trim_heap()
    _reset_high_water()
    before = _status_bytes("VmRSS")
    return lambda: max(0, _status_bytes("VmHWM") - before)


def _watch_profiled() -> Callable[[], int]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it tells of its start and end on standard error
    profile = torch.autograd.profiler.profile(profile_memory=True)
    profile.__enter__()

    def peak() -> int:
        profile.__exit__(None, None, None)
        # The profile's own event list folds allocations into the operators that made them; the raw one has each alone.
        raw: Any = profile.kineto_results
        held = most = 0
        for event in sorted((e for e in raw.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        return most

    return peak


def trim_heap() -> None:
    """Give freed memory back to the system, so that the next allocation is seen (glibc; elsewhere without effect)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _reset_high_water() -> None:
    _CLEAR.write_text("5")  # 5: set VmHWM to the present resident set (man 5 proc)


def _status_bytes(name: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{_STATUS} has no {name}")
