"""The report's figures of Hit-Detector: scores, chosen operations, what screening kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nasdet.report import operations
from nasdet.report.read import Run, read_run

CARD: dict[str, Any] = {
    "method": "hit",
    "name": "net",
    "genotype": {"backbone": ["ir_k3_d1_e3", "sep_k5_d2", "conv_k3_d1"], "neck": ["a", "b"], "head": ["ir_k7_d1_e6"]},
    "settings": {"stages": [[8, 1, 2], [8, 2, 2]]},
}


def test_rows_of_a_card() -> None:
    assert operations.rows_of(CARD) == [
        ("backbone 1", ["ir_k3_d1_e3"]),
        ("backbone 2", ["sep_k5_d2", "conv_k3_d1"]),
        ("neck, top-down", ["a"]),
        ("neck, bottom-up", ["b"]),
        ("head", ["ir_k7_d1_e6"]),
    ]
    uncut = operations.rows_of({**CARD, "settings": {"stages": [[8, 5, 2]]}})
    assert uncut[0] == ("backbone", CARD["genotype"]["backbone"]), "settings that do not fit cut nothing"


@pytest.mark.parametrize(
    "card",
    [None, [], {"method": "fad", "genotype": {"box": ["a"]}}, {**CARD, "genotype": {"neck": [1]}}],
    ids=["none", "a-list", "another-method", "no-names"],
)
def test_other_cards_have_no_rows(card: Any) -> None:
    assert operations.rows_of(card) == []


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("ir_k3_d2_e6", "3e6:2"),
        ("ir_k7_d1_e1", "7e1"),
        ("sep_k5_d1", "s5"),
        ("conv_k3_d3", "c3:3"),
        ("<other>", "&lt;"),
    ],
)
def test_short_names(name: str, word: str) -> None:
    assert word in operations.operation_figure([("head", [name])])


def test_figure_names_every_layer() -> None:
    drawing = operations.operation_figure(operations.rows_of(CARD))
    assert drawing.count("<rect ") == 6 and "neck, top-down, block 1: a" in drawing and "conv_k3_d1 (1)" in drawing


def screened() -> dict[str, Any]:
    history = [
        {"epoch": 1, "scores": {"x": 0.5, "y": 0.3, "z": 0.2}, "removed": ["z"]},
        {"epoch": 2, "scores": {"x": 0.4, "y": 0.6}, "removed": []},
    ]
    return {"part": "neck", "history": history}


def test_scores_of_a_screening() -> None:
    pytest.importorskip("matplotlib", reason="charts are drawn with it")
    run = Run(Path(), "screen-neck", info={"epoch_ends": [10, 20]}, screening=screened())
    ((part, scores, gone),) = operations._parts(run)
    assert part == "neck" and scores["x"] == [(10, 0.5), (20, 0.4)] and gone == {"z": 10}
    page = operations.score_section(run)
    assert "Neck: scores of the operations" in page and "1 removed" in page and "y: 0.600 at last" in page
    assert "1 others" in page


def test_scores_of_a_joint_search_and_its_cost() -> None:
    pytest.importorskip("matplotlib", reason="charts are drawn with it")
    alphas = [{"step": step, "alphas": {"head": [[0.0, 0.0], [0.0, 0.1 * step]]}} for step in (0, 10)]
    metrics = [{"step": step, "expected_head": 2.0 - 0.1 * step} for step in (1, 10)]
    info = {"verb": "search hit", "choices": {"head": ["x", "y"]}}
    run = Run(Path(), "run", info=info, alphas=alphas, metrics=metrics)
    ((_, scores, gone),) = operations._parts(run)
    assert scores["x"][0] == (0, 0.5) and scores["y"][1][1] == pytest.approx((0.5 + 0.7310586) / 2) and not gone
    page = operations.score_section(run)
    assert "head: 1.9 to 1" in page and "Head: scores" in page


@pytest.mark.parametrize("record", [{}, {"history": [1, {"epoch": "a"}]}, {"kept": []}, {"kept": {"neck": 3}}])
def test_strange_records_draw_nothing(record: dict[str, Any]) -> None:
    assert operations.score_section(Run(Path(), "run", screening=record)) == ""


def test_kept_operations_by_part(tmp_path: Path) -> None:
    content = {"kept": {"neck": ["x", "y"], "head": ["y"]}, "parts": {}}
    (tmp_path / "screening.json").write_text(json.dumps(content))
    (tmp_path / "run.json").write_text(json.dumps({"verb": "search hit"}))
    shown = operations.kept_table(read_run(tmp_path).screening)
    assert shown.count("●") == 3 and '<th scope="col">head</th>' in shown
