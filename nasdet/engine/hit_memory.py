"""What a step of a Hit-Detector search will need: forecast without running it, and in words beside the measured."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nasdet.measure.forecast import forecast_memory
from nasdet.measure.memory import can_reset_high_water
from nasdet.spaces.hit import HitSpace, mixed_layers
from nasdet.spaces.hit.steps import draw_the_largest

if TYPE_CHECKING:
    from nasdet.engine.search_hit import HitSearchConfig


def forecast_step(
    config: HitSearchConfig, space: HitSpace, model: nn.Module, make: Callable[[], nn.Module]
) -> dict[str, int]:
    """Bytes that a search will take beyond the weights: ``step``, a step's peak, ``state``, that of SGD, and ``total``.

    ``make`` makes another ``model``, with supernets of ``space``, to be traced. The step is traced on tensors without
    storage: forward of the whole detector on pictures of the largest size, a two-stage one with ``rois`` of each, and
    backward. Losses and targets, small beside it, are left out; with ``memory="sampled"`` each layer draws the
    candidates that need the most.
    """
    size = (_padded(config.short_side), _padded(config.long_side))
    kept = torch.get_rng_state()  # tracing must not move the run's random numbers
    step = forecast_memory(lambda: _step(config, space, make(), size))
    torch.set_rng_state(kept)
    state = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return {"step": step, "state": state, "total": step + state}


def _padded(side: int) -> int:
    return -(-side // 32) * 32


def _step(config: HitSearchConfig, space: HitSpace, model: Any, size: tuple[int, int]) -> Callable[[], None]:
    model.train()
    for layers in mixed_layers(model).values():
        for layer in layers:
            layer.alpha.requires_grad_(False)  # the weights' step, the larger of the two
    if config.memory == "sampled":
        for part in space.parts:
            draw_the_largest(space, model, part, config.samples, size)
    images = torch.randn(config.batch, 3, *size)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=config.amp):
            if config.detector == "retinanet":
                outputs = model(images)
            else:
                features = list(model.neck(model.backbone(images)).values())
                box = images.new_empty(4).expand(config.rois, 4)
                outputs = [model.rpn(features), model.boxes(features, [box] * len(images))]
        values = [value.float().mean() for value in tree_leaves(outputs) if _learns(value)]
        torch.stack(values).sum().backward()

    return step


def _learns(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def measurable(device: torch.device) -> bool:
    """Whether a training's peak can be measured without slowing it down."""
    return device.type == "cuda" or can_reset_high_water()


def in_words(forecast: dict[str, int], measured: int | None = None) -> str:
    """The forecast, and beside it the measured peak."""
    total = forecast["total"]
    words = f"memory beyond the weights: forecast {total / 2**30:.2f} GiB"
    if measured is None:
        return words
    return f"{words}, measured {measured / 2**30:.2f} GiB ({measured / total:.0%} of it)"


__all__ = ["forecast_step", "in_words", "measurable"]
