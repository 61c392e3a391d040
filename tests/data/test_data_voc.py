"""PASCAL VOC: what is read, and what every planted fault says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from nasdet.data import DataError, VocDetection, open_data
from nasdet.data.voc import VOC_CATEGORIES, voc_image_id

NAMES = ["2008_000002", "2008_000008", "000012"]

VOC_OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult>
<bndbox><xmin>{box[0]}</xmin><ymin>{box[1]}</ymin><xmax>{box[2]}</xmax><ymax>{box[3]}</ymax></bndbox></object>"""


def voc_xml(objects: list[tuple[str, tuple[float, ...], int]], width: int = 40, height: int = 30) -> str:
    body = "".join(VOC_OBJECT.format(name=name, box=box, difficult=difficult) for name, box, difficult in objects)
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><filename>x.jpg</filename>{size}{body}</annotation>"


@pytest.fixture
def make_voc(tmp_path: Path) -> Callable[..., Path]:
    """``make_voc({"trainval": names, ...}, xml={name: text})`` -> folder."""

    def make(sets: dict[str, list[str]], xml: dict[str, str] | None = None) -> Path:
        folder = tmp_path / "voc"
        for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
            (folder / part).mkdir(parents=True)
        default = voc_xml([("dog", (5, 6, 14, 13), 0), ("cat", (21, 11, 32, 26), 1)])
        for name, stems in sets.items():
            (folder / "ImageSets" / "Main" / f"{name}.txt").write_text("".join(f"{stem}\n" for stem in stems))
            for stem in stems:
                Image.new("RGB", (40, 30), (90, 120, 30)).save(folder / "JPEGImages" / f"{stem}.jpg")
                (folder / "Annotations" / f"{stem}.xml").write_text((xml or {}).get(stem, default))
        return folder

    return make


def test_items_follow_the_contract(make_voc):
    data = VocDetection(make_voc({"trainval": NAMES}))
    assert data.categories == VOC_CATEGORIES and len(data.categories) == 20
    assert data.category_ids == tuple(range(1, 21))
    assert data.image_ids == [2008000002, 2008000008, 12]
    image, target = data[0]
    assert tuple(image.shape) == (3, 30, 40)
    # VOC counts from 1 and includes the last pixel: xmin 5 .. xmax 14 are the ten pixels 4 .. 13
    assert target["boxes"].tolist() == [[4.0, 5.0, 14.0, 13.0], [20.0, 10.0, 32.0, 26.0]]
    assert [data.categories[label] for label in target["labels"]] == ["dog", "cat"]
    assert target["area"].tolist() == [80.0, 192.0]
    assert target["iscrowd"].tolist() == [False, True]  # the second is difficult
    truth = data.ground_truth()
    assert [record["iscrowd"] for record in truth["annotations"]] == [0, 1] * 3


def test_difficult_objects_can_be_dropped(make_voc):
    data = VocDetection(make_voc({"trainval": NAMES}), keep_difficult=False)
    assert [len(target["labels"]) for _, target in data] == [1, 1, 1]


def test_a_picture_without_objects_is_kept(make_voc):
    data = VocDetection(make_voc({"trainval": NAMES}, {NAMES[1]: voc_xml([])}))
    assert data[1][1]["boxes"].shape == (0, 4)


def test_own_classes(make_voc):
    folder = make_voc({"train": ["a", "b"]}, {"a": voc_xml([("bolt", (1, 1, 9, 9), 0)]), "b": voc_xml([])})
    assert VocDetection(folder, "train", categories=["nut", "bolt"])[0][1]["labels"].tolist() == [1]
    (folder / "classes.txt").write_text("bolt\nnut\n")
    assert VocDetection(folder, "train")[0][1]["labels"].tolist() == [0]
    (folder / "classes.txt").write_text("bolt\nbolt\n")
    with pytest.raises(DataError, match="classes.txt: bad category name: must hold one class name per line, each once"):
        VocDetection(folder, "train")


def test_image_ids_are_stable_and_exact_in_json():
    assert voc_image_id("2007_000027") == 2007000027
    assert voc_image_id("000005") == 5
    assert voc_image_id("street-7") == voc_image_id("street-7") != voc_image_id("street-8")
    assert voc_image_id("street-7") < 2**53


def box(x1, y1, x2, y2, name="dog"):
    return voc_xml([(name, (x1, y1, x2, y2), 0)])


