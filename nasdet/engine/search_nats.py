"""NATS searches: a detector's backbone becomes a supernet in place, and the derived backbone comes out as a card."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nasdet.arch import Card, save_card
from nasdet.data import Batch, DataFolder
from nasdet.engine.checkpoint import LAST, seed_everything
from nasdet.engine.distributed import local_device
from nasdet.engine.layout import training_layout
from nasdet.engine.loop import Loop
from nasdet.engine.optim import Schedule
from nasdet.engine.receptive_field import measure_field, write_fields
from nasdet.engine.records import append_line
from nasdet.engine.runs import recorded
from nasdet.engine.supernet import SupernetRun, check_search
from nasdet.engine.train import write_cost
from nasdet.search.gradient import Bilevel
from nasdet.spaces.assemble import ModelConfig, build_model
from nasdet.spaces.nats import NATSSpace
from nasdet.spaces.nats.genotype import dilation_name, genotype_set

# What may differ between a run and its resumption.
_FREE = ("workers", "log_every", "checkpoint_every", "name")


@dataclass(frozen=True)
class NATSSearchConfig:
    """A NATS search; the defaults are the paper's (NeurIPS 2019, section 4.1: COCO, 8 GPUs with an image each).

    ``epochs`` over the images that train the weights, in steps of ``batch`` images; in the first ``frozen_epochs`` the
    weights learn alone, then each step of the weights is followed by one of the alphas, on ``batch`` other images.
    ``steps`` sets the steps of the weights whatever the data; the share of those without alphas stays. SGD from ``lr``
    down to ``final_lr`` along a cosine, after a linear warm-up from 1/3 (``warmup_steps``; None: 500, or a tenth of a
    short run); Adam at ``arch_lr``. ``dilations``, ``channel_groups``, ``channels_per_group`` and
    ``index_preserving``: see :class:`NATSSpace`. ``norm`` of the backbone, None: ``"sync_bn"`` with pretrained
    weights, else ``"gn"``. ``clip`` bounds the gradient's norm; ``flip`` mirrors half of the images.
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
    dilations: str = "C"
    channel_groups: int | None = None
    channels_per_group: int | None = None
    index_preserving: bool = False
    detector: str = "fcos"
    backbone: str = "resnet50"
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
        for name in ("epochs", "batch", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if not 0 <= self.frozen_epochs < self.epochs:
            raise ValueError(f"frozen_epochs must be in 0..{self.epochs - 1}, got {self.frozen_epochs}")
        for name in ("lr", "arch_lr"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be a positive number, got {getattr(self, name)}")
        if not 0 <= self.final_lr <= self.lr:
            raise ValueError(f"final_lr must be between 0 and lr {self.lr}, got {self.final_lr}")
        if self.clip is not None and not (math.isfinite(self.clip) and self.clip > 0):
            raise ValueError(f"clip must be a positive number or None, got {self.clip}")
        if self.name is not None:
            Card("nats", self.name, {"layer": []})
        genotype_set(self.dilations)
        self.schedule(self.steps or self.epochs)
        self.model(("thing",))

    def total_steps(self, images: int) -> int:
        """Steps of the weights on ``images`` images."""
        return self.steps or self.epochs * math.ceil(images / self.batch)

    def alphas_from(self, total: int) -> int:
        """The first step after which the alphas move; at least one does."""
        return min(total * self.frozen_epochs // self.epochs, total - 1)

    def schedule(self, total: int) -> Schedule:
        """The weights' learning rate by step."""
        final = self.final_lr / self.lr
        return Schedule(self.lr, total, decay="cosine", final=final, warmup_steps=self.warmup_steps)

    def model(self, categories: tuple[str, ...], pretrained: bool = False) -> ModelConfig:
        """The detector; with pretrained weights the stem and the first stage are frozen."""
        return ModelConfig(
            detector=self.detector,
            backbone=self.backbone,
            width=self.width,
            fpn_channels=self.fpn_channels,
            levels=self.levels,
            norm=self.norm or ("sync_bn" if pretrained else "gn"),
            frozen_stages=2 if pretrained else 0,
            num_classes=len(categories),
            categories=categories,
            tower_convs=self.tower_convs,
            short_side=self.short_side,
            long_side=self.long_side,
        )

    def fixed(self) -> dict[str, Any]:
        """What a resumed run must repeat, as plain data."""
        return {key: value for key, value in asdict(self).items() if key not in _FREE}

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


def search_nats(
    config: NATSSearchConfig,
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
    """Search the dilations of a detector's backbone (first-order bilevel; section 3.2) and return the derived card.

    The weights learn on ``data.search_train()``, the alphas on ``data.search_val()``; test images are refused. The run
    folder ``out`` gets ``run.json`` (with the deviations from the paper), ``split.json``, ``metrics.jsonl``,
    ``alphas.jsonl`` (by layer), checkpoints, and at the end ``card.json``, ``model.json`` (the derived detector),
    ``cost.json``, and ``erf.json`` (the receptive fields of the original and the derived backbone). Killed at any
    moment and resumed it ends with the same alphas and card.

    ``weights`` is a local file with the backbone's pretrained weights, copied into every replica; ``backend`` chooses
    the convolutions' backend; ``command`` is recorded.

    Raises ``ValueError`` for a folder that holds a run when not resuming, or one made with other settings or another
    split, and for a backbone without bottlenecks; ``TestSplitError`` for data that includes test images;
    ``NonFiniteLoss`` when the search diverges.
    """
    out, where = Path(out), local_device(device)
    check_search("search nats", data, out, resume)
    run = _NATSRun(config, data, where, backend, weights, started=resume and (out / LAST).exists())
    loop = Loop(
        out,
        steps=run.steps,
        state={"model": run.model, "weights": run.bilevel.weight_optimizer, "alphas": run.bilevel.arch_optimizer},
        seed=config.seed,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint_every,
        resume=resume,
        title="search nats",
        progress=progress,
        config=config.fixed() | {"split": data.split.sha256, "pretrained": weights is not None},
    )
    facts: dict[str, Any] = {
        "data": str(data.path.resolve()),
        "skipped": data.skipped or None,
        "weights": weights and str(weights),
        "choices": {layer.name: list(map(dilation_name, run.space.dilations_of(layer))) for layer in run.space.layers},
        "alphas_from": run.alphas_from,
        "deviations": deviations(config, data, weights is not None),
    }
    arguments = asdict(config)
    with recorded(
        out, "search nats", arguments, seed=config.seed, device=where, command=command, resume=resume, **facts
    ):
        data.split.save(out / "split.json")
        if loop.start == 0:
            append_line(out / "alphas.jsonl", {"step": 0, "alphas": run.alphas()})
        loop.run(
            run.stepper(loop.start),
            on_log=lambda done, line: append_line(out / "alphas.jsonl", {"step": done, "alphas": run.alphas()}),
        )
        card = _finish(config, data, run, out)
        _record_fields(run, card, out, weights)
        return card


class _NATSRun(SupernetRun):
    """Supernet, optimisers and data of one search."""

    def __init__(
        self,
        config: NATSSearchConfig,
        data: DataFolder,
        device: torch.device,
        backend: str | None,
        weights: str | Path | None,
        started: bool,
    ) -> None:
        super().__init__(config, data, device)
        self.config = config
        self.steps = config.total_steps(len(data.search_train()))
        self.alphas_from = config.alphas_from(self.steps)
        seed_everything(config.seed)
        self.model_config = config.model(data.categories, weights is not None)
        source = None if started else weights  # a checkpoint brings its own
        self.model = build_model(self.model_config, weights=source)
        self.backbone: nn.Module = self.model.get_submodule("backbone")
        self.space = config.search_space(self.backbone)
        self.space.supernet(self.backbone, backend)
        self.model.to(device)
        self.format = training_layout(self.model, device, config.channels_last)
        self.model.to(memory_format=self.format).train()  # type: ignore[call-overload]  # torch's stub lacks this form
        alphas = self.space.arch_parameters(self.backbone)
        of_alphas = {id(parameter) for parameter in alphas}
        self.bilevel = Bilevel(
            [parameter for parameter in self.model.parameters() if id(parameter) not in of_alphas],
            alphas,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            clip=config.clip,
            schedule=config.schedule(self.steps).at,
            arch_lr=config.arch_lr,
            arch_weight_decay=config.arch_weight_decay,
        )

    def alphas(self) -> dict[str, list[list[float]]]:
        """Raw alphas by layer and channel group."""
        return self.space.alphas(self.backbone)

    def stepper(self, start: int) -> Callable[[int], Mapping[str, Tensor]]:
        """The step function of the loop, its batches lined up with step ``start``."""
        first, seed = self.alphas_from, 2 * self.config.seed
        weight_batches = self.batches(self.data.search_train(), seed=seed, start=start, steps=self.steps)
        arch_batches: Iterator[Batch] = self.batches(
            self.data.search_val(), seed=seed + 1, start=max(0, start - first), steps=self.steps - first
        )

        def step(index: int) -> Mapping[str, Tensor]:
            terms: dict[str, Tensor] = {}
            values = self.bilevel.weight_step(index, lambda: self.loss(next(weight_batches), terms))
            if index >= first:
                values["arch_loss"] = self.bilevel.arch_step(lambda: self.loss(next(arch_batches), {}))
            return {**values, **terms}

        return step


def _finish(config: NATSSearchConfig, data: DataFolder, run: _NATSRun, out: Path) -> Card:
    card = run.space.derive(
        run.backbone,
        config.name or f"nats-{config.dilations}-{config.backbone}-seed{config.seed}",
        settings={"backbone": config.backbone, "width": config.width},
        source={
            "search": "nasdet search nats",
            "data": data.path.resolve().name,
            "split": data.split.sha256,
            "steps": run.steps,
            "batch": config.batch,
            "seed": config.seed,
        },
    )
    derived = replace(run.model_config, backbone_card=card.to_json())
    write_cost(out, derived)
    derived.save(out / "model.json")
    save_card(card, out / "card.json")
    return card


def _record_fields(run: _NATSRun, card: Card, out: Path, weights: str | Path | None) -> None:
    """``erf.json``: the backbone before and after, with the weights that both begin retraining from."""
    seed_everything(run.config.seed)
    backbone = build_model(run.model_config, weights=weights).get_submodule("backbone").to(run.device)
    fields = [measure_field(backbone, f"original {run.config.backbone}")]
    fields.append(measure_field(NATSSpace.build(card, backbone), f"derived, {card.name}"))
    write_fields(out, fields, "random weights, those of the seed" if weights is None else "the pretrained weights")


_COMPARED = {
    "batch": "images a step",
    "short_side": "pixels on the short side",
    "long_side": "pixels on the long side at most",
    "lr": "learning rate of the weights",
    "final_lr": "learning rate of the weights at the end",
    "momentum": "momentum",
    "weight_decay": "weight decay",
    "arch_lr": "learning rate of the alphas",
    "arch_weight_decay": "weight decay of the alphas",
    "dilations": "set of dilations",
    "backbone": "backbone",
    "width": "width multiplier of the backbone",
    "fpn_channels": "pyramid channels",
    "levels": "pyramid levels",
}


def deviations(config: NATSSearchConfig, data: DataFolder, pretrained: bool) -> list[str]:
    """Every way in which a search differs from the paper's, in words; the first ones hold for every search here."""
    paper = NATSSearchConfig()
    found = [
        "alphas start at zero, each step of the weights is followed by one of the alphas, Adam's betas are 0.5 and "
        "0.999, and the rate is read as per image: the paper does not say",
        "weights and alphas learn on two halves of the training images; the paper: train2014, val2014 without minival",
        f"detector: {config.detector}; the paper: faster_rcnn with a feature pyramid",
    ]
    if data.layout != "coco" or len(data.split.train) < 100_000:
        found.append(f"data: {data.path.resolve().name}, {len(data.split.train)} images to search on; the paper: COCO")
    if config.steps is not None:
        found.append(f"steps: {config.steps}; the paper: {paper.epochs} epochs")
    elif (config.epochs, config.frozen_epochs) != (paper.epochs, paper.frozen_epochs):
        ours, theirs = (f"{c.epochs} epochs, {c.frozen_epochs} without alphas" for c in (config, paper))
        found.append(f"schedule: {ours}; the paper: {theirs}")
    for name, words in _COMPARED.items():
        ours, theirs = getattr(config, name), getattr(paper, name)
        if ours != theirs:
            found.append(f"{words}: {_short(ours)}; the paper: {_short(theirs)}")
    if config.clip is not None:
        found.append(f"gradients clipped at {_short(config.clip)}; the paper does not say")
    if config.index_preserving:
        found.append("derived channel groups keep their places; the paper: in blocks, one per dilation")
    if not pretrained:
        norm = config.model(("thing",)).norm
        found.append(f"random backbone with {norm}, all of it trained; the paper: ImageNet weights")
    elif config.norm not in (None, "sync_bn"):
        found.append(f"norm of the backbone: {config.norm}; the paper: sync_bn")
    if config.amp:
        found.append("bfloat16 autocast; the paper: float32")
    return found


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
