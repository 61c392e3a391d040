"""The checks of RoIAlign's arguments."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from nasdet._checks import plain_int
from nasdet.ops._checks import FLOATS, integer_within, is_integer

MOST_LEVELS = 63  # the raw backward takes their layouts as the bits of one int64
LARGEST_SIDE = 2**20  # of a pooled box; the real ones are below
LARGEST_LEVEL = 2**20  # the kernels keep levels, and what they are shifted by, in 32 bits


def checked_features(name: str, features: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(features, Tensor) or not isinstance(features, Sequence):
        raise TypeError(f"{name} must be a sequence of tensors, got {type(features).__name__}")
    if len(features) == 0:
        raise ValueError(f"{name} must hold at least one level, got none")
    if len(features) > MOST_LEVELS:
        raise ValueError(f"{name} must hold at most {MOST_LEVELS} levels, got {len(features)}")
    first = features[0]
    for index, x in enumerate(features):
        if isinstance(x, Tensor) and x.dtype in FLOATS and x.dim() == 4 and x.dtype == first.dtype:
            if x.shape[:2] == first.shape[:2] and x.device == first.device:
                continue
        which = name if name == "input" else f"{name}[{index}]"
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{which} must be a float32, float64, float16 or bfloat16 tensor, got {kind}")
        if x.dim() != 4:
            raise ValueError(f"{which} must have shape (N, C, H, W), got {tuple(x.shape)}")
        if x.dtype != first.dtype:
            raise TypeError(f"{which} must be {first.dtype} as features[0], got {x.dtype}")
        if x.device != first.device:
            raise ValueError(f"{which} must be on {first.device}, got {x.device}")
        raise ValueError(f"{which} must have N, C = {tuple(first.shape[:2])}, got {tuple(x.shape[:2])}")
    return list(features)


def checked_rois(boxes: Tensor | Sequence[Tensor], like: Tensor) -> Tensor:
    """``boxes`` as ``[K, 5]`` in the dtype of the geometry."""
    wanted = torch.float64 if like.dtype == torch.float64 else torch.float32
    if isinstance(boxes, Tensor):
        _check_boxes("boxes", boxes, 5, like)
        return boxes if boxes.dtype == wanted else boxes.to(wanted)
    if not isinstance(boxes, Sequence):
        raise TypeError(f"boxes must be a tensor or a sequence of tensors, got {type(boxes).__name__}")
    if len(boxes) != like.shape[0]:
        raise ValueError(f"boxes must hold one tensor per image ({like.shape[0]}), got {len(boxes)}")
    rows = []
    for image, own in enumerate(boxes):
        _check_boxes(f"boxes[{image}]", own, 4, like)
        rows.append(pad(own if own.dtype == wanted else own.to(wanted), (1, 0), value=float(image)))
    if not rows:
        return like.new_empty((0, 5), dtype=wanted)
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _check_boxes(name: str, boxes: Tensor, columns: int, like: Tensor) -> None:
    if not isinstance(boxes, Tensor) or boxes.dtype not in FLOATS:
        kind = boxes.dtype if isinstance(boxes, Tensor) else type(boxes).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    if boxes.dim() != 2 or boxes.shape[1] != columns:
        letter = "K" if columns == 5 else "L"
        raise ValueError(f"{name} must have shape ({letter}, {columns}), got {tuple(boxes.shape)}")
    if boxes.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {boxes.device}")


def checked_size(output_size: int | Sequence[int]) -> Sequence[int]:
    size = [plain_int(v) for v in (output_size if isinstance(output_size, Sequence) else (output_size, output_size))]
    if len(size) != 2 or not all(is_integer(side) and side > 0 for side in size):
        raise ValueError(f"output_size must be one or two positive integers, got {output_size}")
    if not all(side < LARGEST_SIDE for side in size):
        raise ValueError(f"output_size must be below 2**20, got {output_size}")
    return size


def checked_scales(spatial_scales: Sequence[float], levels: int) -> list[float]:
    if isinstance(spatial_scales, (str, Tensor)) or not isinstance(spatial_scales, Sequence):
        raise TypeError(f"spatial_scales must be a sequence of numbers, got {type(spatial_scales).__name__}")
    if len(spatial_scales) != levels:
        raise ValueError(f"spatial_scales must have one entry per level ({levels}), got {len(spatial_scales)}")
    return list(spatial_scales)


def checked_level(name: str, level: int) -> int:
    return integer_within(name, level, -LARGEST_LEVEL, LARGEST_LEVEL)


def checked_lowest_level(scales: Sequence[float], lowest_level: int | None) -> int | None:
    """``lowest_level``; if it is None, scales must halve, which says what levels the maps are of."""
    if lowest_level is None:
        # Rounded: a scale measured from a map's size is seldom a power of two.
        if any(round(math.log2(scales[0] / scale)) != level for level, scale in enumerate(scales)):
            raise ValueError(f"spatial_scales must halve from level to level, got {scales}")
        return None
    if not is_integer(plain_int(lowest_level)):
        raise TypeError(f"lowest_level must be an integer or None, got {lowest_level!r}")
    return checked_level("lowest_level", lowest_level)
