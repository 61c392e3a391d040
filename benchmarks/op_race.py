"""Races of one op's contestants on its cases: correctness gate, times, peak memory, least work, promises."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from backends import check_backends, chosen_backends
from interleave import Clock, Race, check_result, make_clock, run_race
from machine import float32_products, large_blocks_kept, on_threads, pinned, processors
from op_setting import DTYPES, FORWARD, PHASES, TF32, TRAINING, Call, Setting
from promises import KEPT, Measured, Target, verdict
from torch import Tensor

import nasdet
from nasdet import _dispatch
from nasdet._cases import Case
from nasdet.measure.memory import peak_memory

__all__ = [
    "DTYPES",
    "FORWARD",
    "PHASES",
    "TF32",
    "TRAINING",
    "Call",
    "Contestant",
    "OpBench",
    "Setting",
    "Target",
    "compiled",
]

# Relative L2 distance to the float64 reference. Rivals get more room: eager in bfloat16 rounds every intermediate map,
# and PyTorch's channels_last group norm puts some activations on the other side of ReLU's kink. TF32 has 10 bits of
# mantissa, and a matrix unit drops the others of both operands: a product is off by less than 2 * 2^-10 of itself, and
# so is, over many outputs, the L2 norm of a sum of products with random signs.
TOLERANCE = {"fp32": 1e-4, TF32: 2**-9, "bf16": 1e-2}
RIVAL_TOLERANCE = {"fp32": 1e-2, TF32: 1e-2, "bf16": 5e-2}
SHORTEST = 2e-3  # seconds that one timing takes at least on the CPU, where calls may be repeated


@dataclass(frozen=True)
class Contestant:
    """One way to compute the op. ``make()`` returns a function with the op's arguments; it may compile."""

    name: str
    make: Callable[[], Call]
    phases: Sequence[str] = PHASES
    devices: Sequence[str] = ("cpu", "cuda")
    may_fail: bool = False  # a rival that may be missing or wrong: then absent, for that reason; in others an error
    cases: Sequence[str] = ()  # runs in these only; in all when empty
    threads: int = 0  # runs on so many, whatever the others do (CPU); 0: as the others
    same: bool = True  # computes the op; a yardstick that computes something else of the same cost is not checked
    library: str = ""  # that it needs; on the CPU it is raced in an environment of its own (`make bench-rivals`)

    @property
    def ours(self) -> bool:
        return self.name.startswith("nasdet")

    def enters(self, case: Case) -> bool:
        """Whether it races in this case at all."""
        return not self.cases or case.id in self.cases

    def why_not(self, case: Case, phase: str, device: str, threads: int) -> str | None:
        """Why it does not take part, or None."""
        if phase not in self.phases or device not in self.devices:
            return f"not for {phase} on {device}"
        if not self.enters(case):
            return f"not for {case.id}"
        if self.threads and (device != "cpu" or threads >= self.threads):
            return f"only beside contestants on fewer than {self.threads} threads"
        if self.threads > len(processors()):
            return f"fewer than {self.threads} processors"
        if self.library and device == "cpu" and importlib.util.find_spec(self.library) is None:
            return f"{self.library} is not installed"
        return None

    def place(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call`` on the contestant's own threads, if it has any."""
        return on_threads(self.threads)(call) if self.threads else call


@dataclass(frozen=True)
class OpBench:
    """An op's benchmark: contestants, promises, and the least work that a call takes.

    ``flops_per_value[phase]``: operations per element of one input map, nominal: multiply, add, compare, each 1; for
    ops that map P maps to one. Others give ``work(setting, phase) -> (bytes, operations or None)``, or neither.
    """

    op: _dispatch.Op
    contestants: Sequence[Contestant]
    targets: Sequence[Target]
    flops_per_value: Mapping[str, float] | None = None
    work: Callable[[Setting, str], tuple[int, float | None]] | None = None
    cases: Sequence[Case] = ()  # the op's own large ones when empty
    file: str = ""  # the result file, that several ops may share; the op's name when empty
    reference: Call | None = None  # the op's own when None
    exact: bool = False  # the reference decides in the inputs' own dtype, and results must be equal
    comparable: Callable[[list[Tensor]], list[Tensor]] = list  # of results whose order rounding may change
    repeatable: bool = False  # no contestant overwrites its inputs: calls too short for the CPU's clock are repeated

    @property
    def name(self) -> str:
        return self.file or self.op.name

    def large_cases(self) -> list[Case]:
        return [case for case in self.cases or self.op.cases if case.large]


@dataclass
class Admitted:
    """Who takes part in a race, and who does not: by its rules, or because it ``failed``."""

    calls: dict[str, Call] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)  # relative L2, of the first output
    backends: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """A finished race: times, peak bytes over the inputs by contestant and phase, the work, and who was in it."""

    case: str
    race: Race
    memory: dict[str, dict[str, int]]
    bytes_moved: int | None
    flops: float | None
    entered: Admitted = field(default_factory=Admitted)

    @property
    def absent(self) -> dict[str, str]:
        return self.entered.absent | self.entered.failed


