"""NATS searches: a detector's backbone becomes a supernet in place, and the derived backbone comes out as a card."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nasdet.arch import Card
from nasdet.data import DataFolder
from nasdet.engine.checkpoint import seed_everything
from nasdet.engine.epochs import FrozenEpochs
from nasdet.engine.optim import Schedule, other_rate
from nasdet.engine.receptive_field import measure_field, write_fields
from nasdet.engine.supernet import (
    BilevelRun,
    SearchOptions,
    check_settings,
    differences,
    model_around,
    own_ways,
    run_search,
    unlike_coco,
)
from nasdet.spaces.assemble import ModelConfig, backbone_name, build_model
from nasdet.spaces.nats import NATSSpace
from nasdet.spaces.nats.genotype import dilation_name, genotype_set, to_plain
from nasdet.spaces.nats.space import CHANNEL_GROUPS

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class NATSSearchConfig(FrozenEpochs):
    """A NATS search; the defaults are the paper's (NeurIPS 2019, section 4.1: COCO, 8 GPUs with an image each).

    ``epochs`` over the images that train the weights, in steps of ``batch`` images; in the first ``frozen_epochs`` the
    weights learn alone, then each step of the weights is followed by one of the alphas, on ``batch`` other images.
    ``steps`` sets the steps of the weights whatever the data; the share of those without alphas stays. SGD from ``lr``
    down to ``final_lr`` along a cosine, after a linear warm-up from 1/3 (``warmup_steps``; None: 500, or a tenth of a
    short run; 0: none, as the paper has it); Adam at ``arch_lr``. ``dilations``, ``channel_groups``,
    ``channels_per_group`` and ``index_preserving``: see :class:`NATSSpace`. ``norm`` of the backbone, None:
    ``"sync_bn"`` with pretrained weights, else ``"gn"``. ``clip`` bounds the gradient's norm; ``flip`` mirrors half of
    the images.
    """

    epochs: int = 25
    frozen_epochs: int = 10
    steps: int | None = None
    batch: int = 8
    short_side: int = 800
    long_side: int = 1200
    lr: float = 0.01
    final_lr: float = 0.0004
    momentum: float = 0.9
    weight_decay: float = 1e-4
    warmup_steps: int | None = None
    clip: float | None = None
    arch_lr: float = 0.01
    arch_weight_decay: float = 1e-5
    dilations: str | Mapping[Any, Any] = "C"
    channel_groups: int | None = None
    channels_per_group: int | None = None
    index_preserving: bool = False
    detector: str = "faster_rcnn"
    backbone: str | Mapping[str, Any] = "resnet50"
    width: float = 1.0
    fpn_channels: int = 256
    levels: int = 5
    tower_convs: int = 4
    norm: str | None = None
    amp: bool = False
    channels_last: bool = True
    flip: bool = True
    seed: int = 0
    workers: int = 2
    log_every: int = 20
    checkpoint_every: int = 200
    name: str | None = None

    def __post_init__(self) -> None:
        whole = ("epochs", "batch", "steps", "log_every", "checkpoint_every")
        check_settings("nats", self, whole, ("lr", "arch_lr", "clip"))
        self.check_epochs()
        if not 0 <= self.final_lr <= self.lr:
            raise ValueError(f"final_lr must be between 0 and lr {self.lr}, got {self.final_lr}")
        dilations = genotype_set(self.dilations)
        if not isinstance(self.dilations, str):  # as JSON has it, so that a run's records and its settings agree
            own = {str(stage): list(map(to_plain, pairs)) for stage, pairs in dilations.items()}
            object.__setattr__(self, "dilations", own)
        self.schedule(self.steps or self.epochs)
        self.model(("thing",))

    def schedule(self, total: int) -> Schedule:
        """The weights' learning rate by step."""
        final = self.final_lr / self.lr
        return Schedule(self.lr, total, decay="cosine", final=final, warmup_steps=self.warmup_steps)

    def model(self, categories: tuple[str, ...], pretrained: bool = False) -> ModelConfig:
        """The detector; with pretrained weights the stem and the first stage are frozen."""
        norm = self.norm or ("sync_bn" if pretrained else "gn")
        return model_around(self, categories, pretrained, norm=norm, tower_convs=self.tower_convs)

    def search_space(self, backbone: str | nn.Module | None = None) -> NATSSpace:
        """The space to search, on the configured backbone by default."""
        return NATSSpace(
            self.dilations,
            channel_groups=self.channel_groups,
            channels_per_group=self.channels_per_group,
            backbone=self.backbone if backbone is None else backbone,
            width=self.width,
            index_preserving=self.index_preserving,
        )


def search_nats(config: NATSSearchConfig, data: DataFolder, out: str | Path, **options: Unpack[SearchOptions]) -> Card:
    """Search the dilations of a detector's backbone (first-order bilevel; section 3.2) and return the derived card.

    The weights learn on ``data.search_train()``, the alphas on ``data.search_val()``; test images are refused. The run
    folder and what is raised are :func:`~nasdet.engine.supernet.run_search`'s, the ``options``
    :class:`~nasdet.engine.supernet.SearchOptions`; pretrained weights are copied into every replica. The folder also
    gets ``erf.json``, the receptive fields of the original and the derived backbone. A backbone without bottlenecks and
    depthwise convolutions is a ``ValueError``.
    """
    return run_search(_NATSRun, config, data, out, **options)


