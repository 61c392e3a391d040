"""The worked example of a detector: every object is one point of one map, its centre's cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdet.detectors.fpn import FPN
from nasdet.detectors.parts.postprocess import AS_MANY, top_candidates
from nasdet.detectors.resnet import ResNet
from nasdet.detectors.towers import PlainTowers

STRIDE = 8


class CenterDetector(nn.Module):
    """Class logits and box sizes at the cells of one map of stride 8."""

    def __init__(self, backbone: ResNet, neck: FPN, towers: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.backbone, self.neck, self.towers = backbone, neck, towers
        self.cls = nn.Conv2d(int(towers.cls_channels), num_classes, 1)
        self.box = nn.Conv2d(int(towers.box_channels), 2, 1)

    def forward(self, images: Tensor) -> dict[str, list[Tensor]]:
        """Logits ``[N, K, H, W]`` and the logarithms of width and height in strides ``[N, 2, H, W]``."""
        box, cls = self.towers(self.neck(self.backbone(images))["p3"])
        return {"cls": [self.cls(cls)], "box": [self.box(box)]}

    def loss(self, outputs: dict[str, list[Tensor]], targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """Cross-entropy over all cells, L1 of the sizes at the objects' cells."""
        logits, sizes = outputs["cls"][0], outputs["box"][0]
        wanted, box = torch.zeros_like(logits), sizes.sum() * 0
        for image, target in enumerate(targets):
            x1, y1, x2, y2 = target["boxes"].unbind(1)
            column = ((x1 + x2) / 2 / STRIDE).long().clamp(0, logits.shape[3] - 1)
            row = ((y1 + y2) / 2 / STRIDE).long().clamp(0, logits.shape[2] - 1)
            wanted[image, target["labels"], row, column] = 1
            size = torch.stack([x2 - x1, y2 - y1]).clamp(min=1).div(STRIDE).log()
            box = box + F.l1_loss(sizes[image, :, row, column], size, reduction="sum")
        count = wanted.sum().clamp(min=1)
        cls = F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / count
        return {"loss_cls": cls, "loss_box": box / count}

    @torch.no_grad()
    def detect(self, outputs: dict[str, list[Tensor]], sizes: Sequence[tuple[int, int]]) -> list[dict[str, Tensor]]:
        """Detections per image in batch coordinates."""
        results = []
        width = outputs["cls"][0].shape[3]
        for image, size in enumerate(sizes):
            scores = outputs["cls"][0][image].sigmoid().flatten(1).T
            best, cell, labels = top_candidates(scores, scores > 0.05, 100)
            half = outputs["box"][0][image].flatten(1).T[cell].exp() * STRIDE / 2
            centre = (torch.stack([cell % width, cell // width], 1) + 0.5) * STRIDE
            boxes = torch.cat([centre - half, centre + half], 1)
            results.append(AS_MANY.finish(boxes, best, labels, size, 0.6, 100))
        return results


def build_center(
    backbone: str = "resnet18",
    num_classes: int = 80,
    *,
    width: float = 1.0,
    fpn_channels: int = 256,
    tower_convs: int = 4,
    towers: nn.Module | None = None,
    norm: str | None = None,
    **_: Any,
) -> CenterDetector:
    """The detector by the names of a ``ModelConfig``."""
    depth = int(backbone.removeprefix("resnet"))
    body = ResNet(depth, width=width, norm=norm or "gn", outputs=("c3", "c4", "c5"))
    neck = FPN(body.channels, body.strides, fpn_channels, extra_levels=0)
    return CenterDetector(body, neck, towers or PlainTowers(fpn_channels, tower_convs), num_classes)
