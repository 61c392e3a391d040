"""From pytest-benchmark's JSON to result files to the README's tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

record = pytest.importorskip("record", reason="no benchmarks beside these tests")
tables = pytest.importorskip("tables", reason="no benchmarks beside these tests")

README = f"# Title\n\nBefore.\n\n{tables.BEGIN}\n{tables.END}\n\nAfter.\n"
RIVALS = {"torch": "2.15.0", "torchvision": "0.29.2"}
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


def detection_row(contestant: str, seconds: float, case: str = "nms-5000", **more: Any) -> dict[str, Any]:
    """A row of a run with torchvision, which has no share of the copy peak."""
    new = row(contestant, seconds, case, bench="nms", environment=ENVIRONMENT | RIVALS, **more)
    return {key: value for key, value in new.items() if key != "copy_share"}


def written(folder: Path, results: Path) -> tuple[list[str], Path, Path, Path]:
    """The options of the command, and the files that it writes."""
    readme, page, guide = folder / "README.md", folder / "docs" / "benchmarks.md", folder / "guide.md"
    readme.write_text(README)
    guide.write_text(README)
    theory = folder / "theory.md"
    theory.write_text(README)
    options = ["--results", str(results), "--readme", str(readme), "--page", str(page), "--guide", str(guide)]
    options += ["--theory", str(theory)]
    return options, readme, page, guide


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
    options, readme, page, guide = written(tmp_path, results)
    assert tables.main([*options, "--check"]) == 1
    assert readme.read_text() == README
    assert tables.main(options) == 0
    once = readme.read_text()
    assert once.startswith("# Title\n\nBefore.\n") and once.endswith(f"{tables.END}\n\nAfter.\n")
    assert tables.main(options) == 0
    assert readme.read_text() == once
    assert tables.main([*options, "--check"]) == 0
    assert "10.5 ms | **4.0x** faster |" in once and "Promises: 1 of 2 met" in page.read_text()
    readme.write_text(once.replace("10.5 ms", "1.5 ms"))
    assert tables.main([*options, "--check"]) == 1
    readme.write_text(once)
    page.write_text("old")
    assert tables.main([*options, "--check"]) == 1
    assert tables.main(options) == 0
    assert "No results with torchvision yet." in guide.read_text()
    rows = detection_row("nasdet", 0.002, speedup_over={"torchvision": 10.0}), detection_row("torchvision", 0.02)
    record.record(document(tmp_path / "more.json", *rows), results)
    assert tables.main([*options, "--check"]) == 1
    assert tables.main(options) == 0
    assert guide.read_text().endswith(f"{tables.END}\n\nAfter.\n") and "**10.0x** faster" in guide.read_text()


def test_rows_with_and_without_torchvision_stand_side_by_side(results: Path, tmp_path: Path) -> None:
    def entered() -> list[tuple[Any, ...]]:
        rows = json.loads((results / "some-cpu-avx2" / "nms.json").read_text())["rows"]
        return [(r["case"], r["contestant"], r["median_s"], r["environment"]["torch"]) for r in rows]

    plain = row("nasdet", 0.5, "nms-5000", bench="nms")
    rivals = detection_row("nasdet", 0.4), detection_row("torchvision", 4.0)
    record.record(document(tmp_path / "a.json", plain, row("nasdet", 0.9, "nms-20000", bench="nms")), results)
    record.record(document(tmp_path / "b.json", *rivals), results)
    both = [
        ("nms-5000", "nasdet", 0.5, "2.13.0"),
        ("nms-5000", "nasdet", 0.4, "2.15.0"),
        ("nms-5000", "torchvision", 4.0, "2.15.0"),
        ("nms-20000", "nasdet", 0.9, "2.13.0"),  # by number, not by letter
    ]
    assert entered() == both
    newer = detection_row("nasdet", 0.3) | {"environment": ENVIRONMENT | RIVALS | {"torch": "2.16.0"}}
    record.record(document(tmp_path / "c.json", newer), results)
    assert entered() == [both[0], ("nms-5000", "nasdet", 0.3, "2.16.0"), both[3]]


def test_each_environment_has_a_heading_and_tables_of_its_own(results: Path, tmp_path: Path) -> None:
    rows = [
        detection_row("nasdet", 0.002, speedup_over={"torchvision": 10.5}, peak_memory={"forward": 3500}),
        detection_row("torchvision", 0.021),
        row("nasdet", 0.0018, "nms-5000", bench="nms"),
    ]
    record.record(document(tmp_path / "more.json", *rows), results)
    text = tables.render(results)
    plain, rivals = text.split("**Some CPU (avx2)**")[1:]
    assert plain.startswith(", PyTorch 2.13.0, 2026-01-02") and "torchvision" not in plain
    assert rivals.startswith(", PyTorch 2.15.0, torchvision 0.29.2, 2026-01-02") and "`mix`" not in rivals
    assert "| time | nasdet | torchvision |\n" in rivals  # no share of the copy peak: nobody says the bytes
    assert "| `nms`, 5,000 boxes fp32, forward | 2.0 ms | 21.0 ms (10.50x) |" in rivals
    assert "| `nms`, 5,000 boxes fp32, forward | 4 kB | 12 MB |" in rivals
    assert "resident* |  | 30 MB |" in rivals


def test_promised_limits_are_shown_in_their_units(results: Path, tmp_path: Path) -> None:
    limits = [
        {"quantity": "time", "at_most": 1.5e-4, "value": 2e-4, "met": False},
        {"quantity": "peak_memory", "at_most": 55e6, "value": 50.2e6, "met": True},
    ]
    record.record(document(tmp_path / "more.json", detection_row("nasdet", 2e-4, targets=limits)), results)
    text = tables.render(results)
    assert "200 us; promised at most 150 us: **missed**" in text
    assert "50 MB at the peak; promised at most 55 MB: met" in text


GPU = (
    ENVIRONMENT
    | RIVALS
    | {
        "machine": "some-gpu",
        "device": "Some GPU",
        "peaks": ENVIRONMENT["peaks"] | {"matrix_flops_per_s": {"fp32": 5e10, "bf16": 8e14, "tf32": 4e14}},
    }
)


def gpu_row(contestant: str, seconds: float, **more: Any) -> dict[str, Any]:
    options = {"bench": "mixed_dilation_conv2d", "dtype": "bf16", "environment": GPU, "speedup_over": {"eager": 3.5}}
    return row(contestant, seconds, "c256-n4", **(options | more))


def test_a_gpus_promises_are_shown_with_what_they_are_held_against(results: Path, tmp_path: Path) -> None:
    failed = {"quantity": "time", "over": "torch.compile", "at_least": 2.0, "absent": "WrongResult: x", "met": False}
    targets = [
        {"quantity": "matrix_share", "at_least": 0.55, "value": 0.613, "met": True},
        {"quantity": "matrix_share", "at_least": 0.55, "absent": "no peak was measured for this row", "met": False},
        {"quantity": "kept_memory", "at_most": 21.5e6, "value": 17.2e6, "met": True},
        failed,
    ]
    rows = [
        gpu_row("nasdet", 1e-3, targets=targets, matrix_share=0.613, backend="triton", error=2e-3),
        gpu_row("eager", 3.5e-3, matrix_share=0.2, error=3e-3),
    ]
    record.record(document(tmp_path / "gpu.json", *rows), results)
    page = tables.render(results)
    assert "bfloat16 matrix product 800000 GFLOP/s, TF32 matrix product 400000 GFLOP/s" in page
    assert "nasdet by `triton`" in page
    assert "| time | nasdet | eager | copy peak used | matrix peak used |" in page
    assert "| 4x256x50x84 bf16, forward | 1.0 ms | 3.5 ms (3.50x) | 88 % | 61 % |" in page
    assert "61% of the measured matrix peak; promised 55%: met" in page
    assert "no peak was measured for this row; promised 55%: **missed**" in page
    assert "17 MB kept for backward; promised at most 22 MB: met" in page
    assert "not compared with torch.compile (WrongResult: x); promised 2x: **missed**" in page
    assert "Promises: 2 of 4 met" in page
    assert json.loads((results / "some-gpu" / "mixed_dilation_conv2d.json").read_text())["rows"][0]["backend"]


def test_a_gpu_has_one_environment_for_all_tables(results: Path, tmp_path: Path) -> None:
    rows = [gpu_row("nasdet", 1e-3, error=2e-3), gpu_row("eager", 3.5e-3, error=3e-3)]
    record.record(document(tmp_path / "gpu.json", *rows), results)
    line = "| `mixed_dilation_conv2d` 4x256x50x84 bf16, forward | 1.0 ms | 3.5 ms | **3.5x** faster |"
    assert line in tables.convolutions(results) and line in tables.headline(results)


def test_shares_of_matrix_products_are_not_shown_for_a_cpus_faster_algorithms(results: Path, tmp_path: Path) -> None:
    fast = row("nasdet", 0.01, "c128-n1", bench="mixed_dilation_conv2d", matrix_share=5.9)
    record.record(document(tmp_path / "cpu.json", fast), results)
    assert "matrix peak used" not in tables.render(results) and "590 %" not in tables.render(results)


def test_several_files_are_recorded_at_once(tmp_path: Path, capsys: Any) -> None:
    sources = [
        document(tmp_path / "a.json", row("nasdet", 0.5)),
        document(tmp_path / "b.json", detection_row("x", 1.0)),
    ]
    assert record.main([*map(str, sources), "--results", str(tmp_path / "results")]) == 0
    written = capsys.readouterr().out.split()
    assert [Path(path).name for path in written] == ["mix.json", "nms.json"]


def test_ratios_name_what_torchvision_does_not_offer(results: Path, tmp_path: Path) -> None:
    rows = [
        detection_row("nasdet", 0.002, speedup_over={"torchvision": 10.5}),
        detection_row("torchvision", 0.021),
        detection_row("nasdet", 0.003, "soft_nms-linear-5000"),
        detection_row("reference", 0.5, "soft_nms-linear-5000"),
        row("nasdet", 0.1, "nms-20000", bench="nms"),
    ]
    record.record(document(tmp_path / "more.json", *rows), results)
    text = tables.ratios(results)
    assert text.startswith("**Some CPU (avx2)**, PyTorch 2.15.0, torchvision 0.29.2, threads: 1:")
    assert "| `nms`, 5,000 boxes fp32, forward | 2.0 ms | 21.0 ms | **10.5x** faster | 30 MB | 30 MB |" in text
    assert "| `soft_nms` linear, 5,000 boxes fp32, forward | 3.0 ms | not offered |  | 30 MB |  |" in text
    assert "20,000" not in text and "mix" not in text
    assert "10.5x" in tables.headline(results) and "soft_nms" not in tables.headline(results)


def test_a_convolution_is_compared_with_the_faster_of_its_rivals(results: Path, tmp_path: Path) -> None:
    mixed = {"bench": "mixed_dilation_conv2d", "phase": "forward"}
    rows = [
        row("nasdet", 0.02, "c128-n1", error=3e-7, speedup_over={"eager": 9.0, "eager, folded kernels": 8.0}, **mixed),
        row("eager", 0.18, "c128-n1", error=5e-7, **mixed),
        row("eager, folded kernels", 0.16, "c128-n1", error=6e-7, **mixed),
    ]
    record.record(document(tmp_path / "more.json", *rows), results)
    found = tables.convolutions(results)
    line = "| `mixed_dilation_conv2d` 1x128x100x152 fp32, forward | 20.0 ms | 160.0 ms | **8.0x** faster |"
    assert f"{line}  | 30 MB | 30 MB | 3.0e-07 | 6.0e-07 |" in found
    assert line in tables.headline(results)


def test_both_on_two_threads_have_a_column_beside_those_on_one(results: Path, tmp_path: Path) -> None:
    grouped = {"bench": "grouped_dilation_conv2d", "phase": "forward"}
    ratios = {"one convolution": 4.0, "one convolution, 2 threads": 2.125}
    rows = [
        row("nasdet", 0.02, "c128-n1", speedup_over={"one convolution": 2.25}, **grouped),
        row("nasdet, 2 threads", 0.01, "c128-n1", speedup_over=ratios, **grouped),
        row("one convolution", 0.045, "c128-n1", **grouped),
        row("one convolution, 2 threads", 0.024, "c128-n1", **grouped),
    ]
    record.record(document(tmp_path / "more.json", *rows), results)
    line = "fp32, forward | 20.0 ms | 45.0 ms | **2.2x** faster | **2.1x** faster | 30 MB |"
    assert line in tables.convolutions(results) and line in tables.headline(results)


def test_the_headline_leaves_a_processor_held_to_less_to_the_page(results: Path, tmp_path: Path) -> None:
    held = ENVIRONMENT | {"machine": "a-cpu-baseline", "isa": "baseline"}
    slower = {"bench": "mixed_dilation_conv2d", "phase": "forward", "environment": held}
    rows = [row("eager", 0.9, "c128-n1", **slower), row("nasdet", 0.3, "c128-n1", error=3e-7, **slower)]
    full = [row("nasdet", 0.1, "c128-n1", error=3e-7, bench="mixed_dilation_conv2d"), detection_row("nasdet", 0.1)]
    record.record(document(tmp_path / "held.json", *rows), results)
    record.record(document(tmp_path / "full.json", *full), results)
    assert "(baseline)" in tables.render(results) and "(baseline)" in tables.convolutions(results)
    assert "(baseline)" not in tables.headline(results) and "(avx2)" in tables.headline(results)


def test_a_nats_step_is_shown_fused_and_by_reference(results: Path, tmp_path: Path) -> None:
    common = {"case": "1x3x416x416", "phase": "w step + alpha step", "bench": "supernet_nats"}
    memory = [{"step": peak, "step, resident": 2 * peak} for peak in (500_000_000, 1_700_000_000)]
    rows = [
        row("nasdet", 1.5, peak_memory=memory[0], **common) | {"speedup_over": {"reference": 4.04}},
        row("reference", 6.0, peak_memory=memory[1], **common),
        row("nasdet", 1.5, **common) | {"case": "1x3x800x1216"},
    ]
    record.record(document(tmp_path / "more.json", *rows), results)
    text = tables.headline(results)
    assert "Weights, then alphas, 1 threads; time and peak memory:" in text
    line = "| 1x3x416x416 | 1.50 s, 500 MB | 6.00 s, 1,700 MB | **4.0x** faster | 3.4x less memory |"
    assert line in text and "800x1216" not in text, "one alone is no comparison"
    page = tables.render(results)
    assert "**One NATS search step of ResNet-50" in page and "*resident* | 1,000 MB | 3,400 MB |" in page
    assert "1x3x416x416" not in tables.ratios(results)


@pytest.mark.parametrize("readme", ["none", tables.END + tables.BEGIN, tables.BEGIN * 2 + tables.END])
def test_a_readme_without_its_markers_is_an_error(readme: str) -> None:
    with pytest.raises(ValueError, match="README must hold"):
        tables.insert(readme, "x")
    with pytest.raises(ValueError, match="guide.md must hold"):
        tables.insert(readme, "x", "guide.md")


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
    (tmp_path / "results").mkdir()
    options, *_ = written(tmp_path, tmp_path / "results")
    assert tables.main(options) == 1
    assert "make bench" in capsys.readouterr().err
