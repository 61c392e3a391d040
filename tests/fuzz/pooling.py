"""Fuzz of ``roi_align`` and ``multilevel_roi_align``.

A sample beside the border counts or not, an adaptive grid has one sample more or less, a box goes to one level or the
next: float32 and float64 may differ there. Half of the cases are snapped to a grid on which float32 is exact, and keep
such boxes; in the others boxes within a margin of a decision are left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from drawing import DTYPES, EPS32, Draw, compare
from torch import Tensor

from nasdet.ops import multilevel_roi_align, roi_align
from nasdet.testing import tolerance


def _boxes(draw: Draw, count: int, images: int, width: float, height: float, snapped: bool) -> Tensor:
    """``[count, 5]`` in pixels of the picture: inside, across its border, far outside, thin, empty, inverted, NaN."""
    image = draw.integers(0, max(images - 1, 0), count, 1).float()
    extent = torch.tensor([width, height])
    corner = draw.uniform(count, 2, low=-0.3, high=1.1) * extent
    size = draw.uniform(count, 2, low=-0.1, high=1.0) ** 3 * extent * 1.3
    odd = draw.uniform(count)
    size = torch.where((odd < 0.08)[:, None], torch.zeros(()), size)
    size[:, 0] = torch.where((odd > 0.08) & (odd < 0.14), torch.zeros(()), size[:, 0])
    rois = torch.cat([image, corner, corner + size], 1)
    if snapped:
        rois = torch.cat([image, (rois[:, 1:] * 4).round() / 4], 1)
    for row in range(count):
        if draw.chance(0.02):
            rois[row, draw.random.randint(1, 4)] = float("nan")
    return rois


def _certain(
    rois: Tensor, scale: float, shape: Sequence[int], bins: Sequence[int], sampling: int, aligned: bool, snapped: bool
) -> Tensor:
    """The boxes none of whose decisions hangs on a rounding."""
    safe = torch.ones(len(rois), dtype=torch.bool)
    for (low, high), size, count in zip(((2, 4), (1, 3)), shape, bins, strict=True):
        start = rois[:, low].double() * scale - 0.5 * aligned
        length = rois[:, high].double() * scale - 0.5 * aligned - start
        margin = 16 * EPS32 * (1 + start.abs() + length.abs())
        step = (length if aligned else length.clamp(min=1)) / count
        grid = torch.full_like(step, sampling) if sampling > 0 else step.ceil().nan_to_num(0).clamp(0, 1000)
        if sampling <= 0 and not snapped:
            exactly_empty = rois[:, low] == rois[:, high] if aligned else length < 1 - margin
            safe &= ((step - step.round()).abs() > margin) | exactly_empty | step.isnan()
        exact_grid = snapped and (sampling in (1, 2, 4))
        if exact_grid:
            continue
        samples = torch.arange(int(grid.max()) if len(grid) else 0) + 0.5
        at = start[:, None, None] + torch.arange(count)[:, None] * step[:, None, None]
        at = at + samples * (step / grid.clamp(min=1))[:, None, None]
        near = torch.minimum((at + 1).abs(), (at - size).abs()) < margin[:, None, None]
        near &= samples < grid[:, None, None]
        safe &= ~near.flatten(1).any(1)
    return safe


def _bounds(features: list[Tensor], rois: Tensor, scales: list[float]) -> tuple[float, float]:
    """What a rounded coordinate moves: it scales with the coordinate and with the map's range."""
    top = max((float(x.detach().abs().max()) for x in features if x.numel()), default=0.0)
    reach = float(rois[:, 1:].nan_to_num(0).abs().max()) * max(scales) + 1 if len(rois) else 1.0
    return top, reach


def _compare(
    draw: Draw,
    features: list[Tensor],
    rois: Tensor,
    scales: list[float],
    run: Callable[..., Tensor],
    exact: Callable[..., Tensor],
) -> None:
    dtype = features[0].dtype
    top, reach = _bounds(features, rois, scales)
    wobble = 0.0 if dtype == torch.float64 else 16 * EPS32 * reach

    def gradient_bound(d: torch.dtype, largest: float, upstream: Tensor) -> float:
        size = float(upstream.abs().max()) if upstream.numel() else 0.0
        root = math.sqrt(max(upstream.numel(), 1))
        return tolerance(d, upstream.numel(), max(largest, size)) + wobble * size * root

    compare(
        draw,
        run,
        exact,
        features,
        lambda largest: tolerance(dtype, 64, max(largest, top)) + wobble * top,
        gradient_bound,
    )


