"""The points of the image that a feature map's cells stand for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CONVENTIONS = ("centre", "torchvision")


def check_convention(convention: str) -> str:
    """``convention`` if it is one of ``CONVENTIONS``."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    return convention


def level_points(
    height: int,
    width: int,
    stride: float | tuple[float, float],
    device: torch.device | str | None = None,
    offset: float = 0.5,
) -> Tensor:
    """Points ``((column + offset) * stride, (row + offset) * stride)`` of a map's cells, in pixels; by default centres.

    Float32 ``[height * width, 2]`` as (x, y), row by row: the order of ``map.flatten(-2)``. ``stride`` is one number,
    or (down, across).
    """
    down, across = stride if isinstance(stride, tuple) else (stride, stride)
    x = (torch.arange(width, device=device, dtype=torch.float32) + offset) * across
    y = (torch.arange(height, device=device, dtype=torch.float32) + offset) * down
    return torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=1)


def canvas(maps: Sequence[Tensor], strides: Sequence[int]) -> tuple[int, int]:
    """Height and width of the padded pictures that the maps were computed from, by the finest map and its stride."""
    fine = list(strides).index(min(strides))  # min(..., key=) breaks torch.compile's graph
    return maps[fine].shape[-2] * strides[fine], maps[fine].shape[-1] * strides[fine]


def pyramid_points(maps: Sequence[Tensor], strides: Sequence[int], convention: str = "centre") -> list[Tensor]:
    """:func:`level_points` of each map ``[N, C, H, W]``, on the maps' device.

    ``"centre"``: the cells' centres. ``"torchvision"``: the cells' upper left corners, spaced by the picture's side
    divided by the map's, rounded down: less than the stride where the map's size was rounded up.
    """
    if len(maps) != len(strides):
        raise ValueError(f"maps must have one entry per stride ({len(strides)}), got {len(maps)}")
    if check_convention(convention) == "centre":
        spacing: list[tuple[float, float]] = [(stride, stride) for stride in strides]
    else:
        height, width = canvas(maps, strides)
        spacing = [(height // level.shape[-2], width // level.shape[-1]) for level in maps]
    offset = 0.5 if convention == "centre" else 0.0
    return [
        level_points(level.shape[-2], level.shape[-1], step, level.device, offset)
        for level, step in zip(maps, spacing, strict=True)
    ]


def flatten_levels(maps: Sequence[Tensor], values: int | None = None) -> Tensor:
    """Per-level maps ``[N, C, H, W]`` to one ``[N, sum of H * W, C]``, in the order of the points.

    With ``values`` the channels are A anchors of ``values`` each: ``[N, sum of H * W * A, values]``.
    """
    levels = [level.flatten(2).transpose(1, 2) for level in maps]
    flat = levels[0] if len(levels) == 1 else torch.cat(levels, dim=1)  # of one channels_last map: no copy
    return flat if values is None else flat.reshape(flat.shape[0], -1, values)
