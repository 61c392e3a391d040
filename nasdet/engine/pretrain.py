"""Pretraining by classification: a backbone, or a supernet path by path, on an ImageNet-style folder."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nasdet._files import write_json
from nasdet.data.classification import (
    ClassificationDataset,
    ClassificationFolder,
    evaluation_transform,
    training_transform,
)
from nasdet.data.loader import make_loader
from nasdet.data.transforms import Batch
from nasdet.detectors.classifier import Classifier
from nasdet.detectors.weights import DESCRIPTION, PRETRAINED
from nasdet.engine import distributed
from nasdet.engine.checkpoint import LAST, load_into, load_weights, save_checkpoint, seed_everything
from nasdet.engine.classify import evaluate_classifier
from nasdet.engine.layout import place_model
from nasdet.engine.loop import Loop
from nasdet.engine.optim import OPTIMIZERS, Schedule, make_optimizer, make_sgd
from nasdet.engine.paths import Paths
from nasdet.engine.recalibrate import recalibrate
from nasdet.engine.records import append_line, read_lines
from nasdet.engine.runs import recorded, sole_writer
from nasdet.engine.step import train_step

PARTS = ("train", "search-train")
# What may differ between a run and its continuation without changing a single weight.
_FREE = ("workers", "log_every", "checkpoint_every", "eval_every", "eval_batch", "recalibration_images", "device")


@dataclass(frozen=True)
class PretrainConfig:
    """How to pretrain; the defaults are DetNAS's for its supernet on ImageNet (NeurIPS 2019, section 4; released code).

    ``batch`` is images per step over all processes. SGD at ``lr``, which falls by ``decay`` (``"linear"``, to 0),
    without warm-up unless ``warmup_steps`` are given; norms and biases have no weight decay. ``last`` is the number of
    channels of a 1x1 convolution before the classifier (None: none), ``label_smoothing`` the classifier's.

    Pictures: a random part of at least ``least_area`` of the picture, scaled to ``size`` x ``size`` pixels, ``jitter``
    of brightness, contrast and saturation, mirrored half of the time with ``flip``; for evaluation the centre of
    the picture, whose shorter side is scaled to ``short`` (None: 8/7 of ``size``, 256 for 224).

    ``part`` of the data learns: ``"train"``, all that may be, or ``"search-train"``, which keeps images back to choose
    an architecture by; None: all for a backbone, search-train for a supernet. ``eval_every`` steps the accuracy is
    measured for the curve, 0 only at the end; nothing is chosen by it. ``recalibration_images`` give the one path of a
    supernet that is measured at the end its batch norm statistics. ``device=None`` takes the GPU where there is one.
    """

    steps: int = 300_000
    batch: int = 1024
    optimizer: str = "sgd"
    lr: float = 0.5
    momentum: float = 0.9
    weight_decay: float = 4e-5
    decay: str = "linear"
    warmup_steps: int = 0
    label_smoothing: float = 0.1
    clip: float | None = None
    last: int | None = None
    size: int = 224
    short: int | None = None
    least_area: float = 0.08
    jitter: float = 0.4
    flip: bool = True
    part: str | None = None
    recalibration_images: int = 500
    amp: bool = False
    channels_last: bool = True
    seed: int = 0
    workers: int = 2
    log_every: int = 20
    checkpoint_every: int = 1000
    eval_every: int = 0
    eval_batch: int = 256
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "log_every", "checkpoint_every", "eval_batch", "recalibration_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("workers", "eval_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.clip is not None and not (math.isfinite(self.clip) and self.clip > 0):
            raise ValueError(f"clip must be a positive number or None, got {self.clip}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.part not in (None, *PARTS):
            raise ValueError(f"part must be one of {', '.join(PARTS)} or None, got {self.part!r}")
        self.schedule()
        training_transform(self.size, least_area=self.least_area, jitter=self.jitter)
        evaluation_transform(self.size, self.short)
        Classifier(nn.Identity(), 1, 1, self.last, label_smoothing=self.label_smoothing)

    def schedule(self) -> Schedule:
        """The learning rate by step."""
        return Schedule(self.lr, self.steps, decay=self.decay, warmup="linear", warmup_steps=self.warmup_steps)

    def fixed(self) -> dict[str, Any]:
        """What a resumed run must repeat, as plain data."""
        return {key: value for key, value in asdict(self).items() if key not in _FREE}


def pretrain(
    config: PretrainConfig,
    data: ClassificationFolder,
    out: str | Path,
    backbone: Callable[[], nn.Module],
    *,
    paths: Paths | None = None,
    named: Mapping[str, Any] | None = None,
    resume: bool = False,
    command: Sequence[str] | None = None,
    progress: bool = True,
) -> Path:
    """Train the backbone that ``backbone()`` makes as a :class:`Classifier`, and return the run's folder.

    ``weights.pt`` in it holds the backbone's state dict, as ``nasdet train --weights`` and
    :func:`nasdet.detectors.load_backbone_weights` read it. A backbone is evaluated on ``data.test()``, which is only
    reported on. With ``paths`` it is a supernet: the path of ``paths.draw(step)`` learns in each step, the rest of it
    has no gradient, no momentum and no weight decay; at the end the path of one step more is measured on
    ``data.search_val()``, with batch norm statistics of its own, as a sign of life.

    ``backbone`` is called once the generators are seeded; it has ``channels`` by name, the last map's last. ``named``
    is plain data that says which backbone it is: a resumed run must repeat it. The folder also gets run.json,
    split.json, classifier.json, metrics.jsonl, checkpoints and eval.json (``eval-search-val.json`` of a supernet).
    Killed at any moment and resumed, it ends with the same weights. Under ``torchrun`` every process calls this; batch
    norms then see their own process's images, as in the paper.

    Raises ``ValueError`` for a folder that already holds a run without ``resume``, for one of other settings or that
    another process writes, and, as ``NonFiniteLoss``, for a loss that is not finite.
    """
    out, device, named = Path(out), distributed.local_device(config.device), dict(named or {})
    with distributed.process_group(device), contextlib.ExitStack() as held:
        if config.batch % distributed.world_size():
            raise ValueError(f"batch must be a multiple of {distributed.world_size()} processes, got {config.batch}")
        seed_everything(config.seed)
        model = make_classifier(config, data, backbone)
        layout = place_model(model, device, config.channels_last)
        optimizer = _optimizer(config, model)
        held.enter_context(sole_writer(out))
        loop = Loop(
            out,
            steps=config.steps,
            state={"model": model, "optimizer": optimizer},
            seed=config.seed,
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every,
            resume=resume,
            title="pretrain",
            progress=progress,
            config=config.fixed() | named | {"split": data.split.sha256, "supernet": paths is not None},
        )
        part = config.part or PARTS[paths is not None]
        facts: dict[str, Any] = {**named, "data": str(data.path.resolve()), "skipped": data.skipped or None}
        place: dict[str, Any] = {"seed": config.seed, "device": device, "command": command, "resume": resume}
        with recorded(out, "pretrain", asdict(config) | {"part": part}, **place, **facts):
            if distributed.is_main():
                data.split.save(out / "split.json")
                sizes = {"last": config.last, "size": config.size, "short": config.short}
                write_json(out / DESCRIPTION, {**named, **sizes, "classes": list(data.categories)})
            run = _Pretraining(config, data, part, model, optimizer, paths, device, layout, out, progress)
            run.go(loop)
    return out


def make_classifier(
    config: PretrainConfig, data: ClassificationFolder, backbone: Callable[[], nn.Module]
) -> Classifier:
    """The classifier of a run, untrained."""
    body = backbone()
    channels: int = list(body.channels.values())[-1]  # type: ignore[union-attr, operator]  # a backbone's
    return Classifier(body, channels, len(data.categories), config.last, label_smoothing=config.label_smoothing)


def load_classifier(
    run: str | Path, config: PretrainConfig, data: ClassificationFolder, backbone: Callable[[], nn.Module]
) -> Classifier:
    """The classifier of a run with the weights of its last checkpoint, in evaluation mode.

    ``FileNotFoundError`` or ``ValueError`` names what is missing or does not fit.
    """
    model = make_classifier(config, data, backbone)
    load_into("model", model, load_weights(Path(run) / LAST), Path(run) / LAST)
    return model.eval()


def _optimizer(config: PretrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    rates: dict[str, Any] = {"momentum": config.momentum, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return make_sgd(model, config.lr, **rates, decay_norm=False, decay_bias=False)
    return make_optimizer(config.optimizer, model, config.lr, **rates)


@dataclass
class _Pretraining:
    """The moving parts of one run."""

    config: PretrainConfig
    data: ClassificationFolder
    part: str
    model: Classifier
    optimizer: torch.optim.Optimizer
    paths: Paths | None
    device: torch.device
    layout: torch.memory_format
    out: Path
    progress: bool

    def go(self, loop: Loop) -> None:
        dataset = self.data.train() if self.part == PARTS[0] else self.data.search_train()
        steps = self.config.steps
        batches = training_batches(self.config, dataset, self.device, start=loop.start, steps=steps)
        distributed.share_state(self.model)
        loop.run(self.stepper(batches), on_step=self.look)
        distributed.share_state(self.model)
        if distributed.is_main():
            state = self.model.backbone.state_dict()
            save_checkpoint(self.out / PRETRAINED, {key: value.cpu().contiguous() for key, value in state.items()})
        if self.paths is not None:
            self.measure_path(self.paths, dataset)
        self.evaluate(self.data.test() if self.paths is None else self.data.search_val(), steps, self.out)

    def stepper(self, batches: Iterator[Batch]) -> Callable[[int], Mapping[str, Tensor]]:
        config, paths = self.config, self.paths
        schedule, sampled = config.schedule(), paths is not None
        module = distributed.LossModule(self.model) if sampled else distributed.wrap(self.model, self.device)
        options: dict[str, Any] = {"clip": config.clip, "amp": config.amp, "average": sampled}

        def step(index: int) -> Mapping[str, Tensor]:
            module.train()
            if paths is not None:
                paths.activate(self.model.backbone, paths.draw(index))
            batch = next(batches).to(self.device, self.layout, non_blocking=True)
            terms = train_step(module, self.optimizer, batch, schedule.at(index), **options)
            return {name: terms[name] for name in ("loss", "grad_norm")}

        return step

    def look(self, done: int) -> None:
        """The periodic evaluation."""
        every = self.config.eval_every
        if self.paths is None and every and done % every == 0 and done < self.config.steps:
            self.evaluate(self.data.test(), done)

    def measure_path(self, paths: Paths, dataset: ClassificationDataset) -> None:
        """Run the path of one step more, with statistics of its own: the shared ones are stored by now."""
        paths.activate(self.model.backbone, paths.draw(self.config.steps))
        recalibrate_classifier(self.model, self.config, dataset, self.device, self.layout)

    def evaluate(self, dataset: ClassificationDataset, step: int, out: Path | None = None) -> None:
        """Measure the accuracy, and note it once, also when a finished run is resumed."""
        config = self.config
        look: dict[str, Any] = {"device": self.device, "amp": config.amp, "progress": self.progress, "step": step}
        look |= {"size": config.size, "short": config.short, "batch": config.eval_batch, "workers": config.workers}
        look |= {"channels_last": self.layout is torch.channels_last, "out": out}
        found = evaluate_classifier(self.model, dataset, **look)
        file = self.out / "metrics.jsonl"
        if distributed.is_main() and not any(line["step"] == step and "top1" in line for line in read_lines(file)):
            append_line(file, {name: found[name] for name in ("step", "top1", "top5")})


def training_batches(
    config: PretrainConfig,
    dataset: ClassificationDataset,
    device: torch.device,
    *,
    start: int,
    steps: int,
    batch: int | None = None,
    alone: bool = False,
) -> Iterator[Batch]:
    """Batches ``start .. steps - 1`` of ``batch`` (the configured number) augmented pictures over all processes, of
    which each has its share, or with ``alone`` all of them."""
    rank, ranks = (0, 1) if alone else (distributed.rank(), distributed.world_size())
    loader = make_loader(
        dataset,
        (batch or config.batch) // ranks,
        training_transform(config.size, least_area=config.least_area, jitter=config.jitter, flip=config.flip),
        seed=config.seed,
        start_step=start,
        steps=steps,
        workers=config.workers,
        rank=rank,
        world_size=ranks,
        divisor=1,
        pin_memory=device.type == "cuda",
    )
    # The iterator, and with it the workers, is made in the first step: after the loop has taken over the signals.
    return itertools.chain.from_iterable(iter(loader) for _ in range(1))


def recalibrate_classifier(
    model: nn.Module,
    config: PretrainConfig,
    dataset: ClassificationDataset,
    device: torch.device,
    layout: torch.memory_format,
    *,
    mode: str = "cumulative",
) -> None:
    """Batch norm statistics of the active path from ``config.recalibration_images`` pictures of ``dataset``, augmented
    as in training, in batches of at most ``config.eval_batch``; the same pictures at every call."""
    size = min(config.eval_batch, config.recalibration_images)
    steps = -(-config.recalibration_images // size)
    batches = training_batches(config, dataset, device, start=0, steps=steps, batch=size, alone=True)

    def forward(batch: Batch) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
            model(batch.to(device, layout, non_blocking=True).images)

    recalibrate(model, batches, mode=mode, forward=forward)