def compiled(reference: Call, mode: str | None = None) -> Call:
    """``torch.compile`` of the reference, static shapes, for the present number of threads."""
    return torch.compile(reference, fullgraph=True, dynamic=False, mode=mode)


def run_op(bench: OpBench, case: Case, dtype: str, phase: str, *, device: str, threads: int, rounds: int) -> Outcome:
    """Check every contestant against the reference, then time them interleaved, then probe their memory.

    Before each timing the inputs are written anew, so that everyone finds them in the same state of the caches. Where
    calls may be repeated a timing of short ones on the CPU is a mean, and finds the caches as the call before it left
    them.
    Products of float32 are float32's in ``"fp32"``, and may be TF32's for everyone in ``"tf32"``.
    """
    torch._dynamo.reset()  # otherwise the cases share one function's limit of recompilations
    with float32_products(tf32=dtype == TF32):
        setting = Setting(case, dtype, device, bench.op.differentiable)
        admitted = _admitted(bench, setting, case, dtype, phase, device, threads)
        return _raced(bench, setting, admitted, phase, device, threads, rounds)


def _raced(
    bench: OpBench, setting: Setting, admitted: Admitted, phase: str, device: str, threads: int, rounds: int
) -> Outcome:
    calls, step = admitted.calls, setting.forward if phase == FORWARD else setting.train
    places = {c.name: c.place for c in bench.contestants}
    timed = {name: places[name](functools.partial(step, call)) for name, call in calls.items()}
    clock = make_clock(device)
    # A GPU's events are exact without, and many calls in a row would take the host longer than the clock hides.
    repeatable = bench.repeatable and device == "cpu"
    with pinned(threads):
        repeats = {name: _repeats(clock, call) if repeatable else 1 for name, call in timed.items()}
        timed = {name: functools.partial(_repeat, call, repeats[name]) for name, call in timed.items()}
        with large_blocks_kept():
            race = run_race(timed, rounds=rounds, clock=clock, prepare=setting.restore)
        memory = {name: places[name](_memory)(setting, call, phase, device) for name, call in calls.items()}
    seconds = {name: [time / repeats[name] for time in times] for name, times in race.seconds.items()}
    return Outcome(setting.case, Race(seconds), memory, *_work(bench, setting, phase), admitted)


def _admitted(
    bench: OpBench, setting: Setting, case: Case, dtype: str, phase: str, device: str, threads: int
) -> Admitted:
    """The contestants whose results are the reference's, why others are absent, and errors.

    Raises WrongResult and WrongBackend.
    """
    reference = bench.reference or bench.op.reference
    expected = bench.comparable((setting if bench.exact else setting.in_float64()).results(reference, phase))
    admitted = Admitted()
    for contestant in bench.contestants:
        name = contestant.name
        if reason := contestant.why_not(case, phase, device, threads):
            admitted.absent[name] = reason
            continue
        tolerance = 0.0 if bench.exact else (TOLERANCE if contestant.ours else RIVAL_TOLERANCE)[dtype]
        try:
            call = contestant.make()
            with chosen_backends() if contestant.ours else contextlib.nullcontext({}) as chosen:
                results = contestant.place(setting.results)(call, phase)
            check_backends(name, chosen, device, an_op=contestant.ours)
            if contestant.same:
                admitted.errors[name] = check_result(name, bench.comparable(results), expected, tolerance)[0]
        except Exception as error:
            if not contestant.may_fail:
                raise
            admitted.failed[name] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        admitted.calls[name] = call
        if chosen:
            admitted.backends[name] = ", ".join(sorted({backend for names in chosen.values() for backend in names}))
    return admitted


