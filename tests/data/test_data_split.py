"""The split: made once, stored with a hash, and enforced."""

from __future__ import annotations

import dataclasses
import json

import pytest

from nasdet.data import CocoDetection, DataError, Split, TestSplitError, open_data, require_selectable


def test_parts_are_disjoint_complete_and_halved(make_coco):
    split = open_data(make_coco(train=9, val=4)).split
    assert (len(split.search_train), len(split.search_val)) == (5, 4)
    assert split.train == tuple(range(1, 10))
    assert not set(split.search_train) & set(split.search_val)
    assert split.test == (101, 102, 103, 104)


def test_a_test_part_is_held_out_where_there_is_none(make_coco):
    folder = open_data(make_coco(train=20, val=0))
    split = folder.split
    assert (len(split.search_train), len(split.search_val), len(split.test)) == (8, 8, 4)
    assert sorted(split.train + split.test) == list(range(1, 21))
    assert folder.testset is None
    assert sorted(folder.train().image_ids + folder.test().image_ids) == list(range(1, 21))


def test_a_split_is_a_function_of_ids_and_seed(make_coco):
    path = make_coco(train=20)
    splits = [open_data(path, seed=seed).split for seed in (0, 0, 1)]
    assert splits[0] == splits[1]
    assert splits[0].search_train != splits[2].search_train
    assert splits[0].sha256 != splits[2].sha256
    # pinned: a stored run must find the same halves again in later versions
    assert splits[0].search_train == (3, 4, 7, 9, 10, 14, 15, 17, 18, 20)


@pytest.mark.parametrize("train, val, needed", [(1, 2, 2), (2, 0, 3)])
def test_too_few_images_to_divide(make_coco, train, val, needed):
    def plant(document):
        document["annotations"].append({"id": 1, "image_id": 1, "category_id": 3, "bbox": [1, 1, 5, 5]})

    with pytest.raises(DataError, match=f"too few images: {train} images; a split needs at least {needed}"):
        open_data(make_coco(train=train, val=val, plant=plant))


def test_saved_and_loaded(make_coco, tmp_path):
    path = make_coco()
    split = open_data(path, seed=3).split
    file = split.save(tmp_path / "run" / "split.json")
    assert Split.load(file) == split
    assert open_data(path, split=Split.load(file)).search_val().image_ids == list(split.search_val)
    assert [p.name for p in file.parent.iterdir()] == ["split.json"]


TAMPERED = {
    "test image moved to search-val": lambda d: d["search_val"].append(d["test"].pop()),
    "halves swapped": lambda d: d.update(search_train=d["search_val"], search_val=d["search_train"]),
    "seed": lambda d: d.update(seed=8),
    "fingerprint": lambda d: d.update(fingerprint="0" * 64),
    "test source": lambda d: d.update(test_source="0" * 64),
    "hash": lambda d: d.update(sha256="0" * 64),
}


@pytest.mark.parametrize("change", TAMPERED.values(), ids=TAMPERED.keys())
def test_a_tampered_file_is_refused(make_coco, tmp_path, change):
    file = open_data(make_coco()).split.save(tmp_path / "split.json")
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    with pytest.raises(
        DataError, match=r"split.json: sha256: split does not match its hash: stored \w{12}, its content"
    ):
        Split.load(file)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.pop("test"), "top level: missing key: 'test'"),
        (lambda d: d.update(test=[1.5]), "test: bad value: must be a list of integers"),
        (lambda d: d.update(seed="0"), "seed: bad value: got '0'"),
        (lambda d: d.update(sha256=""), "sha256: bad value: got ''"),
        (lambda d: d.update(version=2), "version: unknown split version: must be 1, got 2"),
        (lambda d: d.update(format="x"), "top level: not a split file: 'format' must be 'nasdet-split'"),
    ],
    ids=["key", "type", "seed", "empty hash", "version", "format"],
)
def test_a_malformed_file_is_refused(make_coco, tmp_path, change, message):
    file = open_data(make_coco()).split.save(tmp_path / "split.json")
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))
    with pytest.raises(DataError) as caught:
        Split.load(file)
    assert str(caught.value) == f"{file}: {message}"


@pytest.mark.parametrize(
    "content, message", [("{", "malformed JSON"), ("[]", "not a split file"), (None, "missing split file")]
)
def test_no_json_at_all(tmp_path, content, message):
    file = tmp_path / "split.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=message):
        Split.load(file)


def test_parts_that_overlap_are_refused_even_with_a_fitting_hash(make_coco, tmp_path):
    split = open_data(make_coco()).split
    shared = dataclasses.replace(split, search_val=split.search_val + split.search_train[:1], sha256="")
    with pytest.raises(DataError, match="split parts overlap: in both search_train and search_val"):
        Split.load(shared.save(tmp_path / "a.json"))
    held_out = open_data(make_coco(val=0, train=9, name="one")).split
    shared = dataclasses.replace(held_out, search_val=held_out.search_val + held_out.test[:1], sha256="")
    with pytest.raises(DataError, match="split parts overlap: in both search_val and test"):
        Split.load(shared.save(tmp_path / "b.json"))


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_split_of_changed_annotations_is_refused(make_coco, part):
    path = make_coco()
    split = open_data(path).split
    file = path / "annotations" / f"instances_{part}.json"
    document = json.loads(file.read_text())
    document["annotations"][0]["bbox"][0] += 1
    file.write_text(json.dumps(document))
    with pytest.raises(DataError, match="split: annotations changed since the split was made"):
        open_data(path, split=split)


