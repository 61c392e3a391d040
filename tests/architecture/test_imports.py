"""Who may import whom: the table of docs/architecture.md, held by parsing every import, lazy ones included."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from typing import Any

import pytest

PRIVATE = {"_checks", "_files", "_version"}  # everything may import these
PARTS = {"spaces", "search", "data", "arch", "measure"}

# part -> the parts it may import, besides itself and PRIVATE
MAY: dict[str, set[str]] = {
    "": {"_dispatch", *PARTS, "compat", "nn", "ops", "detectors", "engine", "report"},  # nasdet/__init__.py, lazily
    "__main__": {"cli"},
    "_checks": set(),
    "_files": set(),
    "_version": set(),
    "_library": set(),
    "_cases": set(),
    "_dispatch": {"_library", "_cases"},
    "testing": {"_cases", "_dispatch"},
    "kernels": set(),
    "ops": {"_dispatch", "_library", "_cases", "kernels"},
    "nn": {"ops"},
    "compat": {"nn", "ops", "_library"},
    "detectors": {"nn", "ops", "_C"},
    "arch": set(),
    "data": set(),
    "measure": {"nn", "ops"},
    "report": {"arch", "data", "measure"},
    "search": {"arch"},
    "spaces": {"arch", "detectors", "nn", "ops"},
    "engine": {*PARTS, "detectors", "nn"},
    "cli": {*PARTS, "report", "engine", "detectors", "nn", "ops", "_dispatch", "_library", "_C"},
}
# part or module -> what it must not import in any way
NO_TORCH = (
    "nasdet.arch",
    "nasdet.search.random",
    "nasdet.search.evolution",
    "nasdet.search.constraints",
    "nasdet.spaces.detnas.costs",
    "nasdet.spaces.detnas.genotype",
    "nasdet.spaces.hit.costs",
    "nasdet.spaces.hit.genotype",
    "nasdet.spaces.msnas.costs",
    "nasdet.spaces.msnas.genotype",
    "nasdet.spaces.msnas.sampling",
    "nasdet.spaces.msnas.variation",
    "nasdet.measure.tau",
    "nasdet.measure.latency_table",
    "nasdet._files",
    "nasdet._version",
    "nasdet.cli.__init__",
)
LAZY_ONLY = {"triton", "matplotlib", "tensorboard", "sklearn", "PIL", "pycocotools", "faster_coco_eval", "safetensors"}
KERNELS_MAY = {"torch", "triton", "__future__", "nasdet"} | set(sys.stdlib_module_names)


def part_of(name: str) -> str:
    words = name.split(".")
    return words[1] if len(words) > 1 else ""


def test_the_table_knows_every_part(sources: list[Any]) -> None:
    assert {part_of(source.name) for source in sources} <= set(MAY)


def upward(source: Any) -> list[str]:
    """The imports of a source that the table forbids. A name like ``nasdet.__version__`` is no part."""
    own = part_of(source.name)
    return [
        f"{source.name}:{line} imports {name}"
        for name, line, _ in source.imports()
        if name.startswith("nasdet.") and part_of(name) in {*MAY, "_C"} - {""}
        if part_of(name) not in MAY[own] | PRIVATE | {own}
    ]


def test_import_direction(sources: list[Any]) -> None:
    wrong = [line for source in sources for line in upward(source)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("name", "code", "found"),
    [
        ("nasdet.data.x", "from nasdet.engine import loop", ["nasdet.data.x:1 imports nasdet.engine.loop"]),
        ("nasdet.data.x", "from nasdet import engine", ["nasdet.data.x:1 imports nasdet.engine"]),
        ("nasdet.data.x", "def f():\n    import nasdet.spaces.fad", ["nasdet.data.x:2 imports nasdet.spaces.fad"]),
        ("nasdet.data.x", "from ..detectors import fcos", ["nasdet.data.x:1 imports nasdet.detectors.fcos"]),
        ("nasdet.data.x", "from .base import Item\nfrom nasdet import _files, __version__", []),
        ("nasdet.ops.mix", "from nasdet.nn import GroupNormRelu", ["nasdet.ops.mix:1 imports nasdet.nn.GroupNormRelu"]),
    ],
)
def test_a_planted_import_is_found(name: str, code: str, found: list[str], parse: Any) -> None:
    path = Path(*name.split(".")).with_suffix(".py")
    assert upward(parse(name, path, code, ast.parse(code))) == found


def test_a_planted_heavy_import_is_seen_as_eager_or_lazy(parse: Any) -> None:
    code = "import PIL\nif TYPE_CHECKING:\n    import sklearn\ndef f():\n    from matplotlib import pyplot"
    imports = parse("nasdet.data.x", Path("nasdet/data/x.py"), code, ast.parse(code)).imports()
    assert [(name, eager) for name, _, eager in imports] == [
        ("PIL", True),
        ("sklearn", False),
        ("matplotlib.pyplot", False),
    ]


def test_the_table_has_no_circle() -> None:
    done: list[str] = []
    while len(done) < len(MAY):
        ready = [part for part, below in MAY.items() if part not in done and below - {"_C", "nn"} <= set(done)]
        ready += ["nn"] if "nn" not in done and "ops" in done else []
        assert ready, f"a circle among {sorted(set(MAY) - set(done))}"
        done += [part for part in ready if part not in done]


def test_nobody_imports_tests_or_benchmarks(sources: list[Any]) -> None:
    wrong = [
        f"{source.name}:{line}"
        for source in sources
        for name, line, _ in source.imports()
        if name.split(".")[0] in ("tests", "benchmarks", "pytest")
    ]
    assert not wrong


def test_plain_data_parts_import_no_torch(sources: list[Any]) -> None:
    wrong = [
        f"{source.name}:{line} imports {name}"
        for source in sources
        if source.name.startswith(NO_TORCH)
        for name, line, _ in source.imports()
        if name.split(".")[0] == "torch"
    ]
    assert not wrong, wrong


def test_heavy_packages_are_imported_where_they_are_used(sources: list[Any]) -> None:
    wrong = [
        f"{source.name}:{line} imports {name}"
        for source in sources
        if part_of(source.name) not in ("kernels", "report")
        for name, line, eager in source.imports()
        if eager and name.split(".")[0] in LAZY_ONLY
    ]
    assert not wrong, wrong


def test_kernels_know_torch_and_triton_only(sources: list[Any]) -> None:
    wrong = []
    for source in sources:
        if part_of(source.name) == "kernels":
            for name, line, _ in source.imports():
                outside = name.split(".")[0] not in KERNELS_MAY or name.startswith("nasdet.")
                if outside and not name.startswith("nasdet.kernels"):
                    wrong.append(f"{source.name}:{line} imports {name}")
    assert not wrong, wrong


@pytest.mark.parametrize("path", ["csrc/cpu", "csrc/cuda", "csrc/include"])
def test_kernel_files_use_the_stable_abi_only(path: str, repository: Any) -> None:
    wrong = []
    for file in sorted((repository / path).rglob("*")):
        if file.suffix not in (".cpp", ".cu", ".cuh", ".h"):
            continue
        for number, line in enumerate(file.read_text().splitlines(), 1):
            header = line.removeprefix("#include ").strip('<>" ') if line.startswith("#include") else ""
            outside = header.startswith(("ATen", "c10", "torch")) and not header.startswith(
                ("torch/csrc/stable/", "torch/headeronly/", "torch/csrc/inductor/aoti_torch/c/")
            )
            if outside:
                wrong.append(f"{file.relative_to(repository)}:{number}: {header}")
    assert not wrong, wrong
