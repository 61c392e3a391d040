"""Measured latency on this device: of one module, and of all blocks of a search space as a table.

A net's latency is predicted as the sum of its blocks': N architectures cost as many measurements as there are
blocks, not N. How far such a sum is from whole nets is measured too (:meth:`LatencyTable.check`).
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nasdet._checks import check_whole
from nasdet._files import write_json
from nasdet.measure.latency_table import Block, Blocks, Latency, LatencyTable, Net, Record, Setting
from nasdet.measure.machine import device_name, parse_device, versions
from nasdet.nn import accelerate

Name = TypeVar("Name")
Timer = Callable[[Callable[[], Any]], float]
"""Runs a call and returns its seconds."""
DTYPES = ("float32", "bfloat16", "float16")
ROUNDS, WARMUP = 15, 2


def wall_time(call: Callable[[], Any]) -> float:
    """Seconds that a call on the CPU takes; freeing what it returns is within the time, as in a net."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def thread_time(call: Callable[[], Any]) -> float:
    """Seconds that this thread works on a call, without those in which the machine does something else."""
    start = time.thread_time()
    call()
    return time.thread_time() - start


def cuda_time(call: Callable[[], Any]) -> float:
    """Seconds between two events around the call on the current CUDA stream."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


TIMERS: dict[str, Timer] = {"wall": wall_time, "thread": thread_time, "cuda": cuda_time}


@dataclass(frozen=True)
class Conditions:
    """Under what a module is timed: ``device``, ``threads`` (of the CPU; None: as many as torch has now), ``dtype`` (of
    :data:`DTYPES`), memory order, and ``clock``: on a CPU ``"wall"``, or ``"thread"`` for the time that the only thread
    works, on a machine with other work to do; CUDA events (``"cuda"``) on a GPU; None: wall or events. Always in
    evaluation mode, without gradients, as in inference."""

    device: str | torch.device = "cpu"
    threads: int | None = None
    dtype: str = "float32"
    channels_last: bool = True
    clock: str | None = None

    def __post_init__(self) -> None:
        kind = parse_device(self.device).type
        if kind == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device must be one that is here, got {self.device} but torch finds no GPU")
        if self.threads is not None:
            check_whole("threads", self.threads, 1)
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        clocks = ("cuda",) if kind == "cuda" else ("wall", "thread")
        if self.clock is None:
            object.__setattr__(self, "clock", clocks[0])
        if self.clock not in clocks:
            raise ValueError(f"clock must be {' or '.join(clocks)} on {kind}, got {self.clock!r}")
        if self.clock == "thread" and self.threads != 1:
            raise ValueError(f"threads must be 1 for the thread's clock, got {self.threads}")

    def setting(self, blocks: Blocks, size: tuple[int, int]) -> Setting:
        """What a table of these conditions says of itself."""
        threads = torch.get_num_threads() if self.threads is None else self.threads
        name = device_name(torch.device(self.device))
        return Setting(
            space=dict(blocks.settings),
            size=(int(size[0]), int(size[1])),
            device=name,
            threads=threads,
            dtype=self.dtype,
            channels_last=self.channels_last,
            clock=str(self.clock),
            versions=versions(),
        )

    def prepared(self, module: nn.Module) -> nn.Module:
        """``module`` itself, moved to the device, in the dtype, the memory order and evaluation mode."""
        module = module.to(self.device, getattr(torch, self.dtype)).eval()
        return module.to(memory_format=self._layout)  # type: ignore[call-overload]  # missing from its stub

    def input(self, shape: tuple[int, ...]) -> Tensor:
        """A random input, the same every time."""
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        x = x.to(self.device, getattr(torch, self.dtype))
        return x.to(memory_format=self._layout) if x.dim() == 4 else x

    @property
    def timer(self) -> Timer:
        """What times a call."""
        return TIMERS[str(self.clock)]

    @property
    def _layout(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Threads as wanted, no gradients, no garbage collection; afterwards all is as before, random numbers too."""
        device = torch.device(self.device)
        threads, collecting = torch.get_num_threads(), gc.isenabled()
        current = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with torch.random.fork_rng(devices=[]), torch.inference_mode(), current:
            try:
                torch.set_num_threads(threads if self.threads is None else self.threads)
                gc.disable()
                yield
            finally:
                torch.set_num_threads(threads)
                if collecting:
                    gc.enable()


def measure_module(
    module: nn.Module,
    input_shape: tuple[int, ...],
    device: str | torch.device = "cpu",
    *,
    threads: int | None = None,
    dtype: str = "float32",
    channels_last: bool = True,
    rounds: int = ROUNDS,
    warmup: int = WARMUP,
    clock: str | None = None,
    timer: Timer | None = None,
) -> Latency:
    """The latency of ``module(x)`` with a random ``x`` of ``input_shape``: median and interquartile range in ms.

    A copy of the module is timed, in evaluation mode, without gradients, in ``dtype`` and channels_last as in
    inference; ``warmup`` calls come first. Other arguments: see :class:`Conditions`; ``timer`` takes the clock's
    place. Modules are best compared side by side (:func:`measure_table`): what slows the machine then slows all.

    Raises ``ValueError`` for a device, dtype or number out of range.
    """
    conditions = Conditions(device, threads, dtype, channels_last, clock)
    samples: dict[str, list[float]] = {"module": []}
    with conditions.hold():
        calls = _calls({"module": ("module", lambda: copy.deepcopy(module), tuple(input_shape))}, conditions)
        run_rounds(calls, samples, rounds, warmup, timer or conditions.timer)
    return Latency.of(samples["module"])


