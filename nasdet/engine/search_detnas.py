"""DetNAS searches: a detector's backbone as a supernet of ShuffleNetV2 blocks, and evolution over its paths."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from nasdet.arch import Card
from nasdet.data import DataFolder
from nasdet.detectors import TWO_STAGE
from nasdet.engine.one_shot import OneShotConfig, OneShotRun
from nasdet.engine.optim import other_rate
from nasdet.engine.recalibrate import recalibrate
from nasdet.engine.supernet import SearchOptions, differences, model_around, own_ways, run_search, unlike_coco
from nasdet.search.constraints import Constraint
from nasdet.search.evolution import RANDOM, Offspring
from nasdet.spaces.assemble import ModelConfig, build_model
from nasdet.spaces.detnas import DetNASSpace
from nasdet.spaces.detnas.latency import DetNASBlocks

if TYPE_CHECKING:
    from typing_extensions import Unpack

LIMITS = {"small": 300e6, "large": 1.3e9}
"""The paper's largest MACs by space, of the backbone at 224 x 224."""


@dataclass(frozen=True)
class Recalibration:
    """How a path gets statistics of its own for its batch norms: forward passes on training images.

    ``momentum`` None: the mean over all batches.
    """

    images: int
    batch: int
    momentum: float | None


RECALIBRATIONS = {"paper": Recalibration(500, 4, None), "released": Recalibration(4000, 8, 0.1)}
"""The paper's 500 images, and the 500 steps of 8 images in the released code."""


@dataclass(frozen=True)
class DetNASSearchConfig(OneShotConfig):
    """A DetNAS search; the defaults are the paper's (NeurIPS 2019, section 4: COCO, 8 GPUs with 2 images each).

    The shared settings are :class:`~nasdet.engine.one_shot.OneShotConfig`'s; ``lr`` None: 0.02, for RetinaNet 0.01.
    ``scratch`` is DetNAS-scratch: no pretrained weights, and twice the ``steps``. ``space`` and ``shuffle``: see
    :class:`~nasdet.spaces.detnas.DetNASSpace`. ``offspring`` is ``"paper"``, half of the children by crossover and
    half by mutation, or ``"released"``, 40 % each and 20 % random. ``max_macs`` (of the backbone at 224 x 224; None:
    the paper's 300 M for the small space and 1.3 G for the large one) and ``max_parameters`` (of the backbone) limit
    the candidates. ``recalibration`` is a name of :data:`RECALIBRATIONS`, or ``"none"``: the supernet's own
    statistics; ``recalibration_images`` takes the place of its number of images.
    """

    space: str = "small"
    shuffle: str = "even_odd"
    scratch: bool = False
    offspring: str = "paper"
    max_macs: float | None = None
    max_parameters: float | None = None
    recalibration: str = "paper"
    recalibration_images: int | None = None

    def __post_init__(self) -> None:
        self.check("detnas")
        if self.recalibration not in (*RECALIBRATIONS, "none"):
            names = ", ".join((*RECALIBRATIONS, "none"))
            raise ValueError(f"recalibration must be one of {names}, got {self.recalibration!r}")
        if self.recalibration_images is not None and self.recalibration_images < 1:
            raise ValueError(f"recalibration_images must be at least 1, got {self.recalibration_images}")
        offspring(self.offspring, self.population)
        path_limits(self.search_space(), self.space, self.max_macs, self.max_parameters)
        self.model(("thing",))

    def rate(self) -> float:
        return (0.01 if self.detector == "retinanet" else 0.02) if self.lr is None else self.lr

    def search_space(self) -> DetNASSpace:
        """The space to search."""
        return DetNASSpace(self.space, shuffle=self.shuffle)

    def model(self, categories: tuple[str, ...], pretrained: bool = False) -> ModelConfig:
        """The detector around the backbone; two-stage ones have the box head of four convolutions with ``norm``."""
        head = {"box_head": "4conv1fc", "head_norm": self.norm} if self.detector in TWO_STAGE else {}
        own = {"norm": self.norm, "tower_convs": self.tower_convs, "frozen_stages": 0, "options": head}
        return model_around(self, categories, pretrained, **own)


def offspring(kind: str, population: int) -> tuple[Offspring, ...]:
    """How a generation's children are made, in the paper's shares or the released code's."""
    if kind == "paper":
        half = population // 2
        groups = [(("crossover",), half, None), (("mutate",), population - half, 10 * population)]
    elif kind == "released":
        share = population * 2 // 5
        groups = [(("mutate",), share, None), (("crossover",), share, None)]
        groups.append(((RANDOM,), population - 2 * share, 20 * population))
    else:
        raise ValueError(f"offspring must be 'paper' or 'released', got {kind!r}")
    return tuple(Offspring(names, count, most, fill=most is not None) for names, count, most in groups if count)


def path_limits(
    space: DetNASSpace, name: str, max_macs: float | None, max_parameters: float | None = None
) -> list[Constraint]:
    """The limits on a path's MACs (None: those of the space of this name in the paper) and parameters."""
    most = LIMITS.get(name) if max_macs is None else max_macs
    return [
        Constraint(name, lambda card, table=table: table(card.genotype), None, high, table.reachable())  # type: ignore[misc]  # mypy cannot infer a lambda's default
        for name, table, high in (
            ("macs", space.macs, most),
            ("parameters", space.parameters, max_parameters),
        )
    ]


