"""The source tree as parsed modules, for rules that are held by reading it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Source:
    """One Python file: its dotted name, its text, and its syntax tree."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    def imports(self) -> Iterator[tuple[str, int, bool]]:
        """Every import: what by its full dotted name, the line, and whether it happens when the file is imported."""
        lazy = {
            id(inner)
            for outer in ast.walk(self.tree)
            if isinstance(outer, (ast.FunctionDef, ast.AsyncFunctionDef)) or _for_types_only(outer)
            for inner in ast.walk(outer)
        }
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                inside = self.name.split(".") + (["__init__"] if self.path.name == "__init__.py" else [])
                package = inside[: len(inside) - node.level] if node.level else []
                base = ".".join([*package, *([node.module] if node.module else [])])
                # The name may be a module, as in `from nasdet import ops`.
                names = [f"{base}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                yield name, node.lineno, id(node) not in lazy


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@pytest.fixture(scope="session")
def parse() -> type[Source]:
    """``Source``, for planted code."""
    return Source


@pytest.fixture(scope="session")
def sources(repository: Path) -> list[Source]:
    """The library: nasdet/ and kernels/, the latter under its installed name."""
    found = []
    for folder in ("nasdet", "kernels"):
        for path in sorted((repository / folder).rglob("*.py")):
            parts = path.relative_to(repository).with_suffix("").parts
            name = ".".join(part for part in parts if part != "__init__")
            name = f"nasdet.{name}" if folder == "kernels" else name
            text = path.read_text(encoding="utf-8")
            found.append(Source(name, path, text, ast.parse(text, str(path))))
    assert len(found) > 30
    return found
