"""FCOS learns a few drawn pictures by heart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nasdet.detectors import build_fcos
from nasdet.detectors.parts.boxes import pairwise_iou

SIZE = 96
BOXES = [
    [[8, 10, 40, 34], [50, 44, 86, 90]],
    [[20, 12, 76, 80]],
    [[4, 60, 28, 88], [36, 8, 88, 30], [44, 50, 70, 76]],
    [],
]


def _scenes() -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Coloured rectangles on noise; the colour channel is the class."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(len(BOXES), 3, SIZE, SIZE, generator=generator) * 0.2
    targets = []
    for image, boxes in zip(images, BOXES, strict=True):
        labels = [index % 3 for index in range(len(boxes))]
        for (x1, y1, x2, y2), label in zip(boxes, labels, strict=True):
            image[label, y1:y2, x1:x2] += 2
        targets.append(
            {
                "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                "labels": torch.tensor(labels, dtype=torch.int64),
            }
        )
    return images, targets


@pytest.mark.slow
def test_fcos_learns_drawn_rectangles() -> None:
    torch.manual_seed(0)
    images, targets = _scenes()
    model = build_fcos("resnet18", 3, width=0.25, fpn_channels=32, tower_convs=2, levels=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-4)
    steps = 150
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        losses = model.loss(model(images), targets)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        detections = model.detect(model(images), [(SIZE, SIZE)] * len(images))
    for found, target in zip(detections, targets, strict=True):
        sure = found["scores"] > 0.3
        boxes, labels = found["boxes"][sure], found["labels"][sure]
        assert len(boxes) == len(target["boxes"])
        overlap = pairwise_iou(target["boxes"], boxes) * (target["labels"][:, None] == labels[None])
        assert not len(boxes) or float(overlap.amax(dim=1).min()) > 0.85
