"""Drives CMakeLists.txt, the one description of the build.

Environment: NASDET_TORCH_INCLUDE (PyTorch's include folder), NASDET_CUDA=auto|1|0, NASDET_CUDA_ARCHS,
NASDET_PYBIND=1|0, NASDET_SANITIZE=0|1|avx2, NASDET_BUILD_DIR (where CMake works; a second build there compiles only
what changed), MAX_JOBS, CMAKE_ARGS.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SANITIZE = {"": "OFF", "0": "OFF", "1": "ON", "avx2": "avx2"}
WITH_PYBIND = os.environ.get("NASDET_PYBIND", "1") != "0"


def torch_include() -> str:
    """The folder of PyTorch's headers, found without importing torch: under pip's isolation it is not importable."""
    candidates = [os.environ.get("NASDET_TORCH_INCLUDE")]
    spec = importlib.util.find_spec("torch")
    if spec and spec.submodule_search_locations:
        candidates.append(str(Path(spec.submodule_search_locations[0]) / "include"))
    candidates += [str(Path(sysconfig.get_path(key)) / "torch" / "include") for key in ("purelib", "platlib")]
    tried = [folder for folder in dict.fromkeys(candidates) if folder]
    for folder in tried:
        if (Path(folder) / "torch/csrc/stable/library.h").is_file():
            return folder
    raise SystemExit(
        "nasdet needs the headers of PyTorch >= 2.10. Install torch first, or set NASDET_TORCH_INCLUDE. Tried: "
        + ", ".join(tried)
    )


def sanitize() -> str:
    """CMake's name for what NASDET_SANITIZE asks for."""
    value = os.environ.get("NASDET_SANITIZE", "")
    if value not in SANITIZE:
        raise SystemExit(f"NASDET_SANITIZE must be 0, 1 or avx2, got {value!r}")
    return SANITIZE[value]


class Library(Extension):
    """A file that CMake builds. A ``lib*`` one is no Python module and keeps its plain name."""

    def __init__(self, name: str, optional: bool = False):
        super().__init__(name, sources=[], optional=optional)


class CMakeBuild(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        if fullname.rpartition(".")[2].startswith("lib"):
            return os.path.join(*fullname.split(".")) + ".so"
        return super().get_ext_filename(fullname)

    def cmake(self, folder: Path, installed: Path) -> None:
        arguments = [
            f"-DNASDET_VERSION={self.distribution.get_version()}",
            f"-DNASDET_TORCH_INCLUDE={torch_include()}",
            f"-DCMAKE_INSTALL_PREFIX={installed}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DNASDET_CUDA={os.environ.get('NASDET_CUDA', 'auto')}",
            f"-DNASDET_PYBIND={'ON' if WITH_PYBIND else 'OFF'}",
            f"-DNASDET_SANITIZE={sanitize()}",
        ]
        if archs := os.environ.get("NASDET_CUDA_ARCHS"):
            arguments.append(f"-DNASDET_CUDA_ARCHS={archs}")
        if WITH_PYBIND:
            import pybind11

            arguments.append(f"-Dpybind11_DIR={pybind11.get_cmake_dir()}")
        if ninja := shutil.which("ninja"):
            # An isolated build's ninja lies in a temporary folder, which the path in CMake's cache would outlive.
            arguments += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        arguments += os.environ.get("CMAKE_ARGS", "").split()
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count()))
        for command in (
            ["cmake", "-S", str(ROOT), "-B", str(folder), *arguments],
            ["cmake", "--build", str(folder), "-j", jobs],
            ["cmake", "--install", str(folder)],
        ):
            subprocess.run(command, check=True)

    def build_extensions(self) -> None:
        work = Path(os.environ.get("NASDET_BUILD_DIR") or self.build_temp).resolve()
        installed = work / "installed"
        shutil.rmtree(installed, ignore_errors=True)
        self.cmake(work / "cmake", installed)
        built = []
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            source = installed / target.name
            if source.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target)
                built.append(extension)
            elif not extension.optional:
                there = sorted(path.name for path in installed.iterdir())
                raise SystemExit(f"CMake did not build {source.name}; it built {there}")
        self.extensions = built


class CleanBuild(build):
    """Without it the wheel of a second build would hold what an earlier one left: a library, a module that is gone."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class PlatformWheel(bdist_wheel):
    """The libraries know nothing of Python: without the pybind11 module one wheel serves every version."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if WITH_PYBIND else ("py3", "none", platform)


def package_names() -> list[str]:
    """Every package by name: kernels/ lies outside nasdet/, so an implicit list would lose it."""
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "nasdet").rglob("__init__.py")}
    inside = {".".join(folder.parts) for folder in folders}
    return sorted(inside | {"nasdet.kernels"})


extensions = [Library("nasdet.libnasdet_cpu"), Library("nasdet.libnasdet_cuda", optional=True)]
if WITH_PYBIND:
    extensions.append(Library("nasdet._C"))

setup(
    packages=package_names(),
    package_dir={"nasdet.kernels": "kernels"},
    package_data={"nasdet.arch": ["published/*.json"]},
    ext_modules=extensions,
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
