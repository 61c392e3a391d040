"""The built artefacts: those in the folder NASDET_DIST, else an sdist and the wheel from it, built here for the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest


def _run(*command: str, cwd: Path, **environment: str) -> None:
    result = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}: {result.stdout[-2000:]}{result.stderr[-2000:]}"


@pytest.fixture(scope="session")
def dist(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one sdist and the wheel that was built from it."""
    if built := os.environ.get("NASDET_DIST"):
        return Path(built)
    pytest.importorskip("build", reason="the package 'build' makes the sdist")
    folder = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--sdist", "--outdir", str(folder), str(repository), cwd=folder)
    pip_wheel = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-cache-dir", "--wheel-dir", str(folder))
    _run(*pip_wheel, str(*folder.glob("*.tar.gz")), cwd=folder, NASDET_CUDA="0")
    return folder


@pytest.fixture(scope="session")
def wheel(dist: Path) -> Path:
    """The wheel with the pybind11 module."""
    (wheel,) = (path for path in dist.glob("nasdet-*.whl") if "py3-none" not in path.name)
    return wheel


@pytest.fixture(scope="session")
def wheel_files(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.fixture(scope="session")
def sdist_files(dist: Path) -> set[str]:
    """Files of the sdist, without its top folder."""
    (sdist,) = dist.glob("nasdet-*.tar.gz")
    with tarfile.open(sdist) as archive:
        return {member.name.split("/", 1)[1] for member in archive.getmembers() if member.isfile()}


@pytest.fixture(scope="session")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder
