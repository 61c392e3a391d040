"""What a result depends on: machine, versions, threads; and the machine's own peaks, measured the same day."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import statistics
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from interleave import Clock, make_clock

import nasdet
from nasdet import _dispatch, _library
from nasdet.measure.memory import trim_heap

ROOT = Path(__file__).resolve().parent.parent


def environment(device: str, threads: int) -> dict[str, Any]:
    """Versions, processor and commit: plain data without host names or paths."""
    return {
        "machine": machine_name(device),
        "cpu": cpu_model(),
        "isa": _library.cpu_isa() or "none",
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": threads,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
        "triton": _version("triton"),
        "nasdet": nasdet.__version__,
        "build": build_info(),
        "commit": commit(),
    }


def machine_name(device: str = "cpu") -> str:
    """A name for the kind of machine, the folder of its results: processor and instruction set, or the GPU."""
    words = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_model()} {_library.cpu_isa() or 'none'}"
    return re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-")


def cpu_model() -> str:
    """The processor's name; family and model too, where a hypervisor hides the rest."""
    fields: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            fields.setdefault(key.strip(), value.strip())
    name = re.sub(r"\((R|TM)\)|CPU|Processor|@.*", "", fields.get("model name", "")).split()
    if not name:
        return platform.machine()
    if not any(character.isdigit() for character in "".join(name)):
        name += ["family", fields.get("cpu family", "?"), "model", fields.get("model", "?")]
    return " ".join(name)


def build_info() -> dict[str, Any]:
    """Compilers and headers of the compiled part; empty without it."""
    try:
        from nasdet import _C
    except ImportError:
        return {}
    return dict(_C.build_info())


def commit() -> str:
    """The commit of the source tree, with ``+`` when tracked files differ from it; NASDET_COMMIT where that is set, for
    a tree that came without its history."""
    if given := os.environ.get("NASDET_COMMIT"):
        return given
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


def _version(package: str) -> str | None:
    """The version of an installed package, or None."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def lacking(required: str) -> dict[str, str]:
    """What is missing of the comma-separated names in ``NASDET_REQUIRE`` that a benchmark can depend on, and why."""
    reasons = {
        "cpp": _library.why_not("cpu"),
        "cuda": "no CUDA device" if not torch.cuda.is_available() else _library.why_not("cuda"),
        "triton": _dispatch.TRITON_MISSING,
        "torchvision": None if _version("torchvision") else "torchvision is not installed",
    }
    wanted = required.replace(" ", "").split(",")
    return {name: reason for name in wanted if (reason := reasons.get(name))}


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Keep this thread on one processor while it measures with one thread; otherwise nothing happens."""
    if threads != 1 or not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {max(before)})
        yield
    finally:
        os.sched_setaffinity(0, before)


_ALL = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def processors() -> set[int]:
    """The processors that this process could use when it began."""
    return _ALL


@contextlib.contextmanager
def on_threads(threads: int) -> Iterator[None]:
    """So many threads on all processors, whatever holds outside; also a decorator. Threads begun in it keep to them."""
    before = torch.get_num_threads()
    held = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    try:
        if held:
            os.sched_setaffinity(0, processors())
        torch.set_num_threads(threads)
        yield
    finally:
        torch.set_num_threads(before)
        if held:
            os.sched_setaffinity(0, held)


_TRIM, _MMAP_FROM, _MMAPS = -1, -3, -4  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_MMAP_MAX of glibc's malloc.h
_DEFAULT_MMAPS, _NEVER = 65536, 2**31 - 1


def _mallopt(parameter: int, value: int) -> None:
    change = getattr(ctypes.CDLL(None), "mallopt", None)
    if change is not None:
        change(parameter, value)


def keep_freed_blocks() -> None:
    """Set glibc's thresholds to the largest that it would adapt to by itself: freed maps are used again without page
    faults, for every contestant from the first case to the last. Left alone they'd depend on what ran before.
    """
    _mallopt(_MMAP_FROM, 32 * 2**20)
    _mallopt(_TRIM, 64 * 2**20)


@contextlib.contextmanager
def large_blocks_kept() -> Iterator[None]:
    """Freed blocks of any size are used again within, as a caching allocator has it.

    By default glibc hands those of 32 MiB and more back to the system, and each call pays for fresh pages: on a virtual
    machine that can take longer than the call itself, and does not grow with the threads. For every contestant alike.
    """
    _mallopt(_MMAPS, 0)
    _mallopt(_TRIM, _NEVER)
    try:
        yield
    finally:
        _mallopt(_MMAPS, _DEFAULT_MMAPS)
        keep_freed_blocks()
        trim_heap()


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Whether convolutions and matrix products of float32 may drop bits of their operands on a CUDA device, for whoever
    asks torch: its convolutions may by default, and so do this library's then; its matrix products may not.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def measured_peaks(device: str, threads: int) -> dict[str, Any]:
    """The machine's own peaks: bytes/s of a large copy (read + write) and FLOP/s of a matrix product in each dtype.

    The product stands for the multiply-add peak: BLAS reaches 90 to 100 % of it. Of random numbers, for a GPU's clock
    falls with the bits that change, and maps are no ones.
    """
    clock = make_clock(device)
    source = torch.ones(64 * 2**20, device=device)
    target = torch.empty_like(source)
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16} | ({"tf32": torch.float32} if device == "cuda" else {})
    with pinned(threads):
        copy = _median(clock, lambda: target.copy_(source))
        matrix = {name: _matrix_peak(clock, device, dtype, name == "tf32") for name, dtype in dtypes.items()}
    rates = {"copy_bytes_per_s": 2 * source.nbytes / copy, "fma_flops_per_s": matrix["fp32"]}
    return {**rates, "matrix_flops_per_s": matrix}


def _matrix_peak(clock: Clock, device: str, dtype: torch.dtype, tf32: bool) -> float:
    side = 8192 if device == "cuda" else 1536 if dtype == torch.float32 else 768  # some CPUs emulate the 16-bit one
    a, b = torch.randn(2, side, side, device=device).to(dtype).unbind()
    with float32_products(tf32=tf32):
        return 2 * side**3 / _median(clock, lambda: torch.mm(a, b))


def _median(clock: Clock, call: Any, rounds: int = 7) -> float:
    call()
    return statistics.median(clock(call) for _ in range(rounds))
