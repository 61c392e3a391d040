"""Races of one op's contestants on its large cases: inputs, correctness gate, times, peak memory, floor of the work."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from interleave import Race, check_result, make_clock, run_race
from machine import pinned
from torch import Tensor

from nasdet import _dispatch
from nasdet._cases import Case, Inputs
from nasdet.measure.memory import peak_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PHASES = ("forward", "forward+backward")
# Relative L2 distance to the float64 reference. Rivals get more room: eager in bfloat16 rounds every intermediate map,
# and PyTorch's channels_last group norm puts some activations on the other side of ReLU's kink.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
RIVAL_TOLERANCE = {"fp32": 1e-2, "bf16": 5e-2}
FORWARD, TRAINING = PHASES

Call = Callable[..., Tensor]


@dataclass(frozen=True)
class Contestant:
    """One way to compute the op. ``make()`` returns a function with the op's arguments; it may compile."""

    name: str
    make: Callable[[], Call]
    phases: Sequence[str] = PHASES
    devices: Sequence[str] = ("cpu", "cuda")
    may_fail: bool = False  # a rival whose compiler may not be there; a failure of anyone else is an error


@dataclass(frozen=True)
class Target:
    """What the project promises: ``contestant`` ``factor`` times better than ``over`` (CPU, float32)."""

    contestant: str
    phase: str
    over: str
    factor: float
    quantity: str = "time"  # or "peak_memory"


@dataclass(frozen=True)
class OpBench:
    """An op's benchmark: contestants, promises, and the least work that a call takes.

    ``flops_per_value[phase]``: operations per element of one input map, nominal: multiply, add, compare, each 1.
    """

    op: _dispatch.Op
    contestants: Sequence[Contestant]
    targets: Sequence[Target]
    flops_per_value: Mapping[str, float]

    def large_cases(self) -> list[Case]:
        return [case for case in self.op.cases if case.large]


@dataclass
class Outcome:
    """A finished race: times, peak bytes over the inputs by contestant and phase, the work, and who could not run."""

    race: Race
    memory: dict[str, dict[str, int]]
    bytes_moved: int
    flops: float
    absent: dict[str, str] = field(default_factory=dict)


class _Source(torch.autograd.Function):
    """A map as the layer before would hand it over: fresh, part of the graph, its gradient used up by its producer.

    It returns a standing buffer and drops the gradient, so that what is measured is the op's own cost, not a
    convolution's, and no gradient outlives its use as those of leaves do.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, buffer: Tensor, sink: list[Tensor | None] | None, index: int) -> Tensor:
        ctx.sink, ctx.index = sink, index
        return buffer

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, None, None, None]:
        if ctx.sink is not None:
            ctx.sink[ctx.index] = grads[0].clone()
        return None, None, None, None


class Setting:
    """The inputs of one case, and calls of a contestant on them."""

    def __init__(self, case: Case, dtype: str, device: str) -> None:
        arguments, self.options = case.make(Inputs(DTYPES[dtype], device))
        xs, *rest = arguments
        self.pristine: list[Tensor] = list(xs)
        self.buffers = [x.clone() for x in self.pristine]
        self.rest = [r.clone().requires_grad_() if isinstance(r, Tensor) else r for r in rest]
        self.parameters = [r for r in self.rest if isinstance(r, Tensor)]
        self.anchor = torch.ones((), device=device, requires_grad=True)
        self.grad = torch.randn_like(self.pristine[0])
        self.values = self.pristine[0].numel()
        self.map_bytes = self.pristine[0].nbytes

    def in_float64(self) -> Setting:
        """The same inputs, exactly, for the reference."""
        twin = copy.copy(self)
        twin.pristine = [x.double() for x in self.pristine]
        twin.buffers = [x.clone() for x in twin.pristine]
        twin.rest = [r.detach().double().requires_grad_() if isinstance(r, Tensor) else r for r in self.rest]
        twin.parameters = [r for r in twin.rest if isinstance(r, Tensor)]
        twin.grad = self.grad.double()
        return twin

    def restore(self) -> None:
        """Give every buffer its first values again: a contestant may have overwritten them."""
        with torch.no_grad():
            for buffer, value in zip(self.buffers, self.pristine, strict=True):
                buffer.copy_(value)

    def forward(self, call: Call) -> Tensor:
        """Inference: no graph."""
        with torch.no_grad():
            return call(self.buffers, *self.rest, **self.options)

    def graph(self, call: Call, sink: list[Tensor | None] | None = None) -> Tensor:
        """The forward pass of training, its graph kept."""
        xs = [_Source.apply(self.anchor, buffer, sink, index) for index, buffer in enumerate(self.buffers)]
        return call(xs, *self.rest, **self.options)

    def train(self, call: Call, sink: list[Tensor | None] | None = None) -> Tensor:
        """Forward and backward; the parameters' gradients are left in ``.grad``."""
        for parameter in self.parameters:
            parameter.grad = None
        y = self.graph(call, sink)
        y.backward(self.grad)
        return y.detach()

    def results(self, call: Call, phase: str) -> list[Tensor]:
        """All that a call computes, to compare: the output, and in training every gradient."""
        self.restore()
        if phase == FORWARD:
            return [self.forward(call)]
        sink: list[Tensor | None] = [None] * len(self.buffers)
        y = self.train(call, sink)
        grads = [*sink, *(parameter.grad for parameter in self.parameters)]
        missing = [index for index, grad in enumerate(grads) if grad is None]
        assert not missing, f"no gradient for arguments {missing}"
        return [y, *(grad.clone() for grad in grads if grad is not None)]


