"""What the shared libraries ask of a machine, and what they tell of the one that built them."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SYSTEM = {"libc.so.6", "libm.so.6", "libstdc++.so.6", "libgcc_s.so.1", "libdl.so.2", "libpthread.so.0", "librt.so.1"}

HAVE_TOOLS = shutil.which("readelf") and shutil.which("nm")
pytestmark = pytest.mark.skipif(not HAVE_TOOLS, reason="binutils are not installed")


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.fixture(params=["libnasdet_cpu.so", "libnasdet_cuda.so", "_C"])
def library(request: pytest.FixtureRequest, unpacked: Path) -> Path:
    found = sorted((unpacked / "nasdet").glob(f"{request.param}*"))
    if not found:
        assert request.param == "libnasdet_cuda.so", f"the wheel has no {request.param}"
        pytest.skip("the wheel was built without nvcc")
    return found[0]


def test_needs_torch_by_one_name_and_the_system(library: Path) -> None:
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", output("readelf", "-d", str(library))))
    loaders = {name for name in needed if name.startswith("ld-linux")}
    torch = set() if library.name.startswith("_C") else {"libtorch.so"}
    assert needed >= torch
    assert needed - loaders <= SYSTEM | torch


def test_has_no_search_path(library: Path) -> None:
    assert not re.findall(r"\((?:RPATH|RUNPATH)\).*", output("readelf", "-d", str(library)))


def test_exports_nothing(library: Path) -> None:
    lines = output("nm", "-D", "--defined-only", str(library)).splitlines()
    names = {line.split()[-1].split("@")[0] for line in lines}
    assert names <= ({"PyInit__C"} if library.name.startswith("_C") else set())


def test_asks_torch_for_the_stable_interface_only(library: Path) -> None:
    lines = output("nm", "-D", "--undefined-only", str(library)).splitlines()
    names = {line.split()[-1].split("@")[0] for line in lines}
    foreign = {name for name in names if re.match(r"_ZN?K?(2at|3c10|5torch)", name)}
    assert not foreign


def test_tells_no_path_of_the_build(library: Path, repository: Path) -> None:
    content = library.read_bytes()
    words = [rb"/home/", rb"/root/", rb"/tmp/", rb"site-packages", rb"dist-packages", str(repository).encode() + b"/"]
    told = [text for text in re.findall(rb"[\x20-\x7e]{4,}", content) if any(word in text for word in words)]
    assert not told
