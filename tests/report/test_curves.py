from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nasdet.report import alphas, curves, markup, write_report
from nasdet.report.graph import find_cells
from nasdet.report.read import number, read_lines


def test_softmax_and_entropy() -> None:
    shares = alphas.softmax([1000.0, 1000.0, 0.0])
    assert shares == pytest.approx([0.5, 0.5, 0.0]) and sum(alphas.softmax([-1e4, 3.0, 2.5])) == pytest.approx(1)
    assert alphas.entropy([0.25] * 4) == pytest.approx(1) and alphas.entropy([1.0, 0.0]) == 0
    assert alphas.entropy([1.0]) == 0 and 0 < alphas.entropy([0.9, 0.1]) < 1


def test_histories_keep_what_fits_the_last_record() -> None:
    good = [[0.0, 1.0], [2.0, 0.0]]
    records = [
        {"step": 0, "alphas": {"box": [[0.0, 1.0]]}},
        {"step": 3, "alphas": {"box": good}},
        {"step": 1, "alphas": {"box": good, "cls": []}},
        {"step": 2, "alphas": {"box": [[0.0, math.nan], [0.0, 0.0]]}},
        {"step": 2, "alphas": {"box": [[0.0], [0.0, 1.0]]}},
        {"step": math.nan, "alphas": {"box": good}},
        {"step": 2, "alphas": {"box": "text"}},
    ]
    found = alphas.histories(records)
    assert list(found) == ["box"] and [step for step, _ in found["box"]] == [1, 3]
    assert all(sum(row) == pytest.approx(1) for _, matrix in found["box"] for row in matrix)


@pytest.mark.parametrize(("edges", "last"), [(2, (1, 2)), (5, (2, 3)), (9, (3, 4)), (14, (4, 5))])
def test_edge_ends(edges: int, last: tuple[int, int]) -> None:
    ends = alphas.edge_ends(edges)
    assert len(ends) == edges and ends[-1] == last
    assert alphas.edge_ends(edges + 1) == []


def test_kept_edges_are_ringed(search: Path, parse: Any) -> None:
    page = parse(write_report(search).read_text())
    ringed = [span for span in page.all("span") if "kept" in (span.get("class") or "").split()]
    assert len(ringed) == 12
    card = json.loads((search / "card.json").read_text())
    names = [*json.loads((search / "run.json").read_text())["choices"]]
    assert len(alphas.kept(find_cells(card)["box"], 9, names)) == 6
    assert alphas.kept(find_cells(card)["box"], 8, names) == set() and alphas.kept(None, 9, names) == set()


def test_alphas_without_names_of_the_choices(tmp_path: Path, fake: SimpleNamespace, parse: Any) -> None:
    fake.write(tmp_path / "run.json", {"verb": "search fad", "choices": ["one", "two"]})
    fake.write_lines(tmp_path / "alphas.jsonl", fake.make_alphas(100, 100)[:1])
    page = parse(write_report(tmp_path).read_text())
    assert "choice 12" in page.text and "entropy" not in page.text


@pytest.mark.parametrize("choices", [["a"], ["a", "none"]], ids=["without none", "with none"])
def test_names_of_the_choices(choices: list[str], tmp_path: Path, fake: SimpleNamespace, parse: Any) -> None:
    fake.write(tmp_path / "run.json", {"verb": "search fad", "choices": choices})
    fake.write_lines(tmp_path / "alphas.jsonl", [{"step": 0, "alphas": {"mask": [[0.0, 1.0], [1.0, 0.0]]}}])
    page = parse(write_report(tmp_path).read_text())
    assert "0→2 1→2 a 27 73 none 73 27" in page.text


def test_series_takes_the_later_of_two() -> None:
    rows = [
        {"step": 2, "loss": 1.0},
        {"step": 1, "loss": 3},
        {"step": 2, "loss": 5.0},
        {"step": 3, "loss": None},
        {"loss": 1},
    ]
    assert curves.series(rows, "loss") == [(1, 3), (2, 5)]


