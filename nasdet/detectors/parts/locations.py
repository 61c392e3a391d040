"""The points of the image that a feature map's cells stand for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def level_points(height: int, width: int, stride: int, device: torch.device | str | None = None) -> Tensor:
    """Centres ``((column + 0.5) * stride, (row + 0.5) * stride)`` of a map's cells, in pixels.

    Float32 ``[height * width, 2]`` as (x, y), row by row: the order of ``map.flatten(-2)``.
    """
    x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) * stride
    y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) * stride
    return torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=1)


def pyramid_points(maps: Sequence[Tensor], strides: Sequence[int]) -> list[Tensor]:
    """:func:`level_points` of each map ``[N, C, H, W]``, on the maps' device."""
    if len(maps) != len(strides):
        raise ValueError(f"maps must have one entry per stride ({len(strides)}), got {len(maps)}")
    return [
        level_points(level.shape[-2], level.shape[-1], stride, level.device)
        for level, stride in zip(maps, strides, strict=True)
    ]


def flatten_levels(maps: Sequence[Tensor]) -> Tensor:
    """Per-level maps ``[N, C, H, W]`` to one ``[N, sum of H * W, C]``, in the order of the points."""
    return torch.cat([level.flatten(2).transpose(1, 2) for level in maps], dim=1)
