"""What every test relies on: one seed, one thread, and the things that a machine may lack.

``NASDET_REQUIRE=cpp,triton,...`` names what must be there: a test session that lacks one of them fails at once, and a
test that would skip for want of it fails.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import random
import re
import shutil
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[1]


def _tiny_coco() -> Path:
    return Path(os.environ.get("NASDET_TINY_COCO") or REPOSITORY.parent / "shared" / "data" / "tiny_coco")


def _cpp() -> str | None:
    from nasdet import _library

    return _library.why_not("cpu")


def _torchvision() -> str | None:
    try:
        importlib.import_module("torchvision.ops")
    except (ImportError, RuntimeError, OSError) as error:  # the latter two: built for another PyTorch
        return f"it cannot be imported: {error}"
    return None


def _program(name: str) -> Callable[[], str | None]:
    return lambda: None if shutil.which(name) else f"{name} is not on PATH"


def _interpreter() -> str | None:
    try:
        return interpreter_fault(metadata.version("triton"), metadata.version("numpy"))
    except metadata.PackageNotFoundError as error:
        return f"{error.name} is not installed"


def interpreter_fault(triton: str, numpy: str) -> str | None:
    """Why kernels cannot be interpreted with these versions: older Tritons make numbers of arrays with one element."""
    versions = [tuple(map(int, re.findall(r"\d+", version)[:2])) for version in (triton, numpy)]
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        return f"the interpreter of Triton {triton} needs NumPy < 2.4, got {numpy}; that of 3.7 takes any"
    return None


# name -> why it is not here, or None
NEEDS: dict[str, Callable[[], str | None]] = {
    "cpp": _cpp,
    "cuda": lambda: None if torch.cuda.is_available() else "no CUDA device",
    "two_gpus": lambda: None if torch.cuda.device_count() > 1 else f"{torch.cuda.device_count()} CUDA devices",
    "triton": lambda: None if importlib.util.find_spec("triton") else "triton is not installed",
    "interpreter": _interpreter,  # Triton's
    "torchvision": _torchvision,
    "nvcc": _program("nvcc"),
    "g++": _program("g++"),
    "tiny_coco": lambda: (
        None if (_tiny_coco() / "annotations").is_dir() else f"not at {_tiny_coco()}; set NASDET_TINY_COCO to it"
    ),
}
REQUIRED = {name for name in os.environ.get("NASDET_REQUIRE", "").replace(" ", "").split(",") if name}


def _require(name: str, reason: str | None) -> None:
    """Skip because ``name`` is not here, or fail where it must be; go on when ``reason`` is None."""
    if reason is None:
        return
    if name in REQUIRED:
        pytest.fail(f"NASDET_REQUIRE has {name}, but: {reason}", pytrace=False)
    pytest.skip(f"{name}: {reason}")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if unknown := sorted(REQUIRED - set(NEEDS)):
        raise pytest.UsageError(f"NASDET_REQUIRE must name some of {', '.join(NEEDS)}, got {', '.join(unknown)}")
    if missing := {name: reason for name in sorted(REQUIRED) if (reason := NEEDS[name]())}:
        raise pytest.UsageError("; ".join(f"NASDET_REQUIRE has {name}, but: {why}" for name, why in missing.items()))


def pytest_collection_finish() -> None:
    """What is there by now stays to the end, thousands of tests among it: no collection of garbage need look at it."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.needs("cuda"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("needs"):
        for name in marker.args:
            _require(name, NEEDS[name]())


@pytest.fixture(autouse=True)
def _same_chance() -> None:
    """Every test draws the same numbers, alone or in any order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def require() -> Callable[[str, str | None], None]:
    """``require(name, reason)``: skip because ``name`` (cpp, triton, ...) is not here, or fail where it must be."""
    return _require


@pytest.fixture(scope="session")
def repository() -> Path:
    """The source tree that the tests lie in; the nasdet that they import may be another."""
    return REPOSITORY


@pytest.fixture(scope="session")
def tiny_coco() -> Path:
    """50 + 50 real COCO pictures, where they are at hand."""
    _require("tiny_coco", NEEDS["tiny_coco"]())
    return _tiny_coco()
