"""Every detector learns four real COCO pictures by heart, from random weights, on the CPU; with their masks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nasdet.data import Batch, CocoDetection, Resize, collate
from nasdet.detectors import DETECTORS, WITH_MASKS
from nasdet.engine.average_precision import coco_ap
from nasdet.engine.evaluate import coco_results, detect_batch

# A table with people and food; two dogs; cattle among people, with a crowd region; a person, a cat and a bicycle.
IMAGE_IDS = (60623, 173350, 184613, 562150)
SIZE = 256
STEPS = 150


def small(name: str, classes: int) -> nn.Module:
    options: dict[str, Any] = {"width": 0.5, "fpn_channels": 64, "norm": "gn", "tower_convs": 2}
    if "rcnn" in name:
        options |= {"hidden": 256, "samples": 128, "rpn": {"limit": (256, 256)}}
    else:
        options |= {"tower_norm": "gn"}
    return DETECTORS[name]("resnet18", classes, **options)


def train(model: nn.Module, batch: Batch) -> None:
    rate = 1e-3
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=STEPS, pct_start=0.2)
    for _ in range(STEPS):
        losses = model.loss(model(batch.images), batch.targets)  # type: ignore[operator]  # a detector's method
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_overfits_four_coco_pictures(name: str, tiny_coco: Path) -> None:
    pytest.importorskip("PIL")
    pytest.importorskip("pycocotools")
    annotations = tiny_coco / "annotations" / "instances_train2017.json"
    pictures = CocoDetection(tiny_coco / "train2017", annotations, image_ids=IMAGE_IDS, masks=True)
    resize = Resize(SIZE, SIZE)
    batch = collate([resize(*pictures[index], random.Random(0)) for index in range(len(pictures))])
    model = small(name, len(pictures.categories))
    train(model, batch)
    found = detect_batch(model, batch, device=torch.device("cpu"))
    rows = [
        row
        for target, detection in zip(batch.targets, found, strict=True)
        for row in coco_results(detection, int(target["image_id"]), pictures.category_ids)
    ]
    truth = pictures.ground_truth()
    assert coco_ap(truth, rows)["AP50"] > 0.8
    if name in WITH_MASKS:
        assert coco_ap(truth, rows, iou_type="segm")["AP50"] > 0.6