@pytest.mark.parametrize("sign", [1, -1], ids=["logarithmic", "linear"])
def test_smoothing_stays_inside_and_keeps_constants(sign: int) -> None:
    points = [(float(i), sign * (2.0 + math.sin(7 * i))) for i in range(400)]
    smoothed = curves.smooth(points)
    values = [value for _, value in points]
    assert all(min(values) <= value <= max(values) for _, value in smoothed)
    rough = sum(abs(b[1] - a[1]) for a, b in zip(points, points[1:], strict=False))
    assert sum(abs(b[1] - a[1]) for a, b in zip(smoothed, smoothed[1:], strict=False)) < 0.3 * rough
    assert [v for _, v in curves.smooth([(0, 0.3), (1, 0.3), (2, 0.3)])] == pytest.approx([0.3] * 3)


@pytest.mark.parametrize("count", [0, 1, 239, 240, 241, 5000])
def test_thinning_keeps_the_ends(count: int) -> None:
    points = [(float(i), float(i % 17)) for i in range(count)]
    thin = curves.thin(points)
    assert len(thin) == min(count, 240) and thin[:1] == points[:1] and thin[-1:] == points[-1:]
    assert [p[0] for p in thin] == sorted(p[0] for p in thin)


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1, "loss": 0.5}],
        [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.5}],
        [{"step": i, "loss": 0.0} for i in range(9)],
        [{"step": i, "loss": 10.0 ** (i - 150)} for i in range(300)],
        [{"step": i, "loss": -1.0, "AP": -1.0} for i in range(9)],
        [{"step": 10**9, "AP": 0.0, "lr": 0.0}],
    ],
    ids=["one", "constant", "zero", "huge range", "negative", "far"],
)
def test_odd_curves_are_drawn(rows: list[dict[str, Any]], tmp_path: Path, fake: SimpleNamespace, parse: Any) -> None:
    fake.write_lines(tmp_path / "metrics.jsonl", rows)
    source = write_report(tmp_path).read_text()
    assert parse(source).all("svg") and "nan" not in source.lower()


def test_no_curves_for_words_only(tmp_path: Path, fake: SimpleNamespace, parse: Any) -> None:
    fake.write_lines(tmp_path / "metrics.jsonl", [{"step": 1, "note": "x", "flag": True, "grad_norm": 1.0}])
    assert parse(write_report(tmp_path).read_text()).all("svg") == []


def test_lines_of_a_file(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "none.jsonl") == []
    (tmp_path / "a.jsonl").write_bytes(b'{"step": 1}\n\n3\n{"step": 2}\r\n{"st')
    assert read_lines(tmp_path / "a.jsonl") == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("value", [None, True, "3", math.nan, -math.inf, 10**400, [1]], ids=str)
def test_no_number(value: Any) -> None:
    assert number(value) is None
    for show in (markup.amount, markup.memory, markup.duration, markup.percent):
        assert show(value) == "–"


@pytest.mark.parametrize(
    ("shown", "wanted"),
    [
        (markup.amount(4_169_498), "4.17 M"),
        (markup.amount(88.4e9), "88.4 G"),
        (markup.amount(12), "12"),
        (markup.duration(0.0123), "12.3 ms"),
        (markup.duration(119.6), "120 s"),
        (markup.duration(3599.7), "1 h 0 min"),
        (markup.memory(3 * 2**30), "3.00 GiB"),
        (markup.percent(0.4032), "40.3"),
        (markup.percent(-1), "–"),
        (markup.signed(-0.04), "±0.0"),
        (markup.signed(-1.26), "−1.3"),
        (markup.text("<a href=\"x\" b='y'>&"), "&lt;a href=&quot;x&quot; b=&#x27;y&#x27;&gt;&amp;"),
    ],
)
def test_numbers_in_words(shown: str, wanted: str) -> None:
    assert shown == wanted
