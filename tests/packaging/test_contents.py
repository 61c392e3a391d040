"""What is in the sdist and in the wheel made from it: everything, and nothing else."""

from __future__ import annotations

import re
import zipfile
from email import message_from_string
from pathlib import Path


def tree(repository: Path, folder: str, *endings: str) -> set[str]:
    """Files of the source tree below ``folder``; a leading underscore or any other name is no reason to be left out."""
    files = (path for path in (repository / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {str(path.relative_to(repository)) for path in files if path.suffix in endings}


def test_sdist_holds_all_sources(sdist_files: set[str], repository: Path) -> None:
    code = tree(repository, "csrc", ".cpp", ".cu", ".cuh", ".h", ".map") | tree(repository, "kernels", ".py")
    package = tree(repository, "nasdet", ".py", ".json")
    assert len(code) > 10 and len(package) > 40
    missing = (code | package) - sdist_files
    assert not missing
    assert {"setup.py", "CMakeLists.txt", "pyproject.toml", "LICENSE", "README.md", "constraints.txt"} <= sdist_files
    assert not {name for name in sdist_files if name.endswith((".so", ".pyc", ".o"))}


def test_wheel_holds_every_module(wheel_files: set[str], repository: Path) -> None:
    kernels = {f"nasdet/{name}" for name in tree(repository, "kernels", ".py")}
    assert kernels, "no Triton kernel in the source tree?"
    expected = tree(repository, "nasdet", ".py", ".json") | kernels
    assert not expected - wheel_files
    packaged = {name for name in wheel_files if name.endswith((".py", ".json")) and ".dist-info/" not in name}
    assert not packaged - expected


def test_wheel_holds_libraries_and_nothing_foreign(wheel_files: set[str]) -> None:
    binaries = {name for name in wheel_files if name.endswith(".so")}
    module = {name for name in binaries if re.fullmatch(r"nasdet/_C\.cpython-3\d+-.*\.so", name)}
    assert len(module) == 1
    assert "nasdet/libnasdet_cpu.so" in binaries
    assert binaries - module <= {"nasdet/libnasdet_cpu.so", "nasdet/libnasdet_cuda.so"}
    assert {name.split("/")[0] for name in wheel_files if ".dist-info/" not in name} == {"nasdet"}
    assert not {name for name in wheel_files if re.search(r"(^|/)(tests?|benchmarks|csrc|docs)/", name)}


def test_metadata(wheel: Path, wheel_files: set[str]) -> None:
    (name,) = (name for name in wheel_files if name.endswith(".dist-info/METADATA"))
    metadata = message_from_string(zipfile.ZipFile(wheel).read(name).decode())
    assert metadata["Name"] == "nasdet" and metadata["Requires-Python"] == ">=3.10"
    assert metadata["License-Expression"] == "Apache-2.0"
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(re.split(r"[ >=]", line)[0] for line in required) == ["numpy", "torch"]
    assert {"detect", "fast", "triton", "test"} <= set(metadata.get_all("Provides-Extra", []))
    (licence,) = (name for name in wheel_files if name.endswith("/LICENSE"))
    assert b"Apache License" in zipfile.ZipFile(wheel).read(licence)
    (points,) = (name for name in wheel_files if name.endswith("entry_points.txt"))
    assert "nasdet = nasdet.cli:main" in zipfile.ZipFile(wheel).read(points).decode()


def test_wheel_is_for_one_python(wheel: Path) -> None:
    assert re.fullmatch(r"nasdet-[\d.]+-cp3\d+-cp3\d+-linux_\w+\.whl", wheel.name), wheel.name
