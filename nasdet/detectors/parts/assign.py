"""Which object each location learns: the assignment of FCOS."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nasdet.detectors.parts.boxes import box_area

_PAIRS = 1 << 22  # locations times objects looked at in one go: bounds the memory to about 200 MB


def size_ranges(strides: Sequence[int]) -> list[tuple[float, float]]:
    """FCOS's ranges of object size per level: up to 8 strides each, the last without an upper end.

    For strides 8 to 128 these are 0-64, 64-128, 128-256, 256-512 and 512-inf pixels (FCOS, section 3.2).
    """
    ends = [8.0 * stride for stride in strides[:-1]]
    return list(zip([0.0, *ends], [*ends, float("inf")], strict=True))


def assign_locations(
    points: Sequence[Tensor],
    strides: Sequence[int],
    ranges: Sequence[tuple[float, float]],
    boxes: Tensor,
    radius: float = 1.5,
) -> Tensor:
    """The object each location answers for, or -1: int64 ``[sum of L_i]`` over the levels' points ``[L_i, 2]``.

    A location of level i takes a box ``[M, 4]`` (pixels) if it lies strictly inside the box, and strictly within
    ``radius * stride_i`` of its centre in x and y (centre sampling), and its largest distance to a side lies in
    ``ranges[i]``, ends included. Of several boxes the smallest wins, of equal ones the first. A box that is empty or
    not a number is never taken. (FCOS, section 3 of the TPAMI version.)
    """
    if not len(points) == len(strides) == len(ranges):
        raise ValueError(f"points, strides and ranges must match, got {len(points)}, {len(strides)}, {len(ranges)}")
    device = boxes.device
    flat = torch.cat(list(points))
    counts = [len(level) for level in points]
    matched = torch.full((len(flat),), -1, dtype=torch.int64, device=device)
    if not len(boxes) or not len(flat):
        return matched
    repeat = torch.tensor(counts, device=device)
    reach = torch.tensor([radius * stride for stride in strides], device=device)
    reach = reach.repeat_interleave(repeat, output_size=len(flat))
    limits = torch.tensor(ranges, dtype=torch.float32, device=device)
    low, high = limits.repeat_interleave(repeat, dim=0, output_size=len(flat)).unbind(1)
    step = max(1, _PAIRS // len(boxes))
    for start in range(0, len(flat), step):
        part = slice(start, start + step)
        matched[part] = _smallest(flat[part], reach[part], low[part], high[part], boxes)
    return matched


def _smallest(points: Tensor, reach: Tensor, low: Tensor, high: Tensor, boxes: Tensor) -> Tensor:
    # One [L, M] matrix per side: reducing over a last axis of four is several times slower.
    x, y = points[:, 0, None], points[:, 1, None]
    x1, y1, x2, y2 = boxes.unbind(1)
    left, top, right, bottom = x - x1, y - y1, x2 - x, y2 - y
    nearest = torch.minimum(torch.minimum(left, right), torch.minimum(top, bottom))
    largest = torch.maximum(torch.maximum(left, right), torch.maximum(top, bottom))
    offset = torch.maximum((x - (x1 + x2) / 2).abs(), (y - (y1 + y2) / 2).abs())
    taken = (nearest > 0) & (offset < reach[:, None])
    taken &= (largest >= low[:, None]) & (largest <= high[:, None])
    area = box_area(boxes)[None].expand(len(points), -1)
    best, index = area.masked_fill(~taken, float("inf")).min(dim=1)
    return torch.where(best.isfinite(), index, -1)