def search_detnas(
    config: DetNASSearchConfig, data: DataFolder, out: str | Path, **options: Unpack[SearchOptions]
) -> Card:
    """Search a detector's backbone (section 3; Algorithms 1 and 2, without the classification) and return its card.

    The supernet learns on ``data.search_train()``, one random path a step; then paths are scored on images of
    ``data.search_val()``, each with batch norm statistics of its own; test images are refused. ``weights`` are a
    supernet's pretrained for classification. The run folder and what is raised are
    :func:`~nasdet.engine.supernet.run_search`'s; it also gets ``evolution.json`` (all candidates by generation, with
    costs and scores), ``scores/`` and ``cards/``, the best ones. Killed at any moment and resumed, also in the
    search, it ends with the same population.

    Under ``torchrun`` every process calls this; ``out`` must be a folder that all of them see. A resumed search may
    have another number of processes than before, the training of the supernet may not.
    """
    return run_search(_DetNASRun, config, data, out, **options)


class _DetNASRun(OneShotRun):
    verb = "search detnas"
    of_supernet = ("space", "shuffle", "detector", "fpn_channels", "levels", "tower_convs", "norm")
    config: DetNASSearchConfig

    def total_steps(self) -> int:
        return self.config.steps * (2 if self.config.scratch else 1)

    def build(self, weights: str | Path | None) -> None:
        if self.config.scratch and self.weights is not None:
            raise ValueError(f"weights must be None for a search from scratch, got {self.weights}")
        self.space = self.config.search_space()
        self.model = build_model(self.model_config, backbone=self.space.supernet, weights=weights)
        self.supernet = self.model.get_submodule("backbone")

    def constraints(self) -> list[Constraint]:
        config = self.config
        return path_limits(self.space, config.space, config.max_macs, config.max_parameters)

    def timed_blocks(self) -> DetNASBlocks:
        return DetNASBlocks(self.space)

    def children(self) -> tuple[Offspring, ...]:
        return offspring(self.config.offspring, self.config.population)

    def adapt(self, card: Card) -> None:
        """Give the batch norms the path's own statistics."""
        config = self.config
        if config.recalibration == "none":
            return
        how = RECALIBRATIONS[config.recalibration]
        images = min(config.recalibration_images or how.images, len(self.learnt) if how.momentum is None else 10**9)
        batch = min(how.batch, images)
        steps = -(-images // batch)
        batches = self.batches(self.learnt, seed=config.seed, start=0, steps=steps, batch=batch)
        mode, momentum = ("cumulative", 0.1) if how.momentum is None else ("momentum", how.momentum)
        recalibrate(self.model, batches, mode=mode, momentum=momentum, forward=lambda images: self.loss(images, {}))

    def deviations(self) -> list[str]:
        return deviations(self.config, self.data, self.weights is not None)

    def name(self) -> str:
        config = self.config
        return config.name or f"detnas-{config.space}-{config.detector}-seed{config.seed}"


_COMPARED = {
    "steps": "steps of the supernet",
    "batch": "images a step",
    "short_side": "pixels on the short side",
    "long_side": "pixels on the long side at most",
    "optimizer": "optimiser",
    "momentum": "momentum",
    "weight_decay": "weight decay",
    "decay": "decay of the learning rate",
    "warmup_steps": "steps of warm-up",
    "detector": "detector",
    "space": "space",
    "fpn_channels": "pyramid channels",
    "levels": "pyramid levels",
    "tower_convs": "convolutions in a tower",
    "norm": "norm",
    "algorithm": "search algorithm",
    "population": "population",
    "parents": "parents",
    "generations": "generations",
    "val_images": "images to score on",
    "max_macs": "limit on MACs",
    "max_parameters": "limit on parameters",
    "max_latency": "limit on milliseconds",
    "recalibration_images": "images for the batch norms' statistics",
}


def deviations(config: DetNASSearchConfig, data: DataFolder, pretrained: bool) -> list[str]:
    """Every way in which a search differs from the paper's, in words; the first ones hold for every search here."""
    paper = DetNASSearchConfig()
    found = [
        "biases learn at the weights' rate and decay with them; the released code: twice the rate, no decay",
        "the pyramid has no norms; the released code: synchronised batch norm",
        "weights that are not on the path get no gradient, no momentum and no weight decay; in the released code "
        "momentum and decay go on",
        "an operator's attempts are bounded; the released code's may never end",
    ]
    found += unlike_coco(data)
    if config.detector == "retinanet":
        paper = replace(paper, detector="retinanet")
    if config.space in LIMITS:
        paper = replace(paper, space=config.space)
    found += differences(config, paper, _COMPARED)
    found += other_rate("learning rate", (config.rate(), paper.rate()), (config.batch, paper.batch))
    if config.clip is not None:
        found.append(f"gradients clipped at {config.clip:g}; the paper: not")
    if config.shuffle != paper.shuffle:
        found.append("channels are shuffled by halves, as in the released configurations of the search, not its nets")
    if config.offspring != paper.offspring:
        found.append("children as in the released code: 40 % by mutation, 40 % by crossover, 20 % random")
    if config.recalibration != "paper":
        found.append(f"statistics of batch norms: {config.recalibration}; the paper: of 500 images")
    if config.supernet is not None:
        found.append(f"the supernet is that of {Path(config.supernet).name}")
    elif config.scratch:
        found.append("from scratch, DetNAS-scratch in the paper: twice the steps in the place of pretraining")
    elif not pretrained:
        found.append("random supernet; the paper: pretrained for classification on ImageNet")
    return found + own_ways(config)
