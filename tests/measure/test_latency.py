"""Latency: timing by rounds, tables that add up, files that go on where they were, with an injected clock."""

from __future__ import annotations

import gc
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasdet.arch import Card, load_card
from nasdet.detectors.backbone import Backbone
from nasdet.measure import Latency, LatencyTable, measure_module, measure_table
from nasdet.measure.latency import run_rounds
from nasdet.measure.latency_table import Check
from nasdet.nn import AcceleratedConv2d
from nasdet.search.constraints import Constraint
from nasdet.search.evolution import Evolution, Offspring
from nasdet.spaces.detnas import DetNASSpace, Sizes
from nasdet.spaces.detnas.latency import DetNASBlocks

SIZE = (64, 96)
TINY = Sizes(8, (16, 24, 32, 40), (1, 2, 1, 1), 16)


def parameters(call: Any) -> int:
    """What a module has; the sum over a DetNAS backbone's blocks is the backbone's."""
    return sum(parameter.numel() for parameter in call.func.parameters())


class FakeClock:
    """A clock that shows a millisecond for a thousand parameters, so that sums are exact, and counts calls.

    Whole backbones take ``1 + slower`` times as long. After ``until`` calls somebody presses Ctrl-C.
    """

    def __init__(self, slower: float = 0.0, until: int | None = None) -> None:
        self.slower, self.until = slower, until
        self.calls = 0

    def __call__(self, call: Any) -> float:
        if self.calls == self.until:
            raise KeyboardInterrupt
        self.calls += 1
        return parameters(call) / 1e6 * (1 + self.slower * isinstance(call.func, Backbone))


def tiny() -> DetNASBlocks:
    return DetNASBlocks(DetNASSpace(TINY))


def test_latency_is_the_median_and_the_middle_half() -> None:
    assert Latency.of([4.0, 1.0, 3.0, 2.0, 100.0]) == Latency(3.0, 2.0, 5)  # quartiles 2 and 4
    assert Latency.of([2.0]) == Latency(2.0, 0.0, 1)
    with pytest.raises(ValueError, match="samples must be at least one"):
        Latency.of([])


