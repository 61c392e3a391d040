"""MSNAS searches: a detector on a supernet of strides, and evolution over encoders and the maps that heads read."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nasdet.arch import Card
from nasdet.data import DataFolder
from nasdet.detectors import TWO_STAGE
from nasdet.engine import distributed
from nasdet.engine.one_shot import OneShotConfig, OneShotRun
from nasdet.engine.optim import Schedule, make_optimizer, other_rate
from nasdet.engine.step import train_step
from nasdet.engine.supernet import SearchOptions, differences, model_around, own_ways, run_search, unlike_coco
from nasdet.search.constraints import Constraint
from nasdet.search.evolution import PRESETS, Offspring
from nasdet.spaces.assemble import ModelConfig, build_model
from nasdet.spaces.msnas import MSNASSpace
from nasdet.spaces.msnas.costs import INPUT, RPN_CHANNELS
from nasdet.spaces.msnas.latency import MSNASBlocks

if TYPE_CHECKING:
    from typing_extensions import Unpack

_PAPER = PRESETS["msnas"]


@dataclass(frozen=True)
class MSNASSearchConfig(OneShotConfig):
    """An MSNAS search; the defaults are the paper's (section 4.1: COCO, 16 GPUs with 2 images each, from scratch).

    The shared settings are :class:`~nasdet.engine.one_shot.OneShotConfig`'s. The supernet learns for ``epochs`` over
    its images, or for ``steps``: at 0.04 after a linear warm-up from a 32nd of it (``warmup_steps``; None: an epoch),
    divided by 10 after 42 and 47 of 48 parts. ``variant``, ``blocks``, ``channels`` and ``block``: see
    :class:`~nasdet.spaces.msnas.MSNASSpace`. ``rpn_channels`` of the RPN and ``head_channels`` of the box head's fully
    connected layer; one-stage detectors have neither.

    Candidates have MACs of encoder and RPN within ``tolerance`` (a share) of ``target_macs``, for a picture of
    ``macs_height`` by ``macs_width``; None: the variant's, and no limit for other sizes. ``max_parameters`` limits the
    encoder's. Before it is scored, a candidate is trained on its own for ``tuning_steps`` (0: none) of
    ``tuning_batch`` images (None: ``batch``) at ``tuning_lr``, from the shared weights, which it leaves as they were;
    ``tuning_micro_batch`` of them, a divisor, go through the net at a time (None: all), and norms see no more.
    """

    epochs: int = 48
    steps: int | None = None  # type: ignore[assignment]  # epochs by default
    batch: int = 32
    lr: float = 0.04
    warmup_steps: int | None = None
    variant: str = "r18"
    blocks: int | None = None
    channels: int | None = None
    block: str | None = None
    rpn_channels: int = RPN_CHANNELS
    head_channels: int = 1024
    target_macs: float | None = None
    tolerance: float = 0.01
    macs_height: int = INPUT[0]
    macs_width: int = INPUT[1]
    max_parameters: float | None = None
    tuning_steps: int = 100
    tuning_batch: int | None = None
    tuning_micro_batch: int | None = None
    tuning_lr: float = 0.004
    population: int = _PAPER["population"]
    parents: int = _PAPER["parents"]
    generations: int = _PAPER["generations"]

    def __post_init__(self) -> None:
        self.check("msnas")
        for name in ("epochs", "rpn_channels", "head_channels", "tuning_batch", "tuning_micro_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        batch = self.tuning_batch or self.batch
        if self.tuning_micro_batch is not None and batch % self.tuning_micro_batch:
            raise ValueError(f"tuning_micro_batch must divide {batch} images, got {self.tuning_micro_batch}")
        if self.tuning_steps < 0:
            raise ValueError(f"tuning_steps must be at least 0, got {self.tuning_steps}")
        if not (math.isfinite(self.tuning_lr) and self.tuning_lr > 0):
            raise ValueError(f"tuning_lr must be a positive number, got {self.tuning_lr}")
        constraints(self, self.search_space())
        self.model(("thing",))

    def total_steps(self, images: int) -> int:
        """Steps of the supernet on ``images`` images."""
        return self.steps or self.epochs * math.ceil(images / self.batch)

    def rate(self) -> float:
        return self.lr

    def schedule(self, total: int | None) -> Schedule:
        """The supernet's learning rate by step; over its epochs where ``total`` is None."""
        total = total or self.epochs
        warmup = math.ceil(total / 48) if self.warmup_steps is None else self.warmup_steps
        points: dict[str, Any] = {"milestones": (42 / 48, 47 / 48), "warmup_factor": 1 / 32}
        return Schedule(self.lr, total, decay=self.decay, warmup_steps=warmup, **points)

    def search_space(self) -> MSNASSpace:
        """The space to search."""
        return MSNASSpace(self.variant, blocks=self.blocks, channels=self.channels, block=self.block)

    def model(self, categories: tuple[str, ...], pretrained: bool = False) -> ModelConfig:
        """The detector around the encoder; two-stage ones have the box head of two convolutions with ``norm``."""
        head: dict[str, Any] = {"tower_convs": self.tower_convs}
        if self.detector in TWO_STAGE:
            box = {"box_head": "2conv1fc", "head_norm": self.norm, "hidden": self.head_channels}
            head["options"] = box | {"rpn": {"hidden": self.rpn_channels}}
        return model_around(self, categories, pretrained, norm=self.norm, **head)


