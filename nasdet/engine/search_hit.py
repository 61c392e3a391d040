"""Hit-Detector searches: backbone, neck and head of a detector are one supernet, whose operations are chosen together.

What the stages share is here; screening is in :mod:`nasdet.engine.screen_hit`.
"""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nasdet.arch import Card
from nasdet.data import DataFolder
from nasdet.detectors import BACKBONES
from nasdet.engine.hit_memory import forecast_step, in_words, measurable
from nasdet.engine.loop import Loop
from nasdet.engine.optim import Schedule
from nasdet.engine.supernet import (
    BilevelRun,
    SearchOptions,
    check_settings,
    differences,
    model_around,
    run_search,
)
from nasdet.measure.memory import peak_memory
from nasdet.spaces.assemble import ModelConfig, build_model
from nasdet.spaces.hit import LAYOUTS, ONE_STAGE, TWO_STAGE, CostTable, HitSpace, Sizes, draw, expected_cost
from nasdet.spaces.hit.genotype import LEVELS
from nasdet.spaces.hit.screening import FIRST_EPOCH, KEEP, MU, sizes_after
from nasdet.spaces.hit.supernet import checked_memory

if TYPE_CHECKING:
    from typing_extensions import Unpack

STAGES = ("screen", "joint", "all")
GIGA = 1e9
_PARTS = {"faster_rcnn": TWO_STAGE, "retinanet": ONE_STAGE}


