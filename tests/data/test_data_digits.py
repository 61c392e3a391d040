"""digits: deterministic, tight, disjoint, and never half there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from nasdet.data import digits as digits_module
from nasdet.data import open_data, write_digits


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_the_same_seed_gives_the_same_bytes(digits_folder, tmp_path):
    again = write_digits(tmp_path / "again", train=12, val=6, size=(96, 128))
    assert contents(again) == contents(digits_folder)
    other = write_digits(tmp_path / "other", train=12, val=6, size=(96, 128), seed=1)
    assert contents(other)["train/000001.jpg"] != contents(digits_folder)["train/000001.jpg"]


def test_pictures_do_not_depend_on_how_many_there_are(digits_folder, tmp_path):
    fewer = write_digits(tmp_path / "fewer", train=3, val=1, size=(96, 128))
    for name in ("000001.jpg", "000002.jpg", "000003.jpg"):
        assert (fewer / "train" / name).read_bytes() == (digits_folder / "train" / name).read_bytes()


def test_it_is_a_normal_coco_folder(digits_folder):
    folder = open_data(digits_folder)
    assert folder.layout == "coco"
    assert folder.categories == tuple("0123456789")
    assert (len(folder.train()), len(folder.test())) == (12, 6)
    document = json.loads((digits_folder / "annotations" / "instances_train.json").read_text())
    assert [record["id"] for record in document["categories"]] == list(range(1, 11))
    assert {record["width"] for record in document["images"]} == {128}
    assert (digits_folder / "train" / document["images"][0]["file_name"]).is_file()


def test_boxes_and_areas_are_exactly_the_visible_ink(digits_folder):
    folder = open_data(digits_folder, masks=True)
    objects = 0
    for dataset in (folder.train(), folder.test()):
        for _, target in dataset:
            assert len(target["labels"]) <= 8
            assert target["masks"].sum(0).max() <= 1 or not len(
                target["masks"]
            )  # what is hidden belongs to one digit only
            for box, mask, area in zip(target["boxes"], target["masks"], target["area"], strict=True):
                rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
                assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                assert mask.sum() == area
                assert 10 <= max(box[2] - box[0], box[3] - box[1]) <= 100
                objects += 1
    assert objects > 30


def test_the_ink_can_be_seen():
    source = digits_module.Source.load(0)
    rng = np.random.default_rng(0)
    for _ in range(20):
        window = rng.uniform(0, 255, 3).astype(np.float32) * np.ones((8, 8, 1), np.float32)
        before = window.copy()
        digits_module.paint(window, np.ones((8, 8), np.float32), rng)
        assert abs(float(((window - before) @ digits_module._LUMA).mean())) > 0.75 * digits_module.MIN_CONTRAST
    assert sum(len(scans) for part in source.scans.values() for scans in part) == 1797


def test_train_and_val_share_no_scan():
    scans = digits_module.Source.load(0).scans
    train, val = ({scan.tobytes() for digit in scans[part] for scan in digit} for part in ("train", "val"))
    assert len(train) > 2 * len(val) > 900
    assert not train & val


def test_train_and_val_backgrounds_come_from_different_parts():
    source = digits_module.Source.load(0)
    columns = np.broadcast_to(np.arange(640, dtype=np.float32)[None, :, None] * 255 / 640, (427, 640, 3))
    marked = digits_module.Source(source.scans, [columns.astype(np.uint8)])
    edge = 255 * digits_module.TRAIN_COLUMNS

    class Plain:
        """The generator's crops without its change of light."""

        def __init__(self, seed):
            self.rng = np.random.default_rng(seed)

        def __getattr__(self, name):
            return getattr(self.rng, name)

        def uniform(self, low, high):
            return {(0.6, 1.1): 1.0, (-20, 30): 0.0}.get((low, high), self.rng.uniform(low, high))

    for seed in range(10):
        assert digits_module.background(marked, "train", (96, 128), Plain(seed)).max() <= edge + 1
        assert digits_module.background(marked, "val", (96, 128), Plain(seed)).min() >= edge - 2


def test_every_size_and_class_turns_up(tmp_path):
    source = digits_module.Source.load(0)
    labels, sides, counts = set(), [], []
    for index in range(60):
        rng = np.random.default_rng([5, index])
        _, objects = digits_module.draw_picture(source, "train", (192, 256), rng, digits_module.EMPTY_SHARE)
        counts.append(len(objects))
        labels |= {item["category_id"] for item in objects}
        sides += [max(item["bbox"][2:]) for item in objects]
    assert labels == set(range(1, 11))
    assert set(range(1, 8)) <= set(counts) <= set(range(9))
    assert min(sides) < 16 and max(sides) > 80


def test_a_complete_folder_is_left_alone_and_anything_else_refused(tmp_path):
    settings = {"train": 2, "val": 1, "size": (64, 64)}
    out = write_digits(tmp_path / "out", **settings)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert write_digits(out, **settings) == out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before

    with pytest.raises(FileExistsError, match="holds digits made with other settings .* name another folder"):
        write_digits(out, seed=1, **settings)
    (out / "val" / "000003.jpg").unlink()
    with pytest.raises(FileExistsError, match="holds digits whose files were changed"):
        write_digits(out, **settings)
    (out / "digits.json").write_text("[]")
    with pytest.raises(FileExistsError, match="is not empty and holds no digits data set"):
        write_digits(out, **settings)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="is a file"):
        write_digits(tmp_path / "file", **settings)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "out").mkdir()
    write_digits(tmp_path / "out", train=2, val=1, size=(64, 64))
    assert len(open_data(tmp_path / "out").train()) == 2


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=["disk full", "interrupted"])
def test_nothing_is_left_half_written(tmp_path, monkeypatch, error):
    drawn = []

    def draw(*arguments, **options):
        drawn.append(1)
        if len(drawn) == 3:
            raise error
        return original(*arguments, **options)

    original = digits_module.draw_picture
    monkeypatch.setattr(digits_module, "draw_picture", draw)
    with pytest.raises(type(error)):
        write_digits(tmp_path / "out", train=4, val=2, size=(64, 64))
    assert list(tmp_path.iterdir()) == []


def test_two_processes_may_make_the_same_set(tmp_path, monkeypatch):
    settings = {"train": 2, "val": 1, "size": (64, 64)}
    original = digits_module._write

    def write_while_another_finishes(folder, recipe):
        monkeypatch.setattr(digits_module, "_write", original)
        write_digits(tmp_path / "out", **settings)
        original(folder, recipe)

    monkeypatch.setattr(digits_module, "_write", write_while_another_finishes)
    assert write_digits(tmp_path / "out", **settings) == tmp_path / "out"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train": 0}, "train and val must be at least 1, got 0 and 200"),
        ({"size": (63, 64)}, r"size must be \(height, width\), each from 64 to 2048, got \(63, 64\)"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_bad_settings(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        write_digits(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_pixels_show_what_the_annotation_says(digits_folder):
    """Inside a mask the picture differs from the ring around it, on the whole."""
    differences = []
    for image, target in open_data(digits_folder, masks=True).train():
        light = image.float().mean(0)
        for mask in target["masks"]:
            ring = torch.nn.functional.max_pool2d(mask[None].float(), 7, 1, 3)[0].bool() & ~target["masks"].any(0)
            differences.append(float((light[mask].mean() - light[ring].mean()).abs()))
    assert np.median(differences) > 40
