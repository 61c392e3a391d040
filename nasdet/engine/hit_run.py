"""What both stages of a Hit-Detector search share: supernets in a detector, their steps, and the memory these take."""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from nasdet.engine.hit_config import HitSearchConfig
from nasdet.engine.hit_memory import MeasuredPeak, draw_for, forecast_step, in_words
from nasdet.engine.loop import Loop, Stateful
from nasdet.engine.supernet import BilevelRun
from nasdet.spaces.assemble import ModelConfig, build_model, makers_of
from nasdet.spaces.hit import HitSpace


def build_supernet(config: HitSearchConfig, space: HitSpace, model_config: ModelConfig, **options: Any) -> nn.Module:
    """The detector of a search: mixed layers in the parts of ``space``, all others plain.

    ``options``: ``weights``, the backbone's, and ``backend``, that of the mixing operator.
    """
    own: dict[str, Any] = {"memory": config.memory, "backend": options.get("backend")}
    backbone = partial(_searched_backbone, space, **own)
    makers = makers_of(space.parts, backbone, partial(space.supernet, norm=config.norm, **own))
    return build_model(model_config, **makers, **options)


def _searched_backbone(space: HitSpace, *, width: float, **given: Any) -> nn.Module:
    """Called as other backbones' makers are; channels are the layout's, whatever ``width``."""
    return space.supernet("backbone", **given)


class HitRun(BilevelRun):
    """What both stages share: supernets in a detector, a term on the alphas' steps, memory forecast and measured."""

    config: HitSearchConfig
    space: HitSpace

    def total_steps(self) -> int:
        return self.config.total_steps(len(self.data.search_train()))

    def build(self, weights: str | Path | None) -> None:
        self.space = self.config.search_space()
        given: dict[str, Any] = {"weights": weights, "backend": self.backend}
        self.model = build_supernet(self.config, self.space, self.model_config, **given)
        self.supernet = self.model
        self.alphas_from = self.config.alphas_from(self.steps)
        self.forecast: dict[str, int] = {}
        self.measured = MeasuredPeak(self.device)

    def state(self) -> dict[str, Stateful]:
        return super().state() | {"memory": self.measured}

    def facts(self) -> dict[str, Any]:
        # Traced on the CPU, where a backend of the GPU is none.
        make = partial(build_supernet, self.config, self.space, self.model_config)
        self.forecast = forecast_step(self.config, self.space, self.model, make)
        choices = {part: list(names) for part, names in self.space.candidates.items()}
        when = {"alphas_from": self.alphas_from, "epoch_ends": self.config.epoch_ends(self.steps)}
        return {"choices": choices, **when, "memory_forecast": self.forecast}

    def outcome(self) -> dict[str, Any]:
        return {"memory_measured": self.measured.peak}

    @abstractmethod
    def term(self, values: dict[str, Any]) -> Tensor:
        """What the alphas' loss has besides the detector's; what is recorded goes into ``values``."""

    def end_of_step(self, done: int) -> None:
        """What follows the step after which ``done`` are done."""

    def stepper(self, start: int) -> Callable[[int], Mapping[str, Tensor]]:
        first = self.alphas_from
        weight_batches, arch_batches = self.halves(start, first)

        def step(index: int) -> Mapping[str, Tensor]:
            # Both before the memory is watched: the first one starts the processes that read pictures.
            batch, other = next(weight_batches), next(arch_batches) if index >= first else None
            with self.measured.watching(index, self.steps, self.bilevel.weight_optimizer):
                return self._step(index, batch, other)

        return step

    def _step(self, index: int, batch: Any, other: Any) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        loss = partial(self._drawn_loss, index, "weights", batch, terms)
        values: dict[str, Tensor] = {**self.bilevel.weight_step(index, loss)}
        if other is not None:
            extra: dict[str, Tensor] = {}
            again = partial(self._drawn_loss, index, "alphas", other, {})
            values["arch_loss"] = self.bilevel.arch_step(lambda: again() + self.term(extra))
            values |= extra
        self.end_of_step(index + 1)
        return {**values, **terms}

    def _drawn_loss(self, index: int, half: str, batch: Any, terms: dict[str, Any]) -> Tensor:
        if self.config.memory == "sampled":
            draw_for(self.model, self.config, index, half)
        return self.loss(batch, terms)

    def learn(self, loop: Loop) -> None:
        if loop.progress:
            tqdm.write(in_words(self.forecast), file=sys.stderr)
        try:
            super().learn(loop)
        finally:
            self.measured.stop()
        if loop.progress and self.measured.peak is not None:
            tqdm.write(in_words(self.forecast, self.measured.peak), file=sys.stderr)
