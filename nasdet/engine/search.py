"""FAD searches: a detector's towers or mask head become a supernet, and what was found comes out as a card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nasdet.arch import Card
from nasdet.data import DataFolder
from nasdet.detectors import parts_of
from nasdet.engine.optim import Schedule, other_rate
from nasdet.engine.supernet import (
    BilevelRun,
    SearchOptions,
    check_settings,
    differences,
    model_around,
    own_ways,
    run_search,
)
from nasdet.spaces.assemble import ModelConfig, build_model
from nasdet.spaces.fad import PARTS, FADSpace
from nasdet.spaces.fad.genotype import NONE

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class FADSearchConfig:
    """A FAD search; the defaults are the paper's (its released configuration: VOC 2012, FCOS, ResNet-50, one GPU).

    ``batch`` images for the weights and as many for the alphas in each of ``steps``; pictures of ``short_side`` by at
    most ``long_side`` pixels; SGD at ``lr`` with linear warm-up from 1/3 (``warmup_steps``; None: 500, or a tenth of
    a short run) and a drop to a tenth after ``drop`` of the steps; Adam at ``arch_lr``. ``space``, ``repshare``,
    ``decouple`` and ``released_h``: see :class:`FADSpace`; ``score``: see :func:`nasdet.spaces.fad.decode`.
    ``retrain_cells`` is written into the card; ``flip`` mirrors half of the images. ``part`` is what is searched,
    ``"towers"`` or ``"mask_trunk"`` (the mask head's convolutions before the deconvolution); None: what ``detector``
    has of the two.
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
    part: str | None = None
    backbone: str | Mapping[str, Any] = "resnet50"
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
        whole = ("steps", "batch", "cells", "retrain_cells", "log_every", "checkpoint_every")
        check_settings("fad", self, whole, ("lr", "arch_lr", "clip"))
        if self.score not in ("softmax", "alpha"):
            raise ValueError(f"score must be 'softmax' or 'alpha', got {self.score!r}")
        self.schedule(self.steps)
        self.search_space()
        self.model(("thing",))

    def searched_part(self) -> str:
        """``part``, or what the detector has."""
        have = [part for part in PARTS if part in parts_of(self.detector)]
        if not have:
            raise ValueError(f"detector must have towers or a mask trunk to search, got {self.detector!r}")
        if self.part is not None and self.part not in have:
            raise ValueError(f"part must be {' or '.join(have)} for {self.detector}, got {self.part!r}")
        return self.part or have[0]

    def schedule(self, total: int) -> Schedule:
        """The weights' learning rate by step."""
        return Schedule(self.lr, total, milestones=(self.drop,), warmup_steps=self.warmup_steps)

    def model(self, categories: tuple[str, ...], pretrained: bool = False) -> ModelConfig:
        """The detector around the module; with pretrained weights its norms and first two stages are frozen."""
        return model_around(self, categories, pretrained, norm="frozen_bn" if pretrained else "gn")

    def search_space(self) -> FADSpace:
        """The space to search."""
        sharing: dict[str, Any] = {"repshare": self.repshare, "decouple": self.decouple, "released_h": self.released_h}
        return FADSpace(self.space, **sharing, groups=PARTS[self.searched_part()])


def search_fad(config: FADSearchConfig, data: DataFolder, out: str | Path, **options: Unpack[SearchOptions]) -> Card:
    """Search FAD's module for a detector (first-order bilevel; ECCV 2020, section 3.2) and return the derived card.

    The detector's weights learn on ``data.search_train()``, the alphas on ``data.search_val()``; test images are
    refused. ``options``: see :class:`~nasdet.engine.supernet.SearchOptions`; the run's folder, and what is raised: see
    :func:`~nasdet.engine.supernet.run_search`. A search of the mask head needs data with masks.
    """
    return run_search(_FADRun, config, data, out, **options)


class _FADRun(BilevelRun):
    verb = "search fad"
    config: FADSearchConfig

    def build(self, weights: str | Path | None) -> None:
        config = self.config
        self.space = config.search_space()
        channels = self.model_config.fpn_channels  # a backbone that is a pyramid by itself sets them
        self.supernet = self.space.supernet(channels, config.inner_channels, config.cells, self.backend)
        place: dict[str, Any] = {config.searched_part(): self.supernet}
        self.model = build_model(self.model_config, **place, weights=weights)

    def facts(self) -> dict[str, Any]:
        return {"choices": [*self.space.transformations, NONE]}

    def deviations(self) -> list[str]:
        return deviations(self.config, self.data, self.weights is not None)

    def stepper(self, start: int) -> Callable[[int], Mapping[str, Tensor]]:
        weight_batches, arch_batches = self.halves(start)

        def step(index: int) -> Mapping[str, Tensor]:
            arch_batch, weight_batch = next(arch_batches), next(weight_batches)
            terms: dict[str, Tensor] = {}
            values = self.bilevel.step(index, lambda: self.loss(weight_batch, terms), lambda: self.loss(arch_batch, {}))
            return {**values, **terms}

        return step

    def derive(self, source: Mapping[str, Any]) -> Card:
        config = self.config
        name = config.name or f"fad-{config.space}-seed{config.seed}"
        settings = {"cells": config.retrain_cells}
        return self.space.derive(self.supernet, name, score=config.score, settings=settings, source=source)


_COMPARED = {
    "steps": "steps",
    "batch": "images a step",
    "short_side": "pixels on the short side",
    "long_side": "pixels on the long side at most",
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
    masks = config.searched_part() == "mask_trunk"
    if masks:
        found.append("how the paper searches mask heads is not public: what follows is against its search of towers")
        paper = replace(paper, detector="mask_rcnn")
    if data.layout != ("coco" if masks else "voc") or (masks and len(data.split.train) < 100_000):
        ours = f"{data.path.resolve().name}, {len(data.split.train)} images to search on"
        found.append(f"data: {ours}; the paper: {'COCO' if masks else 'PASCAL VOC 2012'}")
    found += differences(config, paper, _COMPARED)
    found += other_rate("learning rate of the weights", (config.lr, paper.lr), (config.batch, paper.batch))
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
    return found + own_ways(config)
