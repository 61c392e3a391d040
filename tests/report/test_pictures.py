from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from nasdet.report import write_report
from nasdet.report.ground_truth import Boxes, choose
from nasdet.report.pictures import iou, match
from nasdet.report.read import read_run

A, B = [0.0, 0.0, 10.0, 10.0], [20.0, 20.0, 30.0, 30.0]


def boxes(*rows: tuple[list[float], int, float], crowd: bool = False) -> Boxes:
    return Boxes([r[0] for r in rows], [r[1] for r in rows], [r[2] for r in rows], [crowd] * len(rows))


@pytest.mark.parametrize(
    ("truth", "found", "counts"),
    [
        (boxes((A, 1, 1)), boxes((A, 1, 0.9)), (1, 0)),
        (boxes((A, 1, 1)), boxes((A, 2, 0.9)), (0, 1)),
        (boxes((A, 1, 1)), boxes((A, 1, 0.9), (A, 1, 0.8)), (1, 1)),
        (boxes((A, 1, 1), (B, 1, 1)), boxes((B, 1, 0.2), (A, 1, 0.9)), (2, 0)),
        (boxes((A, 1, 1)), boxes(([0, 0, 10, 4], 1, 0.9)), (0, 1)),
        (boxes((A, 1, 1), crowd=True), boxes(([0, 0, 10, 4], 1, 0.9)), (0, 0)),
        (boxes(), boxes((A, 1, 0.9)), (0, 1)),
        (boxes((A, 1, 1)), boxes(), (0, 0)),
    ],
    ids=["right", "class", "twice", "two", "small", "crowd", "no object", "nothing"],
)
def test_match(truth: Boxes, found: Boxes, counts: tuple[int, int]) -> None:
    assert match(truth, found) == counts


def test_iou() -> None:
    assert iou(A, A) == 1 and iou(A, B) == 0 and iou(A, [5, 0, 15, 10]) == pytest.approx(1 / 3)
    assert iou([3, 3, 3, 3], [3, 3, 3, 3]) == 0


def test_pictures_are_evenly_spaced_and_not_picked_by_result(train: Path) -> None:
    run = read_run(train)
    shown, categories, why = choose(run, 4)
    assert [picture.name for picture in shown] == [f"{i:06d}.png" for i in (0, 2, 5, 7)] and why == ""
    assert categories == [str(digit) for digit in range(10)]
    run.detections = run.detections[::-1] if run.detections else None
    assert [picture.name for picture in choose(run, 4)[0]] == [picture.name for picture in shown]


def test_pictures_without_a_detection_are_in_the_choice(train: Path, fake: SimpleNamespace) -> None:
    rows = json.loads((train / "detections.json").read_text())
    fake.write(train / "detections.json", [row for row in rows if row["image_id"] > 104])
    fake.write(train / "split.json", {"test": list(range(100, 110))})
    assert [picture.name for picture in choose(read_run(train), 4)[0]] == [f"{i:06d}.png" for i in (0, 2, 5, 7)]


def test_a_detector_that_finds_nothing_is_shown(train: Path, fake: SimpleNamespace, parse: Any) -> None:
    fake.write(train / "detections.json", [])
    fake.write(train / "split.json", {"test": list(range(100, 110))})
    page = parse(write_report(train).read_text())
    assert len(page.all("img")) == 16 and "0 of 4 objects found, 0 false" in page.text


def test_file_of_the_split_wins_where_ids_collide(tmp_path: Path, fake: SimpleNamespace) -> None:
    data = fake.make_data(tmp_path / "data", 6)
    val = data / "annotations" / "instances_val.json"
    content = json.loads(val.read_text())
    for image in content["images"]:
        image["file_name"] = "train-" + image["file_name"]
        Image.new("RGB", (320, 240)).save(data / "val" / image["file_name"])
    train = data / "annotations" / "instances_train.json"
    fake.write(train, content)
    run = fake.make_train(tmp_path / "run", data, 0.4, None)
    for file, first in ((train, "train-000000.png"), (val, "000000.png")):
        source = hashlib.sha256(file.read_bytes()).hexdigest()
        fake.write(run / "split.json", {"test": list(range(100, 106)), "test_source": source})
        assert choose(read_run(run), 1)[0][0].name == first


