from __future__ import annotations

import copy

import numpy
import pytest

from nasdet.engine.average_precision import available_backends, coco_ap

pytest.importorskip("pycocotools")
BACKENDS = available_backends()


def truth(boxes, *, images=2, categories=("cat", "dog"), **extra):
    """``boxes``: (image, category, x, y, w, h) tuples; ids start at 0 on purpose."""
    annotations = [
        {"id": i, "image_id": j, "category_id": category, "bbox": box, "area": box[2] * box[3], "iscrowd": 0, **extra}
        for i, (j, category, *box) in enumerate(boxes)
    ]
    return {
        "images": [{"id": i, "width": 200, "height": 200} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": i + 1, "name": name} for i, name in enumerate(categories)],
    }


def found(*rows):
    return [{"image_id": i, "category_id": c, "bbox": box, "score": score} for i, c, score, *box in rows]


def random_case(seed):
    rng = numpy.random.default_rng(seed)
    rows, detections = [], []
    for image in range(12):
        for _ in range(int(rng.integers(0, 6))):
            x, y, w, h = rng.uniform(0, 80), rng.uniform(0, 80), rng.uniform(4, 120), rng.uniform(4, 120)
            category = int(rng.integers(1, 5))
            rows.append((image, category, x, y, w, h))
            if rng.random() < 0.8:
                box = (numpy.array([x, y, w, h]) + rng.normal(0, 3, 4)).clip(1).tolist()
                detections.append((image, category, round(float(rng.random()), 2), *box))
        for _ in range(int(rng.integers(0, 4))):
            box = rng.uniform(5, 90, 4).tolist()
            detections.append((image, int(rng.integers(1, 6)), round(float(rng.random()), 2), *box))
    content = truth(rows, images=13, categories=("a", "b", "c", "d", "e"))
    for annotation in content["annotations"][::7]:
        annotation["iscrowd"] = 1
    return content, found(*detections)


@pytest.mark.parametrize("backend", BACKENDS)
def test_hand_computed(backend):
    # cat: two to find; ranked: hit (IoU 1), miss, hit (IoU 0.8, so right at 0.50..0.75 and, being not below, at 0.80).
    # precision is 1 up to recall 0.5 and 2/3 above: 51 and 50 of the 101 recall points. Above IoU 0.80 only the 51.
    content = truth([(0, 1, 10, 10, 100, 100), (1, 1, 10, 10, 100, 100), (0, 2, 10, 10, 20, 20)])
    results = found((0, 1, 0.9, 10, 10, 100, 100), (1, 1, 0.8, 150, 150, 20, 20), (1, 1, 0.7, 10, 10, 100, 80))
    result = coco_ap(content, results, backend)
    full, half = (51 + 50 * 2 / 3) / 101, 51 / 101
    cat = (7 * full + 3 * half) / 10
    assert result["per_category"] == {"cat": pytest.approx(cat, abs=1e-12), "dog": 0.0}
    assert result["AP"] == pytest.approx(cat / 2, abs=1e-12)
    assert result["AP50"] == pytest.approx(full / 2, abs=1e-12) and result["AP75"] == pytest.approx(full / 2, abs=1e-12)
    assert result["APs"] == 0.0 and result["APm"] == -1.0 and result["APl"] > 0.5
    assert result["AR100"] == pytest.approx((7 * 1 + 3 * 0.5) / 10 / 2, abs=1e-12)
    assert result["images"] == 2 and result["detections"] == 3 and result["backend"] == backend


@pytest.mark.parametrize("seed", range(4))
def test_every_backend_agrees_with_the_oracle(seed):
    if len(BACKENDS) < 2:
        pytest.skip("only pycocotools is installed")
    content, results = random_case(seed)
    oracle = coco_ap(content, results, "pycocotools")
    assert 0.05 < oracle["AP"] < 0.9
    for backend in BACKENDS:
        other = coco_ap(content, results, backend)
        assert other["per_category"] == pytest.approx(oracle["per_category"], abs=1e-9)
        for key in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"):
            assert other[key] == pytest.approx(oracle[key], abs=1e-9), key


def test_oracle_equals_plain_pycocotools(tmp_path, capsys):
    import json

    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    content, results = random_case(7)
    for annotation in content["annotations"]:
        annotation["id"] += 1
    ours = coco_ap(content, results, "pycocotools")
    assert capsys.readouterr().out == ""
    (tmp_path / "truth.json").write_text(json.dumps(content))
    reference = COCO(str(tmp_path / "truth.json"))
    evaluator = COCOeval(reference, reference.loadRes(copy.deepcopy(results)), "bbox")
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    assert [ours[name] for name in names] == pytest.approx(list(evaluator.stats[:6]), abs=1e-12)
    assert ours["AR100"] == pytest.approx(evaluator.stats[8], abs=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("content", "results", "expected"),
    [
        (truth([(0, 1, 0, 0, 9, 9)]), [], 0.0),
        (truth([]), found((0, 1, 0.5, 0, 0, 9, 9)), -1.0),
        (truth([]), [], -1.0),
        (truth([], images=0), [], -1.0),
        (truth([], categories=()), [], -1.0),
        (truth([(0, 1, 0, 0, 9, 9)], iscrowd=1), found((0, 1, 0.5, 0, 0, 9, 9)), -1.0),
    ],
    ids=["no_results", "nothing_to_find", "neither", "no_images", "no_categories", "crowd_only"],
)
def test_empty_sides(backend, content, results, expected):
    result = coco_ap(content, results, backend)
    assert result["AP"] == expected and result["AP50"] == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_stay_and_ids_do_not_matter(backend):
    content, results = random_case(2)
    before = copy.deepcopy((content, results))
    result = coco_ap(content, results, backend)
    assert (content, results) == before
    for annotation in content["annotations"]:
        annotation["id"] += 100
    assert coco_ap(content, results, backend) == result


@pytest.mark.parametrize("backend", BACKENDS)
def test_area_and_iscrowd_have_defaults(backend):
    content, results = random_case(3)
    for annotation in content["annotations"]:
        annotation["iscrowd"] = 0
    expected = coco_ap(content, results, backend)
    for annotation in content["annotations"]:
        del annotation["iscrowd"], annotation["area"]
    assert coco_ap(content, results, backend) == expected


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ((9, 1, 0.5, 0, 0, 1, 1), r"results\[0\] must be of an image in the ground truth, got image_id 9"),
        ((0, 7, 0.5, 0, 0, 1, 1), "known category, got category_id 7"),
        ((0, 1, float("nan"), 0, 0, 1, 1), "finite score"),
        ((0, 1, 0.5, 0, float("inf"), 1, 1), "finite box"),
        ((0, 1, 0.5, 0, 1, 1), "four"),
    ],
    ids=["image", "category", "nan_score", "inf_box", "three_numbers"],
)
def test_bad_results_are_named(row, message):
    with pytest.raises(ValueError, match=message):
        coco_ap(truth([(0, 1, 0, 0, 9, 9)]), found(row))


def test_bad_backend_and_ground_truth():
    with pytest.raises(ValueError, match="backend must be 'auto'"):
        coco_ap(truth([]), [], "magic")
    with pytest.raises(ValueError, match="no categories"):
        coco_ap({"images": [], "annotations": []}, [])
