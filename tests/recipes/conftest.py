"""Recipes are followed on a copy of the package, as docs/adding.md spells them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import nasdet

PACKAGE = Path(nasdet.__file__).parent
EXAMPLES = Path(__file__).parent / "examples"


class Tree:
    """A copy of the package, to add files and lines to. Each step must stand in docs/adding.md."""

    def __init__(self, folder: Path, repository: Path) -> None:
        self.folder, self.repository = folder, repository
        self.recipes = (repository / "docs/adding.md").read_text(encoding="utf-8")
        shutil.copytree(PACKAGE, folder / "nasdet", ignore=shutil.ignore_patterns("__pycache__"))
        if not (PACKAGE / "kernels/mix.py").is_file():  # a source tree has them beside the package
            shutil.copytree(repository / "kernels", folder / "nasdet/kernels", dirs_exist_ok=True)

    def add(self, example: str, path: str) -> None:
        """Put a file of ``examples`` where the recipe says."""
        assert f"`{path}`" in self.recipes and f"tests/recipes/examples/{example}" in self.recipes
        inside = f"nasdet/{path}" if path.startswith("kernels/") else path
        shutil.copy(EXAMPLES / example, self.folder / inside)

    def edit(self, path: str, before: str, after: str) -> None:
        """Change one place of a file, as the recipe says."""
        assert f"`{path}`" in self.recipes and after in self.recipes, f"docs/adding.md does not say: {after}"
        self._replace(path, before, after)

    def insert(self, path: str, after: str, line: str) -> None:
        """Add a line to a file, as the recipe says."""
        assert f"`{line.strip()}`" in self.recipes, f"docs/adding.md does not say: {line}"
        self._replace(path, f"{after}\n", f"{after}\n{line}\n")

    def _replace(self, path: str, before: str, after: str) -> None:
        file = self.folder / path
        text = file.read_text(encoding="utf-8")
        assert text.count(before) == 1, f"{path} has {before!r} {text.count(before)} times"
        file.write_text(text.replace(before, after), encoding="utf-8")

    def run(self, *arguments: str, **environment: str) -> str:
        """``python arguments`` with this tree; its standard output."""
        result = subprocess.run(
            [sys.executable, *arguments],
            cwd=self.folder,
            env={**os.environ, "PYTHONPATH": str(self.folder), "OMP_NUM_THREADS": "1", **environment},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    def check(self, name: str, **environment: str) -> str:
        """Run ``examples/check_<name>.py``: what the recipe promises, asserted where the added part can be imported."""
        return self.run(str(EXAMPLES / f"check_{name}.py"), **environment)


@pytest.fixture
def tree(tmp_path: Path, repository: Path) -> Tree:
    return Tree(tmp_path, repository)