def spoil(data: Path, what: str, fake: SimpleNamespace) -> None:
    file = data / "annotations" / "instances_val.json"
    content: dict[str, Any] = json.loads(file.read_text())
    if what == "broken JSON":
        file.write_text("{")
    elif what == "no objects":
        fake.write(file, {**content, "images": [1, 2]})
    elif what == "odd ids":
        fake.write(file, {**content, "images": [{"id": [1]}]})
    elif what == "pictures gone":
        for picture in (data / "val").iterdir():
            picture.unlink()
    elif what == "outside":
        Image.new("RGB", (320, 240)).save(data.parent / "secret.png")
        fake.write(file, {**content, "images": [{**i, "file_name": "../../secret.png"} for i in content["images"]]})


@pytest.mark.parametrize("what", ["broken JSON", "no objects", "odd ids", "pictures gone", "outside"])
def test_trouble_in_the_data_folder_costs_only_the_pictures(
    what: str, tmp_path: Path, fake: SimpleNamespace, parse: Any
) -> None:
    data = fake.make_data(tmp_path / "data", 3)
    run = fake.make_train(tmp_path / "run", data, 0.4, None)
    spoil(data, what, fake)
    page = parse(write_report(run).read_text())
    assert "No pictures here" in page.text and not page.all("img") and "Average precision" in page.headings


def test_one_broken_picture_is_named(tmp_path: Path, fake: SimpleNamespace, parse: Any) -> None:
    data = fake.make_data(tmp_path / "data", 3)
    run = fake.make_train(tmp_path / "run", data, 0.4, None)
    (data / "val" / "000001.png").write_bytes(b"no picture")
    page = parse(write_report(run).read_text())
    assert "000001.png cannot be read" in page.text and len(page.all("img")) == 4


def test_odd_boxes_are_left_out(tmp_path: Path, fake: SimpleNamespace, parse: Any) -> None:
    data = fake.make_data(tmp_path / "data", 1)
    run = fake.make_train(tmp_path / "run", data, 0.4, None)
    odd = [
        {"bbox": [1, 2]},
        {"bbox": None},
        {"bbox": [0, 0, float("nan"), 1]},
        {"bbox": [0, 0, 9, 9], "category_id": 99},
    ]
    rows = [{"image_id": 100, "category_id": 1, "score": 0.9, **row} for row in odd]
    (run / "detections.json").write_text(json.dumps([*rows, {"image_id": 100}]))
    page = parse(write_report(run).read_text())
    assert "0 of" in page.text and ", 0 false" in page.text


VOC = """<annotation><filename>{name}.jpg</filename><size><width>100</width><height>80</height><depth>3</depth></size>
<object><name>cat</name><difficult>0</difficult><bndbox><xmin>11</xmin><ymin>21</ymin><xmax>60</xmax><ymax>70</ymax>
</bndbox></object></annotation>"""


def test_voc_folder(tmp_path: Path, fake: SimpleNamespace, parse: Any) -> None:
    pytest.importorskip("nasdet.data.folder")
    data = tmp_path / "VOC2012"
    for name in ("000001", "000002", "000003"):
        for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (data / part).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (100, 80), (50, 90, 50)).save(data / "JPEGImages" / f"{name}.jpg")
        (data / "Annotations" / f"{name}.xml").write_text(VOC.format(name=name))
    (data / "ImageSets" / "Main" / "train.txt").write_text("000001\n000002\n")
    (data / "ImageSets" / "Main" / "val.txt").write_text("000003\n")
    fake.write(tmp_path / "run" / "run.json", {"verb": "train", "data": str(data)})
    found = {"image_id": 3, "category_id": 8, "bbox": [10, 20, 50, 50], "score": 0.9}
    fake.write(tmp_path / "run" / "detections.json", [found])
    page = parse(write_report(tmp_path / "run").read_text())
    assert "000003.jpg: 1 of 1 object found, 0 false" in page.text
    assert page.all("img")[1]["alt"] == "Detections on 000003.jpg: cat 0.90"
