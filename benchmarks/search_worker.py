"""One contestant of a race of search steps: a search, run by ``worker.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from worker import random_objects, serve

from nasdet.engine.layout import place_model
from nasdet.engine.search_nats import NATSSearchConfig
from nasdet.search.gradient import Bilevel
from nasdet.spaces.assemble import ModelConfig, build_model
from nasdet.spaces.fad import FADSpace

CLASSES = 20


class Search:
    """A supernet in its detector, its optimisers, and two fixed batches, all seeded: contestants of one form start with
    the same weights, so that their losses can be compared."""

    def __init__(self, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.device = options["device"]
        size = options["size"] if isinstance(options["size"], list) else [options["size"]] * 2
        model, alphas, settings = {"fad": _fad, "nats": _nats}[options["space"]](options, size)
        self.weights_first = options["space"] == "nats"
        if options["backend"] is None:  # as in a search; the reference is torch's throughout
            place_model(model, torch.device(self.device))
        else:
            model.to(self.device).to(memory_format=torch.channels_last)
        self.model: Any = model.train()
        held = {id(alpha) for alpha in alphas}
        self.bilevel = Bilevel([p for p in model.parameters() if id(p) not in held], alphas, **settings)
        self.batches = [self._batch(options["images"], size, seed) for seed in (1, 2)]
        self.index = 0

    def _batch(self, count: int, size: list[int], seed: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(count, 3, *size, generator=generator).to(self.device)
        targets = []
        for _ in range(count):
            target = random_objects(6, size, CLASSES, generator)
            targets.append({name: value.to(self.device) for name, value in target.items()})
        return images.contiguous(memory_format=torch.channels_last), targets

    def step(self) -> dict[str, float]:
        """An alpha step and a weight step, in the order of the method."""
        weight_batch, arch_batch = self.batches
        if self.weights_first:
            values = self.bilevel.weight_step(self.index, lambda: self._loss(weight_batch))
            values["arch_loss"] = self.bilevel.arch_step(lambda: self._loss(arch_batch))
        else:
            values = self.bilevel.step(self.index, lambda: self._loss(weight_batch), lambda: self._loss(arch_batch))
        self.index += 1
        return {name: float(value) for name, value in values.items()}

    def _loss(self, batch: tuple[Tensor, list[dict[str, Tensor]]]) -> Tensor:
        images, targets = batch
        losses: dict[str, Tensor] = self.model.loss(self.model(images), targets)
        return torch.stack(list(losses.values())).sum()


Made = tuple[nn.Module, list[nn.Parameter], dict[str, Any]]  # the model, its alphas, settings of the optimisers


def _fad(options: dict[str, Any], size: list[int]) -> Made:
    space = FADSpace("full", repshare=options["repshare"])
    config = ModelConfig(
        backbone=options["backbone"],
        fpn_channels=options["fpn_channels"],
        norm="frozen_bn",
        num_classes=CLASSES,
        short_side=min(size),
        long_side=max(size),
    )
    supernet = space.supernet(options["fpn_channels"], options["inner_channels"], 1, options["backend"])
    return build_model(config, towers=supernet), space.arch_parameters(supernet), {}


def _nats(options: dict[str, Any], size: list[int]) -> Made:
    """As a search with pretrained weights makes it, but for the weights."""
    sizes = {name: options[name] for name in ("backbone", "width", "fpn_channels")}
    config = NATSSearchConfig(detector="fcos", **sizes)
    model = build_model(config.model(tuple(map(str, range(CLASSES))), pretrained=True))
    backbone = model.get_submodule("backbone")
    space = config.search_space(backbone)
    space.supernet(backbone, options["backend"])
    # Above it random weights do not stay finite for long.
    settings = {"lr": 1e-3, "clip": 20.0, "arch_lr": config.arch_lr, "arch_weight_decay": config.arch_weight_decay}
    return model, space.arch_parameters(backbone), settings


if __name__ == "__main__":
    serve(Search)
