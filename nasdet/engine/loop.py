"""The one loop: every training and every gradient search of this library runs its steps here.

What it promises: killed at any moment and resumed, a run ends with the same weights, bit for bit on the CPU, and the
same records but for the timings; a non-finite loss stops it and never reaches a checkpoint.
"""

from __future__ import annotations

import contextlib
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from nasdet._checks import check_whole
from nasdet.engine import distributed
from nasdet.engine.checkpoint import (
    LAST,
    NonFiniteState,
    load_checkpoint,
    load_into,
    rng_state,
    save_checkpoint,
    seed_everything,
    set_rng_state,
)
from nasdet.engine.records import append_line, truncate_lines
from nasdet.engine.signals import handled

RECORDS = ("metrics.jsonl", "alphas.jsonl")
_VERSION = 1
#: settings that checkpoints of before do not have, whose runs go on all the same
_LATER = ("weights",)


class Stateful(Protocol):
    """Whatever can be put into a checkpoint: models, optimisers, loaders, search algorithms."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


class NonFiniteLoss(ValueError):
    """A loss, or a weight, became NaN or infinite.

    ``step``: the step (from 0) that produced it; ``terms``: the offending names and values; ``checkpoint``: the last
    good checkpoint and ``checkpoint_step`` the number of steps in it (``None`` and 0 when there is none).
    """

    def __init__(self, step: int, terms: Mapping[str, float], checkpoint: Path | None, checkpoint_step: int) -> None:
        self.step, self.terms, self.checkpoint, self.checkpoint_step = step, dict(terms), checkpoint, checkpoint_step
        what = ", ".join(f"{name} = {value}" for name, value in self.terms.items())
        kept = "there is no checkpoint yet"
        if checkpoint is not None:
            kept = f"the last good checkpoint, {checkpoint}, holds {checkpoint_step} steps"
        advice = "try a lower learning rate or gradient clipping"
        super().__init__(f"training stopped at step {step}: {what}; {kept}; {advice}")


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop (Ctrl-C or SIGTERM); its work is in the checkpoint."""


