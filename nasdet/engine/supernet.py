"""What every gradient search of a supernet shares: what it refuses, its batches, its loss."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from nasdet.data import (
    Batch,
    Compose,
    DataFolder,
    DetectionDataset,
    HorizontalFlip,
    Resize,
    Split,
    make_loader,
    require_selectable,
)
from nasdet.engine.checkpoint import LAST


class SearchSettings(Protocol):
    """What batches and loss need of a search's configuration."""

    @property
    def batch(self) -> int: ...
    @property
    def short_side(self) -> int: ...
    @property
    def long_side(self) -> int: ...
    @property
    def flip(self) -> bool: ...
    @property
    def workers(self) -> int: ...
    @property
    def amp(self) -> bool: ...


def check_search(verb: str, data: DataFolder, out: Path, resume: bool) -> None:
    """Refuse what must not start, before anything is written: several processes, test images, another split."""
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise ValueError(f"{verb} must run in one process, got {processes}")
    for dataset in (data.search_val(), data.search_train()):
        require_selectable(dataset, data.split)
    path = out / "split.json"
    if resume and (out / LAST).exists() and path.is_file() and (old := Split.load(path)).sha256 != data.split.sha256:
        raise ValueError(f"{path}: split must be the run's own, {old.sha256[:12]}, got {data.split.sha256[:12]}")


class SupernetRun:
    """Model and data of one search; a method's own run adds its space, its optimisers and its step."""

    model: nn.Module
    format: torch.memory_format

    def __init__(self, settings: SearchSettings, data: DataFolder, device: torch.device) -> None:
        self.settings, self.data, self.device = settings, data, device

    def batches(self, dataset: DetectionDataset, *, seed: int, start: int, steps: int) -> Iterator[Batch]:
        """The batches of steps ``start .. steps - 1``."""
        settings = self.settings
        size = Resize(settings.short_side, settings.long_side)
        loader = make_loader(
            dataset,
            settings.batch,
            Compose([size, *([HorizontalFlip()] if settings.flip else [])]),
            seed=seed,
            start_step=start,
            steps=steps,
            workers=settings.workers,
            pin_memory=self.device.type == "cuda",
        )
        # The iterator, and with it the workers, is made in the first step: after the loop has taken over the signals.
        return itertools.chain.from_iterable(iter(loader) for _ in range(1))

    def loss(self, batch: Batch, terms: dict[str, Any]) -> Tensor:
        """The detector's loss on a batch; its parts are put into ``terms``."""
        batch = batch.to(self.device, self.format, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp):
            outputs = self.model(batch.images)
        losses: dict[str, Tensor] = self.model.loss(outputs, batch.targets)  # type: ignore[operator]  # a detector's
        terms.update({name: value.detach() for name, value in losses.items()})
        return torch.stack(list(losses.values())).sum()
