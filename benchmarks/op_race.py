"""Races of one op's contestants on its cases: correctness gate, times, peak memory, least work, promises."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from interleave import Clock, Race, check_result, make_clock, run_race
from machine import large_blocks_kept, on_threads, pinned, processors
from op_setting import DTYPES, FORWARD, PHASES, TRAINING, Call, Setting
from torch import Tensor

import nasdet
from nasdet import _dispatch
from nasdet._cases import Case
from nasdet.measure.memory import peak_memory

__all__ = ["DTYPES", "FORWARD", "PHASES", "TRAINING", "Call", "Contestant", "OpBench", "Setting", "Target", "compiled"]

# Relative L2 distance to the float64 reference. Rivals get more room: eager in bfloat16 rounds every intermediate map,
# and PyTorch's channels_last group norm puts some activations on the other side of ReLU's kink.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
RIVAL_TOLERANCE = {"fp32": 1e-2, "bf16": 5e-2}
SHORTEST = 2e-3  # seconds that one timing takes at least, where calls may be repeated


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
        return None

    def place(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call`` on the contestant's own threads, if it has any."""
        return on_threads(self.threads)(call) if self.threads else call


@dataclass(frozen=True)
class Target:
    """What the project promises: ``contestant`` ``factor`` times better than ``over``; without a rival, at most
    ``at_most`` seconds or bytes.
    """

    contestant: str
    phase: str
    over: str = ""
    factor: float = 0.0
    quantity: str = "time"  # "peak_memory" of the tensors; "resident_memory" of the process, or of the tensors if more
    at_most: float = 0.0
    cases: Sequence[str] = ()  # in these only; in all when empty
    device: str = "cpu"
    dtypes: Sequence[str] = ("fp32",)


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
    repeatable: bool = False  # no contestant overwrites its inputs: calls too short for the clock are repeated

    @property
    def name(self) -> str:
        return self.file or self.op.name

    def large_cases(self) -> list[Case]:
        return [case for case in self.cases or self.op.cases if case.large]


@dataclass
class Outcome:
    """A finished race: times, peak bytes over the inputs by contestant and phase, the work, who could not run, and the
    relative L2 errors of the outputs."""

    case: str
    race: Race
    memory: dict[str, dict[str, int]]
    bytes_moved: int | None
    flops: float | None
    absent: dict[str, str] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def compiled(reference: Call, mode: str | None = None) -> Call:
    """``torch.compile`` of the reference, static shapes, for the present number of threads."""
    return torch.compile(reference, fullgraph=True, dynamic=False, mode=mode)


def run_op(bench: OpBench, case: Case, dtype: str, phase: str, *, device: str, threads: int, rounds: int) -> Outcome:
    """Check every contestant against the reference, then time them interleaved, then probe their memory.

    Before each timing the inputs are written anew, so that everyone finds them in the same state of the caches. Where
    calls may be repeated a timing of short ones is a mean, and finds the caches as the call before it left them.
    """
    torch._dynamo.reset()  # otherwise the cases share one function's limit of recompilations
    setting = Setting(case, dtype, device, bench.op.differentiable)
    calls, absent, errors = _admitted(bench, setting, case, dtype, phase, device, threads)
    step = setting.forward if phase == FORWARD else setting.train
    places = {c.name: c.place for c in bench.contestants}
    timed = {name: places[name](functools.partial(step, call)) for name, call in calls.items()}
    clock = make_clock(device)
    with pinned(threads):
        repeats = {name: _repeats(clock, call) if bench.repeatable else 1 for name, call in timed.items()}
        timed = {name: functools.partial(_repeat, call, repeats[name]) for name, call in timed.items()}
        with large_blocks_kept():
            race = run_race(timed, rounds=rounds, clock=clock, prepare=setting.restore)
        memory = {name: places[name](_memory)(setting, call, phase, device) for name, call in calls.items()}
    seconds = {name: [time / repeats[name] for time in times] for name, times in race.seconds.items()}
    moved, flops = _work(bench, setting, phase)
    return Outcome(case.id, Race(seconds), memory, moved, flops, absent, errors)


