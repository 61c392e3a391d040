"""The objects of a target that a detector learns from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nasdet.detectors.parts.boxes import Size, box_area


class Objects(NamedTuple):
    """Float32 ``boxes`` ``[M, 4]``, int64 ``labels`` ``[M]``, int64 ``rows`` ``[M]``: their places in the target."""

    boxes: Tensor
    labels: Tensor
    rows: Tensor


def usable_objects(target: Mapping[str, Tensor]) -> Objects:
    """A target's objects without its crowd regions, and without boxes that are empty or not finite."""
    boxes, labels = target["boxes"], target["labels"]
    if boxes.dim() != 2 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes must have shape (N, 4), got {tuple(boxes.shape)}")
    if labels.shape != boxes.shape[:1]:
        raise ValueError(f"labels must have shape ({boxes.shape[0]},), got {tuple(labels.shape)}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    boxes = boxes.float()
    usable = (box_area(boxes) > 0) & boxes.isfinite().all(dim=1)
    crowd = target.get("iscrowd")
    if crowd is not None and len(boxes):
        usable &= ~crowd.bool()
    rows = usable.nonzero()[:, 0]
    return Objects(boxes[rows], labels[rows], rows)


def batch_objects(targets: Sequence[Mapping[str, Tensor]], images: int, num_classes: int) -> list[Objects]:
    """:func:`usable_objects` of each target of a batch of ``images``, with labels seen to be in 0..num_classes - 1."""
    if len(targets) != images:
        raise ValueError(f"targets must have one entry per image ({images}), got {len(targets)}")
    batch = [usable_objects(target) for target in targets]
    for image, (_, labels, _) in enumerate(batch):
        if labels.device.type != "cpu" or not len(labels):
            continue  # elsewhere the look at the values would stall the device once per image
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise ValueError(f"labels must be in 0..{num_classes - 1}, got {low}..{high} in image {image} of the batch")
    return batch


def check_sizes(sizes: Sequence[Size], images: int) -> list[Size]:
    """``sizes`` as pairs of ints, one per image of the batch; tensors stay what they are."""
    if len(sizes) != images:
        raise ValueError(f"sizes must have one entry per image ({images}), got {len(sizes)}")
    return [size if isinstance(size, Tensor) else (int(size[0]), int(size[1])) for size in sizes]
