"""setup.py: how a wheel is named, and what a build without PyTorch's headers says."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")

CAPTURE = """
import importlib.util, runpy, setuptools, sys, sysconfig
captured = {}
setuptools.setup = captured.update
script = runpy.run_path("setup.py")
"""


def run(code: str, repository: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CAPTURE + code],
        cwd=repository,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(("pybind", "python", "abi"), [("1", "cp3", "cp3"), ("0", "py3", "none")])
def test_wheel_tags(pybind: str, python: str, abi: str, repository: Path) -> None:
    code = """
distribution = setuptools.Distribution({**captured, "name": "nasdet", "version": "1"})
command = distribution.cmdclass["bdist_wheel"](distribution)
command.ensure_finalized()
print(*command.get_tag())
"""
    result = run(code, repository, NASDET_PYBIND=pybind)
    assert result.returncode == 0, result.stderr
    tags = result.stdout.split()
    assert tags[0].startswith(python) and tags[1].startswith(abi) and tags[2].startswith(("linux", "manylinux"))


def test_packages_are_those_of_the_tree(repository: Path) -> None:
    result = run("print(*captured['packages'])", repository)
    folders = {path.parent for path in (repository / "nasdet").rglob("*.py")}
    expected = {str(folder.relative_to(repository)).replace("/", ".") for folder in folders}
    assert set(result.stdout.split()) == expected, "a folder with modules and without __init__.py?"


def test_missing_headers_are_one_clear_error(repository: Path, tmp_path: Path) -> None:
    code = f"""
importlib.util.find_spec = lambda name: None
sysconfig.get_path = lambda key: {str(tmp_path)!r}
script["torch_include"]()
"""
    result = run(code, repository, NASDET_TORCH_INCLUDE=str(tmp_path / "mine"))
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert "nasdet needs the headers of PyTorch >= 2.10. Install torch first" in result.stderr
    assert str(tmp_path / "mine") in result.stderr and str(tmp_path / "torch/include") in result.stderr


@pytest.mark.parametrize(("value", "meaning"), [("", "OFF"), ("0", "OFF"), ("1", "ON"), ("avx2", "avx2"), ("ON", None)])
def test_a_sanitizer_is_not_left_out_silently(value: str, meaning: str | None, repository: Path) -> None:
    result = run("print(script['sanitize']())", repository, NASDET_SANITIZE=value)
    if meaning is not None:
        assert result.stdout.split() == [meaning]
    else:
        assert result.returncode != 0 and result.stderr.strip() == "NASDET_SANITIZE must be 0, 1 or avx2, got 'ON'"


def test_setup_never_imports_torch(repository: Path) -> None:
    assert run("print('torch' in sys.modules)", repository).stdout.split() == ["False"]


@pytest.mark.slow
def test_two_isolated_builds_in_one_tree(repository: Path, tmp_path: Path) -> None:
    """The second one has other temporary paths of ninja and pybind11, and must not keep what the first one built."""
    command = [sys.executable, "-m", "build", "--sdist", "--outdir", str(tmp_path), str(repository)]
    subprocess.run(command, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    source = tmp_path / "source"
    source.mkdir()
    subprocess.run(["tar", "xf", str(sdist), "--strip-components=1", "-C", str(source)], check=True)
    names = []
    for pybind in ("1", "0"):
        out = tmp_path / f"wheel{pybind}"
        pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(out), str(source)]
        environment = {**os.environ, "NASDET_CUDA": "0", "NASDET_PYBIND": pybind}
        result = subprocess.run(pip, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
        (wheel,) = out.glob("*.whl")
        names.append(wheel.name)
        has_module = any("/_C." in name for name in zipfile.ZipFile(wheel).namelist())
        assert has_module == (pybind == "1")
    assert "-py3-none-linux" in names[1] and "-cp3" in names[0]
