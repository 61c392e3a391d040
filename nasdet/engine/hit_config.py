"""The settings of a Hit-Detector search, and how they differ from the paper's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from nasdet.data import DataFolder
from nasdet.detectors import BACKBONES
from nasdet.engine.epochs import FrozenEpochs
from nasdet.engine.optim import Schedule, other_rate
from nasdet.engine.supernet import check_settings, differences, model_around, own_ways, unlike_coco
from nasdet.spaces.assemble import ModelConfig, backbone_maker
from nasdet.spaces.hit import LAYOUTS, ONE_STAGE, TWO_STAGE, HitSpace, Sizes
from nasdet.spaces.hit.genotype import LEVELS
from nasdet.spaces.hit.screening import FIRST_EPOCH, KEEP, MU, sizes_after
from nasdet.spaces.hit.supernet import checked_memory

STAGES = ("screen", "joint", "all")
_PARTS = {"faster_rcnn": TWO_STAGE, "retinanet": ONE_STAGE}


@dataclass(frozen=True)
class HitSearchConfig(FrozenEpochs):
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
    of the searched parts in G, at this picture size and with ``proposals`` RoIs; or, with a ``latency_table``, a file
    of ``nasdet measure latency`` for this layout and detector, expected milliseconds), in screening ``penalty`` times
    the column penalty (mu). Screening removes operations after the epochs from ``removal_epoch`` to the last.
    The backbone that is screened begins from ``screen_weights`` (``nasdet pretrain --space hit-LAYOUT-half``), or at
    random. ``rois`` of each image train a head. ``memory`` and ``samples``: see :class:`~nasdet.spaces.hit.MixedLayer`.
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
    screen_weights: str | None = None
    cost_weight: float = 0.01
    target: float = 1.0
    proposals: int = 1000
    latency_table: str | None = None
    rois: int = 512
    parts: Sequence[str] | None = None
    candidates: str | Sequence[str] | Mapping[str, Sequence[str]] | None = None
    layout: str = "released"
    memory: str = "full"
    samples: int = 2
    detector: str = "faster_rcnn"
    backbone: str | Mapping[str, Any] = "resnet50"
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
        self.check_epochs()
        for name in ("cost_weight", "penalty", "arch_weight_decay"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.searched_parts() != tuple(part for part in _PARTS[self.detector] if part in self.searched_parts()):
            have = ", ".join(_PARTS[self.detector])
            raise ValueError(f"parts must be among {have}, in this order, for {self.detector}, got {self.parts!r}")
        space = self.search_space()
        if self.stage != "joint":
            if not self.frozen_epochs < self.removal_epoch <= self.epochs:  # before, alphas are noise
                allowed = f"{self.frozen_epochs + 1}..{self.epochs}"
                raise ValueError(f"removal_epoch must be in {allowed}, got {self.removal_epoch}")
            for names in space.candidates.values():
                sizes_after(0, len(names), self.keep, self.removal_epoch, self.epochs)
        self.model(("thing",))

    def searched_parts(self) -> tuple[str, ...]:
        """``parts``, or all that the detector has."""
        return _PARTS[self.detector] if self.parts is None else tuple(self.parts)

    def epoch_ends(self, total: int) -> list[int]:
        """Steps that are done after each epoch."""
        return [total * epoch // self.epochs for epoch in range(1, self.epochs + 1)]

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
                made = backbone_maker(self.backbone)
                maker = BACKBONES[made] if isinstance(made, str) else made
                body: Any = maker(width=self.width, outputs=LEVELS)
            own |= {"stages": tuple((body.channels[level], 1, 2) for level in LEVELS), "tail": ()}
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


_COMPARED = {
    "batch": "images a step",
    "short_side": "pixels on the short side",
    "long_side": "pixels on the long side at most",
    "momentum": "momentum",
    "weight_decay": "weight decay",
    "clip": "gradient clipping",
    "arch_lr": "learning rate of the alphas",
    "layout": "layout of the backbone",
    "norm": "norm",
    "rois": "RoIs of an image to train on",
}
_PLAIN = {"backbone": "plain backbone", "width": "its width multiplier"}
_JOINT = {"cost_weight": "weight of the cost", "proposals": "RoIs in the cost"}
_SCREEN = {"penalty": "weight of the column penalty", "keep": "operations kept", "removal_epoch": "first removal"}


def deviations(config: HitSearchConfig, data: DataFolder, pretrained: bool) -> list[str]:
    """Every way in which a run differs from the paper's, in words; the first ones hold for every search here."""
    screening = config.stage == "screen"
    paper = replace(HitSearchConfig(), stage=config.stage, detector=config.detector)
    decay = f"decay of the alphas ({config.arch_weight_decay:g})"
    found = [
        f"warm-up, clipping, Adam's betas (0.5 and 0.999), {decay} and their start near 0: the paper does not say",
        "one process on one device; the paper: 8 GPUs",
        "weights and alphas learn on two halves of the training images, a step of the alphas after each of the weights",
    ]
    if screening:
        found.append(
            "an operation's score is the mean of its softmax over the layers, and operations go in equal parts at the "
            "ends of the last epochs, while the other parts are plain: the paper does not say"
        )
    else:
        unit = "G" if config.latency_table is None else "ms"
        found.append(
            f"the cost is expected over the softmax, in {unit} over {config.target:g}: the paper prints alpha, no unit"
        )
    if not screening and config.latency_table is not None:
        found.append("the cost is measured latency; the paper: FLOPs")
    found += unlike_coco(data)
    if config.steps is not None:
        found.append(f"steps: {config.steps}; the paper: {paper.epochs} epochs")
    if (config.epochs, config.frozen_epochs) != (paper.epochs, paper.frozen_epochs):
        ours, theirs = (f"{c.epochs} epochs, {c.frozen_epochs} without alphas" for c in (config, paper))
        found.append(f"schedule: {ours}; the paper: {theirs}")
    plain = {} if "backbone" in config.searched_parts() and not screening else _PLAIN
    found += differences(config, paper, _COMPARED | (_SCREEN if screening else _JOINT) | plain)
    found += other_rate("learning rate of the weights", (config.lr, paper.lr), (config.batch, paper.batch))
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
    return found + own_ways(config)
