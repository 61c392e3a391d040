"""Tests of the GPU kernels. Most need no GPU: they interpret, compile ahead of time, or run on the CPU."""

from __future__ import annotations

import functools
import os
import subprocess
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


@pytest.fixture(scope="session")
def shim_driver(tmp_path_factory: pytest.TempPathFactory, cuda_sources: Path) -> Callable[[str], Path]:
    """Compiles a program of shim/ under the sanitizers, once.

    Not optimised: the sanitizers see most then, and the drivers compile in a third of the time and run as fast.
    """
    folder, shim = tmp_path_factory.mktemp("shim"), HERE / "shim"
    # The address sanitizer sees what is left out of the other.
    left_out = "-fno-sanitize=null,object-size,pointer-overflow"
    sanitizers = f"-fsanitize=address,undefined {left_out} -fno-sanitize-recover=all"
    warnings = "-Wall -Wextra -Werror -Wno-unknown-pragmas"
    includes = [f"-I{path}" for path in (shim, cuda_sources, cuda_sources.parent / "include")]

    @functools.cache
    def compiled(name: str) -> Path:
        command = ["g++", "-std=c++20", "-O0", "-g1", *sanitizers.split(), *warnings.split(), *includes]
        command += [str(shim / f"{name}.cpp"), "-o", str(folder / name)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr[-4000:]
        return folder / name

    return compiled


@pytest.fixture(scope="session")
def run_shim(
    shim_driver: Callable[[str], Path], program_environment: Callable[..., dict[str, str]]
) -> Callable[[str, str], subprocess.CompletedProcess[str]]:
    """``run_shim(driver, part)``: a part of a driver, run to its end."""

    def run(name: str, part: str) -> subprocess.CompletedProcess[str]:
        # A preloaded library of the test session's own sanitizers would come before the program's.
        environment = program_environment(ASAN_OPTIONS="detect_leaks=0", LD_PRELOAD="")
        return subprocess.run([shim_driver(name), part], env=environment, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="session")
def check_kernels(run_shim: Callable[[str, str], subprocess.CompletedProcess[str]]) -> Callable[[str, str, int], None]:
    """``check_kernels(driver, part, at_least)``: it fails at a wrong value, and says how many it compared."""

    def check(name: str, part: str, at_least: int) -> None:
        result = run_shim(name, part)
        assert result.returncode == 0, result.stderr[-4000:]
        checks, word = result.stdout.split()
        assert word == "checks" and int(checks) >= at_least

    return check
