"""A row says which backend ran, and on a CUDA device it is one of that device's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nasdet import _dispatch
from nasdet._dispatch import OPS, use_backend
from nasdet.ops.mix import mix

backends = pytest.importorskip("backends", reason="no benchmarks beside these tests")
op_race = pytest.importorskip("op_race", reason="no benchmarks beside these tests")
machine = pytest.importorskip("machine", reason="no benchmarks beside these tests")

MIX = next(case for case in OPS["mix"].cases if case.id == "twelve-maps")


def test_every_call_is_noted_with_its_backend() -> None:
    xs, weights = [torch.ones(3)], torch.ones(1)
    before = _dispatch.choose
    with backends.chosen_backends() as found:
        mix(xs, weights, backend="reference")
        first = {op: list(names) for op, names in found.items()}
        with use_backend("reference"):
            mix(xs, weights)
    assert first == found == {"mix": ["reference"]}
    assert _dispatch.choose is before
    mix(xs, weights)
    assert found == {"mix": ["reference"]}


@pytest.mark.parametrize(
    ("found", "right"),
    [
        ({"mix": ["cuda"]}, True),
        ({"mix": ["cuda"], "norm_act_mix": ["triton"]}, True),
        ({"mixed_dilation_conv2d": ["folded"]}, False),
        ({"mix": ["cuda", "reference"]}, False),
        ({"nms": ["reference"]}, False),
    ],
)
def test_a_fallback_on_a_cuda_device_is_an_error(found: dict[str, list[str]], right: bool) -> None:
    backends.check_backends("nasdet", found, "cpu")
    if right:
        return backends.check_backends("nasdet", found, "cuda")
    with pytest.raises(backends.WrongBackend, match=r"nasdet: backend of \w+ must be (cuda|triton).* on cuda, got"):
        backends.check_backends("nasdet", found, "cuda")


def test_an_op_that_is_not_ours_is_not_timed_as_ours() -> None:
    backends.check_backends("eager", {}, "cuda", an_op=False)
    backends.check_backends("nasdet", {}, "cpu", an_op=True)
    with pytest.raises(backends.WrongBackend, match="nasdet: must call an op of this library on cuda, got none"):
        backends.check_backends("nasdet", {}, "cuda", an_op=True)


def test_rows_keep_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    contestants = (op_race.Contestant("nasdet", lambda: mix), op_race.Contestant("eager", lambda: OPS["mix"].reference))
    bench = op_race.OpBench(OPS["mix"], contestants, (), cases=(MIX,))

    def raced() -> Any:
        return op_race.run_op(bench, MIX, "fp32", "forward", device="cpu", threads=1, rounds=1)

    with use_backend("reference"):
        outcome = raced()
    assert outcome.entered.backends == {"nasdet": "reference"}
    info = [op_race.row_info(bench, outcome, name, "fp32", "forward", "cpu") for name in ("nasdet", "eager")]
    assert info[0]["backend"] == "reference" and "backend" not in info[1]
    monkeypatch.setattr(
        op_race,
        "check_backends",
        lambda name, found, device, **more: backends.check_backends(name, found, "cuda", **more),
    )
    with use_backend("reference"), pytest.raises(backends.WrongBackend, match="must be cuda or triton on cuda"):
        raced()


def test_what_is_required_and_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.lacking("") == {} and machine.lacking("g++") == {}
    assert machine.lacking("cuda, cpp")["cuda"] == "no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine._library, "why_not", lambda device: f"no {device} library")
    assert machine.lacking("cuda,cpp") == {"cuda": "no cuda library", "cpp": "no cpu library"}
