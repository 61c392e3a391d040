"""What a step of a Hit-Detector search will need: forecast without running it, and in words beside the measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nasdet.data.transforms import padded
from nasdet.measure.forecast import forecast_memory
from nasdet.measure.memory import watch_peak
from nasdet.spaces.hit import HitSpace, all_mixed_layers, draw
from nasdet.spaces.hit.steps import draw_the_largest

if TYPE_CHECKING:
    from nasdet.engine.hit_config import HitSearchConfig


def forecast_step(
    config: HitSearchConfig, space: HitSpace, model: nn.Module, make: Callable[[], nn.Module]
) -> dict[str, int]:
    """Bytes that a search will take beyond the weights: ``step``, a step's peak, ``state``, that of SGD, and ``total``.

    ``make`` makes another ``model``, with supernets of ``space``, to be traced. The step is traced on tensors without
    storage: forward of the whole detector on pictures of the largest size, a two-stage one with ``rois`` of each, and
    backward. Losses and targets, small beside it, are left out. With ``memory="sampled"`` a step's peak depends on the
    draw: ``step`` is the larger one of the first two steps'. ``most`` is the total in the worst case, where there is
    one: pictures upright and lying in one batch, which is then padded to a square, and the candidates that need most
    drawn everywhere.
    """
    short, long = padded(config.short_side), padded(config.long_side)
    kept = torch.get_rng_state()  # tracing must not move the run's random numbers
    draws = [_drawn(model, config, index) for index in (0, 1)] if config.memory == "sampled" else [[]]
    step = max(
        forecast_memory(lambda drawn=drawn: _step(config, make(), (short, long), lambda net: _give(net, drawn)))  # type: ignore[misc]  # mypy cannot infer a lambda's default
        for drawn in draws
    )
    state = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    found = {"step": step, "state": state, "total": step + state}
    worst = (long if config.batch > 1 else short, long)
    if config.memory == "sampled" or worst != (short, long):
        found["most"] = state + forecast_memory(
            lambda: _step(config, make(), worst, lambda net: draw_the_largest(space, net, config.samples, worst))
        )
    torch.set_rng_state(kept)
    return found


def draw_for(model: nn.Module, config: HitSearchConfig, index: int, half: str = "weights") -> None:
    """Draw the candidates of a half of step ``index``: a function of seed, step and alphas."""
    seed = Random(f"draw {config.seed} {index} {half}").getrandbits(63)
    draw(model, config.samples, generator=torch.Generator().manual_seed(seed))


def _drawn(model: nn.Module, config: HitSearchConfig, index: int) -> list[tuple[int, ...] | None]:
    draw_for(model, config, index)
    return [layer.drawn for layer in all_mixed_layers(model)]


def _give(model: nn.Module, drawn: list[tuple[int, ...] | None]) -> None:
    """The draw of another model."""
    for layer, own in zip(all_mixed_layers(model), drawn, strict=True):
        layer.drawn = own


def _step(
    config: HitSearchConfig, model: Any, size: tuple[int, int], choose: Callable[[nn.Module], None]
) -> Callable[[], None]:
    model.train()
    for layer in all_mixed_layers(model):
        layer.alpha.requires_grad_(False)  # the weights' step, the larger of the two
    if config.memory == "sampled":
        choose(model)
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


class MeasuredPeak:
    """The most memory that a training's first steps take beyond what was there before them; kept in its checkpoints.

    Of tensors: on the CPU the process also has the heap's holes and the libraries' work space. The first step makes the
    gradients and the optimiser's state, the second runs beside them. ``peak`` is None until both are done.
    """

    def __init__(self, device: torch.device) -> None:
        self.peak: int | None = None
        self.device = device
        self._found: Callable[[], int] | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"peak": self.peak}

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        self.peak = state_dict["peak"]

    @contextmanager
    def watching(self, index: int, steps: int, optimizer: torch.optim.Optimizer) -> Iterator[None]:
        """The block is step ``index`` of ``steps``: watched from step 0 to the end of step 1, or of the only one.

        What ``optimizer`` will keep of parameters that had no gradient yet (candidates that were not drawn) is added.
        """
        if index == 0:
            self._found = watch_peak(self.device, tensors_only=True)
        yield
        if index == min(1, steps - 1) and self._found is not None:
            owners = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
            self.peak = (self.stop() or 0) + sum(p.nbytes for p in owners if p not in optimizer.state)

    def stop(self) -> int | None:
        """End a watch that is on, and return what it found: a profiler that nobody stops would go on for ever."""
        found, self._found = self._found, None
        return None if found is None else found()


def in_words(forecast: dict[str, int], measured: int | None = None) -> str:
    """The forecast, and beside it the measured peak."""
    total = forecast["total"]
    words = f"memory beyond the weights: forecast {total / 2**30:.2f} GiB"
    if "most" in forecast:
        words += f" (at most {forecast['most'] / 2**30:.2f})"
    if measured is None:
        return words
    return f"{words}, measured {measured / 2**30:.2f} GiB ({measured / total:.0%} of the forecast)"


__all__ = ["MeasuredPeak", "draw_for", "forecast_step", "in_words"]
