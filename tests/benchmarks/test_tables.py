"""From pytest-benchmark's JSON to result files to the README's tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

record = pytest.importorskip("record", reason="no benchmarks beside these tests")
tables = pytest.importorskip("tables", reason="no benchmarks beside these tests")

README = f"# Title\n\nBefore.\n\n{tables.BEGIN}\n{tables.END}\n\nAfter.\n"
ENVIRONMENT = {
    "machine": "some-cpu-avx2",
    "cpu": "Some CPU",
    "isa": "avx2",
    "device": "cpu",
    "threads": 1,
    "torch": "2.13.0",
    "commit": "0123456789",
    "peaks": {"copy_bytes_per_s": 1e10, "fma_flops_per_s": 5e10},
}


def row(contestant: str, seconds: float, case: str = "fpn-p3", **more: Any) -> dict[str, Any]:
    return {
        "bench": "mix",
        "case": case,
        "dtype": "fp32",
        "phase": "forward",
        "contestant": contestant,
        "median_s": seconds,
        "iqr_s": seconds / 9,
        "copy_share": 0.875,
        "peak_memory": {"forward": 12_000_000, "forward, resident": 30_000_000},
        "speedup_over": {"eager": 4.0} if contestant == "nasdet" else {"nasdet": 0.25},
        "targets": [],
        "environment": ENVIRONMENT,
    } | more


def target(ratio: float, met: bool) -> dict[str, Any]:
    return {"quantity": "time", "over": "eager", "at_least": 3.0, "ratio": ratio, "met": met}


def document(path: Path, *rows: dict[str, Any]) -> Path:
    benchmarks = [{"name": "x", "stats": {"data": [0.1]}, "extra_info": item} for item in rows]
    machine = {"node": "a-host-name"}
    path.write_text(json.dumps({"machine_info": machine, "datetime": "2026-01-02T03:04:05", "benchmarks": benchmarks}))
    return path


@pytest.fixture
def results(tmp_path: Path) -> Path:
    rows = row("eager", 0.0421), row("nasdet", 0.0105, targets=[target(4.0, True), target(2.5, False)])
    record.record(document(tmp_path / "run.json", *rows), tmp_path / "results")
    return tmp_path / "results"


def test_results_hold_rows_and_no_host(results: Path) -> None:
    path = results / "some-cpu-avx2" / "mix.json"
    content = json.loads(path.read_text())
    assert [item["contestant"] for item in content["rows"]] == ["eager", "nasdet"]
    assert content["rows"][1]["environment"] == ENVIRONMENT
    assert "a-host-name" not in path.read_text()
    assert str(results.parent) not in path.read_text()


def test_a_race_run_again_replaces_its_rows_only(results: Path, tmp_path: Path) -> None:
    again = document(tmp_path / "again.json", row("nasdet", 0.02), row("nasdet", 0.03, case="fpn-p4"))
    record.record(again, results)
    rows = json.loads((results / "some-cpu-avx2" / "mix.json").read_text())["rows"]
    assert [(item["case"], item["contestant"], item["median_s"]) for item in rows] == [
        ("fpn-p3", "nasdet", 0.02),
        ("fpn-p4", "nasdet", 0.03),
    ]


def test_tables_show_times_ratios_memory_and_promises(results: Path) -> None:
    text = tables.render(results)
    assert "| 2x96x100x152 fp32, forward | 10.5 ms | 42.1 ms (4.00x) | 88 % |" in text
    assert "| 2x96x100x152 fp32, forward | 12 MB | 12 MB |" in text
    assert "resident | 30 MB" not in text
    assert "Promises: 1 of 2 met" in text
    assert "2.50x faster than eager; promised 3x: **missed**" in text


def test_writing_twice_changes_nothing_and_keeps_the_rest(results: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text(README)
    page = tmp_path / "docs" / "benchmarks.md"
    options = ["--results", str(results), "--readme", str(readme), "--page", str(page)]
    assert tables.main([*options, "--check"]) == 1
    assert readme.read_text() == README
    assert tables.main(options) == 0
    once = readme.read_text()
    assert once.startswith("# Title\n\nBefore.\n") and once.endswith(f"{tables.END}\n\nAfter.\n")
    assert tables.main(options) == 0
    assert readme.read_text() == once
    assert tables.main([*options, "--check"]) == 0
    assert "10.5 ms | 4.0x faster |" in once and "Promises: 1 of 2 met" in page.read_text()
    readme.write_text(once.replace("10.5 ms", "1.5 ms"))
    assert tables.main([*options, "--check"]) == 1
    readme.write_text(once)
    page.write_text("old")
    assert tables.main([*options, "--check"]) == 1


@pytest.mark.parametrize("readme", ["none", tables.END + tables.BEGIN, tables.BEGIN * 2 + tables.END])
def test_a_readme_without_its_markers_is_an_error(readme: str) -> None:
    with pytest.raises(ValueError, match="README must hold"):
        tables.insert(readme, "x")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ("{}", "must be pytest-benchmark's JSON"),
        ('{"benchmarks": []}', "at least one row"),
        ('{"benchmarks": [{"extra_info": {"environment": {"machine": "../up"}, "bench": "mix"}}]}', "lower-case"),
    ],
)
def test_bad_input_is_one_error_that_names_the_file(content: str, message: str, tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "bad.json"
    source.write_text(content)
    assert record.main([str(source), "--results", str(tmp_path / "results")]) == 1
    error = capsys.readouterr().err
    assert str(source) in error and message in error
    assert not (tmp_path / "results").exists()


def test_no_results_is_an_error(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "README.md").write_text(README)
    options = ["--results", str(tmp_path), "--readme", str(tmp_path / "README.md"), "--page", str(tmp_path / "p.md")]
    assert tables.main(options) == 1
    assert "make bench" in capsys.readouterr().err