@dataclass(frozen=True)
class HitSearchConfig:
    """A Hit-Detector search; the defaults are the paper's (CVPR 2020, section 4.1: COCO, 8 GPUs of 4 images).

    ``stage``: ``"screen"`` finds the ``keep`` best operations of each part, ``"joint"`` searches the parts together,
    ``"all"`` does both. ``parts`` are those of ``detector`` (``faster_rcnn``: backbone, neck, head; ``retinanet``:
    backbone, neck, towers) or some of them; the others are plain. ``candidates``: see :class:`HitSpace`; None: the
    published sub-spaces for a joint search, all 32 operations for screening. ``layout``: a name of
    :data:`~nasdet.spaces.hit.LAYOUTS`; ``fpn_channels`` in the place of its own channels of neck and head.

    ``epochs`` over the images that train the weights, ``batch`` a step; in the first ``frozen_epochs`` the weights
    learn alone, then each step of the weights is followed by one of the alphas on ``batch`` other images. ``steps``
    sets the steps whatever the data, and an epoch is an equal share. SGD from ``lr`` down a cosine, Adam at
    ``arch_lr``. The alphas' loss has ``cost_weight * C / target`` added (lambda; ``C``: expected multiply-accumulates
    of the searched parts in G, at this picture size and with ``proposals`` RoIs), in screening ``penalty`` times the
    column penalty (mu). Screening removes operations after the epochs from ``removal_epoch`` to the last.
    ``rois`` of each image train a head. ``memory`` and ``samples``: see :class:`~nasdet.spaces.hit.MixedLayer`.
    """

    stage: str = "joint"
    epochs: int = 12
    frozen_epochs: int = 5
    steps: int | None = None
    batch: int = 32
    short_side: int = 800
    long_side: int = 1200
    lr: float = 0.04
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int | None = None
    clip: float | None = 35.0
    arch_lr: float = 4e-4
    arch_weight_decay: float = 0.0
    penalty: float = MU
    keep: int = KEEP
    removal_epoch: int = FIRST_EPOCH
    cost_weight: float = 0.01
    target: float = 1.0
    proposals: int = 1000
    rois: int = 512
    parts: Sequence[str] | None = None
    candidates: str | Sequence[str] | Mapping[str, Sequence[str]] | None = None
    layout: str = "released"
    memory: str = "full"
    samples: int = 2
    detector: str = "faster_rcnn"
    backbone: str = "resnet50"
    width: float = 1.0
    fpn_channels: int | None = None
    tower_convs: int = 4
    norm: str = "sync_bn"
    amp: bool = False
    channels_last: bool = True
    flip: bool = True
    seed: int = 0
    workers: int = 2
    log_every: int = 20
    checkpoint_every: int = 200
    name: str | None = None

    def __post_init__(self) -> None:
        for name, names in (("stage", STAGES), ("detector", tuple(_PARTS)), ("layout", tuple(LAYOUTS))):
            if getattr(self, name) not in names:
                raise ValueError(f"{name} must be one of {', '.join(names)}, got {getattr(self, name)!r}")
        checked_memory(self.memory)
        if self.norm == "frozen_bn":
            raise ValueError("norm must be one that learns, for layers that nobody has trained, got 'frozen_bn'")
        whole = (
            "epochs",
            "batch",
            "steps",
            "samples",
            "proposals",
            "rois",
            "fpn_channels",
            "log_every",
            "checkpoint_every",
        )
        check_settings("hit", self, whole, ("lr", "arch_lr", "clip", "target"))
        if not 0 <= self.frozen_epochs < self.epochs:
            raise ValueError(f"frozen_epochs must be in 0..{self.epochs - 1}, got {self.frozen_epochs}")
        for name in ("cost_weight", "penalty", "arch_weight_decay"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.searched_parts() != tuple(part for part in _PARTS[self.detector] if part in self.searched_parts()):
            have = ", ".join(_PARTS[self.detector])
            raise ValueError(f"parts must be among {have}, in this order, for {self.detector}, got {self.parts!r}")
        space = self.search_space()
        if self.stage != "joint":
            for names in space.candidates.values():
                sizes_after(0, len(names), self.keep, self.removal_epoch, self.epochs)
        self.model(("thing",))

    def searched_parts(self) -> tuple[str, ...]:
        """``parts``, or all that the detector has."""
        return _PARTS[self.detector] if self.parts is None else tuple(self.parts)

    def total_steps(self, images: int) -> int:
        """Steps of the weights on ``images`` images."""
        return self.steps or self.epochs * math.ceil(images / self.batch)

    def epoch_ends(self, total: int) -> list[int]:
        """Steps that are done after each epoch."""
        return [total * epoch // self.epochs for epoch in range(1, self.epochs + 1)]

    def alphas_from(self, total: int) -> int:
        """The first step after which the alphas move; at least one does."""
        return min(total * self.frozen_epochs // self.epochs, total - 1)

    def schedule(self, total: int) -> Schedule:
        """The weights' learning rate by step."""
        return Schedule(self.lr, total, decay="cosine", warmup_steps=self.warmup_steps)

    def sizes(self) -> Sizes:
        """The layout's sizes; those of a plain backbone where the neck reads one."""
        own: dict[str, Any] = {}
        if self.detector == "retinanet":
            own |= {"inputs": LEVELS[1:], "extra": "convs"}
        if self.fpn_channels is not None:
            own["channels"] = self.fpn_channels
        if "backbone" not in self.searched_parts() and "neck" in self.searched_parts():
            with torch.device("meta"):
                channels = BACKBONES[self.backbone](width=self.width, outputs=LEVELS).channels
            own |= {"stages": tuple((channels[level], 1, 2) for level in LEVELS), "tail": ()}
        return replace(LAYOUTS[self.layout], **own)

    def search_space(self) -> HitSpace:
        """The space that is searched; a screening's has half the blocks of each stage of the backbone."""
        candidates = self.candidates or ("screened" if self.stage == "joint" else "full")
        sizes = self.sizes()
        return HitSpace(sizes.halved() if self.stage == "screen" else sizes, candidates, self.searched_parts())

    def model(self, categories: tuple[str, ...], pretrained: bool = False) -> ModelConfig:
        """The detector around the searched parts; a plain pretrained backbone keeps its first stages frozen."""
        own: dict[str, Any] = {"norm": self.norm, "tower_convs": self.tower_convs}
        own["fpn_channels"] = self.sizes().channels
        if self.detector == "faster_rcnn":
            own["options"] = {"samples": self.rois}
        if "backbone" in self.searched_parts():
            own |= {"frozen_stages": 0, "width": 1.0}
        return model_around(self, categories, pretrained, **own)


def search_hit(config: HitSearchConfig, data: DataFolder, out: str | Path, **options: Unpack[SearchOptions]) -> Card:
    """Search a detector's parts together (first order; CVPR 2020, sections 3.2 and 3.3) and return the derived card.

    The weights learn on ``data.search_train()``, the alphas on ``data.search_val()``; test images are refused. With
    ``stage="all"`` every part is screened first, in sub-folders of ``out``, and what was kept is searched;
    ``stage="screen"`` is :func:`~nasdet.engine.screen_hit.screen_hit`'s and a ``ValueError`` here. ``weights`` are the
    backbone's: a supernet's where it is searched; with ``stage="all"`` the plain one's, around other parts.

    The run folder and what is raised are :func:`~nasdet.engine.supernet.run_search`'s, the ``options``
    :class:`~nasdet.engine.supernet.SearchOptions`; ``run.json`` also has the forecast of the memory and, from the
    process that began the training, the measured peak of the first step.
    """
    if config.stage == "screen":
        raise ValueError("stage must be joint or all, got 'screen', which finds no architecture: call screen_hit")
    if config.stage == "all":
        from nasdet.engine.screen_hit import screen_hit  # it needs this module

        config = replace(config, stage="joint", candidates=screen_hit(config, data, out, **options))
        if "backbone" in config.searched_parts():
            options["weights"] = None
    return run_search(_JointRun, config, data, out, **options)


def build_supernet(config: HitSearchConfig, space: HitSpace, model_config: ModelConfig, **options: Any) -> nn.Module:
    """The detector of a search: mixed layers in the parts of ``space``, all others plain.

    ``options``: ``weights``, the backbone's, and ``backend``, that of the mixing operator.
    """
    own: dict[str, Any] = {"memory": config.memory, "backend": options.get("backend")}
    makers: dict[str, Any] = {}
    if "backbone" in space.parts:
        makers["backbone"] = lambda *, width, **given: space.supernet("backbone", **own, **given)
    if "neck" in space.parts:
        makers["neck"] = lambda channels, strides: space.supernet(
            "neck", norm=config.norm, in_channels=channels, strides=strides, **own
        )
    if "head" in space.parts:
        makers["box_trunk"] = lambda: space.supernet("head", norm=config.norm, **own)
    if "towers" in space.parts:
        makers["towers"] = space.supernet("towers", norm=config.norm, **own)
    return build_model(model_config, **makers, **options)


class HitRun(BilevelRun):
    """What both stages share: supernets in a detector, a term on the alphas' steps, memory forecast and measured."""

    config: HitSearchConfig
    space: HitSpace

    def total_steps(self) -> int:
        return self.config.total_steps(len(self.data.search_train()))

    def build(self, weights: str | Path | None) -> None:
        self.space = self.config.search_space()
        self.model = self._make(weights)
        self.supernet = self.model
        self.alphas_from = self.config.alphas_from(self.steps)
        self.forecast: dict[str, int] = {}
        self.peak: int | None = None

    def facts(self) -> dict[str, Any]:
        self.forecast = forecast_step(self.config, self.space, self.model, self._make)
        choices = {part: list(names) for part, names in self.space.candidates.items()}
        when = {"alphas_from": self.alphas_from, "epoch_ends": self.config.epoch_ends(self.steps)}
        return {"choices": choices, **when, "memory_forecast": self.forecast}

    def outcome(self) -> dict[str, Any]:
        return {"memory_measured": self.peak}

    def _make(self, weights: str | Path | None = None) -> nn.Module:
        return build_supernet(self.config, self.space, self.model_config, weights=weights, backend=self.backend)

    @abstractmethod
    def term(self, values: dict[str, Any]) -> Tensor:
        """What the alphas' loss has besides the detector's; what is recorded goes into ``values``."""

    def end_of_step(self, done: int) -> None:
        """What follows the step after which ``done`` are done."""

    def stepper(self, start: int) -> Callable[[int], Mapping[str, Tensor]]:
        first = self.alphas_from
        weight_batches, arch_batches = self.halves(start, first)

        def step(index: int) -> Mapping[str, Tensor]:
            terms: dict[str, Tensor] = {}
            values = self.bilevel.weight_step(index, lambda: self._drawn_loss(next(weight_batches), terms))
            if index >= first:
                extra: dict[str, Tensor] = {}
                values["arch_loss"] = self.bilevel.arch_step(
                    lambda: self._drawn_loss(next(arch_batches), {}) + self.term(extra)
                )
                values |= extra
            self.end_of_step(index + 1)
            return {**values, **terms}

        return lambda index: step(index) if index else self._measured(step)

    def _measured(self, step: Callable[[int], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
        """The first step, which also makes the optimiser's state; it alone, as a checkpoint takes memory on the CPU."""
        if not measurable(self.device):
            return step(0)
        found: dict[str, Tensor] = {}
        self.peak = peak_memory(lambda: found.update(step(0)), device=self.device)
        return found

    def _drawn_loss(self, batch: Any, terms: dict[str, Any]) -> Tensor:
        if self.config.memory == "sampled":
            draw(self.model, self.config.samples)
        return self.loss(batch, terms)

    def learn(self, loop: Loop) -> None:
        if loop.progress:
            tqdm.write(in_words(self.forecast), file=sys.stderr)
        super().learn(loop)
        if loop.progress and self.peak is not None:
            tqdm.write(in_words(self.forecast, self.peak), file=sys.stderr)


class _JointRun(HitRun):
    verb = "search hit"

    def build(self, weights: str | Path | None) -> None:
        super().build(weights)
        config = self.config
        self.costs: CostTable = self.space.macs((config.short_side, config.long_side), config.proposals)

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"cost": "multiply-accumulates", "cost_range": list(self.costs.reachable())}

    def term(self, values: dict[str, Any]) -> Tensor:
        costs = {part: cost / GIGA for part, cost in expected_cost(self.model, self.costs).items()}
        values |= {f"expected_{part}": cost.detach() for part, cost in costs.items()}
        return self.config.cost_weight / self.config.target * torch.stack(list(costs.values())).sum()

    def deviations(self) -> list[str]:
        return deviations(self.config, self.data, self.weights is not None)

    def derive(self, source: Mapping[str, Any]) -> Card:
        config = self.config
        name = config.name or f"hit-{config.layout}-{config.detector}-seed{config.seed}"
        return self.space.derive(self.model, name, source=source)


_COMPARED = {
    "batch": "images a step",
    "short_side": "pixels on the short side",
    "long_side": "pixels on the long side at most",
    "lr": "learning rate of the weights",
    "momentum": "momentum",
    "weight_decay": "weight decay",
    "clip": "gradient clipping",
    "arch_lr": "learning rate of the alphas",
    "layout": "layout of the backbone",
    "norm": "norm",
    "rois": "RoIs of an image to train on",
}
_JOINT = {"cost_weight": "weight of the cost", "proposals": "RoIs in the cost"}
_SCREEN = {"penalty": "weight of the column penalty", "keep": "operations kept", "removal_epoch": "first removal"}


def deviations(config: HitSearchConfig, data: DataFolder, pretrained: bool) -> list[str]:
    """Every way in which a run differs from the paper's, in words; the first ones hold for every search here."""
    screening = config.stage == "screen"
    paper = replace(HitSearchConfig(), stage=config.stage, detector=config.detector)
    found = [
        "warm-up, clipping, Adam's betas (0.5 and 0.999) and no decay of the alphas: the paper does not say",
        "weights and alphas learn on two halves of the training images, a step of the alphas after each of the weights",
    ]
    if screening:
        found.append(
            "an operation's score is the mean of its softmax over the layers, and operations go in equal parts at the "
            "ends of the last epochs, while the other parts are plain: the paper does not say"
        )
    else:
        found.append(
            f"the cost is expected over the softmax, in G over {config.target:g}: the paper prints alpha and no unit"
        )
    if data.layout != "coco" or len(data.split.train) < 100_000:
        found.append(f"data: {data.path.resolve().name}, {len(data.split.train)} images to search on; the paper: COCO")
    if config.steps is not None:
        found.append(f"steps: {config.steps}; the paper: {paper.epochs} epochs")
    if (config.epochs, config.frozen_epochs) != (paper.epochs, paper.frozen_epochs):
        ours, theirs = (f"{c.epochs} epochs, {c.frozen_epochs} without alphas" for c in (config, paper))
        found.append(f"schedule: {ours}; the paper: {theirs}")
    found += differences(config, paper, _COMPARED | (_SCREEN if screening else _JOINT))
    if not screening and config.searched_parts() != paper.searched_parts():
        found.append(f"{', '.join(config.searched_parts())} alone, in a detector whose other parts are plain")
    if (width := config.sizes().channels) != LAYOUTS[config.layout].channels:
        found.append(f"channels of neck and head: {width}; the layout's: {LAYOUTS[config.layout].channels}")
    if config.candidates is not None and config.candidates != ("full" if screening else "screened"):
        found.append("candidates of this run's own choice; the paper: its sub-spaces, or all 32 when screening")
    if config.memory == "sampled":
        found.append(f"{config.samples} candidates of each layer a step, drawn by their softmax; the paper: all")
    if not pretrained:
        found.append("random weights; the paper: the backbone's supernet pretrained on ImageNet, its alphas fixed")
    if config.amp:
        found.append("bfloat16 autocast; the paper: float32")
    return found
