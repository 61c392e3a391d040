"""Sizes, names and habits that CONTRIBUTING.md promises."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

CPLUSPLUS = (".cpp", ".cu", ".cuh", ".h")
FILE_LINES = 400
FUNCTION_LINES = 60
# files beside the operators' own in kernels/ and csrc/: shared helpers, and the libraries' own entries
HELPERS = {"box_order", "build", "caches", "launch", "module", "results", "scratch", "storage", "tasks", "tuning"}
CONVOLUTIONS = ("conv", "dilation", "frequency", "winograd")  # behind both multi-dilation convolutions


def tracked(repository: Path) -> list[Path]:
    """The files that belong to the project: git's list, or in a tree without git everything that is not ignored."""
    command = ["git", "-C", str(repository), "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("the tests do not lie in a git checkout")
    return [repository / name for name in listing if name and (repository / name).is_file()]


def test_file_lengths(repository: Path) -> None:
    long = {
        str(path.relative_to(repository)): lines
        for path in tracked(repository)
        if path.suffix in (".py", *CPLUSPLUS) and (lines := len(path.read_text().splitlines())) > FILE_LINES
    }
    assert not long, f"split these: {long}"


def lines(node: Any) -> int:
    return int(node.end_lineno - node.lineno + 1)


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    return lines(function) - (lines(first) if documented else 0)


def test_function_lengths(sources: list[Any]) -> None:
    long = {
        f"{source.name}.{node.name}": length(node)
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and length(node) > FUNCTION_LINES
    }
    assert not long, f"split these: {long}"


def functions(text: str) -> Iterator[tuple[str, int]]:
    """Head and length of each C++ function, from its first line to its last brace; what is inside counts with it."""
    head, first, stack = "", 0, list[tuple[str, int] | None]()  # None: a namespace or a type, whose members count alone
    for number, line in enumerate(text.splitlines()):
        if line.startswith("#"):
            continue
        for part in re.split("([{};])", re.sub(r'"(\\.|[^"\\])*"|\'(\\.|[^\'\\])\'|//.*', "", line)):
            if part == "}":
                if (opened := stack.pop()) and not any(stack):
                    yield opened[0], number - opened[1] + 1
            elif part == "{":
                kind = re.search(r"\bnamespace\b|^[^(]*\b(struct|class|enum|extern)\b[^(]*$", head)
                stack.append(None if kind and not any(stack) else (head.strip(), first))
            elif part != ";" and part.strip():
                if not head:
                    first = number
                head += part + " "
                continue
            if part in ("{", "}", ";"):
                head = ""


def test_cplusplus_function_lengths(repository: Path) -> None:
    long = {
        f"{path.relative_to(repository)}: {head}": lines
        for path in tracked(repository)
        if path.suffix in CPLUSPLUS
        for head, lines in functions(path.read_text())
        if lines > FUNCTION_LINES
    }
    assert not long, f"split these: {long}"


def calls(source: Any, name: str) -> list[str]:
    """Where ``name`` is called: a plain function, or with a leading dot a method of anything."""
    return [
        f"{source.name}:{node.lineno}"
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and name in (f".{getattr(node.func, 'attr', '')}", getattr(node.func, "id", ""))
    ]


def test_only_the_command_line_prints(sources: list[Any]) -> None:
    wrong = [at for s in sources if not s.name.startswith("nasdet.cli") for at in calls(s, "print")]
    assert not wrong, wrong


def test_operators_never_wait_for_the_device(sources: list[Any]) -> None:
    parts = ("nasdet.ops", "nasdet.kernels", "nasdet._dispatch", "nasdet.nn")
    wrong = [at for s in sources if s.name.startswith(parts) for at in calls(s, ".item")]
    assert not wrong, wrong


def test_nothing_unsafe(sources: list[Any]) -> None:
    modules = {"marshal", "shelve", "dill", "cloudpickle", "joblib", "urllib", "requests", "socket", "http"}
    wrong = []
    for source in sources:
        wrong += [f"{source.name}:{line} {name}" for name, line, _ in source.imports() if name.split(".")[0] in modules]
        for node in ast.walk(source.tree):
            if isinstance(node, ast.Call) and _unsafe(ast.unparse(node.func), node):
                wrong.append(f"{source.name}:{node.lineno} {ast.unparse(node)[:60]}")
    assert not wrong, wrong


def _unsafe(called: str, node: ast.Call) -> bool:
    if called == "torch.load":
        options = {word.arg: ast.unparse(word.value) for word in node.keywords}
        return options.get("weights_only") != "True"
    banned = ("eval", "exec", "pickle.load", "pickle.loads", "pickle.Unpickler", "np.load", "numpy.load", "os.system")
    return called in banned or any(word.arg == "shell" for word in node.keywords)


def test_one_basename_per_operator(repository: Path) -> None:
    ops = {path.stem for path in (repository / "nasdet/ops").glob("*.py") if not path.stem.startswith("_")}
    layers = [
        *(repository / "kernels").glob("*.py"),
        *(repository / "csrc/cpu").iterdir(),
        *(repository / "csrc/cuda").iterdir(),
    ]
    orphans = []
    for path in layers:
        base = path.stem.removeprefix("_")
        helper = base in HELPERS or base.split("_")[0] in CONVOLUTIONS
        helper |= any(base.startswith(f"{op}_") and path.suffix in (".h", ".cuh") for op in ops)
        if path.is_file() and base not in ops and not helper:
            orphans.append(str(path.relative_to(repository)))
    assert not orphans, f"no nasdet/ops/<name>.py for {orphans}"


def test_public_names() -> None:
    import nasdet
    import nasdet.ops

    parts = ["arch", "compat", "data", "detectors", "engine", "measure", "nn", "ops", "report", "search", "spaces"]
    assert sorted(nasdet.__all__) == sorted(
        ["__version__", "accelerate", "decelerate", "release_scratch", "scratch_limit", "use_backend", *parts]
    )
    suppression = ["batched_nms", "box_iou", "generalized_box_iou", "nms", "nms_padded", "soft_nms"]
    others = ["mix", "multilevel_roi_align", "norm_act_mix", "roi_align", "sigmoid_focal_loss", "use_backend"]
    convolutions = ["depthwise_conv2d", "grouped_dilation_conv2d", "mixed_dilation_conv2d"]
    assert nasdet.ops.__all__ == sorted(suppression + others + convolutions)
    for name in nasdet.__all__:
        assert getattr(nasdet, name) is not None
    assert dir(nasdet) == sorted(nasdet.__all__)


def test_every_operator_is_public_and_documented() -> None:
    import nasdet.ops
    from nasdet._dispatch import OPS

    for name, op in OPS.items():
        assert name in nasdet.ops.__all__ and getattr(nasdet.ops, name) is op.call
        text = op.call.__doc__ or ""
        assert len(text) > 300 and "Args:" in text and "Returns:" in text and "Raises:" in text, name


@pytest.mark.parametrize(
    "part", ["ops", "arch", "compat", "data", "detectors", "measure", "search", "spaces", "engine", "report"]
)
def test_public_things_have_docstrings(part: str) -> None:
    module = importlib.import_module(f"nasdet.{part}")
    assert module.__doc__
    missing = [
        name
        for name in getattr(module, "__all__", ())
        if callable(value := getattr(module, name)) and not (value.__doc__ or "").strip()
    ]
    assert not missing, missing


def test_no_machine_paths(repository: Path) -> None:
    words = ("work", "tmp", "root", "opt", "mnt")  # spelt apart, or this file would name them itself
    path = re.compile(r"(?<![\w.\-/}])/(?:" + "|".join(words) + r"|home/\w+)/[\w.]")
    wrong = []
    for file in tracked(repository):
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        for number, line in enumerate(text.splitlines(), 1):
            if path.search(line):
                wrong.append(f"{file.relative_to(repository)}:{number}: {line.strip()[:80]}")
    assert not wrong, wrong


def test_no_loose_ends(repository: Path) -> None:
    words = re.compile(r"\b(TODO" + r"|FIXME" + r"|XXX|raise NotImplementedError)\b")
    wrong = [
        f"{file.relative_to(repository)}:{number}"
        for file in tracked(repository)
        if file.suffix in (".py", *CPLUSPLUS)
        for number, line in enumerate(file.read_text().splitlines(), 1)
        if words.search(line) and file != Path(__file__)
    ]
    assert not wrong, wrong
