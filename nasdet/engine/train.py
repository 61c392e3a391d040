"""One training run: a model, its data and the loop, in a run folder."""

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
from nasdet.arch import save_card
from nasdet.data.base import DetectionDataset
from nasdet.data.folder import DataFolder
from nasdet.data.loader import make_loader
from nasdet.data.transforms import Batch, Compose, HorizontalFlip, Resize, padded
from nasdet.detectors import countable
from nasdet.engine import distributed
from nasdet.engine.checkpoint import LAST, digest_of, save_weights, seed_everything
from nasdet.engine.evaluate import evaluate
from nasdet.engine.layout import place_model
from nasdet.engine.loop import Loop
from nasdet.engine.optim import OPTIMIZERS, Schedule, make_optimizer, scaled_lr
from nasdet.engine.records import append_line, read_lines
from nasdet.engine.runs import recorded, sole_writer
from nasdet.engine.step import train_step
from nasdet.measure import count
from nasdet.spaces.assemble import ModelConfig, build_model

# What may differ between a run and its continuation without changing a single weight.
_FREE = ("workers", "log_every", "checkpoint_every", "eval_every", "eval_batch", "device", "lr", "reference_lr")


@dataclass(frozen=True)
class TrainConfig:
    """How to train; the defaults are the papers' (FCOS and FAD 1x on COCO: 90,000 steps of 16 images).

    ``batch`` is images per step over all processes. ``lr=None`` is ``reference_lr``, the rate for 16 images, scaled
    linearly with ``batch``; ``optimizer`` is sgd or adamw. ``decay``, ``milestones``, ``warmup``, ``warmup_steps``
    and ``warmup_factor`` are a ``Schedule``'s; ``clip`` bounds the gradient's 2-norm, None does not. ``amp`` computes
    the model in bfloat16. ``flip`` mirrors half of the images.
    ``eval_every`` steps the test part is evaluated for the curve in the report, 0 never; nothing is chosen by it.
    ``device=None`` takes the GPU where there is one.
    """

    steps: int = 90_000
    batch: int = 16
    optimizer: str = "sgd"
    lr: float | None = None
    reference_lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    decay: str = "step"
    milestones: tuple[float, ...] = (2 / 3, 8 / 9)
    warmup: str = "constant"
    warmup_steps: int | None = None
    warmup_factor: float = 1 / 3
    clip: float | None = None
    amp: bool = False
    channels_last: bool = True
    flip: bool = True
    seed: int = 0
    workers: int = 2
    log_every: int = 20
    checkpoint_every: int = 500
    eval_every: int = 0
    eval_batch: int = 4
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "log_every", "checkpoint_every", "eval_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("workers", "eval_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.clip is not None and not (math.isfinite(self.clip) and self.clip > 0):
            raise ValueError(f"clip must be a positive number or None, got {self.clip}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        self.schedule()

    def schedule(self) -> Schedule:
        """The learning rate by step."""
        lr = scaled_lr(self.reference_lr, self.batch) if self.lr is None else self.lr
        names = ("decay", "milestones", "warmup", "warmup_steps", "warmup_factor")
        return Schedule(lr, self.steps, **{name: getattr(self, name) for name in names})

    def fixed(self) -> dict[str, Any]:
        """What a resumed run must repeat, as plain data."""
        kept = {key: value for key, value in asdict(self).items() if key not in _FREE}
        return kept | {"learning_rate": self.schedule().lr}


def train(
    config: TrainConfig,
    data: DataFolder,
    model_config: ModelConfig,
    out: str | Path,
    *,
    weights: str | Path | None = None,
    resume: bool = False,
    command: Sequence[str] | None = None,
    progress: bool = True,
) -> Path:
    """Train a detector on ``data.train()``, evaluate it on ``data.test()``, and return the run's folder.

    The folder gets run.json, split.json, model.json, card.json (when a part is a card's), metrics.jsonl,
    checkpoints, weights.safetensors, eval.json and detections.json. The test part is only reported on. ``weights``
    are the backbone's pretrained ones. Under ``torchrun`` every process calls this.

    Raises ``ValueError`` for a model that does not fit the data, for a folder that already holds a run without
    ``resume`` or that another process writes, and, as ``NonFiniteLoss``, for a loss that is not finite.
    """
    out, device = Path(out), distributed.local_device(config.device)
    categories = tuple(model_config.categories)
    if model_config.num_classes != len(data.categories) or (categories and categories != tuple(data.categories)):
        raise ValueError(
            f"model must have the {len(data.categories)} categories of {data.path}, got {model_config.num_classes} "
            f"({', '.join(categories[:3])}...)"
        )
    with distributed.process_group(device), contextlib.ExitStack() as held:
        if config.batch % distributed.world_size():
            raise ValueError(f"batch must be a multiple of {distributed.world_size()} processes, got {config.batch}")
        seed_everything(config.seed)
        source = None if resume and (out / LAST).exists() else weights
        model: nn.Module = build_model(model_config, weights=source)
        layout = place_model(model, device, config.channels_last)
        model = distributed.sync_batch_norm(model, device)
        rates = {"momentum": config.momentum, "weight_decay": config.weight_decay}
        optimizer = make_optimizer(config.optimizer, model, config.schedule().lr, **rates)
        held.enter_context(sole_writer(out))
        loop = Loop(
            out,
            steps=config.steps,
            state={"model": model, "optimizer": optimizer},
            seed=config.seed,
            log_every=config.log_every,
            checkpoint_every=config.checkpoint_every,
            resume=resume,
            progress=progress,
            config=config.fixed() | _named(model_config) | {"split": data.split.sha256, "weights": digest_of(weights)},
        )
        facts = {"data": str(data.path.resolve()), "skipped": data.skipped or None, "weights": weights and str(weights)}
        arguments = asdict(config)
        with recorded(
            out, "train", arguments, seed=config.seed, device=device, command=command, resume=resume, **facts
        ):
            _write_inputs(out, data, model_config)
            run = _Training(config, model_config, model, optimizer, device, layout, out, progress)
            run.go(loop, data.train(), data.test())
    return out


def _named(model_config: ModelConfig) -> dict[str, Any]:
    return {f"model.{key}": value for key, value in model_config.to_json().items()}


def _write_inputs(out: Path, data: DataFolder, model_config: ModelConfig) -> None:
    if not distributed.is_main():
        return
    data.split.save(out / "split.json")
    model_config.save(out / "model.json")
    if model_config.card is not None:
        save_card(model_config.card, out / "card.json")
    write_cost(out, model_config)


def write_cost(out: Path, model_config: ModelConfig) -> None:
    """Write ``cost.json``: parameters and MACs by part at the model's picture size, for the report and the demo.

    Two-stage detectors are counted with 1,000 proposals and 100 detections.
    """
    height, width = (padded(side) for side in (model_config.short_side, model_config.long_side))
    state = torch.get_rng_state()  # building a model to count it must not move the run's random numbers
    costs = count(countable(build_model(model_config)), torch.empty(1, 3, height, width, device="meta"))
    torch.set_rng_state(state)
    write_json(out / "cost.json", {"size": [height, width], "parts": [cost._asdict() for cost in costs]})


@dataclass
class _Training:
    """The moving parts of one run."""

    config: TrainConfig
    model_config: ModelConfig
    model: nn.Module
    optimizer: torch.optim.Optimizer
    device: torch.device
    layout: torch.memory_format
    out: Path
    progress: bool

    def go(self, loop: Loop, dataset: DetectionDataset, test: DetectionDataset) -> None:
        loop.run(self.stepper(self.batches(dataset, loop.start)), on_step=lambda done: self.look(done, test))
        if distributed.is_main():
            save_weights(self.model, self.out)
        self.report(self.config.steps, self.evaluate(test, self.out, self.config.steps))

    def batches(self, dataset: DetectionDataset, start: int) -> Iterator[Batch]:
        config, size = self.config, (self.model_config.short_side, self.model_config.long_side)
        transforms: list[Any] = [Resize(*size), *([HorizontalFlip()] if config.flip else [])]
        loader = make_loader(
            dataset,
            config.batch // distributed.world_size(),
            Compose(transforms),
            seed=config.seed,
            start_step=start,
            steps=config.steps,
            workers=config.workers,
            rank=distributed.rank(),
            world_size=distributed.world_size(),
            pin_memory=self.device.type == "cuda",
        )
        # The iterator, and with it the workers, is made in the first step: after the loop has taken over the signals.
        return itertools.chain.from_iterable(iter(loader) for _ in range(1))

    def stepper(self, batches: Iterator[Batch]) -> Callable[[int], Mapping[str, Tensor]]:
        config, module = self.config, distributed.wrap(self.model, self.device)
        schedule = config.schedule()

        def step(index: int) -> Mapping[str, Tensor]:
            module.train()
            batch = next(batches).to(self.device, self.layout, non_blocking=True)
            return train_step(module, self.optimizer, batch, schedule.at(index), clip=config.clip, amp=config.amp)

        return step

    def look(self, done: int, test: DetectionDataset) -> None:
        """The periodic evaluation."""
        if self.config.eval_every and done % self.config.eval_every == 0 and done < self.config.steps:
            self.report(done, self.evaluate(test, None, done))

    def evaluate(self, test: DetectionDataset, out: Path | None, step: int) -> dict[str, Any]:
        config = self.config
        channels_last = self.layout is torch.channels_last
        options = {"batch": config.eval_batch, "workers": config.workers, "channels_last": channels_last}
        size = {"short": self.model_config.short_side, "long": self.model_config.long_side}
        place = {"device": self.device, "amp": config.amp, "progress": self.progress}
        return evaluate(self.model, test, out=out, step=step, **options, **size, **place)

    def report(self, done: int, summary: Mapping[str, Any]) -> None:
        """One line of precision per step, also when a finished run is resumed."""
        file = self.out / "metrics.jsonl"
        if distributed.is_main() and not any(line["step"] == done and "AP" in line for line in read_lines(file)):
            masks = {f"mask_{name}": summary["masks"][name] for name in ("AP", "AP50") if "masks" in summary}
            append_line(file, {"step": done, "AP": summary["AP"], "AP50": summary["AP50"], **masks})
