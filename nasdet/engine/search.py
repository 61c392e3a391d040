"""FAD searches: a search on a detector and a data folder, in a run folder that can be resumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nasdet.arch import Card, save_card
from nasdet.data import DataFolder
from nasdet.engine.checkpoint import LAST, seed_everything
from nasdet.engine.distributed import local_device
from nasdet.engine.layout import training_layout
from nasdet.engine.loop import Loop
from nasdet.engine.optim import Schedule
from nasdet.engine.records import append_line
from nasdet.engine.runs import recorded
from nasdet.engine.supernet import SupernetRun, check_search
from nasdet.engine.train import write_cost
from nasdet.search.gradient import Bilevel
from nasdet.spaces.assemble import ModelConfig, build_model
from nasdet.spaces.fad import FADSpace
from nasdet.spaces.fad.genotype import NONE

# What may differ between a run and its resumption.
_FREE = ("workers", "log_every", "checkpoint_every", "name")


@dataclass(frozen=True)
class FADSearchConfig:
    """A FAD search; the defaults are the paper's (its released configuration: VOC 2012, FCOS, ResNet-50, one GPU).

    ``batch`` images for the weights and as many for the alphas in each of ``steps``; pictures of ``short_side`` by at
    most ``long_side`` pixels; SGD at ``lr`` with linear warm-up from 1/3 (``warmup_steps``; None: 500, or a tenth of
    a short run) and a drop to a tenth after ``drop`` of the steps; Adam at ``arch_lr``. ``space``, ``repshare``,
    ``decouple`` and ``released_h``: see :class:`FADSpace`; ``score``: see :func:`nasdet.spaces.fad.decode`.
    ``retrain_cells`` is written into the card; ``flip`` mirrors half of the images.
    """

    steps: int = 17_500
    batch: int = 4
    short_side: int = 416
    long_side: int = 693
    lr: float = 0.004
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int | None = None
    drop: float = 12_500 / 17_500
    clip: float = 20.0
    arch_lr: float = 3e-4
    arch_weight_decay: float = 1e-3
    space: str = "full"
    repshare: bool | None = None
    decouple: bool = True
    released_h: bool = False
    score: str = "softmax"
    detector: str = "fcos"
    backbone: str = "resnet50"
    width: float = 1.0
    fpn_channels: int = 256
    levels: int = 5
    inner_channels: int = 96
    cells: int = 1
    retrain_cells: int = 2
    amp: bool = False
    channels_last: bool = True
    flip: bool = True
    seed: int = 0
    workers: int = 2
    log_every: int = 20
    checkpoint_every: int = 200
    name: str | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "cells", "retrain_cells", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "arch_lr", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}")
        if self.score not in ("softmax", "alpha"):
            raise ValueError(f"score must be 'softmax' or 'alpha', got {self.score!r}")
        if self.name is not None:
            Card("fad", self.name, {"box": []})
        self.schedule()
        self.search_space()

    def schedule(self) -> Schedule:
        """The weights' learning rate by step."""
        return Schedule(self.lr, self.steps, milestones=(self.drop,), warmup_steps=self.warmup_steps)

    def model(self, categories: tuple[str, ...], pretrained: bool = False) -> ModelConfig:
        """The detector around the module; with pretrained weights its norms and first two stages are frozen."""
        return ModelConfig(
            detector=self.detector,
            backbone=self.backbone,
            width=self.width,
            fpn_channels=self.fpn_channels,
            levels=self.levels,
            norm="frozen_bn" if pretrained else "gn",
            frozen_stages=2 if pretrained else 0,
            num_classes=len(categories),
            categories=categories,
            short_side=self.short_side,
            long_side=self.long_side,
        )

    def fixed(self) -> dict[str, Any]:
        """What a resumed run must repeat, as plain data."""
        return {key: value for key, value in asdict(self).items() if key not in _FREE}

    def search_space(self) -> FADSpace:
        """The space to search."""
        return FADSpace(self.space, repshare=self.repshare, decouple=self.decouple, released_h=self.released_h)


