"""What is promised of the multi-dilation convolutions on a GPU, and that the promises stand on rows that are raced."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from nasdet._cases import Inputs

op_race = pytest.importorskip("op_race", reason="no benchmarks beside these tests")
bench = pytest.importorskip("bench_dilation_conv", reason="no benchmarks beside these tests")


def raced(device: str) -> set[tuple[Any, ...]]:
    return {(row.values[0].name, row.values[1].id, *row.values[2:]) for row in bench.rows(device)}


def test_every_promise_of_a_gpu_stands_on_rows_that_are_raced() -> None:
    rows, count = raced("cuda"), 0
    for entry in (bench.MIXED_BENCH, bench.GROUPED_BENCH):
        for target in entry.targets:
            for case in target.cases if target.device == "cuda" else ():
                for dtype in target.dtypes:
                    where = (entry.name, case, dtype, target.phase)
                    assert (*where, target.contestant) in rows, target
                    assert not target.over or (*where, target.over) in rows, target
                    count += 1
    assert count == 4 + 1 + 6 + 2 + 1


def test_what_the_issue_asks_of_a_gpu() -> None:
    def found(entry: Any) -> set[tuple[Any, ...]]:
        return {
            (case, target.phase, target.over or target.quantity, target.factor or target.at_least)
            for target in entry.targets
            if target.device == "cuda" and not target.at_most
            for case in target.cases
        }

    training = "forward+backward"
    assert found(bench.MIXED_BENCH) == {
        *((case, training, "eager", 3.0) for case in ("c128-n4", "c256-n4")),
        *((case, training, "torch.compile", 2.0) for case in ("c128-n4", "c256-n4")),
        ("c256-n32", "forward", "matrix_share", 0.55),
    }
    assert found(bench.GROUPED_BENCH) == {
        *((case, "forward", "one convolution", 1 / 1.15) for case in ("c128-n4", "c256-n4")),
        ("c256-n32", "forward", "matrix_share", 0.55),
    }
    limits = [target for target in bench.MIXED_BENCH.targets if target.device == "cuda" and target.at_most]
    assert {target.quantity for target in limits} == {"kept_memory", "peak_memory"}
    assert all(set(target.cases) == set(bench.BY_DILATIONS) and target.dtypes == ("bf16",) for target in limits)


def test_cases_for_a_gpu_are_what_they_are_called() -> None:
    small = bench.gpu_case("small", (2, 20, 5, 6), (1, 2, (1, 3)), (8, 8, 4))
    x, weight, dilations, splits, *rest = small.make(Inputs(torch.bfloat16))[0]
    assert x.is_contiguous(memory_format=torch.channels_last) and x.shape == (2, 20, 5, 6)
    assert weight.shape == (20, 20, 3, 3) and sum(splits) == 20 and len(dilations) == 3 and rest == [1, 1]
    mixed = bench.gpu_case("small", (2, 20, 5, 6), (1, 2)).make(Inputs(torch.bfloat16))[0]
    assert mixed[1].shape == (2, 20, 20, 3, 3) and mixed[2].shape == (2, 20) and mixed[3] == (1, 2)
    assert {"c128-n4": (4, 128, 100, 168), "c256-n4": (4, 256, 50, 84)}.items() <= bench.GPU_MAPS.items()
    assert all(sum(splits) == channels and len(splits) == 5 for channels, splits in bench.SPLITS.items())
    assert [len(dilations) for dilations in bench.BY_DILATIONS.values()] == [2, 4, 8]


def test_the_cpus_rows_are_those_that_they_were() -> None:
    cpu, cuda = raced("cpu"), raced("cuda")
    own = set(bench.ON_GPU_ALONE)
    assert not own & {row[1] for row in cpu} and own <= {row[1] for row in cuda}
    assert {row[2] for row in cpu} == {"fp32", "bf16"} and {row[2] for row in cuda} == {"fp32", "bf16", "tf32"}
    assert all(row[2] == "bf16" for row in cuda if row[1] in own)


def small(entry: Any, case: str, splits: tuple[int, ...] = ()) -> Any:
    """The race of a GPU's case on a map for the CPU, with everybody in it; nothing is compiled."""
    dilations = bench.BY_DILATIONS.get(case, bench.SET_C)
    contestants = [
        dataclasses.replace(c, devices=("cpu", "cuda"), make=(lambda: bench.eager) if "compile" in c.name else c.make)
        for c in entry.contestants
        if "cuda" in c.devices
    ]
    cases = (bench.gpu_case(case, (1, 10, 9, 10), dilations, splits),)
    return dataclasses.replace(entry, contestants=contestants, cases=cases)


@pytest.mark.parametrize(
    ("name", "case", "phase", "expected"),
    [
        ("MIXED_BENCH", "c256-n4", "forward+backward", [("time", "eager"), ("time", "torch.compile")]),
        ("MIXED_BENCH", "c256-n32", "forward", [("matrix_share", None)]),
        ("MIXED_BENCH", "c128-n4-8-dilations", "forward+backward", [("kept_memory", None), ("peak_memory", None)]),
        ("MIXED_BENCH", "c256-n4", "forward", []),
        ("GROUPED_BENCH", "c128-n4", "forward", [("time", "one convolution")]),
        ("GROUPED_BENCH", "c256-n32", "forward", [("matrix_share", None)]),
    ],
)
def test_a_race_says_of_every_promise_whether_it_is_kept(
    name: str, case: str, phase: str, expected: list[tuple[str, str | None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    if ("peak_memory", None) not in expected:  # it takes most of the time to find out
        monkeypatch.setattr(op_race, "_memory", lambda *_: {phase: 8, "graph kept": 8})
    entry = small(getattr(bench, name), case, (2,) * 5 if name == "GROUPED_BENCH" else ())
    outcome = op_race.run_op(entry, entry.cases[0], "bf16", phase, device="cpu", threads=1, rounds=1)
    assert not outcome.entered.failed
    peaks = {"copy_bytes_per_s": 1e12, "matrix_flops_per_s": {"bf16": 1e15}}
    info = op_race.row_info(entry, outcome, "nasdet", "bf16", phase, "cuda", peaks)
    assert [(target["quantity"], target.get("over")) for target in info["targets"]] == expected
    assert all(isinstance(target["met"], bool) and "absent" not in target for target in info["targets"])
    if "matrix_share" in dict(expected):
        assert not info["targets"][0]["met"], "a CPU reaches no half of a petaflop"
    if phase == "forward+backward":
        outcome.entered.failed["eager"] = "OutOfMemoryError: x"
        del outcome.race.seconds["eager"]
        again = op_race.row_info(entry, outcome, "nasdet", "bf16", phase, "cuda", peaks)["targets"]
        assert [t["met"] for t in again if t.get("over") == "eager"] == [False] * (("time", "eager") in expected)


def test_a_stored_branch_would_break_the_promise_of_memory() -> None:
    limits = {t.quantity: t.at_most for t in bench.MIXED_BENCH.targets if t.device == "cuda" and t.at_most}
    maps = {quantity: limit / bench.MAP_BYTES for quantity, limit in limits.items()}
    assert 1 < maps["kept_memory"] < 2, "the output, and no branch beside it"
    assert maps["peak_memory"] < 8, "the branches of eight dilations"
