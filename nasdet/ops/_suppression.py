"""What the suppression family shares: checks, the pieces of its references, boxes for its cases."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nasdet._cases import Inputs
from nasdet.ops._checks import FLOATS, checked_number


def wrong_boxes(boxes: Any, shape: str) -> Exception:
    if not isinstance(boxes, Tensor):
        return TypeError(f"boxes must be a tensor, got {type(boxes).__name__}")
    return ValueError(f"boxes must have shape {shape}, got {tuple(boxes.shape)}")


def checked_boxes(boxes: Tensor, scores: Tensor, iou_threshold: float, leading: int) -> tuple[Tensor, Tensor, float]:
    """Boxes ``[..., N, 4]`` and scores ``[..., N]`` of one float dtype on one device, and the threshold as a float."""
    if not isinstance(boxes, Tensor) or boxes.dim() != leading + 2 or boxes.shape[-1] != 4:
        raise wrong_boxes(boxes, "(..., N, 4)" if leading else "(N, 4)")
    if boxes.dtype not in FLOATS:
        raise TypeError(f"boxes must be float32, float64, float16 or bfloat16, got {boxes.dtype}")
    if not isinstance(scores, Tensor) or scores.dtype not in FLOATS:
        kind = scores.dtype if isinstance(scores, Tensor) else type(scores).__name__
        raise TypeError(f"scores must be a float32, float64, float16 or bfloat16 tensor, got {kind}")
    if scores.shape != boxes.shape[:-1]:
        raise ValueError(f"scores must have shape {tuple(boxes.shape[:-1])}, got {tuple(scores.shape)}")
    if scores.device != boxes.device:
        raise ValueError(f"scores must be on {boxes.device}, got {scores.device}")
    threshold = checked_number("iou_threshold", iou_threshold)
    if threshold != threshold:
        raise ValueError("iou_threshold must be a number, got nan")
    if scores.dtype != boxes.dtype:
        wider = torch.promote_types(scores.dtype, boxes.dtype)
        return boxes.to(wider), scores.to(wider), threshold
    return boxes, scores, threshold


def checked_classes(idxs: Tensor, scores: Tensor) -> Tensor:
    """The classes of the boxes as int64."""
    if not isinstance(idxs, Tensor) or idxs.is_floating_point() or idxs.is_complex() or idxs.dtype == torch.bool:
        kind = idxs.dtype if isinstance(idxs, Tensor) else type(idxs).__name__
        raise TypeError(f"idxs must be an integer tensor, got {kind}")
    if idxs.shape != scores.shape:
        raise ValueError(f"idxs must have shape {tuple(scores.shape)}, got {tuple(idxs.shape)}")
    if idxs.device != scores.device:
        raise ValueError(f"idxs must be on {scores.device}, got {idxs.device}")
    return idxs if idxs.dtype == torch.int64 else idxs.to(torch.int64)


def above(iou: Tensor, iou_threshold: float) -> Tensor:
    """``iou > iou_threshold``: in float64 on the CPU, in the IoU's dtype elsewhere."""
    return (iou.double() if iou.device.type == "cpu" else iou) > iou_threshold


def iou_with(one: Tensor, boxes: Tensor) -> Tensor:
    """IoU ``[B, N]`` of one box ``[B, 1, 4]`` with boxes ``[B, N, 4]``, each operation rounded once."""
    areas = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    area = (one[..., 2] - one[..., 0]) * (one[..., 3] - one[..., 1])
    sides = torch.minimum(one[..., 2:], boxes[..., 2:]) - torch.maximum(one[..., :2], boxes[..., :2])
    sides = torch.where(sides > 0, sides, 0)  # 0 for NaN too, as infinite coordinates give
    overlap = sides[..., 0] * sides[..., 1]
    return overlap / (area + areas - overlap)


def need_data(boxes: Tensor) -> None:
    """Raise for meta tensors: how many boxes stay depends on the data."""
    if boxes.is_meta:
        raise ValueError("boxes must hold data, got a meta tensor; nms_padded has a static shape")


def clustered(
    inputs: Inputs, *shape: int, clusters: int = 6, size: int = 60, jitter: float = 6.0
) -> tuple[Tensor, Tensor]:
    """Boxes ``[*shape, 4]`` around a few centres of a 1,024 x 1,024 image, as detectors give them, and scores.

    Coordinates are whole numbers below 2,048 and areas below 2^18, so every IoU of different boxes is at least 2^-20
    away from a threshold such as 1/2 or 1/4, or equal to it: float32 and float64 decide alike.
    """
    generator = inputs.generator
    centres = 64 + 896 * torch.rand(clusters, 2, generator=generator)
    sides = size * (0.5 + torch.rand(clusters, 2, generator=generator))
    which = torch.randint(clusters, shape, generator=generator)
    centre = centres[which] + jitter * torch.randn(*shape, 2, generator=generator)
    half = sides[which] * (1 + 0.15 * torch.randn(*shape, 2, generator=generator)).clamp(0.5, 1.5) / 2
    boxes = torch.cat([centre - half, centre + half], -1).round().to(inputs.dtype)
    scores = torch.rand(*shape, generator=generator).to(inputs.dtype)
    return boxes.to(inputs.device), scores.to(inputs.device)


def in_layout(tensor: Tensor, layout: str) -> Tensor:
    """The same values strided: ``sliced`` (every second of a wider last dimension) or ``transposed``."""
    if layout == "sliced":
        return torch.stack([tensor, torch.full_like(tensor, 7)], -1).flatten(-2)[..., ::2]
    if layout == "transposed":
        return tensor.movedim(-1, 0).contiguous().movedim(0, -1)
    return tensor
