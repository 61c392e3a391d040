"""Options and fixtures of the benchmarks. Each row of pytest-benchmark's JSON is one contestant of a race."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # this folder only: the repository's root would hide an installed nasdet

from machine import environment, keep_freed_blocks, lacking, measured_peaks  # noqa: E402  (needs the line above)
from op_race import OpBench, row_info, run_op  # noqa: E402
from rows import CLOCK, race_once, replay  # noqa: E402
from step_race import run_workers, step_info, step_threads  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("nasdet benchmarks")
    group.addoption("--bench-device", choices=("cpu", "cuda"), default="cpu", help="where to measure (cpu)")
    group.addoption("--bench-threads", type=int, default=1, help="threads of the op benchmarks (1)")
    group.addoption("--bench-rounds", type=int, default=11, help="interleaved rounds of the op benchmarks (11)")
    group.addoption("--bench-step-threads", type=int, default=0, help="threads of a search step (0: all processors)")
    group.addoption("--bench-step-rounds", type=int, default=3, help="rounds of a step at 1 image (3); at 4: a third")
    group.addoption("--bench-step-scale", type=float, default=1.0, help="of the papers' widths in a step (1)")
    group.addoption("--bench-detector-rounds", type=int, default=3, help="rounds of a detector (3)")
    group.addoption("--bench-detector-size", default="800x1333", help="of a detector's pictures (800x1333)")
    group.addoption("--bench-large-step", action="store_true", help="also a NATS step at 800 x 1216 px")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    if target := config.getoption("benchmark_json", None):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
    if missing := lacking(os.environ.get("NASDET_REQUIRE", "")):
        raise pytest.UsageError("; ".join(f"NASDET_REQUIRE has {name}, but: {why}" for name, why in missing.items()))


@pytest.fixture(scope="session")
def bench_device(request: pytest.FixtureRequest) -> str:
    device = str(request.config.getoption("--bench-device"))
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return device


@pytest.fixture(scope="session")
def bench_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """The threads of the op benchmarks; set before anything is compiled, for torch.compile builds them in."""
    threads, before = int(request.config.getoption("--bench-threads")), torch.get_num_threads()
    torch.set_num_threads(threads)
    keep_freed_blocks()
    yield threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def bench_machine(bench_device: str, bench_threads: int) -> dict[str, Any]:
    """Environment and measured peaks of the run."""
    return {**environment(bench_device, bench_threads), "peaks": measured_peaks(bench_device, bench_threads)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=CLOCK.read))


@pytest.fixture(scope="session")
def races() -> dict[Any, Any]:
    """Finished races by what was raced: each is run once, by the first of its rows."""
    return {}


@pytest.fixture
def op_row(
    benchmark: Any,
    request: pytest.FixtureRequest,
    races: dict[Any, Any],
    bench_machine: dict[str, Any],
    bench_device: str,
    bench_threads: int,
) -> Callable[..., None]:
    """``op_row(bench, case, dtype, phase, contestant)``: run the race if need be, and enter the contestant's row."""

    def enter(bench: OpBench, case: Any, dtype: str, phase: str, contestant: str) -> None:
        key = (bench.name, case.id, dtype, phase)
        rounds = int(request.config.getoption("--bench-rounds"))
        outcome = race_once(
            races,
            key,
            lambda: run_op(bench, case, dtype, phase, device=bench_device, threads=bench_threads, rounds=rounds),
        )
        if contestant in outcome.absent:
            benchmark.skipped = True
            pytest.skip(outcome.absent[contestant])
        info = row_info(bench, outcome, contestant, dtype, phase, bench_device, bench_machine["peaks"])
        info |= {"bench": bench.name, "case": case.id, "environment": bench_machine}
        replay(benchmark, " ".join(key), outcome.race.seconds[contestant], info)

    return enter


@pytest.fixture
def step_row(
    benchmark: Any,
    request: pytest.FixtureRequest,
    races: dict[Any, Any],
    bench_machine: dict[str, Any],
    bench_device: str,
) -> Callable[..., None]:
    """``step_row(contestants, twins, contestant, options, bench=..., case=..., phase=..., ...)``: run the race of whole
    steps if need be, all workers with the same ``options``, and enter the contestant's row.

    ``rounds`` are those of ``--bench-step-rounds`` unless given; ``add(info, outcome)`` completes the row.
    """

    def enter(
        contestants: Mapping[str, Mapping[str, Any]],
        twins: Mapping[str, str],
        contestant: str,
        options: Mapping[str, Any],
        *,
        rounds: int | None = None,
        add: Callable[[dict[str, Any], Any], None] | None = None,
        **facts: Any,
    ) -> None:
        option = request.config.getoption
        rounds = int(option("--bench-step-rounds")) if rounds is None else rounds
        threads = step_threads(int(option("--bench-step-threads")))
        common = {**options, "device": bench_device, "threads": threads}
        key = (facts["bench"], facts["case"], facts["phase"])
        outcome = race_once(races, key, lambda: run_workers(contestants, common, twins, rounds))
        info = step_info(outcome, contestant, **facts, environment={**bench_machine, "threads": threads})
        if add is not None:
            add(info, outcome)
        replay(benchmark, " ".join(key), outcome.race.seconds[contestant], info)

    return enter
