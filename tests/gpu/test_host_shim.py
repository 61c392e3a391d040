"""The bodies of the CUDA kernels, compiled with g++ under the sanitizers and run on the CPU by shim/host_shim.h."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.needs("g++")
# Types of maps. Doubles and halfs go the same ways as the others: they are left to the slow tests.
STORAGES = [
    *(pytest.param(storage) for storage in ("float", "bfloat16")),
    *(pytest.param(storage, marks=pytest.mark.slow) for storage in ("double", "half")),
]
Run = Callable[[str, str], "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize("storage", ["float", "double", "half", "bfloat16"])
def test_mix_kernels_on_the_cpu(check_kernels: Callable[[str, str, int], None], storage: str) -> None:
    check_kernels("mix_driver", storage, 10_001)


RIGHT_KERNELS = ["barrier", "dynamic-shared", "half-warps"]
WRONG_KERNELS = ["missing-barrier", "unwritten-shared", "divergent-barrier", "missing-lane", "outside-mask"]


@pytest.mark.parametrize("kernel", RIGHT_KERNELS + WRONG_KERNELS)
def test_shim_runs_right_kernels_and_notices_wrong_ones(run_shim: Run, kernel: str) -> None:
    result = run_shim("shim_check", kernel)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("kernel", "words"), [("write-beyond", "heap-buffer-overflow"), ("read-unaligned", "misaligned address")]
)
def test_sanitizers_see_through_the_shim(run_shim: Run, kernel: str, words: str) -> None:
    result = run_shim("shim_check", kernel)
    assert result.returncode != 0 and words in result.stderr
