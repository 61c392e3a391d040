"""The examples of docs/your-detector.md run as they stand there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "your-detector.md"
TEXT = GUIDE.read_text(encoding="utf-8") if GUIDE.is_file() else ""
EXAMPLES = re.findall(r"^## ([^\n]+)\n\n(?:[^\n#`][^\n]*\n|\n)*```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.mark.skipif(not TEXT, reason="no docs beside these tests")
def test_there_are_five_examples() -> None:
    assert len(EXAMPLES) == TEXT.count("```python") == 5


@pytest.mark.parametrize(("title", "code"), EXAMPLES, ids=[title for title, _ in EXAMPLES])
def test_example_runs(title: str, code: str) -> None:
    if "torchvision" in title and importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    names: dict[str, Any] = {}
    exec(compile(code, f"{GUIDE.name}: {title}", "exec"), names)
    if "pooled" in names:
        assert tuple(names["pooled"].shape) == (2, 16, 7, 7)
    if "features" in names and "keep" in names:
        assert tuple(names["features"].shape) == (3, 64, 7, 7)
    if "card" in names:
        assert list(names["card"].genotype) == ["2"] and all(alpha.any() for alpha in names["alphas"])
        assert sum(p.numel() for p in names["net"].parameters()) == 3 * 32 * 9 + 32 + 32 * 64 * 9 + 64
    if "report" in names:
        assert names["report"].swapped == ("0",) and not names["report"].active
        assert tuple(names["y"].shape) == (1, 4, 40, 56)
    if "found" in names:
        assert set(names["found"]) == {"boxes", "labels", "scores"}
        assert "torchvision::nms [CPU]" in names["patch"].replaced and not names["patch"].active