def _admitted(
    bench: OpBench, setting: Setting, case: Case, dtype: str, phase: str, device: str, threads: int
) -> tuple[dict[str, Call], dict[str, str], dict[str, float]]:
    """The contestants whose results are the reference's, why others are absent, and errors. Raises WrongResult."""
    reference = bench.reference or bench.op.reference
    exact = bench.exact
    expected = bench.comparable((setting if exact else setting.in_float64()).results(reference, phase))
    calls: dict[str, Call] = {}
    absent: dict[str, str] = {}
    errors: dict[str, float] = {}
    for contestant in bench.contestants:
        if reason := contestant.why_not(case, phase, device, threads):
            absent[contestant.name] = reason
            continue
        ours = contestant.name.startswith("nasdet")
        tolerance = 0.0 if exact else (TOLERANCE if ours else RIVAL_TOLERANCE)[dtype]
        try:
            call = contestant.make()
            results = contestant.place(setting.results)(call, phase)
            if contestant.same:
                distances = check_result(contestant.name, bench.comparable(results), expected, tolerance)
                errors[contestant.name] = distances[0]
        except Exception as error:
            if not contestant.may_fail:
                raise
            absent[contestant.name] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        calls[contestant.name] = call
    return calls, absent, errors


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


def row_info(bench: OpBench, outcome: Outcome, name: str, dtype: str, phase: str, device: str) -> dict[str, Any]:
    """What a row says beside its times: work, memory, ratios to every rival, promises kept or not."""
    seconds = outcome.race.median(name)
    rivals = [rival for rival in outcome.race.seconds if rival != name]
    info: dict[str, Any] = {"contestant": name, "dtype": dtype, "phase": phase}
    info |= {"median_s": seconds, "iqr_s": outcome.race.iqr(name)}
    if name in outcome.errors:
        info["error"] = outcome.errors[name]
    if outcome.bytes_moved is not None:
        info |= {"bytes_floor": outcome.bytes_moved, "bytes_per_s": outcome.bytes_moved / seconds}
    if outcome.flops is not None:
        info |= {"flops": outcome.flops, "flops_per_s": outcome.flops / seconds}
    return info | {
        "peak_memory": outcome.memory[name],
        "speedup_over": {rival: outcome.race.speedup(name, rival) for rival in rivals},
        "targets": _targets(bench, outcome, name, dtype, phase, device),
    }


def _targets(
    bench: OpBench, outcome: Outcome, name: str, dtype: str, phase: str, device: str
) -> list[dict[str, Any]]:
    rows = []
    for target in bench.targets:
        if (target.contestant, target.phase, target.device) != (name, phase, device) or dtype not in target.dtypes:
            continue
        if target.cases and outcome.case not in target.cases:
            continue
        if not target.over:
            own = outcome.race.median(name) if target.quantity == "time" else _most(outcome.memory[name], phase)
            row = {"quantity": target.quantity, "at_most": target.at_most, "value": own}
            rows.append(row | {"met": own <= target.at_most})
        elif target.over in outcome.race.seconds:
            row = {"quantity": target.quantity, "over": target.over, "at_least": target.factor}
            ratio = _ratio(outcome, name, target, phase)
            rows.append(row | {"ratio": ratio, "met": ratio >= target.factor})
    return rows


def _ratio(outcome: Outcome, name: str, target: Target, phase: str) -> float:
    if target.quantity == "time":
        return outcome.race.speedup(name, target.over)
    theirs, ours = outcome.memory[target.over], outcome.memory[name]
    if target.quantity == "resident_memory":
        return _most(theirs, phase) / max(_most(ours, phase), 1)
    return theirs[phase] / max(ours[phase], 1)


def _most(memory: Mapping[str, int], phase: str) -> int:
    """The peak with what an op takes from malloc beside its tensors, where that is known."""
    return max(memory[phase], memory.get(f"{phase}, resident", 0))


def _memory(setting: Setting, call: Call, phase: str, device: str) -> dict[str, int]:
    """Peak bytes over the inputs: of tensors in use, exactly; and of the resident set, heap holes included."""
    probes: dict[str, Callable[[], Any]] = {FORWARD: functools.partial(setting.forward, call)}
    if phase == TRAINING:
        probes = {
            "graph kept": functools.partial(setting.graph, call),
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
