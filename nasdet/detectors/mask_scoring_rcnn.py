"""Mask Scoring R-CNN (Huang et al., 2019): a head that says how good the mask is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdet.detectors.mask_rcnn import MaskStage, chosen, mask_loss, object_crops, with_masks
from nasdet.detectors.parts.boxes import box_area
from nasdet.detectors.parts.layers import conv_norm_relu, he_init, normal_init
from nasdet.detectors.parts.losses import at_least_float32
from nasdet.detectors.parts.masks import target_masks
from nasdet.detectors.parts.objects import Objects
from nasdet.detectors.parts.sampler import Samples
from nasdet.detectors.roi_heads import MaskHead, RoIPooler


class MaskIoUHead(nn.Module):
    """The IoU of a predicted mask with its object's, per class, from the pooled feature and the mask (figure 3).

    Four 3x3 convolutions, the last of stride 2, then ``fcs`` fully connected layers and one output per class.
    """

    def __init__(
        self, channels: int, num_classes: int, *, hidden: int = 256, fc: int = 1024, fcs: int = 2, size: int = 14
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(4):
            layers += conv_norm_relu(hidden if index else channels + 1, hidden, None, stride=2 if index == 3 else 1)[1]
        self.convs = nn.Sequential(*layers)
        widths = [hidden * (-(-size // 2)) ** 2, *[fc] * fcs]
        self.fcs = nn.ModuleList(nn.Linear(*pair) for pair in zip(widths, widths[1:], strict=False))
        self.iou = nn.Linear(fc, num_classes + 1)
        he_init(self)
        normal_init(self.iou)

    def forward(self, pooled: Tensor, masks: Tensor) -> Tensor:
        """Pooled features ``[R, C, S, S]`` and mask probabilities ``[R, 2 S, 2 S]`` to IoUs ``[R, K + 1]``."""
        small = F.max_pool2d(masks[:, None].to(pooled.dtype), 2)
        x = self.convs(torch.cat([pooled, small], dim=1)).flatten(1)
        for layer in self.fcs:
            x = F.relu(layer(x), inplace=True)
        return self.iou(x)


class MaskScoringStage(MaskStage):
    """Mask R-CNN's stage with a :class:`MaskIoUHead`; ``iou_weight`` is its loss's."""

    def __init__(self, head: MaskHead, iou_head: MaskIoUHead, pooler: RoIPooler, *, iou_weight: float = 0.5) -> None:
        super().__init__(head, pooler)
        self.iou_head = iou_head
        self.iou_weight = iou_weight

    def forward(self, features: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """The mask logits; the IoU head is run on the first class's mask, for the sake of counting it."""
        pooled = self.pooler(features, boxes)
        logits = self.head(pooled)
        self.iou_head(pooled, logits[:, 0].sigmoid())
        return logits

    def losses(
        self,
        features: Sequence[Tensor],
        samples: Samples,
        batch: Sequence[Objects],
        targets: Sequence[Mapping[str, Tensor]],
    ) -> dict[str, Tensor]:
        """``loss_mask`` as Mask R-CNN's, and ``loss_mask_iou``: the mean square error over masks that hit at all."""
        positives = samples.positives()
        labels = torch.cat(positives.labels)
        pooled = self.pooler(features, positives.boxes)
        logits = chosen(self.head(pooled), labels)
        crops = object_crops(positives, batch, targets, logits.shape[-1])
        wanted = mask_iou(logits.detach() > 0, crops >= 0.5, object_shares(positives, batch, targets))
        error = (chosen(self.iou_head(pooled, logits.sigmoid()), labels) - wanted).square()
        hits = (wanted > 0).to(error.dtype)
        iou = (error * hits).sum() / hits.sum().clamp(min=1.0)
        return {"loss_mask": mask_loss(logits, crops), "loss_mask_iou": self.iou_weight * iou}

    def complete(self, features: Sequence[Tensor], found: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
        """As for Mask R-CNN, with ``mask_scores`` ``[n]``: the score times the predicted IoU, which ranks the masks."""
        labels = torch.cat([image["labels"] for image in found]) + 1
        pooled = self.pooler(features, [image["boxes"] for image in found])
        logits = chosen(self.head(pooled), labels)
        iou = chosen(self.iou_head(pooled, logits.sigmoid()), labels).clamp(0, 1)
        scores = torch.cat([image["scores"] for image in found])
        return with_masks(found, mask_logits=logits, mask_scores=scores * iou)


def mask_iou(predicted: Tensor, cropped: Tensor, shares: Tensor) -> Tensor:
    """IoU of masks predicted in a box with whole objects, of which the box may show a part: float32 ``[P]``.

    ``predicted`` and ``cropped`` are bool ``[P, M, M]``; ``shares`` ``[P]`` is the whole object's area over the box's.
    """
    overlap = (predicted & cropped).flatten(1).sum(dim=1).float()
    whole = torch.maximum(shares * predicted[0].numel() if len(predicted) else shares, cropped.flatten(1).sum(dim=1))
    union = predicted.flatten(1).sum(dim=1) + whole - overlap
    return overlap / union.clamp(min=1.0)


@torch.no_grad()
def object_shares(positives: Samples, batch: Sequence[Objects], targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """The area of each positive sample's object over that of its box: float32 ``[P]``."""
    shares = []
    for boxes, match, objects, target in zip(positives.boxes, positives.matches, batch, targets, strict=True):
        areas = target_masks(target).flatten(1).sum(dim=1).float()
        shares.append(areas[objects.rows[match]] / at_least_float32(box_area(boxes)).clamp(min=1e-6))
    return torch.cat(shares)