def run_rounds(
    calls: Mapping[Name, Callable[[], Any]],
    samples: Mapping[Name, list[float]],
    rounds: int,
    warmup: int,
    timer: Timer,
    after: Callable[[int], Any] = lambda done: None,
) -> None:
    """Call each of ``calls`` once a round until each has ``rounds`` ``samples``, in milliseconds.

    Each round begins one call later than the one before. Warm-up rounds go before, without samples. Samples that are
    there count: a call takes part from the round that it lacks. ``after(done)`` is called after each round with the
    number of rounds that all have.
    """
    check_whole("rounds", rounds, 1)
    check_whole("warmup", warmup, 0)
    if not calls:
        return
    have = min(len(samples[name]) for name in calls)
    for index in range(have - warmup, rounds):
        due = [name for name in calls if len(samples[name]) < rounds and (index < have or len(samples[name]) <= index)]
        first = index % len(due)
        taken = {name: timer(calls[name]) * 1e3 for name in due[first:] + due[:first]}
        if index < have:
            continue
        for name, ms in taken.items():
            samples[name].append(ms)
        gc.collect()
        after(index + 1)


def measure_table(
    blocks: Blocks,
    size: tuple[int, int],
    path: str | Path,
    device: str | torch.device = "cpu",
    *,
    threads: int | None = None,
    dtype: str = "float32",
    channels_last: bool = True,
    rounds: int = ROUNDS,
    warmup: int = WARMUP,
    nets: int = 0,
    seed: int = 0,
    clock: str | None = None,
    timer: Timer | None = None,
    after: Callable[[int, int], Any] = lambda done, rounds: None,
) -> LatencyTable:
    """Measure all blocks of a space for images of ``size`` (height, width), and keep them in the file ``path``.

    Equal blocks are timed once. Every round times each block once (see :func:`measure_module` for how), and so each of
    ``nets`` whole nets of random cards drawn with ``seed``, which the table's predictions are checked against. On a CPU
    their convolutions are accelerated (:func:`nasdet.accelerate`), as in the library's training and detection. The
    file is written after every round: a second call with the same settings measures only what is missing, be it rounds
    after an interruption, further rounds, blocks or nets. ``after(done, rounds)`` is told of each round.

    Raises ``ValueError`` for a file that holds something else, or was measured under other settings: it is left alone.
    """
    conditions = Conditions(device, threads, dtype, channels_last, clock)
    check_whole("rounds", rounds, 1)
    check_whole("nets", nets, 0)
    setting = conditions.setting(blocks, size)
    record = _opened(Path(path), setting)
    parts: dict[tuple[str, str], Block] = {("block", part[0]): part for part in blocks.blocks(setting.size)}
    samples = {(kind, key): record.rows.setdefault(key, []) for kind, key in parts}
    for key, card in _random_cards(blocks, nets, seed).items():
        net = record.nets.setdefault(key, Net(card.to_json(), list(blocks.keys(card))))
        parts["net", key], samples["net", key] = blocks.network(card, setting.size), net.samples
    missing = {name: part for name, part in parts.items() if len(samples[name]) < rounds}
    with conditions.hold():
        calls = _calls(missing, conditions, accelerated=True)  # as the library runs them

        def save(done: int) -> None:
            write_json(path, record.to_json())
            after(done, rounds)

        run_rounds(calls, samples, rounds, warmup, timer or conditions.timer, save)
    return LatencyTable(blocks, record)


def _opened(path: Path, setting: Setting) -> Record:
    """The file's record, if it is there, or a new one."""
    if not path.exists():
        return Record(setting, datetime.now(timezone.utc).isoformat(timespec="seconds"))
    if not path.is_file():  # a device such as /dev/full may be read without end
        raise ValueError(f"{path}: must be a file, or not there yet, got a folder or a device")
    record = Record.load(path)
    if difference := setting.difference(record.setting):
        raise ValueError(f"{path}: {difference}; measure into another file, or remove this one")
    return record


def _random_cards(blocks: Blocks, count: int, seed: int) -> dict[str, Any]:
    """Different cards by key; fewer where the space has hardly more."""
    rng, cards = Random(seed), dict[str, Any]()
    for _ in range(100 * count):
        if len(cards) == count:
            break
        card = blocks.random(rng)
        cards.setdefault(card.key, card)
    return cards


def _calls(
    parts: Mapping[Name, Block], conditions: Conditions, accelerated: bool = False
) -> dict[Name, Callable[[], Any]]:
    """What runs each part on its input; parts of one shape share it."""
    inputs = {shape: conditions.input(shape) for shape in {shape for _, _, shape in parts.values()}}
    modules = {name: conditions.prepared(make()) for name, (_, make, _) in parts.items()}
    if accelerated:
        for module in modules.values():
            accelerate(module)
    return {name: partial(module, inputs[parts[name][2]]) for name, module in modules.items()}