def test_a_split_of_images_that_are_gone_is_refused(make_coco):
    path = make_coco()
    split = open_data(path).split
    (path / "train" / "2.png").unlink()
    message = "split names images that are gone: 1 images of the split's train part are not usable, first image 2"
    with pytest.raises(DataError, match=message):
        open_data(path, split=split, skip_bad=True)


def test_a_split_survives_a_move_of_the_folder(make_coco, tmp_path):
    path = make_coco()
    split = open_data(path).split
    path.rename(tmp_path / "elsewhere")
    assert open_data(tmp_path / "elsewhere", split=split).split is split


def test_roles(make_coco):
    folder = open_data(make_coco())
    parts = {"train": folder.train(), "search-train": folder.search_train(), "search-val": folder.search_val()}
    for role, dataset in parts.items():
        assert (dataset.role, dataset.split) == (role, folder.split)
        require_selectable(dataset)
        require_selectable(dataset, folder.split)
    assert folder.test().role == "test"
    assert sorted(parts["search-train"].image_ids + parts["search-val"].image_ids) == sorted(parts["train"].image_ids)
    image_id = parts["search-val"].image_ids[0]
    assert parts["search-val"][0][1]["image_id"] == image_id


def refused():
    return pytest.raises(TestSplitError, match="choosing an architecture on the test split is refused")


def test_choosing_on_the_test_split_is_refused(make_coco):
    path = make_coco()
    folder = open_data(path)
    with refused():
        require_selectable(folder.test())
    with refused():
        require_selectable(folder.test().subset(folder.split.test[:1]))
    with pytest.raises(TestSplitError, match="a part of the test data stays test data, got role 'search-val'"):
        folder.test().subset(folder.split.test, "search-val")
    # the test annotations, opened by hand under another role: their split still knows them
    val = path / "annotations" / "instances_val.json"
    by_hand = CocoDetection(path / "val", val, role="search-val", image_ids=[101])
    with refused():
        require_selectable(by_hand, folder.split)


def test_held_out_images_are_refused_under_any_role(make_coco):
    folder = open_data(make_coco(train=10, val=0))
    with pytest.raises(TestSplitError, match="2 of 10 images of the 'train' data set are test images, first image"):
        require_selectable(folder.trainval)
    with refused():
        require_selectable(folder.trainval.subset(folder.split.test[:1], "search-val"))
    require_selectable(folder.trainval.subset(folder.split.search_val, "search-val"))


def test_equal_ids_in_two_annotation_files_are_different_images(make_coco):
    folder = open_data(make_coco(train=6, val=4, val_first_id=1))
    assert set(folder.split.test) <= set(folder.split.train)
    require_selectable(folder.search_val())
    require_selectable(folder.search_val(), folder.split)
    with refused():
        require_selectable(folder.test())


@pytest.mark.parametrize("dataset", [None, [1, 2], object()], ids=["none", "list", "object"])
def test_what_says_nothing_of_its_origin_is_refused(dataset):
    with pytest.raises(TypeError, match="dataset must have a role and image_ids"):
        require_selectable(dataset)


def test_unknown_folders(tmp_path, make_coco):
    with pytest.raises(DataError, match="nowhere: not a data folder: no such folder"):
        open_data(tmp_path / "nowhere")
    with pytest.raises(DataError, match="not a data folder: expected a COCO folder .* or a VOC folder"):
        open_data(tmp_path)
    path = make_coco()
    (path / "annotations" / "instances_train2.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"ambiguous data folder: instances_train.json, instances_train2.json: keep one"
    ):
        open_data(path)
    path = make_coco(name="other")
    (path / "annotations" / "instances_train.json").unlink()
    with pytest.raises(DataError, match=r"annotations/instances_train\*.json is missing"):
        open_data(path)


def test_image_folders_are_found_where_tools_put_them(make_coco):
    path = make_coco()
    (path / "images").mkdir()
    for part in ("train", "val"):
        (path / part).rename(path / "images" / part)
    assert len(open_data(path).train()) == 6
    (path / "images" / "val").rename(path / "gone")
    (path / "images").rename(path / "elsewhere")
    with pytest.raises(DataError, match="train: missing image folder: for instances_train.json"):
        open_data(path)


def test_train_and_val_must_agree_and_be_apart(make_coco):
    path = make_coco(plant=lambda d: d["categories"].append({"id": 9, "name": "cow"}))
    with pytest.raises(DataError, match=r"instances_val.json: categories: categories differ: .* \(9, 'cow'\)"):
        open_data(path)
    path = make_coco(name="leak", val=0)
    train = path / "annotations" / "instances_train.json"
    (path / "train").rename(path / "images")
    (path / "annotations" / "instances_val.json").write_text(train.read_text())
    with pytest.raises(DataError, match="1.png: test image is a training image: .* 6 images would be trained on"):
        open_data(path)


def test_skipped_counts_of_both_parts_are_summed(make_coco):
    path = make_coco()
    (path / "train" / "2.png").unlink()
    (path / "val" / "101.png").unlink()
    folder = open_data(path, skip_bad=True)
    assert folder.skipped == {"missing image": 2}
    assert 2 not in folder.split.train and 101 not in folder.split.test