class _NATSRun(BilevelRun):
    verb = "search nats"
    config: NATSSearchConfig

    def total_steps(self) -> int:
        return self.config.total_steps(len(self.data.search_train()))

    def build(self, weights: str | Path | None) -> None:
        self.alphas_from = self.config.alphas_from(self.steps)
        self.model = build_model(self.model_config, weights=weights)
        self.supernet = self.model.get_submodule("backbone")
        self.space = self.config.search_space(self.supernet)
        self.space.supernet(self.supernet, self.backend)

    def facts(self) -> dict[str, Any]:
        space = self.space
        choices = {layer.name: list(map(dilation_name, space.dilations_of(layer))) for layer in space.layers}
        return {"choices": choices, "alphas_from": self.alphas_from}

    def deviations(self) -> list[str]:
        return deviations(self.config, self.data, self.weights is not None)

    def stepper(self, start: int) -> Callable[[int], Mapping[str, Tensor]]:
        first = self.alphas_from
        weight_batches, arch_batches = self.halves(start, first)

        def step(index: int) -> Mapping[str, Tensor]:
            terms: dict[str, Tensor] = {}
            values = self.bilevel.weight_step(index, lambda: self.loss(next(weight_batches), terms))
            if index >= first:
                values["arch_loss"] = self.bilevel.arch_step(lambda: self.loss(next(arch_batches), {}))
            return {**values, **terms}

        return step

    def derive(self, source: Mapping[str, Any]) -> Card:
        config = self.config
        chosen = config.dilations if isinstance(config.dilations, str) else "own"
        name = config.name or f"nats-{chosen}-{backbone_name(config.backbone)}-seed{config.seed}"
        settings = {"backbone": config.backbone, "width": config.width}
        return self.space.derive(self.supernet, name, settings=settings, source=source)

    def finish(self, out: Path, *, resume: bool = False, progress: bool = True) -> Card:
        card = super().finish(out, resume=resume, progress=progress)
        self._record_fields(card, out)
        return card

    def _record_fields(self, card: Card, out: Path) -> None:
        """``erf.json``: the backbone before and after, with the weights that both begin retraining from."""
        seed_everything(self.config.seed)
        backbone = build_model(self.model_config, weights=self.weights).get_submodule("backbone").to(self.device)
        fields = [measure_field(backbone, f"original {backbone_name(self.config.backbone)}")]
        fields.append(measure_field(NATSSpace.build(card, backbone), f"derived, {card.name}"))
        random = "random weights, those of the seed"
        write_fields(out, fields, random if self.weights is None else "the pretrained weights")


_COMPARED = {
    "batch": "images a step",
    "short_side": "pixels on the short side",
    "long_side": "pixels on the long side at most",
    "momentum": "momentum",
    "weight_decay": "weight decay",
    "arch_lr": "learning rate of the alphas",
    "arch_weight_decay": "weight decay of the alphas",
    "dilations": "set of dilations",
    "detector": "detector",
    "backbone": "backbone",
    "width": "width multiplier of the backbone",
    "fpn_channels": "pyramid channels",
    "levels": "pyramid levels",
}


def _other_cut(config: NATSSearchConfig) -> list[str]:
    """A line where the channels are cut otherwise than the paper cuts those of this backbone (tables 2 and 4)."""
    groups, channels = config.channel_groups or CHANNEL_GROUPS, config.channels_per_group
    ours = f"{groups} in a layer" if channels is None else f"of {channels} channels"
    large = config.backbone in ("resnet101", "resnext101_32x4d")
    theirs = "of 32 channels" if large else f"{CHANNEL_GROUPS} in a layer"
    return [] if ours == theirs else [f"channel groups: {ours}; the paper: {theirs}"]


def deviations(config: NATSSearchConfig, data: DataFolder, pretrained: bool) -> list[str]:
    """Every way in which a search differs from the paper's, in words; the first ones hold for every search here."""
    paper = NATSSearchConfig()
    found = [
        "alphas start at zero, each step of the weights is followed by one of the alphas, Adam's betas are 0.5 and "
        "0.999, and the rate is read as per image: the paper does not say",
        "weights and alphas learn on two halves of the training images; the paper: train2014, val2014 without minival",
    ]
    found += unlike_coco(data)
    if config.steps is not None:
        found.append(f"steps: {config.steps}; the paper: {paper.epochs} epochs")
    elif (config.epochs, config.frozen_epochs) != (paper.epochs, paper.frozen_epochs):
        ours, theirs = (f"{c.epochs} epochs, {c.frozen_epochs} without alphas" for c in (config, paper))
        found.append(f"schedule: {ours}; the paper: {theirs}")
    found += differences(config, paper, _COMPARED)
    found += _other_cut(config)
    batches = config.batch, paper.batch
    found += other_rate("learning rate of the weights", (config.lr, paper.lr), batches)
    found += other_rate("learning rate of the weights at the end", (config.final_lr, paper.final_lr), batches)
    if config.warmup_steps != 0:
        length = "500 steps, at most a tenth of all" if config.warmup_steps is None else f"{config.warmup_steps} steps"
        found.append(f"warm-up from a third of the rate: {length}; the paper has one when retraining only")
    if config.clip is not None:
        found.append(f"gradients clipped at {config.clip:g}; the paper does not say")
    if config.index_preserving:
        found.append("derived channel groups keep their places; the paper: in blocks, one per dilation")
    if pretrained:
        found.append("the backbone's stem and first stage are frozen; the paper does not say")
    if not pretrained:
        norm = config.model(("thing",)).norm
        found.append(f"random backbone with {norm}, all of it trained; the paper: ImageNet weights")
    elif config.norm not in (None, "sync_bn"):
        found.append(f"norm of the backbone: {config.norm}; the paper: sync_bn")
    return found + own_ways(config)
