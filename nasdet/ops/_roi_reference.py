"""RoIAlign in PyTorch, exact and slow: what the compiled kernels are compared with, and what serves without them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nasdet.ops._dilation import is_channels_last


def level_range(scales: Sequence[float]) -> tuple[int, int]:
    """The levels of the first and of the last map where scales halve: ``-log2`` of the first scale, and one a map."""
    first = -round(math.log2(scales[0]))
    return first, first + len(scales) - 1


def shifted_level(scales: Sequence[float], canonical_level: int, lowest_level: int | None) -> int:
    """``canonical_level`` for levels counted as if scales halved, where the first map is of ``lowest_level``."""
    return canonical_level if lowest_level is None else canonical_level + level_range(scales)[0] - lowest_level


def memory_format(nhwc: bool) -> torch.memory_format:
    return torch.channels_last if nhwc else torch.contiguous_format


def reference(
    features: list[Tensor],
    rois: Tensor,
    scales: list[float],
    height: int,
    width: int,
    sampling_ratio: int,
    aligned: bool,
    policy: int,
    canonical_scale: float,
    canonical_level: int,
) -> Tensor:
    """The pixels of every sample gathered, 64 boxes of one map at a time."""
    first = features[0]
    y = torch.zeros(len(rois), first.shape[1], height, width, dtype=rois.dtype, device=rois.device)
    y = y.to(memory_format=memory_format(is_channels_last(first)))
    y = y + sum(x[:0].sum() for x in features)  # nothing: without boxes the maps still get a gradient
    if first.device.type == "meta":
        return y.to(first.dtype)
    rois = rois.detach()
    image = rois[:, 0].trunc()
    outside = ((image >= 0) & (image < first.shape[0])).logical_not()
    if first.device.type == "cpu" and outside.any():
        k = int(outside.nonzero()[0])
        raise RuntimeError(f"rois[{k}] must have a batch index in [0, {first.shape[0]}), got {float(rois[k, 0]):g}")
    level_of = levels_of(rois[:, 1:], scales, policy, canonical_scale, canonical_level)
    with torch.autocast(first.device.type, enabled=False):
        for (level, x), n in itertools.product(enumerate(features), range(first.shape[0])):
            for rows in ((level_of == level) & (image == n)).nonzero().flatten().split(64):
                if x.numel() and len(rows):
                    pool = (sampling_ratio, aligned)
                    ys, wy = _samples(rois[rows, 2], rois[rows, 4], scales[level], x.shape[2], height, *pool)
                    xs, wx = _samples(rois[rows, 1], rois[rows, 3], scales[level], x.shape[3], width, *pool)
                    pixels = x[n][:, ys[:, :, :, None, None], xs[:, None, None]].to(rois.dtype)
                    y[rows] = torch.einsum("ckptqs,kpt,kqs->kcpq", pixels, wy, wx)
    return y.to(first.dtype)


def levels_of(
    boxes: Tensor, scales: Sequence[float], policy: int, canonical_scale: float, canonical_level: int
) -> Tensor:
    """The index of the level of each box ``[L, 4]``."""
    k_min, k_max = level_range(scales)
    ratio = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt() / canonical_scale
    if policy == 0:
        level = torch.floor(canonical_level + ratio.log2() + 1e-6)
    else:
        level = torch.floor(canonical_level + (ratio + 1e-8).log2())
    return level.nan_to_num(nan=k_min, posinf=k_max, neginf=k_min).clamp(k_min, k_max).long() - k_min


def _samples(
    low: Tensor, high: Tensor, scale: float, size: int, bins: int, sampling_ratio: int, aligned: bool
) -> tuple[Tensor, Tensor]:
    """One axis: the pixels ``[K, bins, T]`` that the bins' samples read, and their weights over the samples' number."""
    start = low * scale - 0.5 * aligned
    length = high * scale - 0.5 * aligned - start
    step = (length if aligned else length.clamp(min=1))[:, None, None] / bins
    grid = torch.full_like(step, sampling_ratio) if sampling_ratio > 0 else step.ceil()
    grid = torch.where((grid > 0) & (grid < 2**31), grid, 0)
    sample = torch.arange(int(grid.max()), dtype=low.dtype, device=low.device) + 0.5
    at = start[:, None, None] + torch.arange(bins, device=low.device)[:, None] * step + sample * step / grid
    inside = (sample < grid) & (at >= -1) & (at <= size)
    at = torch.where(inside, at, 0).clamp(0, size - 1)
    below = at.floor()
    weight = torch.where(inside, 1 / grid, 0)
    pixels = torch.cat([below, (below + 1).clamp(max=size - 1)], -1).long()
    return pixels, torch.cat([(1 - (at - below)) * weight, (at - below) * weight], -1)
