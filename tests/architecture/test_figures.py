"""The figures of docs/ are what their scripts draw, and say what is so."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest
import torch


@pytest.fixture(scope="module")
def taps(repository: Path) -> ModuleType:
    script = repository / "docs" / "images" / "taps.py"
    if not script.is_file():
        pytest.skip("no docs beside these tests")
    spec = importlib.util.spec_from_file_location("taps", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_union_is_33_of_45_and_57_of_81(taps: ModuleType) -> None:
    from nasdet.spaces.nats import SETS

    assert (taps.STAGE_3, taps.STAGE_5) == (SETS["C"][3], SETS["C"][5])
    for dilations, apart, together in ((taps.STAGE_3, 45, 33), (taps.STAGE_5, 81, 57)):
        found = taps.union(dilations)
        assert sum(map(len, found.values())) == apart and len(found) == together
        assert len(found[0, 0]) == len(dilations), "all of them read the centre"


def test_the_figure_is_what_the_script_draws(taps: ModuleType) -> None:
    stored = taps.SVG.read_text(encoding="utf-8")
    assert stored == taps.draw(), "run python docs/images/taps.py"
    tree = ElementTree.fromstring(stored)
    filled = [node for node in tree.iter("{http://www.w3.org/2000/svg}rect") if node.get("fill", "#fff") != "#fff"]
    assert len(filled) == 45 + 45, "nine of each kernel, and the same again in the union"


def test_the_example_of_the_page_runs(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = repository / "docs" / "multi_dilation_conv.md"
    if not page.is_file():
        pytest.skip("no docs beside these tests")
    text = page.read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(compile(code, page.name, "exec"), names)
    assert capsys.readouterr().out.count("torch.Size([1, 64, 40, 56])") == 2
    torch.testing.assert_close(names["same"](names["x"]), names["conv"](names["x"]), rtol=1e-4, atol=1e-5)
    assert names["derived"].weight is names["conv"].weight
    assert text.count("<!-- benchmarks:begin -->") == text.count("<!-- benchmarks:end -->") == 1
