"""Masks of objects seen through boxes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from nasdet.ops import roi_align

_PIXELS = 1 << 24  # of masks in float32 at one time: 64 MB


def target_masks(target: Mapping[str, Tensor]) -> Tensor:
    """``masks`` bool ``[N, h, w]`` of a target, one per box."""
    if "masks" not in target:
        raise ValueError(f"targets must hold masks, got {', '.join(target)}")
    masks = target["masks"]
    if masks.dim() != 3 or len(masks) != len(target["boxes"]):
        raise ValueError(f"masks must have shape ({len(target['boxes'])}, h, w), got {tuple(masks.shape)}")
    return masks


def crop_masks(masks: Tensor, rows: Tensor, boxes: Tensor, size: int) -> Tensor:
    """RoIAlign of ``masks[rows[i]]`` in ``boxes[i]``: float32 ``[P, size, size]``, the covered share of every bin.

    ``masks`` ``[N, h, w]`` of 0 and 1 in any dtype, ``rows`` int64 ``[P]``, ``boxes`` ``[P, 4]`` in the masks' pixels.
    """
    crops = boxes.new_zeros((len(rows), size, size), dtype=torch.float32)
    used, place = rows.unique(return_inverse=True)
    step = max(1, _PIXELS // max(1, masks[0].numel() if len(masks) else 1))
    for start in range(0, len(used), step):
        part = masks[used[start : start + step], None].float()
        here = ((place >= start) & (place < start + step)).nonzero()[:, 0]
        rois = torch.cat([(place[here] - start)[:, None].to(boxes.dtype), boxes[here]], dim=1)
        crops[here] = roi_align(part, rois, size)[:, 0]
    return crops