def _target(config: MSNASSearchConfig, space: MSNASSpace) -> float | None:
    return space.target if config.target_macs is None else config.target_macs


def constraints(config: MSNASSearchConfig, space: MSNASSpace) -> list[Constraint]:
    """The window of a candidate's MACs, and the limit on its parameters; without either, they are recorded only."""
    size, target = (config.macs_height, config.macs_width), _target(config, space)

    def cost(card: Card) -> float:
        return space.macs(card, size, config.rpn_channels)

    reachable = space.macs_range(size, config.rpn_channels)
    if target is None:
        window = Constraint("macs", cost, reachable=reachable)
    else:
        window = Constraint.window("macs", cost, target, config.tolerance, reachable)
    return [window, Constraint("parameters", space.parameters, None, config.max_parameters)]


def search_msnas(
    config: MSNASSearchConfig, data: DataFolder, out: str | Path, **options: Unpack[SearchOptions]
) -> Card:
    """Search the strides of a detector's encoder and the maps of its heads (section 3.4) and return the card.

    The supernet learns on ``data.search_train()``, in each step one uniformly random encoder with its heads; then
    candidates are trained for some steps on their own and scored on images of ``data.search_val()``; test images are
    refused. The run folder and what is raised are :func:`~nasdet.engine.supernet.run_search`'s; it also gets
    ``evolution.json`` (all candidates by generation, with costs and scores), ``scores/`` and ``cards/``, the best ones.
    Killed at any moment and resumed, also in the search, it ends with the same population. A window of MACs that no
    encoder reaches is a ``ValueError``, before anything is trained.

    Under ``torchrun`` every process calls this; ``out`` must be a folder that all of them see. A resumed search may
    have another number of processes than before, the training of the supernet may not.
    """
    return run_search(_MSNASRun, config, data, out, **options)


