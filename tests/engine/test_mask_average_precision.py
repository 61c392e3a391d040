"""Average precision of masks: figures known by hand, the oracle, and a whole evaluation with its files."""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from nasdet.cli import detect, evaluate
from nasdet.data import DataFolder, DetectionDataset, open_data, write_digits
from nasdet.detectors.parts.paste import encode_rle
from nasdet.engine.average_precision import available_backends, coco_ap
from nasdet.engine.evaluate import coco_results, detect_all
from nasdet.engine.evaluate import evaluate as evaluate_model
from nasdet.ops import roi_align
from nasdet.spaces.assemble import ModelConfig

coco_mask = pytest.importorskip("pycocotools.mask")
BACKENDS = available_backends()
SIZE = (120, 160)
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")


def block(x: int, y: int, width: int, height: int) -> np.ndarray:
    mask = np.zeros(SIZE, dtype=bool)
    mask[y : y + height, x : x + width] = True
    return mask


def rle(mask: np.ndarray) -> dict[str, Any]:
    encoded = encode_rle(mask)
    return {**encoded, "counts": encoded["counts"].decode()}


def box_of(mask: np.ndarray) -> list[float]:
    if not mask.any():
        return [0.0] * 4
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    sides = (columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
    return [float(side) for side in sides]


def truth(*masks: np.ndarray, **extra: Any) -> dict[str, Any]:
    """One picture with an object of one category for each mask."""
    annotations = [
        {
            "id": i,
            "image_id": 4,
            "category_id": 2,
            "bbox": box_of(mask),
            "area": int(mask.sum()),
            "iscrowd": 0,
            "segmentation": rle(mask),
            **extra,
        }
        for i, mask in enumerate(masks)
    ]
    images = [{"id": 4, "height": SIZE[0], "width": SIZE[1]}]
    return {"images": images, "annotations": annotations, "categories": [{"id": 2, "name": "cat"}]}


def found(*rows: tuple[np.ndarray, float], **extra: Any) -> list[dict[str, Any]]:
    return [
        {"image_id": 4, "category_id": 2, "bbox": box_of(mask), "score": score, "segmentation": rle(mask), **extra}
        for mask, score in rows
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("prediction", "of_masks", "of_boxes"),
    [
        (block(40, 40, 40, 40), 1.0, 1.0),
        (block(49, 40, 40, 40), 0.3, 0.3),  # IoU 31 * 40 / (2 * 1600 - 1240) = 0.633: right at 0.50, 0.55, 0.60
        (block(40, 40, 40, 29) | block(40, 79, 40, 1), 0.6, 1.0),  # 30 of 40 rows in the same box: IoU 0.75
        (block(40, 40, 40, 1) | block(40, 79, 40, 1), 0.0, 1.0),  # two lines with the right box
        (block(80, 40, 40, 40), 0.0, 0.0),
        (np.zeros(SIZE, dtype=bool), 0.0, 0.0),
    ],
    ids=["perfect", "shifted", "rows missing", "lines", "beside", "empty"],
)
def test_figures_by_hand(prediction: np.ndarray, of_masks: float, of_boxes: float, backend: str) -> None:
    content, results = truth(block(40, 40, 40, 40)), found((prediction, 0.9))
    segm, bbox = (coco_ap(content, results, backend, iou_type) for iou_type in ("segm", "bbox"))
    assert segm["AP"] == pytest.approx(of_masks, abs=1e-9) and bbox["AP"] == pytest.approx(of_boxes, abs=1e-9)
    assert segm["AP50"] == pytest.approx(float(of_masks > 0)) and segm["AP75"] == pytest.approx(float(of_masks >= 0.6))
    assert segm["per_category"] == {"cat": pytest.approx(of_masks)} and segm["APl"] == -1.0 and segm["APs"] == -1.0
    assert segm["APm"] == pytest.approx(of_masks) and segm["AR100"] == pytest.approx(of_masks)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_are_ranked_by_their_own_score_where_they_have_one(backend: str) -> None:
    content = truth(block(40, 40, 40, 40))
    results = found((block(100, 90, 20, 20), 0.9), (block(40, 40, 40, 40), 0.6))
    assert coco_ap(content, results, backend, "segm")["AP"] == pytest.approx(0.5)  # wrong, right: precision 1/2
    results[0]["mask_score"], results[1]["mask_score"] = 0.2, 0.5
    assert coco_ap(content, results, backend, "segm")["AP"] == pytest.approx(1.0)
    assert coco_ap(content, results, backend, "bbox")["AP"] == pytest.approx(0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_crowd_neither_rewards_nor_punishes(backend: str) -> None:
    content = truth(block(40, 40, 40, 40), block(90, 10, 60, 90))
    content["annotations"][1]["iscrowd"] = 1
    right, inside, beside = block(40, 40, 40, 40), block(100, 30, 20, 30), block(2, 2, 20, 20)
    assert coco_ap(content, found((right, 0.5), (inside, 0.9)), backend, "segm")["AP"] == pytest.approx(1.0)
    assert coco_ap(content, found((right, 0.5), (beside, 0.9)), backend, "segm")["AP"] == pytest.approx(0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_kind_of_ground_truth_does_not_matter(backend: str) -> None:
    content = truth(block(40, 40, 40, 40))
    results = found((block(49, 40, 40, 40), 0.9))
    expected = coco_ap(content, results, backend, "segm")
    polygon, runs = copy.deepcopy(content), copy.deepcopy(content)
    polygon["annotations"][0]["segmentation"] = [[40, 40, 80, 40, 80, 80, 40, 80]]
    counts = [40 * 120 + 40, *([40, 80] * 39), 40, 120 * 160 - 79 * 120 - 80]
    runs["annotations"][0]["segmentation"] = {"size": list(SIZE), "counts": counts}
    before = copy.deepcopy((polygon, runs, results))
    assert coco_ap(polygon, results, backend, "segm") == expected
    assert coco_ap(runs, results, backend, "segm") == expected
    assert (polygon, runs, results) == before
    as_bytes = [{**results[0], "segmentation": encode_rle(block(49, 40, 40, 40))}]
    assert coco_ap(content, as_bytes, backend, "segm") == expected


def random_case(seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Several pictures of blobs, some found a little off, some missed, some made up."""
    rng = np.random.default_rng(seed)
    content, results = truth(), []
    content["images"] = [{"id": i, "height": SIZE[0], "width": SIZE[1]} for i in range(6)]
    content["categories"] = [{"id": i, "name": str(i)} for i in (1, 2, 3)]
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    for image in range(6):
        for _ in range(int(rng.integers(0, 5))):
            cx, cy, rx, ry = rng.uniform(10, 150), rng.uniform(10, 110), rng.uniform(4, 50), rng.uniform(4, 50)
            category = int(rng.integers(1, 4))
            mask = ((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 < 1
            (annotation,) = truth(mask, image_id=image, category_id=category)["annotations"]
            content["annotations"].append({**annotation, "id": len(content["annotations"])})
            shift = rng.normal(0, 2, 2)
            near = ((x - cx - shift[0]) / rx) ** 2 + ((y - cy - shift[1]) / ry) ** 2 < rng.uniform(0.8, 1.2)
            if rng.random() < 0.8 and near.any():
                results += found((near, round(float(rng.random()), 2)), image_id=image, category_id=category)
        made_up = block(int(rng.integers(100)), int(rng.integers(80)), 30, 20)
        results += found((made_up, 0.4), image_id=image, category_id=1)
    for annotation in content["annotations"][::6]:
        annotation["iscrowd"] = 1
    return content, results


@pytest.mark.parametrize("seed", range(3))
def test_backends_agree_with_plain_pycocotools(seed: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    content, results = random_case(seed)
    for annotation in content["annotations"]:
        annotation["id"] += 1
    ours = {backend: coco_ap(content, results, backend, "segm") for backend in BACKENDS}
    assert capsys.readouterr().out == ""
    (tmp_path / "truth.json").write_text(json.dumps(content))
    reference = COCO(str(tmp_path / "truth.json"))
    evaluator = COCOeval(reference, reference.loadRes(copy.deepcopy(results)), "segm")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    expected = [*evaluator.stats[:6], evaluator.stats[8]]
    assert 0.1 < expected[0] < 0.95
    for backend in BACKENDS:
        assert [ours[backend][name] for name in FIGURES] == pytest.approx(expected, abs=1e-9)
    assert coco_ap(content, results, iou_type="bbox")["AP"] != pytest.approx(expected[0], abs=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segmentation": None}, r"results\[0\] must have a segmentation with size and compressed counts, got None"),
        ({"segmentation": {"size": [120, 160], "counts": [19200]}}, "compressed counts"),
        ({"segmentation": {"size": [160, 120], "counts": "0"}}, r"of its image's size \[120, 160\], got \[160, 120\]"),
        ({"mask_score": float("nan")}, "finite score"),
    ],
    ids=["none", "uncompressed", "size", "score"],
)
def test_bad_results_are_named(change: dict[str, Any], message: str) -> None:
    content, results = truth(block(4, 4, 9, 9)), found((block(4, 4, 9, 9), 0.5))
    results[0] |= change
    with pytest.raises(ValueError, match=message):
        coco_ap(content, results, iou_type="segm")
    assert coco_ap(content, results)["AP"] == 1.0


def test_bad_ground_truth_and_type() -> None:
    content = truth(block(4, 4, 9, 9))
    del content["annotations"][0]["segmentation"]
    with pytest.raises(ValueError, match=r"annotations\[0\] must have a segmentation to evaluate masks, got none"):
        coco_ap(content, [], iou_type="segm")
    with pytest.raises(ValueError, match="iou_type must be one of bbox, segm, got 'keypoints'"):
        coco_ap(content, [], iou_type="keypoints")


class Oracle(nn.Module):
    """Finds what the annotations say, in the pixels of the batch that it is shown, its masks M x M in their boxes."""

    def __init__(self, dataset: DetectionDataset, side: int = 56, keep: float = 1.0) -> None:
        super().__init__()
        self.known = [dataset[index][1] for index in range(len(dataset))]
        self.side, self.keep, self.seen = side, keep, 0
        self.masks: nn.Module | None = nn.Identity()

    def forward(self, images: Tensor) -> dict[str, Any]:
        return {"images": images}

    def detect(self, outputs: dict[str, Any], sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
        found = []
        for height, width in sizes:
            target = self.known[self.seen % len(self.known)]
            self.seen += 1
            boxes = target["boxes"]
            rois = torch.cat((torch.arange(len(boxes))[:, None].float(), boxes), dim=1)
            crops = roi_align(target["masks"][:, None].float(), rois, self.side, 1.0, 2, True)[:, 0]
            crops[:, round(self.keep * self.side) :] = 0.0
            scale = torch.tensor([width / target["size"][1], height / target["size"][0]]).repeat(2)
            scores = torch.ones(len(boxes))
            masks = {"mask_logits": crops.logit(1e-4), "mask_scores": 0.5 * scores}
            found.append({"boxes": boxes * scale, "scores": scores, "labels": target["labels"], **masks})
        return found


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    folder = write_digits(tmp_path_factory.mktemp("digits") / "set", train=4, val=6, size=(160, 224))
    return open_data(folder, masks=True)


@pytest.mark.parametrize(("short", "batch"), [(160, 1), (200, 2), (97, 3)], ids=["as stored", "larger", "smaller"])
def test_masks_come_back_in_stored_pixels(digits: DataFolder, short: int, batch: int, tmp_path: Path) -> None:
    data = digits.test()
    model = Oracle(data)
    summary = evaluate_model(model, data, out=tmp_path, short=short, long=2 * short, batch=batch, progress=False)
    assert summary["AP"] == 1.0 and set(summary["masks"]) == {*FIGURES, "per_category"}
    assert summary["masks"]["AP50"] == 1.0 and summary["masks"]["AP"] > 0.7  # thin strokes in whole pixels
    assert json.loads((tmp_path / "eval.json").read_text()) == summary
    results = json.loads((tmp_path / "detections.json").read_text())
    assert coco_ap(data.ground_truth(), results, iou_type="segm")["AP"] == summary["masks"]["AP"]
    masks = [mask for _, target in data for mask in target["masks"]]
    shares = []
    for row, mask in zip(results, masks, strict=True):
        assert isinstance(row["segmentation"]["counts"], str) and row["mask_score"] == 0.5
        got = torch.from_numpy(coco_mask.decode(row["segmentation"])).bool()
        assert got.shape == mask.shape
        shares.append(float((got & mask).sum() / (got | mask).sum()))
    assert min(shares) > 0.5 and np.mean(shares) > 0.85  # the worst is a digit of 12 pixels


def test_masks_that_miss_a_part_lose_precision_and_boxes_do_not(digits: DataFolder) -> None:
    data, options = digits.test(), {"short": 160, "long": 224, "progress": False}
    whole, half = (evaluate_model(Oracle(data, keep=keep), data, **options) for keep in (1.0, 0.5))
    assert half["AP"] == whole["AP"] == 1.0
    assert half["masks"]["AP"] < 0.3 < whole["masks"]["AP"]


def test_without_masks_in_data_or_model_there_are_no_such_figures(digits: DataFolder) -> None:
    plain = open_data(digits.path, split=digits.split).test()
    options = {"short": 160, "long": 224, "progress": False}
    assert "masks" not in evaluate_model(Oracle(digits.test()), plain, **options)

    class Boxes(Oracle):
        def detect(self, outputs: dict[str, Any], sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
            return [{key: d[key] for key in ("boxes", "scores", "labels")} for d in super().detect(outputs, sizes)]

    boxes = Boxes(digits.test())
    boxes.masks = None
    assert "masks" not in evaluate_model(boxes, digits.test(), **options)
    assert "segmentation" not in detect_all(Boxes(digits.test()), digits.test(), **options)[0]

    class Blind(Oracle):
        def detect(self, outputs: dict[str, Any], sizes: list[tuple[int, int]]) -> list[dict[str, Tensor]]:
            return [{key: value[:0] for key, value in d.items()} for d in super().detect(outputs, sizes)]

    assert evaluate_model(Blind(digits.test()), digits.test(), **options)["masks"]["AP"] == 0.0


def test_results_refuse_masks_that_are_not_one_for_each_box() -> None:
    detection = {"boxes": torch.zeros(2, 4), "scores": torch.ones(2), "labels": torch.zeros(2).long(), "masks": []}
    with pytest.raises(ValueError):
        coco_results(detection, 1, [1])


def call(verb: Any, *arguments: Any) -> int:
    parser = argparse.ArgumentParser()
    verb.configure(parser)
    return int(verb.run(**vars(parser.parse_args([str(argument) for argument in arguments]))))


@pytest.fixture
def run(digits: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder whose model is the oracle of the test part."""
    sizes = {"short_side": 160, "long_side": 224}
    config = ModelConfig(num_classes=10, categories=digits.categories, **sizes)
    monkeypatch.setattr("nasdet.engine.evaluate.load_run_at", lambda *_: (Oracle(digits.test()), config, None))
    digits.split.save(tmp_path / "split.json")
    (tmp_path / "run.json").write_text(json.dumps({"data": str(digits.path)}))
    return tmp_path


def test_the_verb_eval_reports_both(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(evaluate, run, "--device", "cpu", "--workers", 0, "--batch", 1) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("AP 1.0000  AP50 1.0000") and lines[2].startswith("masks: AP 0.")
    assert json.loads((run / "eval.json").read_text())["masks"]["AP50"] == 1.0


def test_the_verb_detect_draws_and_lists_masks(run: Path, digits: DataFolder) -> None:
    data = digits.test()
    path = data.pictures[0].path
    assert call(detect, run, path, "--out", run / "found", "--device", "cpu", "--threshold", 0.4) == 0
    (entry,) = json.loads((run / "found" / "detections.json").read_text())["images"]
    masks = data[0][1]["masks"]
    assert len(entry["detections"]) == len(masks) > 0
    for row, mask in zip(entry["detections"], masks, strict=True):
        got = torch.from_numpy(coco_mask.decode(row["mask"])).bool()
        assert (got & mask).sum() > 0.6 * (got | mask).sum()
    drawn = np.asarray(Image.open(run / "found" / entry["drawing"]).resize((224, 160)).convert("RGB")).astype(int)
    changed = np.abs(drawn - np.asarray(Image.open(path).convert("RGB"))).sum(axis=2) > 60
    assert changed[masks.any(0).numpy()].mean() > 0.8  # the ink is tinted
