"""Fuzz of the convolutions: ``mixed_dilation_conv2d``, ``grouped_dilation_conv2d`` and ``depthwise_conv2d``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from drawing import DTYPES, Draw, compare
from torch import Tensor

from nasdet.ops import _dilation, depthwise_conv2d, grouped_dilation_conv2d, mixed_dilation_conv2d
from nasdet.testing import tolerance


def _channels(draw: Draw) -> tuple[int, int, int]:
    """Groups, and input and output channels of each."""
    if draw.chance(0.4):
        return 1, draw.random.randint(1, 90 if draw.chance(0.2) else 20), draw.random.randint(1, 90)
    if draw.chance(0.2):
        return draw.random.randint(2, 80), 1, 1
    sizes = (1, 2, 3, 4, 4, 7, 8, 8, 16, 20)
    return draw.random.randint(2, 5), draw.choice(sizes), draw.choice(sizes)


def _operands(draw: Draw) -> tuple[Tensor, tuple[int, int, int], int, Any]:
    groups, fan, width = _channels(draw)
    kernel = draw.choice((1, 3, 3, 3, 3, 5, 7))
    dtype, stride = draw.choice(DTYPES), draw.choice((1, 1, 2, (1, 2), (3, 1)))
    if draw.chance(0.2):  # what every algorithm takes
        groups, fan, kernel, dtype, stride = 1, groups * fan, 3, torch.float32, 1
    shape = (draw.random.randint(0 if draw.chance(0.05) else 1, 3), groups * fan, max(draw.size(20), 1), draw.size(20))
    shape = (*shape[:3], max(shape[3], 1))
    if kernel > 3 or groups * fan * width > 2000:
        shape = (min(shape[0], 1), shape[1], min(shape[2], 6), min(shape[3], 6))
    draw.note(shape=shape, groups=groups, fan=fan, width=width, kernel=kernel, stride=stride, dtype=dtype)
    return draw.laid_out(draw.normal(*shape).to(dtype), expandable=True), (groups, fan, width), kernel, stride


def _dilations(draw: Draw, count: int) -> list[Any]:
    choices = (1, 1, 2, 3, (1, 3), (3, 1), (2, 5), 30)
    dilations = [draw.choice(choices) for _ in range(count)]
    draw.note(dilations=dilations)
    return dilations


def _how(draw: Draw, *call: Any) -> dict[str, Any]:
    """A precision, or an algorithm that can run the call: x, weight, dilations, splits, stride and groups."""
    options: dict[str, Any] = {"precision": draw.choice(("fast", "exact"))}
    if draw.backend == "cpp" and draw.chance(0.6):
        options = {"algorithm": draw.choice([name for name in _dilation.ALGORITHMS if _can_run(name, *call)])}
    draw.note(**options)
    return options


def _can_run(algorithm: str, x: Tensor, weight: Tensor, dilations: list[Any], splits: list[int], *rest: Any) -> bool:
    stride, groups = rest
    pairs = _dilation.checked_dilations(dilations)
    try:
        _dilation.chosen_algorithm(x, weight, pairs, splits, _dilation.pair("stride", stride), groups, algorithm)
    except ValueError:
        return False
    return True


def _bounds(
    leaves: list[Tensor], terms: int, magnitude: float, condition: float
) -> tuple[Callable[[float], float], Callable[[torch.dtype, float, Tensor], float]]:
    count = max(leaves[0].numel(), 1) * terms

    def gradient(dtype: torch.dtype, largest: float, upstream: Tensor) -> float:
        top = max(largest, float(upstream.abs().max()) if upstream.numel() and largest else 0.0)
        # A value of the mixture's gradient is a sum over all pixels of products of all three operands.
        return tolerance(dtype, count, top * magnitude) * condition

    return lambda largest: tolerance(leaves[0].dtype, terms, max(largest, magnitude)) * condition, gradient


def fuzz_mixed_dilation_conv2d(draw: Draw) -> None:
    x, (groups, fan, width), kernel, stride = _operands(draw)
    count, outputs = draw.random.randint(1, 4), groups * width
    dilations = _dilations(draw, count)
    columns = draw.choice([n for n in range(1, outputs + 1) if outputs % n == 0])
    scale = (fan * kernel**2) ** -0.5
    weight = draw.normal(count, outputs, fan, kernel, kernel, scale=scale).to(x.dtype)
    mix = draw.normal(count, columns).to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    draw.note(columns=columns)
    options = _how(draw, x, weight, dilations, [], stride, groups)
    leaves = [x, draw.laid_out(weight), draw.laid_out(mix)]
    magnitude = 1 + float(mix.abs().sum(0).max())
    bound, gradient_bound = _bounds(leaves, count * fan * kernel**2, magnitude, _condition(options))
    compare(
        draw,
        lambda *v: mixed_dilation_conv2d(*v, dilations, stride, groups, backend=draw.backend, **options),
        lambda *v: mixed_dilation_conv2d(*v, dilations, stride, groups, backend="reference"),
        leaves,
        bound,
        gradient_bound,
    )


def fuzz_grouped_dilation_conv2d(draw: Draw) -> None:
    x, (groups, fan, width), kernel, stride = _operands(draw)
    whole = groups if groups > 1 else width
    cuts = sorted(draw.random.sample(range(1, whole), min(draw.random.randint(0, 4), whole - 1)))
    unit = width if groups > 1 else 1
    splits = [(b - a) * unit for a, b in zip([0, *cuts], [*cuts, whole], strict=True)]
    dilations = _dilations(draw, len(splits))
    draw.note(splits=splits)
    scale = (fan * kernel**2) ** -0.5
    weight = draw.normal(groups * width, fan, kernel, kernel, scale=scale).to(x.dtype)
    options = _how(draw, x, weight, dilations, splits, stride, groups)
    leaves = [x, draw.laid_out(weight)]
    bound, gradient_bound = _bounds(leaves, fan * kernel**2, 1.0, _condition(options))
    compare(
        draw,
        lambda *v: grouped_dilation_conv2d(*v, dilations, splits, stride, groups, backend=draw.backend, **options),
        lambda *v: grouped_dilation_conv2d(*v, dilations, splits, stride, groups, backend="reference"),
        leaves,
        bound,
        gradient_bound,
    )


def fuzz_depthwise_conv2d(draw: Draw) -> None:
    dtype, kernel = draw.choice(DTYPES), draw.choice((1, 3, 3, 5, 5, 7, 7, 9))
    stride, dilation = draw.choice((1, 1, 1, 2, 2, 3, (1, 2), (3, 1))), draw.choice((1, 1, 2, 3, 4, (2, 1), (1, 5), 30))
    padding = draw.choice(("same", "same", "same", 0, 1, 3, (2, 5)))
    sides = [max(draw.size(40), 1) for _ in range(2)]
    if padding != "same":  # large enough for the kernel
        reaches = [d * (kernel - 1) + 1 for d in (dilation if isinstance(dilation, tuple) else (dilation, dilation))]
        paddings = padding if isinstance(padding, tuple) else (padding, padding)
        sides = [max(side, reach - 2 * p) for side, reach, p in zip(sides, reaches, paddings, strict=True)]
    channels = draw.random.randint(1, 70 if max(sides) < 15 else 20)
    shape = (draw.random.randint(0 if draw.chance(0.05) else 1, 3), channels, *sides)
    draw.note(shape=shape, kernel=kernel, stride=stride, padding=padding, dilation=dilation, dtype=dtype)
    x = draw.laid_out(draw.normal(*shape).to(dtype), expandable=True)
    leaves = [x, draw.laid_out(draw.normal(channels, 1, kernel, kernel, scale=1 / kernel).to(dtype))]
    bound, gradient_bound = _bounds(leaves, kernel**2, 1.0, 1.0)
    compare(
        draw,
        lambda *v: depthwise_conv2d(*v, stride, padding, dilation, backend=draw.backend),
        lambda *v: depthwise_conv2d(*v, stride, padding, dilation, backend="reference"),
        leaves,
        bound,
        gradient_bound,
    )


def _condition(options: dict[str, Any]) -> float:
    """Winograd's transforms magnify a rounding."""
    return 4.0 if options.get("precision") == "fast" or options.get("algorithm") == "winograd" else 1.0
