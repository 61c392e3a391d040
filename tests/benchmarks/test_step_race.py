"""Races of whole search steps: a wrong loss is not timed, and the NATS contestants are what they are said to be."""

from __future__ import annotations

import json
from typing import Any

import pytest

step_race = pytest.importorskip("step_race", reason="no benchmarks beside these tests")
interleave = pytest.importorskip("interleave", reason="no benchmarks beside these tests")
backends = pytest.importorskip("backends", reason="no benchmarks beside these tests")


@pytest.mark.parametrize(
    ("got", "message"),
    [
        ({"loss": 2.01, "arch_loss": 1.0}, "ours: loss must be within 0.002 of 2, got 2.01"),
        ({"loss": 2.0, "arch_loss": float("nan")}, "ours: arch_loss must be within"),
    ],
    ids=["wrong", "nan"],
)
def test_no_speed_of_a_wrong_loss(got: dict[str, float], message: str) -> None:
    step_race.check_losses("ours", {"loss": 2.001, "arch_loss": 1.0}, {"loss": 2.0, "arch_loss": 1.0})
    with pytest.raises(interleave.WrongResult, match=message):
        step_race.check_losses("ours", got, {"loss": 2.0, "arch_loss": 1.0})


class FakeWorker:
    """Answers from a script in the place of a process."""

    log: list[str] = []
    facts: dict[str, Any] = {}

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *error: Any) -> None:
        self.log.append(f"{self.options['name']} gone")

    def ask(self, what: str) -> dict[str, Any]:
        self.log.append(f"{self.options['name']} {what}")
        seconds = self.options["seconds"]
        chosen = {"nms": [self.options.get("runs_on", "cpp")]}
        answer = {"seconds": seconds, "peak_memory": int(100 * seconds), "values": {"loss": self.options["loss"]}}
        return answer | {"backends": chosen if what == "probe" else {}}


def test_workers_step_in_turns_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_race, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "log", [])
    fast, slow = ({"name": name, "seconds": seconds} for name, seconds in (("fast", 1.0), ("slow", 4.0)))
    contestants = {"fast": fast, "slow": slow}
    outcome = step_race.run_workers(contestants, {"loss": 1.0, "device": "cpu"}, {"fast": "slow"}, rounds=2)
    steps = ["fast step", "slow step", "slow step", "fast step"]
    warm = ["fast step", "slow step", "fast probe", "slow probe"]
    assert FakeWorker.log == [*warm, *steps, "slow gone", "fast gone"]
    environment = {"device": "cpu"}
    info = step_race.step_info(outcome, "fast", bench="b", environment=environment)
    assert (info["median_s"], info["speedup_over"]) == (1.0, {"slow": 4.0})
    assert info["peak_memory"] == {"step": 100, "step, resident": 100} and info["bench"] == "b"
    assert info["backends"] == {"nms": ["cpp"]}
    wrong = {"fast": {**fast, "loss": 1.1}, "slow": {**slow, "loss": 1.0}}
    with pytest.raises(interleave.WrongResult):
        step_race.run_workers(wrong, {}, {"fast": "slow"}, rounds=2)
    assert FakeWorker.log[-2:] == ["slow gone", "fast gone"] and FakeWorker.log.count("fast step") == 4, (
        "none after the check"
    )


def test_a_step_on_a_fallback_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_race, "Worker", FakeWorker)
    monkeypatch.setattr(FakeWorker, "log", [])
    common = {"loss": 1.0, "device": "cuda", "seconds": 1.0}
    ours = {"name": "ours", "backend": None, "runs_on": "reference"}
    asked = {"name": "asked", "backend": "reference", "runs_on": "reference"}
    with pytest.raises(backends.WrongBackend, match="ours: backend of nms must be cuda on cuda, got reference"):
        step_race.run_workers({"ours": ours, "asked": asked}, common, {}, rounds=1)
    assert FakeWorker.log.count("ours step") == 1, "none after the check"
    step_race.run_workers({"ours": ours | {"runs_on": "cuda"}, "asked": asked}, common, {}, rounds=1)


def test_a_promise_over_one_who_took_no_part() -> None:
    info = {"speedup_over": {"here": 2.0}, "environment": {"device": "A GPU"}}
    assert step_race.time_target(info, "here", 1.5)[0]["met"]
    missed = {"quantity": "time", "over": "gone", "at_least": 1.5, "absent": "gone took no part", "met": False}
    assert step_race.time_target(info, "gone", 1.5) == [missed]
    assert step_race.time_target(info | {"environment": {"device": "cpu"}}, "gone", 1.5) == []


def test_a_nats_worker_makes_a_step_of_each_side(monkeypatch: pytest.MonkeyPatch) -> None:
    from nasdet.nn import MixedDilationConv2d

    worker = pytest.importorskip("search_worker", reason="no benchmarks beside these tests")
    sizes = {"backbone": "resnet50", "width": 0.125, "fpn_channels": 16, "size": [64, 96]}
    values = {}
    for backend in ("folded", "reference"):
        options = {**sizes, "space": "nats", "images": 1, "device": "cpu", "backend": backend}
        search = worker.Search(json.loads(json.dumps(options)))
        mixed = [m for m in search.model.modules() if isinstance(m, MixedDilationConv2d)]
        assert len(mixed) == 13 and {m.backend for m in mixed} == {backend}
        assert sum(m.alpha.numel() for m in mixed) == 1232
        weight = mixed[0].weight.detach().clone()
        values[backend] = search.step()
        assert not bool((mixed[0].weight == weight).all()) and all(bool(m.alpha.any()) for m in mixed)
        for image, targets in search.batches:
            assert image.shape == (1, 3, 64, 96)
            assert float(targets[0]["boxes"][:, 2].max()) <= 96 and float(targets[0]["boxes"][:, 3].max()) <= 96
    assert set(values["folded"]) == {"loss", "grad_norm", "arch_loss"}
    step_race.check_losses("folded", values["folded"], values["reference"])