class _MSNASRun(OneShotRun):
    verb = "search msnas"
    of_supernet = (
        *("variant", "blocks", "channels", "block", "rpn_channels", "head_channels"),
        *("detector", "tower_convs", "norm"),
    )
    config: MSNASSearchConfig

    def total_steps(self) -> int:
        learnt, _ = self._divide()
        return self.config.total_steps(len(learnt))

    def build(self, weights: str | Path | None) -> None:
        self.space = self.config.search_space()
        self.model = build_model(self.model_config, backbone=self.space.supernet, weights=weights)
        self.supernet = self.model.get_submodule("backbone")

    def activate(self, card: Card) -> None:
        self.space.activate(self.supernet, card)
        self.model.set_strides(card.genotype["heads"])  # type: ignore[operator]  # a detector's method

    def constraints(self) -> list[Constraint]:
        return constraints(self.config, self.space)

    def timed_blocks(self) -> MSNASBlocks:
        if self.config.detector not in TWO_STAGE or self.config.rpn_channels != RPN_CHANNELS:
            raise ValueError(
                f"latency_table must be None but for two stages and an RPN of {RPN_CHANNELS} channels, as tables are "
                f"measured, got {self.config.detector} with {self.config.rpn_channels}"
            )
        return MSNASBlocks(self.space)

    def children(self) -> tuple[Offspring, ...]:
        """The paper's, in its shares of the population."""
        most = self.config.population
        return tuple(
            Offspring(
                group.operators,
                max(1, most * group.count // _PAPER["population"]),
                max(1, most * (group.attempts or 0) // _PAPER["population"]),
            )
            for group in _PAPER["offspring"]
        )

    def adapt(self, card: Card) -> None:
        """Train the candidate on its own."""
        config = self.config
        if not config.tuning_steps:
            return
        module = distributed.LossModule(self.model.train())
        rates = {"momentum": config.momentum, "weight_decay": config.weight_decay}
        optimizer = make_optimizer(config.optimizer, self.model, config.tuning_lr, **rates)
        batch = config.tuning_batch or config.batch
        size = config.tuning_micro_batch or batch
        parts = batch // size
        images = self.batches(self.learnt, seed=config.seed, start=0, steps=config.tuning_steps * parts, batch=size)
        moved = (part.to(self.device, self.format, non_blocking=True) for part in images)
        while step := list(islice(moved, parts)):
            train_step(module, optimizer, step, config.tuning_lr, clip=config.clip, amp=config.amp)

    def deviations(self) -> list[str]:
        return deviations(self.config, self.data, self.weights is not None)

    def name(self) -> str:
        config = self.config
        return config.name or f"msnas-{config.variant}-{config.detector}-seed{config.seed}"


_COMPARED = {
    "batch": "images a step",
    "short_side": "pixels on the short side",
    "long_side": "pixels on the long side at most",
    "optimizer": "optimiser",
    "momentum": "momentum",
    "weight_decay": "weight decay",
    "decay": "decay of the learning rate",
    "blocks": "blocks",
    "channels": "channels",
    "block": "kind of block",
    "rpn_channels": "channels of the RPN",
    "head_channels": "channels of the box head",
    "detector": "detector",
    "norm": "norm",
    "target_macs": "MACs of encoder and RPN",
    "tolerance": "tolerance of MACs",
    "macs_height": "height that MACs are counted at",
    "macs_width": "width that MACs are counted at",
    "max_latency": "limit on milliseconds",
    "tuning_steps": "steps of a candidate on its own",
    "tuning_batch": "images in such a step",
    "algorithm": "search algorithm",
    "population": "population",
    "parents": "parents",
    "generations": "generations, the first included",
}


def deviations(config: MSNASSearchConfig, data: DataFolder, pretrained: bool) -> list[str]:
    """Every way in which a search differs from the paper's, in words; the first ones hold for every search here."""
    paper = _resolved(MSNASSearchConfig(variant=config.variant))
    found = [
        "basic blocks, for R50 bottlenecks reduced for the heads, nearest upsampling and norms on laterals, as the "
        "paper's FLOPs suggest; the paper does not say",
        "every head has an RPN of its own, and all share a box head; the paper does not say",
        "pictures are padded to multiples of 32; the paper: of 64",
        "children are drawn among the legal ones, and the first population meets the limits too; in the paper illegal "
        "children are thrown away, and the first population need not",
        "candidates are scored on a part of the training images; the paper does not say on which",
    ]
    found += unlike_coco(data)
    if config.steps is not None:
        found.append(f"steps: {config.steps}; the paper: {paper.epochs} epochs")
    elif config.epochs != paper.epochs:
        found.append(f"epochs: {config.epochs}; the paper: {paper.epochs}")
    found += differences(own := _resolved(config), paper, _COMPARED)
    found += other_rate("learning rate", (own.lr, paper.lr), (own.batch, paper.batch))
    tuning = own.tuning_batch or own.batch, paper.tuning_batch or paper.batch
    found += other_rate("learning rate of a candidate on its own", (own.tuning_lr, paper.tuning_lr), tuning)
    if config.warmup_steps is not None:
        found.append(f"steps of warm-up: {config.warmup_steps}; the paper: an epoch")
    if config.tuning_micro_batch is not None:
        found.append(f"norms of a candidate on its own see {config.tuning_micro_batch} images; the paper does not say")
    if config.max_parameters is not None:
        found.append(f"at most {config.max_parameters:g} parameters; the paper: no such limit")
    if config.clip is not None:
        found.append(f"gradients clipped at {config.clip:g}; the paper does not say")
    if config.supernet is not None:
        found.append(f"the supernet is that of {Path(config.supernet).name}")
    elif pretrained:
        found.append("pretrained supernet; the paper: random weights")
    return found + own_ways(config)


def _resolved(config: MSNASSearchConfig) -> MSNASSearchConfig:
    """The settings with the numbers that None stands for."""
    space = config.search_space()
    sizes: dict[str, Any] = {name: getattr(space, name) for name in ("blocks", "channels", "block")}
    sizes |= {"tuning_batch": config.tuning_batch or config.batch, "target_macs": _target(config, space)}
    return replace(config, **sizes)
