"""The benchmarks file by file: what was measured is recorded whatever fails, and the exit status tells."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

run = pytest.importorskip("run", reason="no benchmarks beside these tests")

PEAKS = {"copy_bytes_per_s": 1e10, "fma_flops_per_s": 5e10}
ENVIRONMENT = {
    "machine": "a-gpu", "cpu": "A CPU", "isa": "avx2", "device": "A GPU", "threads": 1, "torch": "2.11.0",
    "commit": "0123456789", "peaks": PEAKS,
}  # fmt: skip
# The real pytest with the real plugin, on a file with one row that is measured and one that is as the name says.
FILE = """
import time

def enter(benchmark, contestant):
    info = {info}
    benchmark.extra_info.update(info | {{"contestant": contestant}})
    benchmark.pedantic(lambda: None, rounds=1)

def test_measured(benchmark):
    enter(benchmark, "nasdet")

def test_other(benchmark):
    {other}
    enter(benchmark, "eager")
"""
OTHER = {"right": "pass", "wrong": "raise AssertionError", "slow": "time.sleep(600)"}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pytests that are started here are not this one's workers, beside which nothing would be measured."""
    pytest.importorskip("pytest_benchmark")
    for name in [name for name in os.environ if name.startswith(("PYTEST_XDIST", "PYTEST_ADDOPTS"))]:
        monkeypatch.delenv(name)


def command(folder: Path, log: list[str]) -> Any:
    def of(name: str, target: Path, options: Sequence[str]) -> list[str]:
        log.append(name)
        info = {
            "bench": name, "case": "fpn-p3", "dtype": "fp32", "phase": "forward", "median_s": 1e-3, "iqr_s": 0.0,
            "backend": "triton", "speedup_over": {}, "targets": [], "peak_memory": {"forward": 8},
            "environment": ENVIRONMENT,
        }  # fmt: skip
        file = folder / f"test_{name}.py"
        file.write_text(FILE.format(info=info, other=OTHER[name]))
        plain = ["-q", "-p", "no:cacheprovider", f"--rootdir={folder}", f"--benchmark-json={target}"]
        return [sys.executable, "-m", "pytest", str(file), *plain, *options]

    return of


def rows(path: Path) -> list[str]:
    return [row["contestant"] for row in json.loads(path.read_text())["rows"]]


def test_a_failing_row_keeps_nothing_from_being_recorded(tmp_path: Path) -> None:
    out, results, log = tmp_path / "out", tmp_path / "results", []
    runs = run.run_all(["wrong", "right"], out, results, None, ["-k", "measured or other"], command(tmp_path, log))
    assert [(each.name, each.failed, each.measured) for each in runs] == [("wrong", True, True), ("right", False, True)]
    assert rows(results / "a-gpu" / "wrong.json") == ["nasdet"]
    assert rows(results / "a-gpu" / "right.json") == ["nasdet", "eager"]
    assert "'nasdet'" not in str(runs[0]) and "failed, status 1" in str(runs[0])


def test_when_the_time_is_up_what_was_measured_is_kept(tmp_path: Path) -> None:
    out, results, log = tmp_path / "out", tmp_path / "results", []
    began = time.monotonic()
    runs = run.run_all(["slow", "right"], out, results, 8 / 60, [], command(tmp_path, log))
    assert time.monotonic() - began < 60
    assert log == ["slow"] and [each.status for each in runs] == [None, None] and all(each.failed for each in runs)
    assert rows(results / "a-gpu" / "slow.json") == ["nasdet"]
    assert str(runs[0]) == "slow: out of time, recorded in part" and str(runs[1]) == "right: out of time"


def test_rows_of_an_earlier_run_are_not_taken_for_this_ones(tmp_path: Path) -> None:
    out, log = tmp_path / "out", []
    out.mkdir()
    (out / "right.json").write_text("old")
    runs = run.run_all(
        ["right"], out, tmp_path / "results", None, ["-k", "nothing_of_that_name"], command(tmp_path, log)
    )
    assert runs[0].status == run.NONE_CHOSEN and not runs[0].failed and not runs[0].measured
    assert not (tmp_path / "results").exists()
    cut = tmp_path / "cut.json"
    cut.write_text('{"benchmarks": [')
    assert run.keep(cut, tmp_path / "results") is False


@pytest.mark.parametrize(
    ("runs", "tables_say", "status"),
    [
        ([("mix", 0, True)], 0, 0),
        ([("mix", 0, True), ("nms", 5, False)], 0, 0),
        ([("mix", 0, True), ("nms", 1, True)], 0, 1),
        ([("mix", 0, True), ("nms", None, False)], 0, 1),
        ([("mix", 5, False)], 0, 1),
        ([("mix", 0, True)], 1, 1),
    ],
)
def test_exit_status(
    runs: list[tuple[Any, ...]], tables_say: int, status: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[Any] = []

    def run_all(*arguments: Any) -> list[Any]:
        seen.extend(arguments)
        return [run.Run(*each) for each in runs]

    monkeypatch.setattr(run, "run_all", run_all)
    monkeypatch.setattr(run.tables, "main", lambda arguments: tables_say)
    given = ["--out", str(tmp_path), "--bench", "nms", "--minutes", "9", "--", "--bench-device", "cuda", "-k", "x"]
    assert run.main(given) == status
    assert seen[0] == ["nms"] and seen[1] == tmp_path and seen[3:] == [9.0, ["--bench-device", "cuda", "-k", "x"]]


def test_every_file_is_a_benchmark_of_its_own() -> None:
    assert {"mix", "nms", "dilation_conv", "detectors", "paste_masks"} <= set(run.names())
    line = run.pytest_command("mix", Path("out") / "mix.json", ["-x"])
    assert (
        line[3].endswith("bench_mix.py") and line[-1] == "-x" and f"--benchmark-json={Path('out') / 'mix.json'}" in line
    )