def fuzz_roi_align(draw: Draw) -> None:
    snapped, aligned = draw.chance(0.5), draw.chance(0.5)
    images, channels = draw.random.randint(1, 3), draw.size(40)
    height, width = draw.random.randint(1, 20), draw.random.randint(1, 20)
    if snapped:
        scale, sampling = 2.0 ** draw.random.randint(-4, 1), draw.choice((-1, 0, 1, 2, 4))
        bins = (draw.choice((1, 2, 4, 8)), draw.choice((1, 2, 4, 8)))
    else:
        scale, sampling = draw.choice((1.0, 0.25, 0.0625, draw.random.uniform(0.05, 1.5))), draw.random.randint(-1, 4)
        bins = (draw.random.randint(1, 8), draw.random.randint(1, 8))
    dtype, count = draw.choice(DTYPES), draw.size(12)
    draw.note(shape=(images, channels, height, width), dtype=dtype, scale=scale, sampling=sampling, aligned=aligned)
    draw.note(bins=bins, snapped=snapped)
    x = draw.laid_out(draw.normal(images, channels, height, width).to(dtype), expandable=True)
    rois = _boxes(draw, count, images, width / scale, height / scale, snapped)
    rois = rois[_certain(rois, scale, (height, width), bins, sampling, aligned, snapped)]
    draw.note(rois=rois.tolist())
    given = draw.laid_out(rois.double() if draw.chance(0.2) else rois)
    options = (bins, scale, sampling, aligned)
    if draw.chance(0.05) and len(rois):
        _wrong_image(draw, x, given, options)
        return
    _compare(
        draw, [x], rois, [scale],
        lambda x: roi_align(x, given, *options, backend=draw.backend),
        lambda x: roi_align(x, rois.double(), *options, backend="reference"),
    )  # fmt: skip


def _wrong_image(draw: Draw, x: Tensor, rois: Tensor, options: tuple[Any, ...]) -> None:
    """A batch index outside the batch is an error that names the row."""
    row, index = draw.random.randrange(len(rois)), draw.choice((-1, x.shape[0], x.shape[0] + 1000))
    wrong = rois.clone()
    wrong[row, 0] = index
    try:
        roi_align(x, wrong, *options, backend=draw.backend)
    except RuntimeError as error:
        assert f"rois[{row}]" in str(error) and f"got {index}" in str(error), f"the error says: {error}"
    else:
        raise AssertionError(f"image index {index} in row {row} was taken")


def fuzz_multilevel_roi_align(draw: Draw) -> None:
    levels, snapped, aligned = draw.random.randint(1, 4), draw.chance(0.5), draw.chance(0.5)
    images, channels = draw.random.randint(1, 2), draw.size(24)
    height, width = draw.random.randint(8, 40), draw.random.randint(8, 40)
    assignment = draw.choice(("torchvision", "detectron2"))
    sampling = draw.choice((0, 1, 2, 4)) if snapped else draw.random.randint(-1, 3)
    bins = (draw.choice((1, 2, 4)),) * 2 if snapped else (draw.random.randint(1, 7), draw.random.randint(1, 7))
    canonical = draw.choice((224.0, 32.0, 56.0))
    level0 = draw.random.randint(2, 4)
    dtype = draw.choice(DTYPES)
    draw.note(shape=(images, channels, height, width), levels=levels, dtype=dtype, sampling=sampling, aligned=aligned)
    draw.note(bins=bins, snapped=snapped, assignment=assignment, canonical=(canonical, level0))
    lowest = draw.choice((None, None, 0, 1, 3))
    ladder = list(range(levels)) if lowest is None else [draw.random.randint(0, 3) for _ in range(levels)]
    draw.note(lowest=lowest, ladder=ladder)
    scales = [0.25 / 2**level for level in ladder]
    shapes = [(max(height >> level, 1), max(width >> level, 1)) for level in ladder]
    features = [draw.laid_out(draw.normal(images, channels, *shape).to(dtype)) for shape in shapes]
    rois = _boxes(draw, draw.size(12), images, 4.0 * width, 4.0 * height, snapped)
    safe = _certain_level(rois, canonical, level0) if levels > 1 else torch.ones(len(rois), dtype=torch.bool)
    for scale, shape in zip(scales, shapes, strict=True):  # whichever level it is
        safe &= _certain(rois, scale, shape, bins, sampling, aligned, snapped)
    rois = rois[safe]
    draw.note(rois=rois.tolist())
    options = dict(assignment=assignment, canonical_scale=canonical, canonical_level=level0, lowest_level=lowest)
    pool = (bins, scales, sampling, aligned)
    _compare(
        draw, features, rois, scales,
        lambda *maps: multilevel_roi_align(maps, rois, *pool, **options, backend=draw.backend),
        lambda *maps: multilevel_roi_align(maps, rois.double(), *pool, **options, backend="reference"),
    )  # fmt: skip


def _certain_level(rois: Tensor, canonical: float, level0: int) -> Tensor:
    """The boxes whose level is not within a rounding, or within either policy's epsilon, of the next."""
    x1, y1, x2, y2 = rois[:, 1:].double().unbind(1)
    level = level0 + torch.log2(((x2 - x1) * (y2 - y1)).sqrt() / canonical)
    return ((level - level.round()).abs() > 1e-4) | ~level.isfinite()