class Loop:
    """Run ``steps`` steps with progress, records and checkpoints in the folder ``out``.

    ``state`` names everything a checkpoint holds (unwrapped model, optimisers, loaders, search algorithm); a model
    comes before its optimiser. ``config`` is plain data that a resumed run must repeat (learning rate, batch, ...).
    ``out/metrics.jsonl`` gets one line per ``log_every`` steps: means of the step's values since the line before,
    ``lr`` (of the first optimiser in ``state``, ``lr_<name>`` of others), ``seconds`` per step; the same goes to
    TensorBoard in ``out/tb`` where it is installed. ``out/checkpoints/last.pt`` is written every ``checkpoint_every``
    steps and at the end.

    Afterwards ``start`` is the first step to run: 0, or the checkpoint's when ``resume`` found one. The generators of
    Python, numpy and torch are seeded with ``seed`` + rank, or set to where the checkpoint left them, when ``run``
    begins.

    Raises ``ValueError`` for a folder that already holds a checkpoint without ``resume``, and for a checkpoint of
    another configuration; nothing is written or dropped then.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        steps: int,
        state: Mapping[str, Stateful],
        seed: int = 0,
        log_every: int = 20,
        checkpoint_every: int = 200,
        resume: bool = False,
        title: str = "train",
        progress: bool = True,
        config: Mapping[str, Any] | None = None,
        tensorboard: bool = True,
    ) -> None:
        for name, value in (("steps", steps), ("log_every", log_every), ("checkpoint_every", checkpoint_every)):
            check_whole(name, value)
        self.out, self.steps, self.state, self.seed = Path(out), steps, dict(state), seed
        self.log_every, self.checkpoint_every = log_every, checkpoint_every
        self.title, self.progress, self.tensorboard = title, progress, tensorboard
        self.config = dict(config or {})
        self.path = self.out / LAST
        self.start = 0
        self._window = _Window()
        self._saved_step: int | None = None
        if self.path.exists():
            if not resume:
                advice = "add --resume to go on with it, or choose another --out"
                raise ValueError(f"{self.out} already holds a run with a checkpoint: {advice}")
            self._load()
        else:
            seed_everything(seed + distributed.rank())
        self._rng = rng_state()
        if distributed.is_main():
            for leftover in self.path.parent.glob(f".{self.path.name}.*"):
                leftover.unlink(missing_ok=True)
            for name in RECORDS:
                truncate_lines(self.out / name, self.start if self._saved_step is not None else -1)
        distributed.barrier()

    def run(
        self,
        step: Callable[[int], Mapping[str, float | Tensor]],
        *,
        on_step: Callable[[int], None] | None = None,
        on_log: Callable[[int, dict[str, float]], None] | None = None,
        on_checkpoint: Callable[[int], None] | None = None,
    ) -> None:
        """Call ``step(i)`` for ``i`` in ``start..steps-1``; it trains once and returns named finite numbers.

        ``on_step(done)`` runs on every rank after each step, outside its timing; ``on_log(done, line)`` follows each
        line of ``metrics.jsonl``, on rank 0 only; ``on_checkpoint(done)`` runs on every rank just *before* a
        checkpoint is written, so that what it appends belongs to that checkpoint. ``done`` counts finished steps.
        Raises ``NonFiniteLoss``; and ``Interrupted`` after Ctrl-C or SIGTERM, once the step is finished and saved.
        """
        set_rng_state(self._rng)
        with self._signals() as stopping, self._bar() as bar, self._writer() as writer:
            for index in range(self.start, self.steps):
                began = time.perf_counter()
                self._window.add(index, step(index), time.perf_counter() - began)
                done = index + 1
                logging = done % self.log_every == 0 or done == self.steps
                if logging or self._window.on_host:
                    self._settle()
                if logging:
                    self._log(done, bar, writer, on_log)
                if on_step is not None:
                    on_step(done)
                bar.update()
                stop = self._agree(stopping, logging)
                if stop or done % self.checkpoint_every == 0 or done == self.steps:
                    self._settle()
                    if on_checkpoint is not None:
                        on_checkpoint(done)
                    self._save(done)
                if stop and done < self.steps:
                    self._interrupted(done)

    def _load(self) -> None:
        payload = load_checkpoint(self.path)
        if lost := [name for name in ("step", "state", "rng", "window") if name not in payload]:
            raise ValueError(f"{self.path}: not the checkpoint of a run: it has no {', '.join(lost)}")
        here: dict[str, Any] = {"version": _VERSION, "seed": self.seed, "steps": self.steps}
        alike = payload.get("processes") == distributed.world_size()
        if payload["step"] != self.steps:  # a finished training may be read by any number of processes
            here["processes"] = distributed.world_size()
        there = {key: payload.get(key) for key in here} | dict(payload.get("config", {}))
        here = {**here, **self.config}
        there["state"], here["state"] = sorted(payload["state"]), sorted(self.state)
        names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        names = [name for name in names if name in there or name not in _LATER]
        differences = [f"{name}: {_short(there.get(name))} -> {_short(here.get(name))}" for name in names]
        if differences:
            raise ValueError(
                f"{self.path} was written by another configuration ({'; '.join(differences)}): "
                "resume with the options it was started with, or choose another --out"
            )
        for name, target in self.state.items():
            load_into(name, target, payload["state"][name], self.path)
        self.start = self._saved_step = payload["step"]
        if alike:
            self._window.load_state_dict(payload["window"][distributed.rank()])
            set_rng_state(payload["rng"][distributed.rank()])
        else:
            seed_everything(self.seed + distributed.rank())

    def _save(self, done: int) -> None:
        rng, window = distributed.gather_objects(rng_state()), distributed.gather_objects(self._window.state_dict())
        if distributed.is_main():
            try:
                payload = {
                    "version": _VERSION,
                    "step": done,
                    "steps": self.steps,
                    "seed": self.seed,
                    "processes": distributed.world_size(),
                    "config": self.config,
                    "state": {name: item.state_dict() for name, item in self.state.items()},
                    "rng": rng,
                    "window": window,
                }
                save_checkpoint(self.path, payload)
            except NonFiniteState as error:
                raise self.non_finite(done - 1, dict.fromkeys(error.names[:3], math.nan)) from error
        distributed.barrier()
        self._saved_step = done

    def _settle(self) -> None:
        """Bring the pending values to the host, and stop at the first that is not finite."""
        found = self._window.settle()
        if found is not None:
            raise self.non_finite(*found)

    def non_finite(self, step: int, terms: Mapping[str, float]) -> NonFiniteLoss:
        """The error of a step that made ``terms`` NaN or infinite, to be raised."""
        good = self.path if self._saved_step is not None else None
        return NonFiniteLoss(step, terms, good, self._saved_step or 0)

    def _log(self, done: int, bar: Any, writer: Any, on_log: Callable[[int, dict[str, float]], None] | None) -> None:
        means = distributed.mean_over_ranks(self._window.take())
        if not distributed.is_main():
            return
        rates: dict[str, float] = {}
        for name, item in self.state.items():
            groups = getattr(item, "param_groups", None)
            if groups:
                rates["lr" if not rates else f"lr_{name}"] = float(groups[0]["lr"])
        line: dict[str, Any] = {"step": done, **means, **rates}
        append_line(self.out / "metrics.jsonl", line)
        shown = {name: f"{means[name]:.4g}" for name in ("loss", "val_loss") if name in means}
        bar.set_postfix(shown, refresh=False)
        if writer is not None:
            for name, value in line.items():
                if name != "step":
                    writer.add_scalar(name, value, done)
        if on_log is not None:
            on_log(done, line)

    def _agree(self, stopping: threading.Event, logging: bool) -> bool:
        # Several processes must stop after the same step; they compare notes only where they meet anyway.
        if not distributed.active():
            return stopping.is_set()
        return logging and any(distributed.gather_objects(stopping.is_set()))

    def _interrupted(self, done: int) -> None:
        message = (
            f"{self.title} stopped after {done} of {self.steps} steps; everything is in {self.path}; "
            "run the same command with --resume to go on"
        )
        raise Interrupted(message)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[threading.Event]:
        """SIGINT and SIGTERM ask for a stop after the step; a second SIGINT stops at once."""
        stopping = threading.Event()

        def ask(number: int, _frame: Any) -> None:
            if stopping.is_set() and number == signal.SIGINT:
                raise KeyboardInterrupt
            stopping.set()

        with handled(ask, signal.SIGINT, signal.SIGTERM):
            yield stopping

    def _bar(self) -> Any:
        return tqdm(
            total=self.steps,
            initial=self.start,
            desc=self.title,
            unit="step",
            file=sys.stderr,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
            disable=not (self.progress and distributed.is_main()),
        )

    @contextlib.contextmanager
    def _writer(self) -> Iterator[Any]:
        writer = None
        if self.tensorboard and distributed.is_main() and self.start < self.steps:
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                writer = SummaryWriter(str(self.out / "tb"), purge_step=self.start + 1 if self.start else None)
        try:
            yield writer
        finally:
            if writer is not None:
                writer.close()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _on_device(value: float | Tensor) -> bool:
    return isinstance(value, Tensor) and value.device.type != "cpu"


class _Window:
    """Sums of the values since the last line; values on a GPU wait until they are needed."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}
        self.seconds = 0.0
        self.steps = 0
        self.pending: list[tuple[int, dict[str, float | Tensor]]] = []

    @property
    def on_host(self) -> bool:
        return not any(_on_device(value) for _, row in self.pending for value in row.values())

    def add(self, index: int, values: Mapping[str, float | Tensor], seconds: float) -> None:
        row = {name: value.detach() if isinstance(value, Tensor) else value for name, value in values.items()}
        self.pending.append((index, row))
        self.seconds += seconds
        self.steps += 1

    def settle(self) -> tuple[int, dict[str, float]] | None:
        """Sum the pending values; returns (step, offending values) at the first non-finite one."""
        pending, self.pending = self.pending, []
        waiting = [torch.as_tensor(v).reshape(()) for _, row in pending for v in row.values() if _on_device(v)]
        numbers = iter(torch.stack([value.double() for value in waiting]).tolist() if waiting else [])
        for index, row in pending:
            floats = {name: next(numbers) if _on_device(value) else float(value) for name, value in row.items()}
            bad = {name: value for name, value in floats.items() if not math.isfinite(value)}
            if bad:
                return index, bad
            for name, value in floats.items():
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1
        return None

    def take(self) -> dict[str, float]:
        """The means, and a fresh start."""
        means = {name: total / self.counts[name] for name, total in self.sums.items()}
        means["seconds"] = self.seconds / max(self.steps, 1)
        self.__init__()  # type: ignore[misc]  # a window has no state but what its constructor sets
        return means

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self.sums), "counts": dict(self.counts), "seconds": self.seconds, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])
        self.seconds, self.steps = state["seconds"], state["steps"]
