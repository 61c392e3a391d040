"""Races of ops of any signature: the gate, gradients, repeated calls, threads, promises; on small made-up ops."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nasdet._cases import Case, Inputs
from nasdet._dispatch import Op

op_race = pytest.importorskip("op_race", reason="no benchmarks beside these tests")
machine = pytest.importorskip("machine", reason="no benchmarks beside these tests")
interleave = pytest.importorskip("interleave", reason="no benchmarks beside these tests")

SHAPE = (2, 6, 3, 4)


def scaled_sum(xs: list[Tensor], offsets: Tensor, weight: Tensor, *, power: float = 1.0) -> Tensor:
    """Maps with gradients, integers without, a parameter: the kinds of arguments that ops have."""
    return (weight**power)[offsets].sum() * torch.stack(list(xs)).sum(0)


def maps_case(name: str = "maps", layout: str = "contiguous") -> Case:
    def make(inputs: Inputs) -> tuple[Any, dict[str, Any]]:
        xs = [inputs.randn(*SHAPE, layout=layout) for _ in range(3)]
        return (xs, torch.tensor([1, 0, 1]), inputs.weights(2)), {"power": 2.0}

    return Case(name, make, large=True)


def top(scores: Tensor, threshold: float) -> Tensor:
    """No gradient, and a result of integers."""
    return torch.argsort(scores, descending=True)[: int((scores > threshold).sum())]


def top_case(name: str = "top") -> Case:
    return Case(name, lambda inputs: ((inputs.randn(50), 0.0), {}), large=True)


def an_op(reference: Callable[..., Any], differentiable: tuple[int, ...] = ()) -> Op:
    return Op("made_up", reference, reference, (), (), lambda *_: 1, differentiable)


def bench(reference: Callable[..., Any], case: Case, contestants: dict[str, Callable[..., Any]], **options: Any) -> Any:
    entered = options.pop("entered", [])
    differentiable = options.pop("differentiable", ())
    makers = [op_race.Contestant(name, functools.partial(lambda c: c, call)) for name, call in contestants.items()]
    settings = {"targets": (), "cases": (case,)} | options
    return op_race.OpBench(an_op(reference, differentiable), (*makers, *entered), **settings)


def run(what: Any, phase: str = "forward", dtype: str = "fp32", rounds: int = 2) -> Any:
    return op_race.run_op(what, what.cases[0], dtype, phase, device="cpu", threads=1, rounds=rounds)


@pytest.mark.parametrize("dtype", op_race.DTYPES)
def test_lists_integers_and_parameters_race_in_training(dtype: str) -> None:
    outcome = run(
        bench(scaled_sum, maps_case(), {"nasdet": scaled_sum}, differentiable=(0, 2)), "forward+backward", dtype
    )
    assert len(outcome.race.seconds["nasdet"]) == 2
    assert set(outcome.memory["nasdet"]) >= {"graph kept", "forward+backward", "graph kept, resident"}


def wrong_map_gradient(xs: list[Tensor], *rest: Any, **options: Any) -> Tensor:
    return scaled_sum([xs[0].detach() + 2 * xs[0] - 2 * xs[0].detach(), *xs[1:]], *rest, **options)


def wrong_weight_gradient(xs: list[Tensor], offsets: Tensor, weight: Tensor, **options: Any) -> Tensor:
    return scaled_sum(xs, offsets, weight + 1e-2 * (weight - weight.detach()), **options)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(wrong_map_gradient, "result 1"), (wrong_weight_gradient, "result 4")],
    ids=["map", "parameter"],
)
def test_a_wrong_gradient_is_not_timed(wrong: Callable[..., Tensor], message: str) -> None:
    what = bench(scaled_sum, maps_case(), {"nasdet": wrong}, differentiable=(0, 2))
    run(what)  # its forward is right
    with pytest.raises(interleave.WrongResult, match=f"nasdet: {message} must be within"):
        run(what, "forward+backward")


def test_every_layout_gets_the_same_incoming_gradient() -> None:
    def other_layout(*arguments: Any, **options: Any) -> Tensor:
        return scaled_sum(*arguments, **options).contiguous()

    what = bench(scaled_sum, maps_case(layout="channels_last"), {"nasdet": other_layout}, differentiable=(0, 2))
    assert "nasdet" in run(what, "forward+backward").race.seconds
    setting = op_race.Setting(what.cases[0], "fp32", "cpu", (0, 2))
    plain, nhwc = torch.empty(SHAPE), torch.empty(SHAPE).to(memory_format=torch.channels_last)
    first, second = setting._incoming(plain), setting._incoming(nhwc)
    assert first.stride() == plain.stride() and second.stride() == nhwc.stride()
    assert torch.equal(first, second) and setting._incoming(plain) is first


def test_exact_results_must_be_equal() -> None:
    def swapped(scores: Tensor, threshold: float) -> Tensor:
        kept = top(scores, threshold)
        return torch.cat([kept[1:2], kept[:1], kept[2:]])

    assert "nasdet" in run(bench(top, top_case(), {"nasdet": top}, exact=True)).race.seconds
    with pytest.raises(interleave.WrongResult, match="must be within 0 of the reference"):
        run(bench(top, top_case(), {"nasdet": swapped}, exact=True))
    ordered = bench(top, top_case(), {"nasdet": swapped}, exact=True, comparable=lambda found: [found[0].sort()[0]])
    assert "nasdet" in run(ordered).race.seconds


def test_a_yardstick_may_compute_something_else() -> None:
    def other(scores: Tensor, threshold: float) -> Tensor:
        return top(scores, threshold + 1)

    yardstick = op_race.Contestant("yardstick", lambda: other, same=False)
    assert "yardstick" in run(bench(top, top_case(), {"nasdet": top}, exact=True, entered=[yardstick])).race.seconds
    with pytest.raises(interleave.WrongResult):
        run(bench(top, top_case(), {"nasdet": top, "rival": other}, exact=True))


def test_inputs_are_whole_again_before_every_timing() -> None:
    seen = []

    def overwriting(xs: list[Tensor], offsets: Tensor, weight: Tensor, *, power: float) -> Tensor:
        y = scaled_sum(xs, offsets, weight, power=power)
        seen.append(float(xs[0].sum()))
        xs[0].zero_()
        offsets.zero_()
        return y

    run(bench(scaled_sum, maps_case(), {"nasdet": overwriting}), rounds=3)
    assert len(seen) > 3 and len(set(seen)) == 1 and seen[0] != 0.0


def test_short_calls_are_repeated_and_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {"fast": 0, "slow": 0}

    def counted(name: str) -> Callable[..., Tensor]:
        def call(*arguments: Any) -> Tensor:
            calls[name] += 1
            return top(*arguments)

        return call

    def clock(call: Callable[[], Any]) -> float:
        before = dict(calls)
        call()
        return (calls["fast"] - before["fast"]) * 1e-6 + (calls["slow"] - before["slow"]) * 1e-4

    monkeypatch.setattr(op_race, "make_clock", lambda device: clock)
    contestants = {name: counted(name) for name in calls}
    outcome = run(bench(top, top_case(), contestants, repeatable=True))
    assert calls["slow"] > 4 * round(op_race.SHORTEST / 1e-4) and calls["fast"] > 4 * 1000  # 1000: the most
    assert outcome.race.seconds["fast"] == pytest.approx([1e-6] * 2)
    assert outcome.race.seconds["slow"] == pytest.approx([1e-4] * 2)
    calls.update(fast=0, slow=0)
    run(bench(top, top_case(), contestants))
    assert calls["slow"] < 20


def test_who_cannot_run_is_absent_with_a_reason() -> None:
    def missing() -> Any:
        raise ImportError("no such library")

    entered = [
        op_race.Contestant("rival", missing, may_fail=True),
        op_race.Contestant("other case", lambda: top, cases=("large",)),
        op_race.Contestant("on the GPU", lambda: top, devices=("cuda",)),
        op_race.Contestant("crowd", lambda: top, threads=10_000),
    ]
    outcome = run(bench(top, top_case(), {"nasdet": top}, entered=entered))
    assert list(outcome.race.seconds) == ["nasdet"]
    assert outcome.absent == {
        "rival": "ImportError: no such library",
        "other case": "not for top",
        "on the GPU": "not for forward on cpu",
        "crowd": "fewer than 10000 processors",
    }
    with pytest.raises(ImportError):
        run(bench(top, top_case(), {"nasdet": top}, entered=[op_race.Contestant("ours", missing)]))


@pytest.mark.skipif(len(machine.processors()) < 2, reason="one processor")
def test_a_contestant_has_threads_of_its_own() -> None:
    seen = {}

    def note(name: str, *arguments: Any) -> Tensor:
        seen[name] = torch.get_num_threads(), len(os.sched_getaffinity(0))
        return top(*arguments)

    two = op_race.Contestant("nasdet, 2 threads", lambda: functools.partial(note, "two"), threads=2)
    before = torch.get_num_threads(), os.sched_getaffinity(0)
    try:
        torch.set_num_threads(1)
        what = bench(top, top_case(), {"nasdet": functools.partial(note, "one")}, entered=[two])
        with machine.pinned(1):
            assert set(run(what).race.seconds) == {"nasdet", "nasdet, 2 threads"}
        assert seen == {"one": (1, 1), "two": (2, len(machine.processors()))}
        assert torch.get_num_threads() == 1 and os.sched_getaffinity(0) == before[1]
    finally:
        torch.set_num_threads(before[0])


def test_work_is_counted_per_map_or_by_the_bench() -> None:
    setting = op_race.Setting(maps_case(), "fp32", "cpu", (0, 2))
    size = 4 * 2 * 6 * 3 * 4
    per_value = bench(scaled_sum, maps_case(), {}, flops_per_value={"forward": 2, "forward+backward": 5})
    assert op_race._work(per_value, setting, "forward") == (4 * size, 2 * 3 * size / 4)
    assert op_race._work(per_value, setting, "forward+backward") == ((4 + 7) * size, 5 * 3 * size / 4)
    own = bench(scaled_sum, maps_case(), {}, work=lambda setting, phase: (7, 8.0))
    assert op_race._work(own, setting, "forward") == (7, 8.0)
    assert op_race._work(bench(scaled_sum, maps_case(), {}), setting, "forward") == (None, None)


def test_products_of_float32_drop_bits_for_all_or_for_none() -> None:
    """A stub that is as exact as torch lets it be: beside full float32 nobody runs in TF32."""
    seen: list[tuple[bool, bool]] = []

    def as_torch_has_it(xs: list[Tensor], *rest: Any, **options: Any) -> Tensor:
        matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        seen.append((matmul, cudnn))
        return scaled_sum(xs, *rest, **options) * (1 + 7e-4 * cudnn)

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    assert before == (False, True), "torch's own defaults"
    what = bench(scaled_sum, maps_case(), {"nasdet": as_torch_has_it, "rival": as_torch_has_it})
    exact = run(what, dtype="fp32")
    assert set(seen) == {(False, False)} and max(exact.entered.errors.values()) < 1e-6
    seen.clear()
    rounded = run(what, dtype=op_race.TF32)
    assert set(seen) == {(True, True)} and set(rounded.race.seconds) == {"nasdet", "rival"}
    assert rounded.entered.errors["nasdet"] == pytest.approx(7e-4, rel=0.01)
    with pytest.raises(interleave.WrongResult, match="within 0.00195312 of the reference"):
        wrong = bench(scaled_sum, maps_case(), {"nasdet": lambda *a, **o: 1.003 * scaled_sum(*a, **o)})
        run(wrong, dtype=op_race.TF32)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_who_fails_is_told_from_who_has_no_place() -> None:
    def broken(scores: Tensor, threshold: float) -> Tensor:
        return top(scores, threshold + 1)

    entered = [
        op_race.Contestant("rival", lambda: broken, may_fail=True),
        op_race.Contestant("other device", lambda: top, devices=("cuda",)),
        op_race.Contestant("other environment", lambda: top, library="a_library_that_nobody_has", may_fail=True),
    ]
    targets = [op_race.Target("nasdet", "forward", entry.name, 2.0) for entry in entered]
    what = bench(top, top_case(), {"nasdet": top}, entered=entered, targets=targets, exact=True)
    outcome = run(what)
    assert set(outcome.entered.failed) == {"rival"}
    assert outcome.absent["other environment"] == "a_library_that_nobody_has is not installed"
    rows = op_race.row_info(what, outcome, "nasdet", "fp32", "forward", "cpu")["targets"]
    assert [(row["over"], row["met"]) for row in rows] == [("rival", False)]
    assert rows[0]["absent"].startswith("WrongResult: rival")
    assert entered[2].why_not(top_case(), "forward", "cuda", 1) is None, "on a GPU there is one environment for all"


def test_shares_are_of_the_peak_in_the_rows_own_dtype() -> None:
    race = interleave.Race({"nasdet": [2.0, 2.0]})
    outcome = op_race.Outcome("top", race, {"nasdet": {"forward": 8}}, 10, 600.0)
    peaks = {"copy_bytes_per_s": 20.0, "fma_flops_per_s": 400.0, "matrix_flops_per_s": {"fp32": 400.0, "bf16": 500.0}}
    target = op_race.Target(
        "nasdet", "forward", quantity="matrix_share", at_least=0.55, dtypes=("bf16", "tf32"), cases=("top",)
    )
    what = bench(top, top_case(), {}, targets=[target])
    halves = op_race.row_info(what, outcome, "nasdet", "bf16", "forward", "cpu", peaks)
    assert (halves["copy_share"], halves["matrix_share"]) == (0.25, 0.6)
    assert halves["targets"] == [{"quantity": "matrix_share", "at_least": 0.55, "value": 0.6, "met": True}]
    whole = op_race.row_info(what, outcome, "nasdet", "fp32", "forward", "cpu", peaks)
    assert whole["matrix_share"] == 0.75 and not whole["targets"]
    unknown = op_race.row_info(what, outcome, "nasdet", "tf32", "forward", "cpu", peaks)
    assert "matrix_share" not in unknown and unknown["targets"][0]["met"] is False
