"""Mask R-CNN's third branch (He et al., 2017): one mask per box."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdet.detectors.parts.losses import at_least_float32
from nasdet.detectors.parts.masks import crop_masks, target_masks
from nasdet.detectors.parts.objects import Objects
from nasdet.detectors.parts.sampler import Samples
from nasdet.detectors.roi_heads import MaskHead, RoIPooler


class MaskStage(nn.Module):
    """Masks of the positive samples at training, and of the detections. ``head`` is a :class:`MaskHead`."""

    def __init__(self, head: MaskHead, pooler: RoIPooler) -> None:
        super().__init__()
        self.head, self.pooler = head, pooler
        self.num_classes = head.num_classes

    def forward(self, features: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """The head's logits ``[R, K + 1, M, M]`` for the boxes of all images in turn."""
        return self.head(self.pooler(features, boxes))

    def losses(
        self,
        features: Sequence[Tensor],
        samples: Samples,
        batch: Sequence[Objects],
        targets: Sequence[Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        """``loss_mask``: the mean cross-entropy of the mask of the right class, over the positive samples' pixels."""
        positives = samples.positives()
        logits = chosen(self(features, positives.boxes), torch.cat(positives.labels))
        return {"loss_mask": mask_loss(logits, object_crops(positives, batch, targets, logits.shape[-1]))}

    def complete(self, features: Sequence[Tensor], found: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """The detections with ``mask_logits`` float32 ``[n, M, M]``: of the label's mask, over the detection's box."""
        labels = torch.cat([image["labels"] for image in found]) + 1
        logits = chosen(self(features, [image["boxes"] for image in found]), labels)
        return with_masks(found, mask_logits=logits)


def chosen(table: Tensor, labels: Tensor) -> Tensor:
    """``table[i, labels[i]]`` in at least float32: ``[R, K + 1, ...]`` and ``[R]`` to ``[R, ...]``."""
    return at_least_float32(table[torch.arange(len(labels), device=labels.device), labels])


def with_masks(found: list[dict[str, Tensor]], **columns: Tensor) -> list[dict[str, Tensor]]:
    """Each image's detections with its share of columns that run over all images in turn."""
    counts = [len(image["labels"]) for image in found]
    for name, column in columns.items():
        found = [image | {name: share} for image, share in zip(found, column.split(counts), strict=True)]
    return found


def mask_loss(logits: Tensor, crops: Tensor) -> Tensor:
    """The mean binary cross-entropy of ``[P, M, M]``; 0, with a gradient of 0, where there is nothing."""
    total = F.binary_cross_entropy_with_logits(logits, crops.to(logits.dtype), reduction="sum")
    return total / max(1, logits.numel())


@torch.no_grad()
def object_crops(
    positives: Samples, batch: Sequence[Objects], targets: Sequence[Mapping[str, Tensor]], size: int
) -> Tensor:
    """The matched objects' masks seen through the positive samples' boxes: float32 ``[P, size, size]``."""
    images = zip(positives.boxes, positives.matches, batch, targets, strict=True)
    return torch.cat(
        [crop_masks(target_masks(target), objects.rows[match], boxes, size) for boxes, match, objects, target in images]
    )