def search_fad(
    config: FADSearchConfig,
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
    """Search FAD's module for a detector (first-order bilevel; ECCV 2020, section 3.2) and return the derived card.

    The detector's weights learn on ``data.search_train()``, the alphas on ``data.search_val()``; test images are
    refused. The run folder ``out`` gets ``run.json`` (with the deviations from the paper), ``split.json``,
    ``metrics.jsonl``, ``alphas.jsonl``, checkpoints, and at the end ``card.json``, ``model.json`` (the derived
    detector) and ``cost.json``. Killed at any moment and resumed it ends with the same alphas and card.

    ``weights`` is a local file with the backbone's pretrained weights; ``backend`` chooses the mixing ops' backend;
    ``command`` is recorded.

    Raises ``ValueError`` for a folder that holds a run when not resuming, or one made with other settings or another
    split; ``TestSplitError`` for data that includes test images; ``NonFiniteLoss`` when the search diverges.
    """
    out, where = Path(out), local_device(device)
    check_search("search fad", data, out, resume)
    run = _FADRun(config, data, where, backend, weights, started=resume and (out / LAST).exists())
    loop = Loop(
        out,
        steps=config.steps,
        state={"model": run.model, "weights": run.bilevel.weight_optimizer, "alphas": run.bilevel.arch_optimizer},
        seed=config.seed,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        resume=resume,
        title="search fad",
        progress=progress,
        config=config.fixed() | {"split": data.split.sha256, "pretrained": weights is not None},
    )
    facts = {
        "data": str(data.path.resolve()),
        "skipped": data.skipped or None,
        "weights": weights and str(weights),
        "choices": [*run.space.transformations, NONE],
        "deviations": deviations(config, data, weights is not None),
    }
    arguments = asdict(config)
    with recorded(
        out, "search fad", arguments, seed=config.seed, device=where, command=command, resume=resume, **facts
    ):
        data.split.save(out / "split.json")
        if loop.start == 0:
            append_line(out / "alphas.jsonl", {"step": 0, "alphas": run.alphas()})
        loop.run(
            run.stepper(loop.start),
            on_log=lambda done, line: append_line(out / "alphas.jsonl", {"step": done, "alphas": run.alphas()}),
        )
        return _finish(config, data, run, out)


class _FADRun(SupernetRun):
    """Model, optimisers and data of one search."""

    def __init__(
        self,
        config: FADSearchConfig,
        data: DataFolder,
        device: torch.device,
        backend: str | None,
        weights: str | Path | None,
        started: bool,
    ) -> None:
        super().__init__(config, data, device)
        self.config = config
        seed_everything(config.seed)
        self.space = config.search_space()
        self.supernet = self.space.supernet(config.fpn_channels, config.inner_channels, config.cells, backend)
        self.model_config = config.model(data.categories, weights is not None)
        source = None if started else weights  # a checkpoint brings its own
        self.model = build_model(self.model_config, towers=self.supernet, weights=source).to(device)
        self.format = training_layout(self.model, device, config.channels_last)
        self.model.to(memory_format=self.format).train()  # type: ignore[call-overload]  # torch's stub lacks this form
        alphas = self.space.arch_parameters(self.supernet)
        of_alphas = {id(parameter) for parameter in alphas}
        self.bilevel = Bilevel(
            [parameter for parameter in self.model.parameters() if id(parameter) not in of_alphas],
            alphas,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            clip=config.clip,
            schedule=config.schedule().at,
            arch_lr=config.arch_lr,
            arch_weight_decay=config.arch_weight_decay,
        )

    def alphas(self) -> dict[str, list[list[float]]]:
        """Raw alphas by group and edge."""
        return self.space.alphas(self.supernet)

    def stepper(self, start: int) -> Callable[[int], Mapping[str, Tensor]]:
        """The step function of the loop, its batches lined up with step ``start``."""
        seed, lined_up = 2 * self.config.seed, {"start": start, "steps": self.config.steps}
        weight_batches = self.batches(self.data.search_train(), seed=seed, **lined_up)
        arch_batches = self.batches(self.data.search_val(), seed=seed + 1, **lined_up)

        def step(index: int) -> Mapping[str, Tensor]:
            arch_batch, weight_batch = next(arch_batches), next(weight_batches)
            terms: dict[str, Tensor] = {}
            values = self.bilevel.step(index, lambda: self.loss(weight_batch, terms), lambda: self.loss(arch_batch, {}))
            return {**values, **terms}

        return step


def _finish(config: FADSearchConfig, data: DataFolder, run: _FADRun, out: Path) -> Card:
    card = run.space.derive(
        run.supernet,
        config.name or f"fad-{config.space}-seed{config.seed}",
        score=config.score,
        settings={"cells": config.retrain_cells},
        source={
            "search": "nasdet search fad",
            "data": data.path.resolve().name,
            "split": data.split.sha256,
            "steps": config.steps,
            "batch": config.batch,
            "seed": config.seed,
        },
    )
    derived = replace(run.model_config, towers=card.to_json())
    write_cost(out, derived)
    derived.save(out / "model.json")
    save_card(card, out / "card.json")
    return card


_COMPARED = {
    "steps": "steps",
    "batch": "images a step",
    "short_side": "pixels on the short side",
    "long_side": "pixels on the long side at most",
    "lr": "learning rate of the weights",
    "momentum": "momentum",
    "weight_decay": "weight decay",
    "clip": "gradient clipping",
    "arch_lr": "learning rate of the alphas",
    "arch_weight_decay": "weight decay of the alphas",
    "space": "set of transformations",
    "detector": "detector",
    "backbone": "backbone",
    "width": "width multiplier of the backbone",
    "fpn_channels": "pyramid channels",
    "levels": "pyramid levels",
    "inner_channels": "channels in the transformations",
    "cells": "cells a group while searching",
    "retrain_cells": "cells a group when retraining",
}


def deviations(config: FADSearchConfig, data: DataFolder, pretrained: bool) -> list[str]:
    """Every way in which a search differs from the paper's, in words; the first ones hold for every search here."""
    paper = FADSearchConfig()
    found = [
        "weights and alphas learn on two halves of the training images; the released code reads the same for both",
        "the alphas are in no SGD group, and their gradient is taken at the current weights; the released code keeps "
        "them in SGD and takes it on a copy that is never updated",
    ]
    found.append("biases learn at the weights' rate and decay with them; the released code: twice the rate, no decay")
    if config.score == "softmax":
        found.append("edges are compared by softmax, the paper's words; the released code compares raw alphas")
    if config.space == "full":
        found.append("dilation 3 (t6) is in the space as in the paper; the released code leaves it out")
    if data.layout != "voc":
        found.append(
            f"data: {data.path.resolve().name}, {len(data.split.train)} images to search on; the paper: PASCAL VOC 2012"
        )
    for name, words in _COMPARED.items():
        ours, theirs = getattr(config, name), getattr(paper, name)
        if ours != theirs:
            found.append(f"{words}: {_short(ours)}; the paper: {_short(theirs)}")
    if config.repshare is False and config.space != "darts":
        found.append("no representation sharing: every transformation is computed by itself")
    if not config.decouple:
        found.append("no decoupling function H")
    if config.released_h:
        found.append("H without its ReLU, as in the released code")
    if not pretrained:
        found.append(
            "random backbone with group norm, all of it trained; the paper: ImageNet weights, two stages frozen"
        )
    if config.amp:
        found.append("bfloat16 autocast; the paper: float32")
    return found


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