FAULTS = {
    "cut": (
        box(1, 1, 9, 9)[:60],
        "malformed XML: unclosed token: line 1, column 53",
        True,
    ),
    "no size": ("<annotation></annotation>", "size: missing key: 'size/height'", True),
    "zero size": (voc_xml([], width=0), "size: bad value: width and height must be positive, got 0x30", True),
    "text for a number": (
        box(1, "x", 9, 9),
        "object 0 (dog): bad value: bndbox/ymin must be a number, got 'x'",
        False,
    ),
    "nan": (box(1, "nan", 9, 9), "object 0 (dog): bad value: bndbox/ymin must be finite, got 'nan'", False),
    "no corner": (
        box(1, 2, 9, 9).replace("<ymax>9</ymax>", ""),
        "object 0 (dog): missing key: 'bndbox/ymax'",
        False,
    ),
    "no name": (box(1, 2, 9, 9, name=""), "object 0: missing key: 'name'", False),
    "unknown category": (
        box(1, 2, 9, 9, name="unicorn"),
        "object 0 (unicorn): unknown category: 'unicorn' is not among the 20 categories",
        False,
    ),
    "inverted": (
        box(9, 2, 1, 9),
        "object 0 (dog): box without area: bbox is [8.0, 1.0, -7.0, 8.0] ([x, y, width, height])",
        False,
    ),
    "outside": (
        box(51, 2, 60, 9),
        "object 0 (dog): box outside the image: bbox is [50.0, 1.0, 10.0, 8.0], the image is 40x30 (width x height)",
        False,
    ),
}


@pytest.mark.parametrize("xml, message, drops_image", FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_names_file_and_record_and_can_be_skipped(make_voc, xml, message, drops_image):
    folder = make_voc({"trainval": NAMES}, {NAMES[1]: xml})
    with pytest.raises(DataError) as caught:
        VocDetection(folder)
    assert str(caught.value) == f"{folder / 'Annotations' / (NAMES[1] + '.xml')}: {message}"
    data = VocDetection(folder, skip_bad=True)
    assert data.skipped == {caught.value.reason: 1}
    assert len(data) == (2 if drops_image else 3)


def test_missing_files(make_voc):
    folder = make_voc({"trainval": NAMES})
    (folder / "JPEGImages" / f"{NAMES[0]}.jpg").unlink()
    (folder / "Annotations" / f"{NAMES[1]}.xml").unlink()
    with pytest.raises(DataError, match=rf"{NAMES[1]}.xml: missing annotation file"):
        VocDetection(folder)
    data = VocDetection(folder, skip_bad=True)
    assert data.skipped == {"missing annotation file": 1, "missing image": 1}
    assert data.image_ids == [12]
    with pytest.raises(DataError, match="nothing.txt: missing or unreadable image set"):
        VocDetection(folder, "nothing")


def test_an_empty_image_set_is_an_error(make_voc):
    folder = make_voc({"trainval": []})
    with pytest.raises(DataError, match="trainval.txt: images: empty data set: no usable image"):
        VocDetection(folder)


def test_a_name_listed_twice_is_a_duplicate(make_voc):
    with pytest.raises(DataError, match=r"image 12 \(000012.jpg\): duplicate image id"):
        VocDetection(make_voc({"trainval": ["000012", "000012"]}))


@pytest.mark.parametrize(
    "sets, train, test",
    [
        ({"trainval": ["1", "2", "3"], "test": ["4", "5"]}, [1, 2, 3], [4, 5]),
        ({"train": ["1", "2", "3"], "val": ["4"], "test": ["5"]}, [1, 2, 3, 4], [5]),
        ({"train": ["1", "2"], "val": ["3"], "trainval": ["1", "2", "3"]}, [1, 2], [3]),
        ({"trainval": ["1", "2", "3", "4", "5"]}, None, None),
    ],
    ids=["trainval+test", "train+val+test", "val is the test", "held out"],
)
def test_which_image_sets_become_train_and_test(make_voc, sets, train, test):
    folder = open_data(make_voc(sets))
    assert folder.layout == "voc"
    if train is None:
        assert len(folder.test()) == 1
        assert sorted(folder.train().image_ids + folder.test().image_ids) == [1, 2, 3, 4, 5]
    else:
        assert (folder.train().image_ids, folder.test().image_ids) == (train, test)


def test_test_pictures_without_annotations_do_not_count(make_voc):
    folder = make_voc({"train": ["1", "2"], "val": ["3"], "test": ["4"]})
    (folder / "Annotations" / "4.xml").unlink()
    assert open_data(folder).test().image_ids == [3]


def test_masks_of_voc_are_refused(make_voc):
    with pytest.raises(DataError, match="no masks: VOC's XML holds boxes only"):
        open_data(make_voc({"trainval": NAMES}), masks=True)