def _repeats(clock: Clock, call: Callable[[], Any]) -> int:
    """How often a call is to be repeated to take ``SHORTEST`` seconds."""
    shortest = min(clock(call) for _ in range(3))
    return max(1, min(1000, round(SHORTEST / max(shortest, 1e-9))))


def _repeat(call: Callable[[], Any], times: int) -> None:
    for _ in range(times):
        call()


def _work(bench: OpBench, setting: Setting, phase: str) -> tuple[int | None, float | None]:
    """The least bytes and operations of a call."""
    if bench.work is not None:
        return bench.work(setting, phase)
    if bench.flops_per_value is None:
        return None, None
    maps = setting.maps
    moved = (len(maps) + 1) + (0 if phase == FORWARD else 2 * len(maps) + 1)
    return moved * maps[0].nbytes, bench.flops_per_value[phase] * len(maps) * maps[0].numel()


def row_info(
    bench: OpBench,
    outcome: Outcome,
    name: str,
    dtype: str,
    phase: str,
    device: str,
    peaks: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What a row says beside its times: backend, work, memory, ratios to every rival, promises kept or not.

    ``peaks``: the machine's own, as :func:`machine.measured_peaks` gives them.
    """
    seconds, entered = outcome.race.median(name), outcome.entered
    rivals = [rival for rival in outcome.race.seconds if rival != name]
    info: dict[str, Any] = {"contestant": name, "dtype": dtype, "phase": phase}
    info |= {"median_s": seconds, "iqr_s": outcome.race.iqr(name)}
    if name in entered.backends:
        info["backend"] = entered.backends[name]
    if name in entered.errors:
        info["error"] = entered.errors[name]
    if outcome.bytes_moved is not None:
        info |= {"bytes_floor": outcome.bytes_moved, "bytes_per_s": outcome.bytes_moved / seconds}
        if peaks:
            info["copy_share"] = info["bytes_per_s"] / peaks["copy_bytes_per_s"]
    if outcome.flops is not None:
        info |= {"flops": outcome.flops, "flops_per_s": outcome.flops / seconds}
        if peaks and dtype in peaks["matrix_flops_per_s"]:
            info["matrix_share"] = info["flops_per_s"] / peaks["matrix_flops_per_s"][dtype]
    measured = Measured(outcome.race, outcome.memory, entered.failed, info.get("matrix_share"))
    verdicts = [
        verdict(target, measured)
        for target in bench.targets
        if target.concerns(name, outcome.case, dtype, phase, device)
    ]
    return info | {
        "peak_memory": outcome.memory[name],
        "speedup_over": {rival: outcome.race.speedup(name, rival) for rival in rivals},
        "targets": [row for row in verdicts if row is not None],
    }


def _memory(setting: Setting, call: Call, phase: str, device: str) -> dict[str, int]:
    """Peak bytes over the inputs: of tensors in use, exactly; and of the resident set, heap holes included."""
    probes: dict[str, Callable[[], Any]] = {FORWARD: functools.partial(setting.forward, call)}
    if phase == TRAINING:
        probes = {
            KEPT: functools.partial(setting.graph, call),
            TRAINING: functools.partial(setting.train, call),
        }
    return {name: _peak(setting, probe, device, True) for name, probe in probes.items()} | {
        f"{name}, resident": _peak(setting, probe, device, False) for name, probe in probes.items() if device == "cpu"
    }


def _peak(setting: Setting, probe: Callable[[], Any], device: str, tensors_only: bool) -> int:
    setting.restore()
    for parameter in setting.parameters:
        parameter.grad = None
    nasdet.release_scratch()  # what a first call would take
    return peak_memory(probe, device=device, tensors_only=tensors_only)
