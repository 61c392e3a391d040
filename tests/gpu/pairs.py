"""Which ops have a kernel for a CUDA device, and in which backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import nasdet.ops  # noqa: F401  enters every op in the registry
from nasdet._dispatch import OPS, Backend, Op

SOURCES = {"cuda": ("csrc/cuda", ".cu"), "triton": ("kernels", ".py")}


def _is_written(op: Op, backend: Backend) -> bool:
    """Whether the source tree has a kernel of this op for this backend; then one that did not build is a failure."""
    folder, suffix = SOURCES[backend.name]
    name = op.call.__module__.rpartition(".")[2]  # ops of one module share a file
    return (Path(__file__).resolve().parents[2] / folder / f"{name}{suffix}").is_file()


PAIRS = [
    (op, backend)
    for op in OPS.values()
    for backend in op.backends
    if backend.name in SOURCES and _is_written(op, backend)
]
BACKENDS = [pytest.param(op, backend, id=f"{op.name}-{backend.name}") for op, backend in PAIRS]


def rows_of(*names: str) -> list[Any]:
    return [row for row, (op, _) in zip(BACKENDS, PAIRS, strict=True) if op.name in names]
