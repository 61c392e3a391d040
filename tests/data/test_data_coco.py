"""COCO: what is read, and what every planted fault says."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nasdet.data import CocoDetection, DataError, read_image


def load(folder: Path, **options) -> CocoDetection:
    return CocoDetection(folder / "train", folder / "annotations" / "instances_train.json", **options)


def test_items_follow_the_contract(make_coco):
    data = load(make_coco(), masks=True)
    assert data.categories == ("cat", "dog")  # in the order of the ids 3 and 7
    assert data.category_ids == (3, 7)
    assert data.image_ids == [1, 2, 3, 4, 5, 6]
    assert (len(data), data.role, data.skipped) == (6, "train", {})
    image, target = data[0]
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 30, 40))
    pixels = np.random.default_rng(1).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))
    assert torch.equal(target["boxes"], torch.tensor([[4.0, 5, 14, 13], [20, 10, 32, 26]]))
    assert target["labels"].tolist() == [1, 0]
    assert target["area"].tolist() == [80.0, 192.0]
    dtypes = {key: target[key].dtype for key in ("boxes", "labels", "iscrowd", "area", "masks")}
    assert dtypes == {
        "boxes": torch.float32,
        "labels": torch.int64,
        "iscrowd": torch.bool,
        "area": torch.float32,
        "masks": torch.bool,
    }
    assert (target["image_id"], target["size"]) == (1, (30, 40))
    expected = torch.zeros(2, 30, 40, dtype=torch.bool)
    expected[0, 5:13, 4:14] = True
    expected[1, 10:26, 20:32] = True
    assert torch.equal(target["masks"], expected)


def test_image_without_objects_is_kept(make_coco):
    image, target = load(make_coco(), masks=True)[5]
    assert image.shape == (3, 30, 40)
    shapes = {key: tuple(target[key].shape) for key in ("boxes", "labels", "iscrowd", "area", "masks")}
    assert shapes == {"boxes": (0, 4), "labels": (0,), "iscrowd": (0,), "area": (0,), "masks": (0, 30, 40)}
    assert "masks" not in load(make_coco(name="again"))[5][1]


def test_polygon_and_both_kinds_of_rle_give_the_same_mask(make_coco):
    from pycocotools import mask as coco_mask

    expected = np.zeros((30, 40), dtype=np.uint8, order="F")
    expected[5:13, 4:14] = 1
    flat = expected.ravel(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *edges, flat.size]).tolist()
    compressed = coco_mask.encode(expected)["counts"].decode()

    def plant(document):
        document["annotations"][2]["segmentation"] = {"size": [30, 40], "counts": runs}
        document["annotations"][2]["iscrowd"] = 1
        document["annotations"][4]["segmentation"] = {"size": [30, 40], "counts": compressed}

    data = load(make_coco(plant=plant), masks=True)
    masks = [data[index][1]["masks"][0] for index in (0, 1, 2)]
    for mask in masks:
        assert torch.equal(mask, torch.from_numpy(expected.astype(bool)))
    assert [data[index][1]["iscrowd"].tolist() for index in (0, 1)] == [[False, False], [True, False]]


@pytest.mark.parametrize(
    "mode, suffix",
    [("L", "png"), ("1", "png"), ("P", "png"), ("LA", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("YCbCr", "jpg")],
)
def test_every_image_mode_becomes_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"image.{suffix}"
    Image.new(mode, (7, 5)).save(path)
    image = read_image(path)
    assert (image.dtype, tuple(image.shape)) == (torch.uint8, (3, 5, 7))


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "deep.png")[0].tolist() == [[0, 1, 128, 255]]


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_grey_of_unknown_scale_is_refused(tmp_path, kind):
    Image.fromarray(np.array([[0, 1, 256, 65535]], dtype=kind)).save(tmp_path / "deep.tiff")
    with pytest.raises(DataError, match=r"deep\.tiff: .*: pixels must have 8 or 16 bits, got 32"):
        read_image(tmp_path / "deep.tiff")


def test_what_is_no_image_is_told_in_plain_words(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(DataError, match=r"text\.png: truncated or unreadable image: cannot identify image file$"):
        read_image(tmp_path / "text.png")


def test_a_box_that_sticks_out_is_clipped_and_kept_in_ground_truth(make_coco):
    def plant(document):
        document["annotations"][0]["bbox"] = [-0.5, -2.0, 10.0, 8.0]
        document["annotations"][1]["bbox"] = [30.0, 20.0, 14.0, 10.4]

    data = load(make_coco(plant=plant))
    assert data[0][1]["boxes"].tolist() == [[0.0, 0.0, 9.5, 6.0], [30.0, 20.0, 40.0, 30.0]]
    assert data.ground_truth()["annotations"][0]["bbox"] == [-0.5, -2.0, 10.0, 8.0]


def annotation(**changes):
    return lambda document: document["annotations"][0].update(changes)


def image(**changes):
    return lambda document: document["images"][0].update(changes)


def drop(kind, key):
    return lambda document: document[kind][0].pop(key)


def repeat(kind, index=0):
    return lambda document: document[kind].append(copy.deepcopy(document[kind][index]))


NAN = float("nan")
BAD_BOX = "annotation 10 of image 1: bad box: bbox must be [x, y, width, height], four finite numbers, got"
FAULTS = {
    # id: (plant, what the message says after the file)
    "outside": (
        annotation(bbox=[41, 5, 10, 8]),
        "annotation 10 of image 1: box outside the image: bbox is [41, 5, 10, 8], the image is 40x30 (width x height)",
    ),
    "mostly outside": (
        annotation(bbox=[36, 5, 10, 8]),
        "annotation 10 of image 1: box outside the image: bbox is [36, 5, 10, 8], the image is 40x30 (width x height); "
        "less than half of the box is inside",
    ),
    "zero width": (
        annotation(bbox=[4, 5, 0, 8]),
        "annotation 10 of image 1: box without area: bbox is [4, 5, 0, 8] ([x, y, width, height])",
    ),
    "negative height": (
        annotation(bbox=[4, 5, 3, -8]),
        "annotation 10 of image 1: box without area: bbox is [4, 5, 3, -8] ([x, y, width, height])",
    ),
    "thinner than float32": (
        annotation(bbox=[30, 5, 1e-9, 8]),
        "annotation 10 of image 1: box without area: bbox is [30, 5, 1e-09, 8]: nothing is left in float32",
    ),
    "nan box": (
        annotation(bbox=[4, NAN, 3, 8]),
        f"{BAD_BOX} [4, nan, 3, 8]",
    ),
    "three numbers": (
        annotation(bbox=[4, 5, 3]),
        f"{BAD_BOX} [4, 5, 3]",
    ),
    "huge integer": (
        annotation(bbox=[4, 5, 3, 10**400]),
        f"{BAD_BOX} [4, 5, 3, {10**400}]",
    ),
    "bad area": (
        annotation(area=-1),
        "annotation 10 of image 1: bad area: area must be a finite number >= 0, got -1",
    ),
    "bad iscrowd": (
        annotation(iscrowd="yes"),
        "annotation 10 of image 1: bad value: iscrowd must be 0 or 1, got 'yes'",
    ),
    "unknown category": (
        annotation(category_id=99),
        "annotation 10 of image 1: unknown category: category_id 99 is not among the categories",
    ),
    "unknown image": (
        annotation(image_id=99),
        "annotation 10: unknown image: image_id 99 is not among the images",
    ),
    "no bbox": (drop("annotations", "bbox"), "annotation 10: missing key: 'bbox'"),
    "no annotation id": (drop("annotations", "id"), "annotation at position 0: missing key: 'id'"),
    "string id": (annotation(id="ten"), "annotation at position 0: bad value: id must be an integer, got 'ten'"),
    "annotation twice": (repeat("annotations"), "annotation 10: duplicate annotation id"),
    "no file name": (drop("images", "file_name"), "image 1: missing key: 'file_name'"),
    "no height": (drop("images", "height"), "image 1: missing key: 'height'"),
    "zero height": (image(height=0), "image 1: bad value: width and height must be positive, got 40x0"),
    "path out of the folder": (
        image(file_name="../1.png"),
        "image 1: bad value: file_name must stay in the image folder, got '../1.png'",
    ),
    "image twice": (repeat("images"), "image 1 (1.png): duplicate image id: the id of 1.png as well"),
}


@pytest.mark.parametrize("plant, message", FAULTS.values(), ids=FAULTS.keys())
def test_a_planted_fault_names_file_and_record_and_can_be_skipped(make_coco, plant, message):
    folder = make_coco(plant=plant)
    with pytest.raises(DataError) as caught:
        load(folder)
    assert str(caught.value) == f"{folder / 'annotations' / 'instances_train.json'}: {message}"

    data = load(folder, skip_bad=True)
    assert data.skipped == {caught.value.reason: 1}
    assert data.skipped_examples == {caught.value.reason: str(caught.value)}
    objects = sum(len(target["labels"]) for _, target in data)
    image_dropped = message.startswith("image 1:")
    assert len(data) == (5 if image_dropped else 6)
    assert objects == {True: 8}.get(image_dropped, 10 if "duplicate" in message else 9)


@pytest.mark.parametrize(
    "segmentation, detail",
    [
        ([], "segmentation has no polygon"),
        ([[1, 2, 3, 4]], "a polygon must be [x1, y1, x2, y2, ...], numbers near the image, at least three points"),
        (
            [[1, 2, 3, 4, 5, NAN]],
            "a polygon must be [x1, y1, x2, y2, ...], numbers near the image, at least three points",
        ),
        (
            [[1, 2, 3, 4, 5, 1e9]],
            "a polygon must be [x1, y1, x2, y2, ...], numbers near the image, at least three points",
        ),
        ("abc", "segmentation must be a list of polygons or an RLE object with size and counts"),
        ({"size": [40, 30], "counts": [1200]}, "RLE size must be [height, width] = [30, 40], got [40, 30]"),
        ({"size": [30, 40], "counts": [1]}, "RLE counts must sum to height x width = 1200, got 1"),
        ({"size": [30, 40], "counts": [1300, -100]}, "RLE counts must be integers >= 0, or their compressed string"),
        ({"size": [30, 40], "counts": "0"}, "RLE counts must sum to height x width = 1200, got 0"),
        ({"size": [30, 40], "counts": "P"}, "RLE counts must be integers >= 0, or their compressed string"),
        ({"size": [30, 40], "counts": "é"}, "RLE counts must be integers >= 0, or their compressed string"),
        ({"size": [30, 40], "counts": None}, "RLE counts must be integers >= 0, or their compressed string"),
    ],
    ids=[
        "empty",
        "two points",
        "nan",
        "far",
        "text",
        "size",
        "short",
        "negative",
        "short string",
        "cut",
        "utf8",
        "none",
    ],
)
def test_a_bad_segmentation_matters_only_when_masks_are_wanted(make_coco, segmentation, detail):
    folder = make_coco(plant=annotation(segmentation=segmentation))
    assert len(load(folder)) == 6
    with pytest.raises(DataError) as caught:
        load(folder, masks=True)
    file = folder / "annotations" / "instances_train.json"
    assert str(caught.value) == f"{file}: annotation 10 of image 1: bad segmentation: {detail}"
    assert load(folder, masks=True, skip_bad=True).skipped == {"bad segmentation": 1}


def test_masks_need_segmentations(make_coco):
    folder = make_coco(plant=drop("annotations", "segmentation"))
    with pytest.raises(
        DataError, match=r"annotation 10 of image 1: missing key: 'segmentation' \(masks were asked for\)"
    ):
        load(folder, masks=True)


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"images": [', "malformed JSON: Expecting value: line 1 column 13 (char 12)"),
        ("[]", "top level: malformed JSON: must be an object, got list"),
        ('{"images": [], "annotations": []}', "top level: missing key: 'categories'"),
        ('{"images": {}, "annotations": [], "categories": []}', "top level: bad value: 'images' must be a list"),
        ('{"images": [], "annotations": [], "categories": []}', "categories: empty data set: no category"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}',
            "images: empty data set: no usable image",
        ),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}',
            "category 1: duplicate category id: 'a' and 'b'",
        ),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "a"}]}',
            "category 2: bad category name: must be a string of its own, got 'a'",
        ),
        ("[" * 100_000, "malformed JSON: "),
        ("\xff\xfe", "malformed JSON: "),
        ('{"images": ' + 5000 * "1", "malformed JSON: Exceeds the limit"),
    ],
    ids=["cut", "list", "key", "type", "no category", "no image", "id twice", "name twice", "deep", "bytes", "digits"],
)
@pytest.mark.parametrize("skip_bad", [False, True])
def test_an_unusable_file_is_an_error_even_when_skipping(make_coco, text, message, skip_bad):
    folder = make_coco()
    file = folder / "annotations" / "instances_train.json"
    file.write_text(text, encoding="latin-1")
    with pytest.raises(DataError) as caught:
        load(folder, skip_bad=skip_bad)
    assert str(caught.value).startswith(f"{file}: {message}")


def test_a_data_set_without_objects_is_empty(make_coco):
    folder = make_coco(plant=lambda document: document["annotations"].clear())
    with pytest.raises(DataError, match=r"annotations: empty data set: no usable object in 6 images$"):
        load(folder)
    assert len(load(folder, image_ids=[1, 2])) == 2  # asked for by name: a background picture may be


def test_skipping_everything_leaves_an_error_that_says_what_was_skipped(make_coco):
    def plant(document):
        for record in document["images"]:
            record["file_name"] = "none.png"

    with pytest.raises(DataError, match=r"images: empty data set: no usable image \(skipped: 6 x missing image\)$"):
        load(make_coco(plant=plant), skip_bad=True)


def test_a_missing_image_is_found_when_opening(make_coco):
    folder = make_coco()
    (folder / "train" / "2.png").unlink()
    with pytest.raises(DataError) as caught:
        load(folder)
    annotations = folder / "annotations" / "instances_train.json"
    expected = f"{folder / 'train' / '2.png'}: image 2 (2.png): missing image: named in {annotations}"
    assert str(caught.value) == expected
    data = load(folder, skip_bad=True)
    assert (data.skipped, data.image_ids) == ({"missing image": 1}, [1, 3, 4, 5, 6])


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda content: content[: len(content) // 2], "truncated or unreadable image"),
        (lambda content: b"", "truncated or unreadable image"),
        (lambda content: b"no image at all", "truncated or unreadable image"),
    ],
    ids=["half", "empty", "text"],
)
def test_a_truncated_image_is_found_on_reading_or_by_the_scan(make_coco, damage, reason):
    folder = make_coco()
    path = folder / "train" / "3.png"
    path.write_bytes(damage(path.read_bytes()))
    data = load(folder)
    data[0]
    with pytest.raises(DataError) as caught:
        data[2]
    assert str(caught.value).startswith(f"{path}: image 3 (3.png): {reason}: ")
    with pytest.raises(DataError, match="image 3"):
        data.verify_images()
    skipping = load(folder, skip_bad=True)
    assert skipping.skipped == {reason: 1}
    assert [target["image_id"] for _, target in skipping] == [1, 2, 4, 5, 6]


def test_an_image_of_another_size_than_annotated_is_refused(make_coco):
    folder = make_coco()
    Image.new("RGB", (30, 40)).save(folder / "train" / "1.png")
    with pytest.raises(
        DataError, match="image 1 .*: image size mismatch: the file is 30x40, its annotation says 40x30"
    ):
        load(folder)[0]


def test_missing_files(tmp_path, make_coco):
    with pytest.raises(DataError, match="nothing.json: missing annotation file"):
        CocoDetection(tmp_path, tmp_path / "nothing.json")
    folder = make_coco()
    with pytest.raises(DataError, match="missing image"):
        CocoDetection(tmp_path / "nowhere", folder / "annotations" / "instances_train.json")


def test_image_ids_select_and_unknown_ones_are_named(make_coco):
    folder = make_coco()
    assert load(folder, image_ids=[4, 2]).image_ids == [2, 4]
    with pytest.raises(DataError, match="image_ids 77, 78: unknown image id: 2 asked for and not there"):
        load(folder, image_ids=[2, 78, 77])
    with pytest.raises(DataError, match="image_ids 9: unknown image id"):
        load(folder).subset([9])


def test_role_is_checked(make_coco):
    with pytest.raises(ValueError, match="role must be one of train, search-train, search-val, test, got 'val'"):
        load(make_coco(), role="val")


def test_data_errors_survive_pickling():
    error = DataError("missing image", "a/b.png", "image 3", "gone")
    copied = pickle.loads(pickle.dumps(error))
    assert (str(copied), copied.reason, copied.file) == (str(error), "missing image", "a/b.png")
