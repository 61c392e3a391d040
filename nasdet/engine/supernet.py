"""What every search of a supernet shares: the run from start to card, its settings, batches and loss."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nasdet.arch import Card, save_card
from nasdet.data import (
    Batch,
    Compose,
    DataFolder,
    DetectionDataset,
    HorizontalFlip,
    Resize,
    Split,
    make_loader,
    require_selectable,
)
from nasdet.detectors import WITH_MASKS
from nasdet.engine import distributed
from nasdet.engine.checkpoint import LAST, digest_of, seed_everything
from nasdet.engine.distributed import local_device
from nasdet.engine.layout import place_model
from nasdet.engine.loop import Loop, Stateful
from nasdet.engine.optim import Schedule
from nasdet.engine.records import append_line
from nasdet.engine.runs import recorded, sole_writer
from nasdet.engine.train import write_cost
from nasdet.measure.latency_table import Record
from nasdet.measure.machine import device_name
from nasdet.search.gradient import Bilevel
from nasdet.spaces.assemble import ModelConfig, searched_fields

# What may differ between a run and its resumption.
_FREE = ("workers", "log_every", "checkpoint_every", "name", "generations", "top")


class SearchOptions(TypedDict, total=False):
    """What every search function takes beside settings, data and the run's folder.

    ``weights`` is a local file with the backbone's pretrained weights (none); ``resume`` goes on with the run in the
    folder (False); ``device`` defaults to a GPU where there is one; ``backend`` chooses the searched part's operators
    (the best at each call); ``command`` is recorded (none); ``progress`` draws a bar (True).
    """

    weights: str | Path | None
    resume: bool
    device: str | torch.device | None
    backend: str | None
    command: Sequence[str] | None
    progress: bool


class SupernetRun(ABC):
    """Model, data and bookkeeping of one search; a method's own run says how it is built, how it steps, what it finds.

    A method's class sets ``verb`` and defines ``build``, ``state``, ``stepper``, ``facts``, ``deviations`` and
    ``derive``; ``alphas`` where it has any. Its settings (``config``) are a frozen dataclass with the names that are
    used here, and ``model(categories, pretrained)``.
    """

    verb: ClassVar[str]
    #: whether several processes may share the run
    parallel: ClassVar[bool] = False
    #: made by ``build``: the search space, its supernet, and the detector that holds it
    space: Any
    supernet: nn.Module
    model: nn.Module

    def __init__(
        self,
        config: Any,
        data: DataFolder,
        device: torch.device,
        backend: str | None = None,
        weights: str | Path | None = None,
        started: bool = False,
    ) -> None:
        self.config, self.data, self.device = config, data, device
        self.backend, self.weights = backend, weights
        if config.detector in WITH_MASKS and not data.trainval.masks:
            raise ValueError(f"data must give masks for {config.detector}: open_data(..., masks=True)")
        self.steps = self.total_steps()
        seed_everything(config.seed)
        self.model_config: ModelConfig = config.model(data.categories, weights is not None)
        self.build(None if started else weights)  # a checkpoint brings its own
        self.format = place_model(self.model, device, config.channels_last)
        self.model.train()

    def total_steps(self) -> int:
        """Steps of the loop."""
        return int(self.config.steps)

    @abstractmethod
    def build(self, weights: str | Path | None) -> None:
        """Make ``space``, ``supernet`` and ``model`` from ``model_config`` and, where given, the backbone's weights."""

    @abstractmethod
    def state(self) -> dict[str, Stateful]:
        """What a checkpoint holds, the model first."""

    @abstractmethod
    def stepper(self, start: int) -> Callable[[int], Mapping[str, Tensor]]:
        """The step function of the loop, its batches lined up with step ``start``."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What ``run.json`` says of this method's run."""

    @abstractmethod
    def deviations(self) -> list[str]:
        """Every way in which the search differs from the paper's, in words."""

    def alphas(self) -> dict[str, list[list[float]]]:
        """Raw alphas by group for ``alphas.jsonl``; empty where a method has none."""
        return {}

    @abstractmethod
    def derive(self, source: Mapping[str, Any]) -> Card:
        """The architecture found; ``source`` goes into the card."""

    def source(self) -> dict[str, Any]:
        """Where the card comes from, in its own words."""
        return {
            "search": f"nasdet {self.verb}",
            "data": self.data.path.resolve().name,
            "split": self.data.split.sha256,
            "split_seed": self.data.split.seed,
            "steps": self.steps,
            "batch": self.config.batch,
            "seed": self.config.seed,
        }

    def ready(self, out: Path, resume: bool) -> bool:
        """Whether nothing is to be learnt, as the weights came ready-made; raises for an ``out`` that must not be."""
        return False

    def loop(self, out: Path, settings: Mapping[str, Any], resume: bool, progress: bool) -> Loop:
        """The loop of the training, at its start or where its checkpoint is; ``settings`` are fixed."""
        config = self.config
        return Loop(
            out,
            steps=self.steps,
            state=self.state(),
            seed=config.seed,
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every,
            resume=resume,
            title=self.verb,
            progress=progress,
            config=settings,
        )

    def outcome(self) -> dict[str, Any]:
        """What ``run.json`` says besides once the training has ended."""
        return {}

    def learn(self, loop: Loop) -> None:
        """Train to the end, with a line of ``alphas.jsonl`` for each of ``metrics.jsonl``, and one before the first."""

        def note(done: int, line: Mapping[str, float] | None = None) -> None:
            if alphas := self.alphas():
                for group, rows in alphas.items():
                    if bad := [value for row in rows for value in row if not math.isfinite(value)]:
                        raise loop.non_finite(done - 1, {f"alphas of {group}": bad[0]})
                append_line(loop.out / "alphas.jsonl", {"step": done, "alphas": alphas})

        if loop.start == 0:
            note(0)
        loop.run(self.stepper(loop.start), on_log=note)

    def finish(self, out: Path, *, resume: bool = False, progress: bool = True) -> Card:
        """Write ``cost.json``, ``model.json`` (the derived detector) and ``card.json``; returns the card."""
        card = self.derive(self.source())
        derived = replace(self.model_config, **searched_fields(card))
        write_cost(out, derived)
        derived.save(out / "model.json")
        save_card(card, out / "card.json")
        return card

    def batches(
        self, dataset: DetectionDataset, *, seed: int, start: int, steps: int, batch: int | None = None
    ) -> Iterator[Batch]:
        """The batches of steps ``start .. steps - 1``, of ``batch`` images (the configured number) over all processes;
        each has its share."""
        config, ranks = self.config, distributed.world_size()
        size = Resize(config.short_side, config.long_side)
        loader = make_loader(
            dataset,
            (batch or config.batch) // ranks,
            Compose([size, *([HorizontalFlip()] if config.flip else [])]),
            seed=seed,
            start_step=start,
            steps=steps,
            workers=config.workers,
            rank=distributed.rank(),
            world_size=ranks,
            pin_memory=self.device.type == "cuda",
        )
        # The iterator, and with it the workers, is made in the first step: after the loop has taken over the signals.
        return itertools.chain.from_iterable(iter(loader) for _ in range(1))

    def loss(self, batch: Batch, terms: dict[str, Any]) -> Tensor:
        """The detector's loss on a batch; its parts are put into ``terms``."""
        batch = batch.to(self.device, self.format, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
            outputs = self.model(batch.images)
        losses: dict[str, Tensor] = self.model.loss(outputs, batch.targets)  # type: ignore[operator]  # a detector's
        terms.update({name: value.detach() for name, value in losses.items()})
        return torch.stack(list(losses.values())).sum()


class BilevelRun(SupernetRun):
    """A first-order gradient search: weights learn on one half of the training images, alphas on the other."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        alphas = self.space.arch_parameters(self.supernet)
        of_alphas = {id(parameter) for parameter in alphas}
        config = self.config
        self.bilevel = Bilevel(
            [parameter for parameter in self.model.parameters() if id(parameter) not in of_alphas],
            alphas,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            clip=config.clip,
            schedule=self.schedule().at,
            arch_lr=config.arch_lr,
            arch_weight_decay=config.arch_weight_decay,
        )

    def schedule(self) -> Schedule:
        """The weights' learning rate by step."""
        schedule: Schedule = self.config.schedule(self.steps)
        return schedule

    def state(self) -> dict[str, Stateful]:
        return {"model": self.model, "weights": self.bilevel.weight_optimizer, "alphas": self.bilevel.arch_optimizer}

    def alphas(self) -> dict[str, list[list[float]]]:
        alphas: dict[str, list[list[float]]] = self.space.alphas(self.supernet)
        return alphas

    def halves(self, start: int, first: int = 0) -> tuple[Iterator[Batch], Iterator[Batch]]:
        """Batches for the weights from step ``start`` on, and for the alphas, whose first step is ``first``."""
        seed = 2 * self.config.seed
        weights = self.batches(self.data.search_train(), seed=seed, start=start, steps=self.steps)
        lined_up = {"start": max(0, start - first), "steps": self.steps - first}
        return weights, self.batches(self.data.search_val(), seed=seed + 1, **lined_up)


def run_search(
    kind: type[SupernetRun],
    config: Any,
    data: DataFolder,
    out: str | Path,
    *,
    weights: str | Path | None = None,
    resume: bool = False,
    device: str | torch.device | None = None,
    backend: str | None = None,
    command: Sequence[str] | None = None,
    progress: bool = True,
) -> Card:
    """Run a search in the folder ``out``, from its start or its checkpoint to the card; see :class:`SearchOptions`.

    The folder gets ``run.json`` (with the deviations from the paper), ``split.json``, ``metrics.jsonl``,
    ``alphas.jsonl`` where there are alphas, checkpoints, and at the end ``card.json``, ``model.json`` (the derived
    detector) and ``cost.json``. Killed at any moment and resumed it ends with the same card.

    Raises ``ValueError`` for a folder that holds a run when not resuming, one made with other settings or another
    split, or that another process writes; ``TestSplitError`` for data that includes test images; ``NonFiniteLoss`` when
    the search diverges.
    """
    out, where = Path(out), local_device(device)
    check_search(kind, data, out, resume)
    with contextlib.ExitStack() as held, contextlib.ExitStack() as together:
        if kind.parallel:
            together.enter_context(distributed.process_group(where))
        run = kind(config, data, where, backend, weights, started=resume and (out / LAST).exists())
        named: dict[str, Any] = {"seed": config.seed, "device": where, "command": command, "resume": resume}
        ready = run.ready(out, resume)
        given = {"pretrained": weights is not None, "weights": digest_of(weights)}
        settings = fixed(config) | {"split": data.split.sha256, **given}
        held.enter_context(sole_writer(out))
        loop = None if ready else run.loop(out, settings, resume, progress)
        notes = measured_elsewhere(getattr(config, "latency_table", None), where)
        for line in notes if progress and distributed.is_main() else ():
            tqdm.write(line, file=sys.stderr)
        facts = {
            "data": str(data.path.resolve()),
            "skipped": data.skipped or None,
            "weights": weights and str(weights),
            **run.facts(),
            "deviations": [*run.deviations(), *notes],
        }
        with recorded(out, kind.verb, asdict(config), **named, **facts) as info:
            if distributed.is_main():
                data.split.save(out / "split.json")
            if loop is not None:
                run.learn(loop)
                info.update(run.outcome())
            together.close()  # what follows the training each process does by itself
            return run.finish(out, resume=resume, progress=progress)


def check_search(kind: type[SupernetRun], data: DataFolder, out: Path, resume: bool) -> None:
    """Refuse what must not start, before anything is written: too many processes, test images, none, another split."""
    if not kind.parallel and (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"{kind.verb} must run in one process, got {processes}")
    for dataset in (data.search_val(), data.search_train()):
        require_selectable(dataset, data.split)
        if not len(dataset):
            raise ValueError(f"{dataset.role} must hold at least one image, got none of {data.path}")
    if kind.parallel and distributed.active():
        raise ValueError(f"{kind.verb} must be called outside a process group: it leaves its own before it scores")
    path = out / "split.json"
    if resume and path.is_file() and (old := Split.load(path)).sha256 != data.split.sha256:
        raise ValueError(f"{path}: split must be the run's own, {old.sha256[:12]}, got {data.split.sha256[:12]}")


def fixed(config: Any) -> dict[str, Any]:
    """The settings that a resumed run must repeat, as plain data."""
    return {key: value for key, value in asdict(config).items() if key not in _FREE}


def check_settings(method: str, config: Any, whole: Sequence[str], positive: Sequence[str]) -> None:
    """Raise ``ValueError`` unless ``whole`` settings are at least 1, ``positive`` ones positive, and the name a card's.

    None passes where it is the default.
    """
    for name in (*whole, *positive):
        value, optional = getattr(config, name), getattr(type(config), name) is None
        if optional and value is None:
            continue
        if name in whole and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
        if name in positive and not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number{' or None' if optional else ''}, got {value}")
    if config.name is not None:
        Card(method, config.name, {"any": []})


def model_around(config: Any, categories: tuple[str, ...], pretrained: bool, **own: Any) -> ModelConfig:
    """The detector of a search's settings; with pretrained weights the stem and the first stage are frozen."""
    names = ("detector", "backbone", "width", "fpn_channels", "levels", "short_side", "long_side")
    around = {name: getattr(config, name) for name in names if hasattr(config, name)}
    around |= {"frozen_stages": 2 if pretrained else 0, "num_classes": len(categories), "categories": categories}
    return ModelConfig(**around | own)


def unlike_coco(data: DataFolder) -> list[str]:
    """The line of deviations for data that is not COCO, or a small part of it."""
    if data.layout == "coco" and len(data.split.train) >= 100_000:
        return []
    return [f"data: {data.path.resolve().name}, {len(data.split.train)} images to search on; the paper: COCO"]


def differences(config: Any, paper: Any, words: Mapping[str, str]) -> list[str]:
    """A line for each setting named in ``words`` that is not the paper's."""
    pairs = [(text, getattr(config, name), getattr(paper, name)) for name, text in words.items()]
    return [f"{text}: {_short(ours)}; the paper: {_short(theirs)}" for text, ours, theirs in pairs if ours != theirs]


def own_ways(config: Any) -> list[str]:
    """The lines of deviations for what no paper does: other arithmetic, pictures that are never mirrored."""
    found = [] if config.flip else ["no picture is mirrored; the paper: half of them"]
    return found + (["bfloat16 autocast; the paper: float32"] if config.amp else [])


def measured_elsewhere(table: str | None, device: torch.device) -> list[str]:
    """A line for a table of latencies, a file, that was measured on another device than the search's own."""
    if table is None:
        return []
    theirs, ours = Record.load(table).setting.device, device_name(device)
    return [] if theirs == ours else [f"milliseconds are those of {theirs}; the search runs on {ours}"]


def _short(value: Any) -> str:
    if isinstance(value, Mapping):  # a card, or dilations of one's own
        return str(value.get("name", "own"))
    return f"{value:g}" if isinstance(value, float) else str(value)
