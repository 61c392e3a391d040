"""The installed package: where it is, what its import costs, and how it stands without triton or the libraries."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

import nasdet

PACKAGE = Path(nasdet.__file__).parent


def run(code: str, folder: Path, **environment: str) -> str:
    """Standard output of ``python -c code`` in ``folder``."""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def here() -> dict[str, str]:
    """The environment in which a child imports the nasdet that this process has, and not one of its own folder."""
    return {"PYTHONPATH": os.pathsep.join([str(PACKAGE.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)}


@pytest.mark.skipif(os.environ.get("NASDET_INSTALLED") != "1", reason="NASDET_INSTALLED=1 is not set")
def test_the_installed_wheel_is_what_is_tested(repository: Path) -> None:
    assert not PACKAGE.is_relative_to(repository / "nasdet")
    assert list(PACKAGE.parent.glob("nasdet-*.dist-info")), f"{PACKAGE} was not installed from a wheel"
    assert (PACKAGE / "libnasdet_cpu.so").is_file() and (PACKAGE / "kernels/mix.py").is_file()
    assert nasdet.__version__ != "0+source"


def test_import_is_quick_and_lazy(tmp_path: Path) -> None:
    code = """
import sys, time, json
import torch
before, start = set(sys.modules), time.perf_counter()
import nasdet, nasdet.ops
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted({name.split(".")[0] for name in set(sys.modules) - before})]))
"""
    results = [json.loads(run(code, tmp_path, **here())) for _ in range(3)]
    assert statistics.median(seconds for seconds, _ in results) < 1.5
    heavy = {"triton", "matplotlib", "PIL", "sklearn", "scipy", "pycocotools", "faster_coco_eval", "tensorboard"}
    assert not heavy & set(results[0][1])


def test_import_alone_does_not_load_torch(tmp_path: Path) -> None:
    code = "import sys, nasdet, nasdet.arch, nasdet.search.random; print({'torch', 'triton'} & set(sys.modules))"
    assert run(code, tmp_path, **here()).strip() == "set()"


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with a copy of the package without its libraries; triton is hidden from what runs there."""
    shutil.copytree(PACKAGE, tmp_path / "nasdet", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['triton'] = None\n")
    return tmp_path


def test_without_libraries_and_triton_the_references_serve(bare: Path) -> None:
    code = """
import torch, nasdet, nasdet.ops
from nasdet._dispatch import OPS
from nasdet._cases import Inputs
assert nasdet.__file__.startswith(__import__("os").getcwd()), nasdet.__file__
for op in OPS.values():
    plain = next(backend.name for backend in op.backends if backend.name in ("folded", "reference"))
    for case in op.cases:
        if not case.large:
            args, kwargs = case.make(Inputs(torch.float32))
            served, expected = op.call(*args, **kwargs), op.call(*args, **kwargs, backend=plain)
            torch.testing.assert_close(served, expected, rtol=0, atol=0, equal_nan=True, msg=f"{op.name} {case.id}")
x = torch.ones(2, 3, requires_grad=True)
nasdet.ops.mix([x, x], torch.tensor([1.0, 2.0])).sum().backward()
print(x.grad.unique().tolist())
"""
    assert run(code, bare, PYTHONPATH=str(bare)).split() == ["[3.0]"]


def test_without_libraries_info_says_why(bare: Path) -> None:
    code = "import runpy, sys; sys.argv = ['nasdet', 'info', '--json']; runpy.run_module('nasdet', run_name='__main__')"
    info = json.loads(run(code, bare, PYTHONPATH=str(bare)))
    assert "libnasdet_cpu.so is not installed" in info["libraries"]["cpu"]
    for states in info["ops"].values():
        assert "libnasdet_cpu.so is not installed" in states["cpp"]
        assert states.get("triton") in (None, "triton is not installed")
        assert states["reference"] == "can run"
    assert "triton" in info["ops"]["mix"]


def test_a_broken_library_is_explained(bare: Path) -> None:
    (bare / "nasdet/libnasdet_cpu.so").write_bytes(b"not a library")
    code = "import nasdet.ops; from nasdet import _library; print(_library.why_not('cpu'))"
    assert "libnasdet_cpu.so does not load" in run(code, bare, PYTHONPATH=str(bare))