def compiled(reference: Call, mode: str | None = None) -> Call:
    """``torch.compile`` of the reference, static shapes, for the present number of threads."""
    return torch.compile(reference, fullgraph=True, dynamic=False, mode=mode)


def run_op(bench: OpBench, case: Case, dtype: str, phase: str, *, device: str, threads: int, rounds: int) -> Outcome:
    """Check every contestant against the reference, then time them interleaved, then probe their memory.

    Before each call the inputs are written anew, so that everyone finds them in the same state of the caches.
    """
    torch._dynamo.reset()  # otherwise the cases share one function's limit of recompilations
    setting = Setting(case, dtype, device)
    expected = setting.in_float64().results(bench.op.reference, phase)
    calls: dict[str, Call] = {}
    absent: dict[str, str] = {}
    for contestant in bench.contestants:
        if phase not in contestant.phases or device not in contestant.devices:
            absent[contestant.name] = f"not for {phase} on {device}"
            continue
        try:
            call = contestant.make()
            results = setting.results(call, phase)
        except Exception as error:
            if not contestant.may_fail:
                raise
            absent[contestant.name] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        ours = contestant.name.startswith("nasdet")
        check_result(contestant.name, results, expected, (TOLERANCE if ours else RIVAL_TOLERANCE)[dtype])
        calls[contestant.name] = call
        del results
    del expected
    step = setting.forward if phase == FORWARD else setting.train
    timed = {name: functools.partial(step, call) for name, call in calls.items()}
    with pinned(threads):
        race = run_race(timed, rounds=rounds, clock=make_clock(device), prepare=setting.restore)
        memory = {name: _memory(setting, call, phase, device) for name, call in calls.items()}
    maps = len(setting.buffers)
    moved = (maps + 1) + (0 if phase == FORWARD else 2 * maps + 1)
    flops = bench.flops_per_value[phase] * maps * setting.values
    return Outcome(race, memory, moved * setting.map_bytes, flops, absent)


def row_info(bench: OpBench, outcome: Outcome, name: str, dtype: str, phase: str, device: str) -> dict[str, Any]:
    """What a row says beside its times: work, memory, ratios to every rival, promises kept or not."""
    seconds = outcome.race.median(name)
    rivals = [rival for rival in outcome.race.seconds if rival != name]
    return {
        "contestant": name,
        "dtype": dtype,
        "phase": phase,
        "median_s": seconds,
        "iqr_s": outcome.race.iqr(name),
        "bytes_floor": outcome.bytes_moved,
        "flops": outcome.flops,
        "bytes_per_s": outcome.bytes_moved / seconds,
        "flops_per_s": outcome.flops / seconds,
        "peak_memory": outcome.memory[name],
        "speedup_over": {rival: outcome.race.speedup(name, rival) for rival in rivals},
        "targets": [] if device == "cuda" or dtype != "fp32" else _targets(bench, outcome, name, phase),
    }


def _targets(bench: OpBench, outcome: Outcome, name: str, phase: str) -> list[dict[str, Any]]:
    rows = []
    for target in bench.targets:
        if target.contestant != name or target.phase != phase or target.over not in outcome.race.seconds:
            continue
        if target.quantity == "time":
            ratio = outcome.race.speedup(name, target.over)
        else:
            ratio = outcome.memory[target.over][phase] / max(outcome.memory[name][phase], 1)
        row = {"quantity": target.quantity, "over": target.over, "at_least": target.factor}
        rows.append(row | {"ratio": ratio, "met": ratio >= target.factor})
    return rows


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
    return peak_memory(probe, device=device, tensors_only=tensors_only)
