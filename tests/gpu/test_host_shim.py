"""The bodies of the CUDA kernels, compiled with g++ under the sanitizers and run on the CPU by shim/host_shim.h."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("g++")
SHIM = Path(__file__).parent / "shim"
# What the address sanitizer sees as well doubles the time to compile.
LEFT_OUT = "-fno-sanitize=null,object-size,pointer-overflow"
FLAGS = f"-std=c++20 -O1 -g1 -fsanitize=address,undefined {LEFT_OUT} -fno-sanitize-recover=all"
# Types of maps. Doubles and halfs go the same ways as the others: they are left to the slow tests.
STORAGES = [
    *(pytest.param(storage) for storage in ("float", "bfloat16")),
    *(pytest.param(storage, marks=pytest.mark.slow) for storage in ("double", "half")),
]
WARNINGS = "-Wall -Wextra -Werror -Wno-unknown-pragmas"


def build(source: str, folder: Path, cuda_sources: Path) -> Path:
    program = folder / Path(source).stem
    command = [
        "g++",
        *FLAGS.split(),
        *WARNINGS.split(),
        f"-I{SHIM}",
        f"-I{cuda_sources}",
        str(SHIM / source),
        "-o",
        str(program),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-4000:]
    return program


def run_checks(
    program: Path, part: str, at_least: int, program_environment: Callable[..., dict[str, str]], timeout: int = 300
) -> None:
    """Run a part of a driver, which prints how many comparisons it made and fails at a wrong one."""
    # A preloaded library of the test session's own sanitizers would come before the program's.
    environment = program_environment(ASAN_OPTIONS="detect_leaks=0", LD_PRELOAD="")
    result = subprocess.run([program, part], env=environment, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, result.stderr[-4000:]
    checks, word = result.stdout.split()
    assert word == "checks" and int(checks) >= at_least


@pytest.fixture(scope="module")
def mix_driver(tmp_path_factory: pytest.TempPathFactory, cuda_sources: Path) -> Path:
    return build("mix_driver.cpp", tmp_path_factory.mktemp("shim"), cuda_sources)


@pytest.fixture(scope="module")
def shim_check(tmp_path_factory: pytest.TempPathFactory, cuda_sources: Path) -> Path:
    return build("shim_check.cpp", tmp_path_factory.mktemp("shim"), cuda_sources)


@pytest.fixture
def run(program_environment: Callable[..., dict[str, str]]) -> Callable[[Path, str], subprocess.CompletedProcess[str]]:
    def start(program: Path, argument: str) -> subprocess.CompletedProcess[str]:
        # A preloaded library of the test session's own sanitizers would come before the program's.
        environment = program_environment(ASAN_OPTIONS="detect_leaks=0", LD_PRELOAD="")
        return subprocess.run([program, argument], env=environment, capture_output=True, text=True, timeout=120)

    return start


Run = Callable[[Path, str], "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize("storage", ["float", "double", "half", "bfloat16"])
def test_mix_kernels_on_the_cpu(run: Run, mix_driver: Path, storage: str) -> None:
    result = run(mix_driver, storage)
    assert result.returncode == 0, result.stderr[-4000:]
    checks, word = result.stdout.split()
    assert word == "checks" and int(checks) > 10_000


RIGHT_KERNELS = ["barrier", "dynamic-shared", "half-warps"]
WRONG_KERNELS = ["missing-barrier", "unwritten-shared", "divergent-barrier", "missing-lane", "outside-mask"]


@pytest.mark.parametrize("kernel", RIGHT_KERNELS + WRONG_KERNELS)
def test_shim_runs_right_kernels_and_notices_wrong_ones(run: Run, shim_check: Path, kernel: str) -> None:
    result = run(shim_check, kernel)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("kernel", "words"), [("write-beyond", "heap-buffer-overflow"), ("read-unaligned", "misaligned address")]
)
def test_sanitizers_see_through_the_shim(run: Run, shim_check: Path, kernel: str, words: str) -> None:
    result = run(shim_check, kernel)
    assert result.returncode != 0 and words in result.stderr
