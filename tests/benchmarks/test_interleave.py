"""Statistics of races on a fake clock, the correctness gate, and the replay into pytest-benchmark."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch

interleave = pytest.importorskip("interleave", reason="no benchmarks beside these tests")


class FakeClock:
    """Takes what a call returns for its seconds, and slows down everyone in each third round."""

    def __init__(self, contestants: int) -> None:
        self.calls: list[str] = []
        self.contestants = contestants

    def __call__(self, call: Callable[[], tuple[str, float]]) -> float:
        name, seconds = call()
        turn = len(self.calls) // self.contestants
        self.calls.append(name)
        return seconds * (10.0 if turn % 3 == 2 else 1.0)


def race(rounds: int = 9, warmup: int = 0, **options: object):
    clock = FakeClock(2)
    calls = {"fast": lambda: ("fast", 1.0), "slow": lambda: ("slow", 4.0)}
    return clock, interleave.run_race(calls, rounds=rounds, clock=clock, warmup=warmup, **options)


def test_noise_that_hits_a_round_leaves_the_ratio_alone() -> None:
    _, result = race()
    assert result.speedup("fast", over="slow") == 4.0
    assert result.speedup("slow", over="fast") == 0.25
    assert result.median("fast") == 1.0
    assert max(result.seconds["fast"]) == 10.0


def test_rounds_are_interleaved_and_rotate() -> None:
    clock, result = race(rounds=4)
    assert clock.calls == ["fast", "slow", "slow", "fast", "fast", "slow", "slow", "fast"]
    assert {len(times) for times in result.seconds.values()} == {4}


def test_warm_up_is_thrown_away() -> None:
    clock, result = race(rounds=2, warmup=3)
    assert len(clock.calls) == 10
    assert {len(times) for times in result.seconds.values()} == {2}


def test_prepare_runs_before_each_call() -> None:
    log: list[str] = []
    calls = {name: (lambda name=name: log.append(name)) for name in "ab"}
    interleave.run_race(calls, rounds=2, clock=lambda call: call() or 1.0, prepare=lambda: log.append("|"), warmup=1)
    assert log[::2] == ["|"] * 6
    assert sorted(log[1::2]) == ["a"] * 3 + ["b"] * 3


def test_iqr() -> None:
    result = interleave.Race({"a": [1.0, 2.0, 3.0, 4.0, 100.0], "b": [1.0]})
    assert result.iqr("a") == 2.0
    assert result.iqr("b") == 0.0


@pytest.mark.parametrize("enabled", (True, False))
def test_collector_is_left_as_it_was(enabled: bool) -> None:
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ZeroDivisionError):
            interleave.run_race({"a": lambda: 1 / 0}, rounds=1)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if was else gc.disable)()


def test_nothing_to_race_is_an_error() -> None:
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        interleave.run_race({"a": int}, rounds=0)
    with pytest.raises(ValueError, match="at least one contestant"):
        interleave.run_race({}, rounds=1)


class FakeDevice:
    """A host and a device of 2 GHz, in seconds: the host queues work, which starts when the device comes to it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host, self.free = 1.0, 1.5  # when the host acts next, and when all that was queued is done
        device = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                device.launch(0.0)
                self.time = device.free

            def synchronize(self) -> None:
                device.wait()

            def elapsed_time(self, end: Event) -> float:
                return 1e3 * (end.time - self.time)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.wait)
        monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: self.launch(cycles / 2e9))

    def work(self, seconds: float) -> None:
        self.host += seconds

    def launch(self, seconds: float) -> None:
        self.free = max(self.free, self.host) + seconds

    def wait(self) -> None:
        self.host = max(self.free, self.host)


@pytest.mark.parametrize(
    ("steps", "seconds"),
    [
        pytest.param([("work", 1e-3), ("launch", 5e-5)], 5e-5, id="host-is-slower"),
        pytest.param([("work", 1e-5), ("launch", 7e-3), ("work", 1e-5), ("launch", 1e-3)], 8e-3, id="device-is-slower"),
        pytest.param(
            [("work", 1e-3), ("launch", 1e-4), ("wait",), ("work", 2e-5), ("launch", 3e-5)], 1.5e-4, id="call-waits"
        ),
        pytest.param([("wait",), ("work", 2e-3), ("launch", 1e-4)], 2.1e-3, id="waits-first"),
        pytest.param([("work", 6e-3), ("launch", 1e-4)], 2.1e-3, id="host-beyond-what-is-hidden"),
    ],
)
def test_gpu_times_are_the_device_s(
    monkeypatch: pytest.MonkeyPatch, steps: list[tuple[object, ...]], seconds: float
) -> None:
    assert interleave.AHEAD / 2e9 == 4e-3
    device = FakeDevice(monkeypatch)

    def call() -> None:
        for name, *length in steps:
            getattr(device, name)(*length)

    for _ in range(2):
        assert interleave.make_clock("cuda")(call) == pytest.approx(seconds, abs=1e-9)


GOOD = torch.arange(1.0, 9.0)


@pytest.mark.parametrize(
    ("got", "message"),
    [
        pytest.param([GOOD * 1.01], "result 0 must be within 0.001 of the reference", id="wrong"),
        pytest.param([GOOD * float("nan")], "result 0 must be within", id="nan"),
        pytest.param([GOOD[:4]], r"result 0 must have shape \(8,\), got \(4,\)", id="shape"),
        pytest.param([GOOD, GOOD], "results must be 1 tensors, got 2", id="count"),
        pytest.param([torch.zeros(8)], "result 0 must be within", id="zeros"),
    ],
)
def test_no_speed_on_red(got: list[torch.Tensor], message: str) -> None:
    with pytest.raises(interleave.WrongResult, match="planted: " + message):
        interleave.check_result("planted", got, [GOOD], 1e-3)


def test_rounding_passes_the_gate() -> None:
    interleave.check_result("rounded", [GOOD.bfloat16()], [GOOD * (1 + 1e-4)], 1e-3)
    interleave.check_result("zero", [torch.zeros(3)], [torch.zeros(3)], 1e-3)


def test_replay_shows_exactly_the_times_loaded() -> None:
    clock = interleave.ReplayClock()
    for seconds in ([0.5, 2.0, 1.0], [3.0]):
        clock.load(seconds)
        seen = []
        for _ in seconds:
            start = clock.read()
            clock.step()
            seen.append(clock.read() - start)
        assert seen == pytest.approx(seconds)