class Probe(nn.Module):
    """Records how it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.seen: list[dict[str, Any]] = []

    def __deepcopy__(self, memo: Any) -> Probe:
        copy = Probe()
        copy.seen = self.seen
        return copy

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(
            {
                "training": self.training,
                "gradients": torch.is_grad_enabled(),
                "dtypes": (x.dtype, self.conv.weight.dtype),
                "channels_last": x.is_contiguous(memory_format=torch.channels_last),
                "threads": torch.get_num_threads(),
                "collecting": gc.isenabled(),
            }
        )
        y: Tensor = self.conv(x)
        return y


def test_a_module_is_timed_as_in_inference_and_left_alone() -> None:
    module, ticks = Probe().train(), iter([9.0, 9.0, 0.005, 0.001, 0.003])
    weights, state = module.conv.weight.clone(), torch.get_rng_state()

    def timer(call: Callable[[], Any]) -> float:
        call()
        return next(ticks)

    found = measure_module(
        module, (1, 4, 8, 10), threads=2, dtype="bfloat16", rounds=3, warmup=2, clock="wall", timer=timer
    )
    assert found == Latency(3.0, pytest.approx(2.0), 3), "milliseconds, without those that warm up"
    assert module.seen == 5 * [
        {
            "training": False,
            "gradients": False,
            "dtypes": (torch.bfloat16, torch.bfloat16),
            "channels_last": True,
            "threads": 2,
            "collecting": False,
        }
    ]
    assert module.training and module.conv.weight.dtype == torch.float32 and torch.equal(module.conv.weight, weights)
    assert torch.get_num_threads() == 1 and gc.isenabled() and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("clock", ["wall", "thread"])
def test_real_clocks_run(clock: str) -> None:
    found = measure_module(nn.Conv2d(8, 8, 3), (1, 8, 32, 32), threads=1, rounds=3, clock=clock)
    assert found.ms > 0 and found.iqr >= 0 and found.rounds == 3


@pytest.mark.gpu
def test_cuda_events_time_a_module() -> None:
    found = measure_module(nn.Conv2d(8, 8, 3), (1, 8, 32, 32), "cuda", dtype="float16", rounds=3)
    assert found.ms > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "foo"}, "device must be cpu, cuda or such as cuda:0, got 'foo'"),
        ({"device": "meta"}, "device must be cpu, cuda or such as cuda:0, got 'meta'"),
        ({"threads": 0}, "threads must be a positive integer, got 0"),
        ({"dtype": "int8"}, "dtype must be one of float32, bfloat16, float16, got 'int8'"),
        ({"rounds": 0}, "rounds must be a positive integer, got 0"),
        ({"warmup": -1}, "warmup must be an integer of at least 0, got -1"),
        ({"clock": "cuda"}, "clock must be wall or thread on cpu, got 'cuda'"),
        ({"clock": "thread", "threads": 2}, "threads must be 1 for the thread's clock, got 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_conditions_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure_module(nn.ReLU(), (1, 1, 2, 2), **options)


def test_rounds_take_turns_and_go_on_where_samples_end() -> None:
    order: list[str] = []
    samples: dict[str, list[float]] = {"a": [1.0], "b": [], "c": [1.0, 1.0, 1.0]}
    done: list[int] = []

    def timer(call: Callable[[], Any]) -> float:
        call()
        return 0.002

    run_rounds({name: partial(order.append, name) for name in samples}, samples, 3, 1, timer, done.append)
    assert samples == {"a": [1.0, 2.0, 2.0], "b": [2.0, 2.0, 2.0], "c": [1.0, 1.0, 1.0]}
    assert sorted(order[:2]) == ["a", "b"], "the round that warms up"
    assert order[2:] == ["b", "b", "a", "a", "b"] and done == [1, 2, 3]


def test_a_table_adds_up_to_whole_nets(tmp_path: Path) -> None:
    blocks = tiny()
    table = measure_table(blocks, SIZE, tmp_path / "t.json", rounds=2, warmup=0, nets=5, timer=FakeClock())
    exact = blocks.space.parameters
    for genotype in product(("sh3", "sh5", "sh7", "xcep"), repeat=5):
        assert table(blocks.space.card(genotype)) == pytest.approx(exact(genotype) / 1e3, rel=1e-12)
    least, most = exact.reachable()
    assert table.reachable() == (pytest.approx(least / 1e3), pytest.approx(most / 1e3))
    assert table.fixed == pytest.approx(exact.fixed / 1e3)
    check = table.check()
    assert check is not None and len(check.nets) == 5 and check.worst_error < 1e-9
    assert check.rank is not None and check.rank.tau == pytest.approx(1)
    assert table.latencies["stem"].rounds == 2


def test_equal_blocks_are_timed_once(tmp_path: Path) -> None:
    blocks, clock = DetNASBlocks.of("small"), FakeClock()
    table = measure_table(blocks, (32, 32), tmp_path / "t.json", rounds=1, warmup=0, timer=clock)
    assert clock.calls == 1 + 4 * 2 * 4 == len(table.latencies), "stem; four stages, first and other blocks"
    assert len(table.rows) == 20 and all(list(row) == ["sh3", "sh5", "sh7", "xcep"] for row in table.rows)
    assert table.rows[1] == table.rows[2] != table.rows[0]


def test_errors_of_predictions_are_told(tmp_path: Path) -> None:
    clock = FakeClock(slower=0.25)
    table = measure_table(tiny(), SIZE, tmp_path / "t.json", rounds=1, warmup=0, nets=4, seed=3, timer=clock)
    check = table.check()
    assert check is not None
    assert check.bias == pytest.approx(-0.2) and check.mean_error == pytest.approx(0.2)
    mixed = Check.of([("a", 11.0, 10.0), ("b", 10.0, 20.0), ("c", 30.0, 30.0)])
    assert (mixed.bias, mixed.mean_error, mixed.worst_error) == (pytest.approx(-0.4 / 3), pytest.approx(0.2), 0.5)
    assert mixed.rank is not None and mixed.rank.tau == pytest.approx(1 / 3)
    assert Check.of([("a", 11.0, 10.0)]).rank is None, "one net has no rank"


def test_a_killed_measurement_goes_on(tmp_path: Path) -> None:
    path, per_round = tmp_path / "t.json", len(list(tiny().blocks(SIZE))) + 2
    options: dict[str, Any] = {"rounds": 4, "warmup": 0, "nets": 2}
    with pytest.raises(KeyboardInterrupt):
        measure_table(tiny(), SIZE, path, timer=FakeClock(until=2 * per_round + 5), **options)
    half = json.loads(path.read_text())
    assert {row["rounds"] for row in [*half["rows"].values(), *half["nets"].values()]} == {2}
    told: list[tuple[int, int]] = []
    clock = FakeClock(slower=1.0)
    table = measure_table(tiny(), SIZE, path, timer=clock, after=lambda *done: told.append(done), **options)
    assert clock.calls == 2 * per_round and told == [(3, 4), (4, 4)]
    assert [path.name for path in tmp_path.iterdir()] == ["t.json"]
    whole = json.loads(path.read_text())
    for part in ("rows", "nets"):
        for key, row in whole[part].items():
            assert row["samples"][:2] == half[part][key]["samples"] and len(row["samples"]) == 4
            assert row["ms"] == statistics.median(row["samples"])
    assert whole["started"] == half["started"] and table.record.to_json() == whole


def test_what_is_measured_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    parts = len(list(tiny().blocks(SIZE)))

    def calls(**options: Any) -> int:
        clock = FakeClock()
        measure_table(tiny(), SIZE, path, warmup=0, timer=clock, **options)
        return clock.calls

    assert calls(rounds=2) == 2 * parts
    before = path.read_bytes()
    assert calls(rounds=2) == 0 and calls(rounds=1) == 0 and path.read_bytes() == before
    assert calls(rounds=2, nets=3) == 2 * 3, "nets alone"
    assert calls(rounds=3, nets=3) == parts + 3, "one more round of all"
    assert calls(rounds=3, nets=4) == 3, "the same nets and one more"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (64, 128)}, r"size must be \(64, 128\), got \(64, 96\)"),
        ({"threads": 2}, "threads must be 2, got 1"),
        ({"dtype": "bfloat16"}, "dtype must be bfloat16, got float32"),
        ({"channels_last": False}, "channels_last must be False, got True"),
        ({"clock": "thread", "threads": 1}, "clock must be thread, got wall"),
        ({"blocks": DetNASBlocks(DetNASSpace(Sizes(8, (16, 24, 32, 42), (1, 2, 1, 1), 16)))}, "space must be .*42"),
    ],
    ids=["size", "threads", "dtype", "layout", "clock", "space"],
)
def test_settings_are_not_mixed_in_a_file(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    arguments: dict[str, Any] = {"blocks": tiny(), "size": SIZE, "path": path, "rounds": 1, "warmup": 0}
    measure_table(timer=FakeClock(), **arguments)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"t.json: {message}.*; measure into another file"):
        measure_table(timer=FakeClock(), **arguments | change)
    assert path.read_bytes() == before


@pytest.mark.parametrize("name", [".", "/dev/null"], ids=["folder", "device"])
def test_what_is_no_file_is_not_read(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"{name}: must be a file, or not there yet, got a folder or a device"):
        measure_table(tiny(), SIZE, tmp_path / name, rounds=1, warmup=0, timer=FakeClock())


def test_a_table_serves_its_own_space_and_size(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    table = measure_table(tiny(), SIZE, path, rounds=1, warmup=0, timer=FakeClock())
    card = tiny().random(Random(0))
    assert LatencyTable.load(path, tiny(), SIZE)(card) == table(card)
    with pytest.raises(ValueError, match=r"t.json: size must be \(32, 32\), got a table for \(64, 96\)"):
        LatencyTable.load(path, tiny(), (32, 32))
    with pytest.raises(ValueError, match="t.json: space must be .*'stem': 16.*, got a table for .*'stem': 8"):
        LatencyTable.load(path, DetNASBlocks.of("small"), SIZE)
    with pytest.raises(ValueError, match="settings must have"):
        table(load_card("detnasnet"))
    with pytest.raises(ValueError, match="method must be 'detnas', got 'msnas'"):
        table(load_card("msnas-r18-1"))


def without_row(value: Any) -> Any:
    return {**value, "rows": {key: row for key, row in value["rows"].items() if key != "stem"}}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_row, "rows must be there for all 21 blocks, got none for 1, such as 'stem'"),
        (lambda value: [value], "must be a table of latencies"),
        (lambda value: {**value, "kind": "run"}, "must be a table of latencies"),
        (lambda value: {**value, "schema_version": 2}, "schema_version must be 1, got 2"),
        (lambda value: {key: value[key] for key in value if key != "clock"}, "not a whole table.*clock"),
        (lambda value: {**value, "rows": {"stem": {"samples": [0.0]}}}, r"samples must be positive .* got \[0.0\]"),
        (lambda value: {**value, "rows": {"stem": {"samples": 3}}}, "not a whole table"),
    ],
    ids=["row-missing", "list", "other-kind", "later-version", "key-missing", "zero", "no-list"],
)
def test_a_damaged_file_is_refused_by_name(damage: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    measure_table(tiny(), SIZE, path, rounds=1, warmup=0, timer=FakeClock())
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=f"t.json: .*{message}"):
        LatencyTable.load(path, tiny(), SIZE)


def test_a_search_is_held_to_it(tmp_path: Path) -> None:
    blocks = tiny()
    table = measure_table(blocks, SIZE, tmp_path / "t.json", rounds=1, warmup=0, timer=FakeClock())
    least, most = table.reachable() or (0, 0)
    limit = least + 0.4 * (most - least)
    limited = Constraint("latency", table, high=limit, reachable=table.reachable())
    search = Evolution(
        blocks.space,
        constraints=[limited],
        population=6,
        parents=3,
        generations=3,
        offspring=[Offspring(("mutate", "crossover"), 6)],
    )
    while not search.done:
        card = search.ask()
        assert table(card) <= limit
        search.tell(card, random.random())
    with pytest.raises(ValueError, match="latency must be at most .*, reachable are"):
        Constraint("latency", table, high=least * 0.9, reachable=table.reachable())


def test_loading_and_predicting_need_no_torch(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    table = measure_table(tiny(), SIZE, path, rounds=1, warmup=0, timer=FakeClock())
    card = tiny().random(Random(0))
    code = (
        "import sys; from nasdet.measure import LatencyTable; from nasdet.spaces.detnas import DetNASSpace, Sizes\n"
        "from nasdet.spaces.detnas.latency import DetNASBlocks\n"
        f"blocks = DetNASBlocks(DetNASSpace({TINY!r}))\n"
        f"table = LatencyTable.load({str(path)!r}, blocks, {SIZE})\n"
        f"print(repr(table(blocks.space.card({card.genotype!r})))); sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == table(card)


class TwoConvs:
    """A space of one's own: one of two kernels at each of two places on RoIs, which are no pictures."""

    settings = {"method": "toy"}
    fixed = ("fc",)
    places = ({"1": "conv1", "3": "conv3"},) * 2

    def blocks(self, size: tuple[int, int]) -> Iterator[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
        for kernel in (1, 3):
            yield f"conv{kernel}", partial(nn.Conv2d, 4, 4, kernel, padding=kernel // 2), (10, 4, 7, 7)
        yield "fc", partial(nn.Linear, 196, 5), (10, 196)

    def keys(self, card: Card) -> Iterable[str]:
        return [f"conv{kernel}" for kernel in card.genotype] + ["fc"]

    def network(self, card: Card, size: tuple[int, int]) -> tuple[str, Callable[[], nn.Module], tuple[int, ...]]:
        convs = [partial(nn.Conv2d, 4, 4, kernel, padding=kernel // 2) for kernel in card.genotype]
        make = lambda: nn.Sequential(*(conv() for conv in convs), nn.Flatten(), nn.Linear(196, 5))  # noqa: E731
        return card.key, make, (10, 4, 7, 7)

    def random(self, rng: Random) -> Card:
        return Card("toy", "toy", [rng.choice((1, 3)), rng.choice((1, 3))])


def test_any_space_of_blocks_can_be_measured(tmp_path: Path) -> None:
    table = measure_table(TwoConvs(), (7, 7), tmp_path / "t.json", rounds=1, warmup=0, nets=9, timer=FakeClock())
    assert [set(row) for row in table.rows] == [{"1", "3"}] * 2
    check = table.check()
    assert check is not None and check.worst_error < 1e-9 and len(check.nets) == 4, "there are no more than four"
    one, nine = (16 * taps + 4 for taps in (1, 9))
    assert table(Card("toy", "net", [1, 3])) == pytest.approx((one + nine + 197 * 5) / 1e3)


class WideConvs(TwoConvs):
    def blocks(self, size: tuple[int, int]) -> Iterator[tuple[str, Callable[[], nn.Module], tuple[int, ...]]]:
        for name, make, _ in super().blocks(size):
            wide = partial(nn.Conv2d, 64, 64, 3, padding=1) if name == "conv3" else make
            yield name, wide, (1, 64, 7, 7) if name == "conv3" else (1, 4, 7, 7)


@pytest.mark.needs("cpp")
def test_blocks_run_on_the_convolutions_that_the_library_runs_on(tmp_path: Path) -> None:
    kinds: set[tuple[type, bool]] = set()

    def timer(call: Any) -> float:
        kinds.add((type(call.func), call.func.weight.is_contiguous()))
        return 1e-3

    measure_table(WideConvs(), (7, 7), tmp_path / "t.json", rounds=1, warmup=0, timer=timer)
    assert {kind for kind, _ in kinds} == {AcceleratedConv2d, nn.Conv2d, nn.Linear}
    kinds.clear()
    measure_module(nn.Conv2d(64, 64, 3, padding=1), (1, 64, 7, 7), rounds=1, warmup=0, timer=timer)
    assert kinds == {(nn.Conv2d, False)}, "somebody's module is timed as it is"
