"""Ground truth as pycocotools takes it: perfect detections score 1, subsets hold just their images."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from nasdet.data import CocoDetection, open_data


def load(folder: Path, **options) -> CocoDetection:
    return CocoDetection(folder / "train", folder / "annotations" / "instances_train.json", **options)


def annotation(**changes):
    return lambda document: document["annotations"][0].update(changes)


def coco_ap(ground_truth: dict, results: list[dict], iou_type: str) -> np.ndarray:
    import contextlib
    import io

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        truth = COCO()
        truth.dataset = ground_truth
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def perfect(data) -> list[dict]:
    """The targets of a data set as detections, with masks where there are any."""
    from pycocotools import mask as coco_mask

    results = []
    for _, target in data:
        for i, (x1, y1, x2, y2) in enumerate(target["boxes"].tolist()):
            if target["iscrowd"][i]:
                continue
            category = data.category_ids[int(target["labels"][i])]
            result = {"image_id": target["image_id"], "category_id": category, "bbox": [x1, y1, x2 - x1, y2 - y1]}
            if "masks" in target:
                result["segmentation"] = coco_mask.encode(np.asfortranarray(target["masks"][i].numpy()))
            results.append({**result, "score": 1.0})
    return results


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_perfect_detections_score_one(digits_folder, iou_type):
    data = open_data(digits_folder, masks=True).test()
    stats = coco_ap(data.ground_truth(), perfect(data), iou_type)
    assert stats[0] == pytest.approx(1.0)
    results = perfect(data)
    ap_of_half = coco_ap(data.ground_truth(), results[: len(results) // 2], iou_type)[0]
    assert ap_of_half < 0.9  # the test can fail


def test_ground_truth_with_annotation_id_zero_counts_every_object(make_coco):
    data = load(make_coco(plant=annotation(id=0)))
    truth = data.ground_truth()
    assert [record["id"] for record in truth["annotations"]] == list(range(1, 11))
    assert coco_ap(truth, perfect(data), "bbox")[0] == pytest.approx(1.0)
    json.dumps(truth, allow_nan=False)


def test_ground_truth_is_of_exactly_the_images_of_a_subset(make_coco):
    truth = load(make_coco()).subset([2, 6], "search-val").ground_truth()
    assert [record["id"] for record in truth["images"]] == [2, 6]
    assert {record["image_id"] for record in truth["annotations"]} == {2}
    assert truth["categories"] == [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    assert "segmentation" not in truth["annotations"][0]


def test_tiny_coco(tiny_coco):
    folder = open_data(tiny_coco, masks=True)
    assert (folder.layout, len(folder.categories), len(folder.trainval)) == ("coco", 80, 50)
    data = folder.test()
    document = json.loads((tiny_coco / "annotations" / "instances_val2017.json").read_text())
    assert sum(len(target["labels"]) for _, target in data) == len(document["annotations"])
    assert sum(int(target["iscrowd"].sum()) for _, target in data) == 5
    assert sum(not len(target["labels"]) for _, target in data) == 2
    errors = []
    for _, target in data:
        for box, mask, iscrowd in zip(target["boxes"], target["masks"], target["iscrowd"], strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            if not iscrowd:
                tight = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
                errors.append(float((tight - box).abs().max()))
    assert np.median(errors) < 1 and np.mean(np.array(errors) < 2) > 0.99  # polygons have points between pixels
    assert coco_ap(data.ground_truth(), perfect(data), "bbox")[0] == pytest.approx(1.0)
