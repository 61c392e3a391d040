"""The page of a run with masks: their precision in its own section and curve; none for a run without."""

from __future__ import annotations

from typing import Any

import pytest

from nasdet.report.curves import curve_section
from nasdet.report.page import _run_sections
from nasdet.report.read import Run


def sections(evaluated: dict[str, Any], tmp_path: Any) -> dict[str, str]:
    run = Run(path=tmp_path, name="run")
    run.eval = evaluated
    return {anchor: html for anchor, _, html in _run_sections(run, 0, {})}


def test_masks_have_a_section_of_their_own(tmp_path: Any) -> None:
    boxes = {"AP": 0.5, "AP50": 0.75, "per_category": {"cat": 0.5}}
    with_masks = sections({**boxes, "masks": {"AP": 0.25, "per_category": {"cat": 0.25}}}, tmp_path)
    assert "25.0" in with_masks["masks"] and "50.0" not in with_masks["masks"]
    assert with_masks["categories"] == sections(boxes, tmp_path)["categories"]
    assert "masks" not in sections(boxes, tmp_path) and "masks" not in sections({**boxes, "masks": 3}, tmp_path)


@pytest.mark.parametrize("key", ["mask_AP", "mask_AP50"])
def test_their_curve_is_one_of_precisions(key: str) -> None:
    pytest.importorskip("matplotlib")
    rows = [{"step": step, "AP": 0.1 * step, key: 0.05 * step} for step in (1, 2, 3)]
    html = curve_section(rows)
    assert html.count("Average precision</b>") == 1 and "Terms of the loss" not in html and key in html
