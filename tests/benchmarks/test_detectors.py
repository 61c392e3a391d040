"""Races of whole detectors: who takes part, who judges, and that the contestants compute the same."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from nasdet.nn import AcceleratedConv2d

bench = pytest.importorskip("bench_detectors", reason="no benchmarks beside these tests")
worker = pytest.importorskip("detector_worker", reason="no benchmarks beside these tests")
summary = pytest.importorskip("summary", reason="no benchmarks beside these tests")
step_race = pytest.importorskip("step_race", reason="no benchmarks beside these tests")

TORCHVISION = importlib.util.find_spec("torchvision") is not None


def test_who_is_absent_and_why() -> None:
    assert bench.absent("torchvision", "cascade_rcnn", 1) == "torchvision has no cascade_rcnn"
    assert (bench.absent("torchvision", "fcos", 2) is None) == TORCHVISION
    assert bench.absent(bench.PLAIN, "fcos", 2) == "measured at 1 image"
    assert bench.absent(bench.PLAIN, "fcos", 1) is None and bench.absent("nasdet", "cascade_rcnn", 2) is None


@pytest.mark.parametrize("detector", ["fcos", "cascade_rcnn"])
@pytest.mark.parametrize("phase", bench.PHASES)
def test_every_contestant_but_the_judge_is_compared(detector: str, phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = {("torchvision", "cascade_rcnn"): "no such"}
    monkeypatch.setattr(bench, "absent", lambda name, detector, images: missing.get((name, detector)))
    contestants, twins = bench.contestants_of(detector, phase, 1)
    ours = {"nasdet", "nasdet, not accelerated", "nasdet, reference ops"}
    assert set(contestants) - ours == ({"torchvision"} if detector == "fcos" else set())
    judge = "torchvision" if detector == "fcos" and phase == "inference" else "nasdet, reference ops"
    assert set(twins) == ours - {judge} and set(twins.values()) == {judge}
    assert all(contestants[name] == bench.CONTESTANTS[name] for name in contestants)


def values(contestant: str, detector: str, phase: str) -> dict[str, float]:
    """What a step computes; only the accelerated contestant has accelerated convolutions."""
    common = {"detector": detector, "phase": phase, "images": 1, "size": [96, 128], "device": "cpu"}
    run = worker.Run(bench.CONTESTANTS[contestant] | common)
    count = sum(type(module) is AcceleratedConv2d for module in run.model.modules())
    assert count >= 18 if contestant == "nasdet" else count == 0
    found: dict[str, float] = run.step()
    return found


@pytest.mark.parametrize("phase", bench.PHASES)
def test_contestants_compute_the_same(phase: str) -> None:
    """On the detector with a mask, a box and a proposal stage."""
    fast, plain = (values(name, "mask_rcnn", phase) for name in ("nasdet", "nasdet, not accelerated"))
    step_race.check_losses("nasdet", fast, plain)
    assert set(fast) == ({"detections", "scores"} if phase == "inference" else {"loss_rpn_cls", "loss_rpn_box"})
    assert all(value > 0 for value in fast.values())


@pytest.mark.needs("torchvision")
def test_torchvisions_finds_the_same() -> None:
    theirs, ours = (values(name, "faster_rcnn", "inference") for name in ("torchvision", "nasdet"))
    step_race.check_losses("nasdet", ours, theirs)


def row(contestant: str, phase: str, median: float) -> dict[str, Any]:
    environment = {"cpu": "A CPU", "isa": "avx2", "device": "cpu", "threads": 2, "torch": "2.10", "torchvision": "0.29"}
    made = {"case": "fcos, 1 image", "dtype": "fp32", "phase": phase, "contestant": contestant, "median_s": median}
    made |= {"peak_memory": {"step": int(3e8)}, "images_per_s": 1 / median, "date": "2026-01-01"}
    return made | {"environment": environment, "speedup_over": {"torchvision": 2.5} if contestant == "nasdet" else {}}


def test_a_line_of_the_summary() -> None:
    rows = [row(*entry) for entry in (("nasdet", "inference", 0.5), ("torchvision", "inference", 1.25))]
    text = summary._detectors({"detectors": [*rows, row("nasdet", "training step", 2.0)]})
    line = next(line for line in text.splitlines() if line.startswith("| fcos"))
    assert line == (
        "| fcos, 1 image | 2.00 images/s, 300 MB | 0.80 images/s, 300 MB | **2.50x** faster | 2.00 s, 300 MB |  |  |"
    )
    assert summary._detectors({}) == ""
