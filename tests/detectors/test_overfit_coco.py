"""FCOS learns four real COCO pictures by heart, from random weights, on the CPU."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nasdet.detectors import FCOS, build_fcos

# A table with people and food; two dogs; cattle among people, with a crowd region; a person, a cat and a bicycle.
IMAGE_IDS = (60623, 173350, 184613, 562150)
SIZE = 256
STEPS = 100


def _folder() -> Path:
    repository = Path(__file__).resolve().parents[2]
    folder = Path(os.environ.get("NASDET_TINY_COCO", repository.parent / "shared" / "data" / "tiny_coco"))
    if not (folder / "annotations" / "instances_train2017.json").is_file():
        pytest.skip(f"no tiny_coco at {folder}: set NASDET_TINY_COCO")
    return folder


def _load(folder: Path) -> tuple[dict[str, Any], Tensor, list[tuple[int, int]], list[dict[str, Tensor]], list[Tensor]]:
    """COCO dict, padded images, valid sizes, targets in batch pixels, and batch over file pixels per image."""
    import numpy
    from PIL import Image

    coco = json.loads((folder / "annotations" / "instances_train2017.json").read_text())
    coco["images"] = [image for image in coco["images"] if image["id"] in IMAGE_IDS]
    coco["annotations"] = [note for note in coco["annotations"] if note["image_id"] in IMAGE_IDS]
    label = {category["id"]: index for index, category in enumerate(coco["categories"])}
    images = torch.zeros(len(IMAGE_IDS), 3, SIZE, SIZE)
    sizes, targets, scales = [], [], []
    for slot, record in enumerate(coco["images"]):
        scale = SIZE / max(record["width"], record["height"])
        width, height = round(record["width"] * scale), round(record["height"] * scale)
        picture = Image.open(folder / "train2017" / record["file_name"]).convert("RGB").resize((width, height))
        images[slot, :, :height, :width] = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1) / 57.5 - 2.0
        notes = [note for note in coco["annotations"] if note["image_id"] == record["id"]]
        boxes = torch.tensor([note["bbox"] for note in notes])
        boxes[:, 2:] += boxes[:, :2]
        scales.append(torch.tensor([width / record["width"], height / record["height"]] * 2))
        sizes.append((height, width))
        targets.append(
            {
                "boxes": boxes * scales[-1],
                "labels": torch.tensor([label[note["category_id"]] for note in notes]),
                "iscrowd": torch.tensor([bool(note["iscrowd"]) for note in notes]),
            }
        )
    return coco, images, sizes, targets, scales


def _train(model: FCOS, images: Tensor, targets: list[dict[str, Tensor]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.02, total_steps=STEPS, pct_start=0.2, cycle_momentum=False
    )
    for _ in range(STEPS):
        losses = model.loss(model(images), targets)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()


def _average_precision(coco: dict[str, Any], detections: list[dict[str, Tensor]], scales: list[Tensor]) -> list[float]:
    """AP and AP50 by pycocotools."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    results = []
    for record, found, scale in zip(coco["images"], detections, scales, strict=True):
        boxes = found["boxes"] / scale
        boxes[:, 2:] -= boxes[:, :2]
        for box, score, label in zip(boxes.tolist(), found["scores"].tolist(), found["labels"].tolist(), strict=True):
            category = coco["categories"][label]["id"]
            results.append({"image_id": record["id"], "category_id": category, "bbox": box, "score": score})
    assert results, "no detections"
    truth = COCO()
    truth.dataset = coco
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [float(value) for value in evaluation.stats[:2]]


@pytest.mark.slow
def test_fcos_overfits_four_coco_pictures() -> None:
    pytest.importorskip("PIL")
    pytest.importorskip("pycocotools")
    coco, images, sizes, targets, scales = _load(_folder())
    torch.manual_seed(0)
    model = build_fcos("resnet18", len(coco["categories"]), width=0.5, fpn_channels=64, tower_convs=2)
    _train(model, images, targets)
    model.eval()
    with torch.no_grad():
        detections = model.detect(model(images), sizes)
    _, ap50 = _average_precision(coco, detections, scales)
    assert ap50 > 0.8
