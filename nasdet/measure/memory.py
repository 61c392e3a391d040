"""Peak memory of a call, over what was held before it.

On a CUDA device torch's allocator counts. On the CPU the kernel does (Linux): the high-water mark of the resident set,
reset before the call; it sees every allocation, whoever made it. Where the mark cannot be reset, or on request, torch's
profiler adds up the allocations of torch's own CPU allocator instead.
"""

from __future__ import annotations

import ctypes
import gc
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
    if where.type == "cuda":
        return _peak_cuda(fn, where)
    return _peak_profiled(fn) if tensors_only or not can_reset_high_water() else _peak_resident(fn)


def can_reset_high_water() -> bool:
    """Whether this system lets a process reset its own high-water mark (Linux, unless a sandbox forbids it)."""
    try:
        _reset_high_water()
        _status_bytes("VmHWM")
    except (OSError, ValueError):
        return False
    return True


def _peak_cuda(fn: Callable[[], Any], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    result = fn()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device)
    del result
    return max(0, peak - before)


def _peak_resident(fn: Callable[[], Any]) -> int:
    trim_heap()
    _reset_high_water()
    before = _status_bytes("VmRSS")
    result = fn()
    peak = _status_bytes("VmHWM")
    del result
    return max(0, peak - before)


def _peak_profiled(fn: Callable[[], Any]) -> int:
    with torch.autograd.profiler.profile(profile_memory=True) as profile:
        result = fn()
    del result
    # The profile's own event list folds allocations into the operators that made them; the raw one has each by itself.
    raw = profile.kineto_results
    assert raw is not None
    held = peak = 0
    for event in sorted((e for e in raw.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
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
