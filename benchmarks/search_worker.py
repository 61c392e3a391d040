"""One contestant of ``bench_search_step`` in a process of its own: makes a FAD search, then does a step per input line.

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
from torch import Tensor

from nasdet.measure.memory import peak_memory, trim_heap
from nasdet.search.gradient import Bilevel
from nasdet.spaces.assemble import ModelConfig, build_model
from nasdet.spaces.fad import FADSpace


class Search:
    """A supernet in its detector, its optimisers, and two fixed batches, all seeded: contestants of one form start with
    the same weights, so that their losses can be compared."""

    def __init__(self, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.device = options["device"]
        space = FADSpace("full", repshare=options["repshare"])
        config = ModelConfig(
            backbone=options["backbone"],
            fpn_channels=options["fpn_channels"],
            norm="frozen_bn",
            num_classes=20,
            short_side=options["size"],
            long_side=options["size"],
        )
        supernet = space.supernet(options["fpn_channels"], options["inner_channels"], 1, options["backend"])
        model: Any = build_model(config, towers=supernet)
        self.model = model.to(self.device).to(memory_format=torch.channels_last).train()
        alphas = space.arch_parameters(supernet)
        held = {id(alpha) for alpha in alphas}
        self.bilevel = Bilevel([p for p in model.parameters() if id(p) not in held], alphas)
        self.batches = [self._batch(options["images"], options["size"], seed) for seed in (1, 2)]
        self.index = 0

    def _batch(self, count: int, size: int, seed: int) -> tuple[Tensor, list[dict[str, Tensor]]]:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(count, 3, size, size, generator=generator).to(self.device)
        targets = []
        for _ in range(count):
            corner = torch.rand(6, 2, generator=generator) * size * 0.6
            extent = 8 + torch.rand(6, 2, generator=generator) * size * 0.35
            labels = torch.randint(0, 20, (6,), generator=generator)
            target = {"boxes": torch.cat([corner, corner + extent], 1), "labels": labels}
            targets.append({name: value.to(self.device) for name, value in target.items()})
        return images.contiguous(memory_format=torch.channels_last), targets

    def step(self) -> dict[str, float]:
        """An alpha step, then a weight step."""
        weight_batch, arch_batch = self.batches
        values = self.bilevel.step(self.index, lambda: self._loss(weight_batch), lambda: self._loss(arch_batch))
        self.index += 1
        return {name: float(value) for name, value in values.items()}

    def _loss(self, batch: tuple[Tensor, list[dict[str, Tensor]]]) -> Tensor:
        images, targets = batch
        losses: dict[str, Tensor] = self.model.loss(self.model(images), targets)
        return torch.stack(list(losses.values())).sum()


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

        # The first step is a warm-up, in which the profiler counts; later ones are timed, and the kernel counts.
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
