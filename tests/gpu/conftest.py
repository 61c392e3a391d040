"""Tests of the GPU kernels. Most need no GPU: they interpret, compile ahead of time, or run on the CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import nasdet

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))  # for op_checks, which the programs that tests start import too


@pytest.fixture(scope="session")
def program_environment() -> Callable[..., dict[str, str]]:
    """The environment of a program in its own process: it finds the same nasdet, and runs on one thread."""

    def environment(**more: str) -> dict[str, str]:
        path = os.pathsep.join([str(Path(nasdet.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        return {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "OMP_NUM_THREADS": "1", **more}

    return environment


@pytest.fixture(scope="session")
def cuda_sources(repository: Path) -> Path:
    return repository / "csrc" / "cuda"
