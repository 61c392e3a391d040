"""One contestant of a race of search steps in a process of its own: makes a search, then does a step per input line.

Speaks JSON lines: the options as the only argument; ``{"ready": ...}``, then one object per step asked for.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from interleave import make_clock
from machine import keep_freed_blocks
from torch import Tensor, nn

from nasdet.engine.search_nats import NATSSearchConfig
from nasdet.measure.memory import peak_memory, trim_heap
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
        self.model: Any = model.to(self.device).to(memory_format=torch.channels_last).train()
        held = {id(alpha) for alpha in alphas}
        self.bilevel = Bilevel([p for p in model.parameters() if id(p) not in held], alphas, **settings)
        self.batches = [self._batch(options["images"], size, seed) for seed in (1, 2)]
        self.index = 0

    def _batch(self, count: int, size: list[int], seed: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(count, 3, *size, generator=generator).to(self.device)
        # Boxes as (x, y) corners and extents; the picture's own proportions.
        whole = torch.tensor([size[1], size[0]])
        targets = []
        for _ in range(count):
            corner = torch.rand(6, 2, generator=generator) * whole * 0.6
            extent = 8 + torch.rand(6, 2, generator=generator) * whole * 0.35
            labels = torch.randint(0, CLASSES, (6,), generator=generator)
            target = {"boxes": torch.cat([corner, corner + extent], 1), "labels": labels}
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


def main() -> None:
    options = json.loads(sys.argv[1])
    torch.set_num_threads(options["threads"])
    keep_freed_blocks()
    search = Search(options)
    clock = make_clock(options["device"])
    _say({"ready": True, "parameters": sum(p.numel() for p in search.model.parameters())})
    for line in sys.stdin:
        values: dict[str, float] = {}

        def step(into: dict[str, float] = values) -> None:
            into.update(search.step())

        # In a probe the profiler counts, which takes time; in other steps the kernel does.
        probing = line.strip() == "probe"
        seconds: list[float] = []

        def timed(into: list[float] = seconds, inner: Callable[[], None] = step) -> None:
            into.append(clock(inner))

        peak = peak_memory(timed, device=options["device"], tensors_only=probing)
        trim_heap()  # or four contestants' freed memory would not fit beside each other
        _say({"seconds": seconds[0], "peak_memory": peak, "values": values})


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
