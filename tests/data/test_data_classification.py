"""ImageNet-style folders: classes, roles, broken files, transforms, and batches that are a function of (seed, step)."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nasdet.data import ClassificationFolder, DataError, TestSplitError, make_loader, require_selectable
from nasdet.data.classification import (
    CentreCrop,
    ClassificationDataset,
    ColorJitter,
    RandomResizedCrop,
    evaluation_transform,
    training_transform,
)
from nasdet.data.digit_classes import write_digit_classes


def make(root: Path, train: dict[str, int], val: dict[str, int] | None = None, size=(20, 30)) -> Path:
    """A folder with so many pictures of each class, each of another colour."""
    for part, counts in (("train", train), ("val", val or {})):
        for name, count in counts.items():
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = np.full((*size, 3), 7 * index % 256, np.uint8)
                Image.fromarray(pixels).save(folder / f"{index:02d}.{('jpg', 'JPEG', 'png')[index % 3]}", quality=95)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "set", {"dog": 10, "cat": 20}, {"cat": 3, "dog": 2})


def test_classes_are_in_the_order_of_their_names(folder):
    (folder / "train" / "dog" / "notes.txt").write_text("no picture")
    (folder / "train" / "dog" / "._00.jpg").write_text("left by another system")
    (folder / "train" / "README.md").write_text("no class")
    data = ClassificationFolder(folder)
    assert data.categories == ("cat", "dog") and data.layout == "classes"
    assert (len(data.train()), len(data.test())) == (30, 5)
    image, target = data.train()[20]
    assert image.dtype == torch.uint8 and image.shape == (3, 20, 30)
    assert target == {"label": 1, "image_id": 20, "size": (20, 30)}
    assert [data.train()[index][1]["label"] for index in (0, 19, 29)] == [0, 0, 1]
    assert data.skipped == {} and "30 images" in repr(data.trainval)


def test_every_part_has_its_role_and_none_overlap(folder):
    data = ClassificationFolder(folder)
    parts = [data.search_train(), data.search_val(), data.train(), data.test()]
    assert [part.role for part in parts] == ["search-train", "search-val", "train", "test"]
    learn, choose = set(parts[0].image_ids), set(parts[1].image_ids)
    assert not learn & choose and learn | choose == set(parts[2].image_ids)
    assert {label: len(ids) for label, ids in parts[1].per_class().items()} == {0: 4, 1: 2}, "a fifth of each class"
    again, other = ClassificationFolder(folder).split, ClassificationFolder(folder, seed=1).split
    assert again == data.split and other.search_val != data.split.search_val


def test_no_more_than_fifty_of_a_class_choose(tmp_path):
    data = ClassificationFolder(make(tmp_path, {"a": 300, "b": 3}, {"a": 1, "b": 1}, size=(2, 2)))
    assert {label: len(ids) for label, ids in data.search_val().per_class().items()} == {0: 50, 1: 1}


def test_without_val_a_fifth_of_each_class_is_held_out(tmp_path):
    data = ClassificationFolder(make(tmp_path, {"a": 10, "b": 20}))
    assert {label: len(ids) for label, ids in data.test().per_class().items()} == {0: 2, 1: 4}
    assert not set(data.test().image_ids) & set(data.train().image_ids)
    with pytest.raises(TestSplitError, match="6 of 30 images"):
        require_selectable(data.trainval)


def test_choosing_on_test_is_refused(folder):
    data = ClassificationFolder(folder)
    require_selectable(data.search_val(), data.split)
    with pytest.raises(TestSplitError, match="role is 'test'"):
        require_selectable(data.test(), data.split)
    with pytest.raises(TestSplitError, match="stays test data"):
        data.test().subset(data.test().image_ids, "search-val")


def test_a_stored_split_is_refused_once_files_change(folder):
    split = ClassificationFolder(folder).split
    assert ClassificationFolder(folder, split=split).split is split
    (folder / "train" / "cat" / "00.jpg").unlink()
    with pytest.raises(DataError, match="annotations changed since the split was made"):
        ClassificationFolder(folder, split=split)


def test_broken_files_are_named_or_skipped_with_a_count(folder):
    broken = folder / "train" / "dog" / "03.jpg"
    broken.write_bytes(broken.read_bytes()[:50])
    data = ClassificationFolder(folder)
    with pytest.raises(DataError, match="03.jpg: truncated or unreadable image"):
        list(make_loader(data.train(), 5, steps=6, workers=1, divisor=1))
    data = ClassificationFolder(folder, skip_bad=True)
    assert data.skipped == {"truncated or unreadable image": 1} and len(data.train()) == 29
    assert str(broken) in data.trainval.skipped_examples["truncated or unreadable image"]
    assert 23 not in data.train().image_ids and data.train().image_ids[-1] == 29, "the others keep their numbers"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: shutil.rmtree(root / "train"), "train/ is missing"),
        (lambda root: shutil.rmtree(root / "train/cat") or shutil.rmtree(root / "train/dog"), "no class"),
        (lambda root: [file.unlink() for file in (root / "train/cat").iterdir()], "cat: empty class folder: no usable"),
        (lambda root: [file.unlink() for file in (root / "val/dog").iterdir()], "val/dog: empty class folder"),
        (lambda root: shutil.rmtree(root / "val/dog"), "val: dog: classes differ: missing here"),
        (lambda root: (root / "val/emu").mkdir(), "val/emu: empty class folder"),
        (lambda root: (root / "train/dog").rename(root / "train/emu"), "classes differ"),
        (lambda root: [file.unlink() for file in sorted((root / "train/dog").iterdir())[1:]], "dog: too few images"),
    ],
    ids=["no_train", "no_class", "empty", "empty_val", "val_lacks", "val_extra", "renamed", "one_image"],
)
def test_a_folder_that_cannot_be_used_is_named(folder, spoil, message):
    spoil(folder)
    with pytest.raises(DataError, match=message):
        ClassificationFolder(folder)


def test_every_file_of_a_class_broken_is_an_error_even_when_skipping(folder):
    for file in (folder / "train" / "dog").iterdir():
        file.write_bytes(b"")
    with pytest.raises(DataError, match=r"dog: empty class folder.*skipped: 10 x truncated"):
        ClassificationFolder(folder, skip_bad=True)


def test_bad_role(folder):
    with pytest.raises(ValueError, match="role must be one of"):
        ClassificationDataset(folder / "train", role="validation")


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_a_function_of_seed_and_step(folder, workers):
    data, transform = ClassificationFolder(folder).train(), training_transform(16)
    whole = list(make_loader(data, 7, transform, seed=3, steps=9, divisor=1))
    rest = list(make_loader(data, 7, transform, seed=3, steps=9, start_step=5, divisor=1, workers=workers))
    for first, second in zip(whole[5:], rest, strict=True):
        assert torch.equal(first.images, second.images) and first.targets == second.targets
    assert whole[0].images.shape == (7, 3, 16, 16)
    other = next(iter(make_loader(data, 7, transform, seed=4, steps=9, divisor=1)))
    assert not torch.equal(other.images, whole[0].images)


def picture(height=40, width=60):
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8), {"label": 0, "size": (height, width)}


def test_random_crops_keep_to_their_ranges():
    crop, rng = RandomResizedCrop(8, (0.2, 0.5)), random.Random(0)
    shapes = set()
    for _ in range(300):
        y, x, height, width = crop._window(40, 60, rng)
        assert 0 <= y <= 40 - height and 0 <= x <= 60 - width
        assert 0.17 < height * width / 2400 < 0.54 and 0.7 < width / height < 1.42
        shapes.add((height, width))
    assert len(shapes) > 100
    image, target = crop(*picture(), rng)
    assert image.shape == (3, 8, 8) and image.dtype == torch.uint8 and target["label"] == 0


def test_a_picture_too_narrow_for_any_draw_gives_its_centre():
    assert RandomResizedCrop(8, (1.0, 1.0))._window(10, 100, random.Random(0)) == (0, 43, 10, 13)
    assert RandomResizedCrop(8, (1.0, 1.0))._window(100, 10, random.Random(0)) == (43, 0, 13, 10)
    assert RandomResizedCrop(8)._window(1, 1, random.Random(0)) == (0, 0, 1, 1)


def test_colours_move_within_their_strength():
    image, target = picture()
    rng = random.Random(0)
    assert torch.equal(ColorJitter(0.0)(image, target, rng)[0], image)
    grey = torch.full((3, 4, 4), 100, dtype=torch.uint8)
    values = {int(ColorJitter(0.4)(grey, target, rng)[0][0, 0, 0]) for _ in range(200)}
    assert min(values) >= 60 and max(values) <= 140 and len(values) > 40, "grey pictures change in brightness alone"
    moved = ColorJitter(0.4)(image, target, rng)[0]
    assert moved.dtype == torch.uint8 and not torch.equal(moved, image)
    red = torch.zeros(3, 4, 4, dtype=torch.uint8)
    red[0] = 200
    spread = {int((p := ColorJitter(0.4)(red, target, rng)[0])[0, 0, 0] - p[1, 0, 0]) for _ in range(100)}
    assert len(spread) > 30, "saturation moves the channels apart"


def test_evaluation_cuts_the_centre_of_the_scaled_picture():
    image = torch.zeros(3, 32, 64, dtype=torch.uint8)
    image[:, 8:24, 24:40] = 255  # the middle quarter of the height, and so much of the width
    found, _ = evaluation_transform(16, 32)(image, {"size": (32, 64)}, random.Random(0))
    assert found.shape == (3, 16, 16) and bool((found == 255).all())
    found, _ = evaluation_transform(28)(*picture(50, 70), random.Random(0))
    assert found.shape == (3, 28, 28)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RandomResizedCrop(0), "size must be positive"),
        (lambda: RandomResizedCrop(8, (0.0, 1.0)), "scale must be"),
        (lambda: RandomResizedCrop(8, (0.5, 1.5)), "scale must be"),
        (lambda: RandomResizedCrop(8, ratio=(2.0, 1.0)), "ratio must be"),
        (lambda: ColorJitter(1.5), r"strength must be in \[0, 1\], got 1.5"),
        (lambda: CentreCrop(0), "size must be positive"),
        (lambda: CentreCrop(9)(*picture(8, 20), random.Random(0)), "at least 9 pixels high and wide, got 8 x 20"),
        (lambda: evaluation_transform(224, 200), "short must be at least size = 224, got 200"),
    ],
    ids=["size", "scale_0", "scale_1", "ratio", "strength", "crop", "small", "short"],
)
def test_bad_transforms(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_digit_classes_are_the_same_every_time_and_balanced(tmp_path):
    pytest.importorskip("sklearn")
    first = write_digit_classes(tmp_path / "a", train=42, val=20, size=(32, 40), seed=5)
    data = ClassificationFolder(first)
    assert data.categories == tuple("0123456789") and data.train()[0][0].shape == (3, 32, 40)
    assert {len(ids) for ids in data.trainval.per_class().values()} == {4, 5} and len(data.test()) == 20
    again = write_digit_classes(tmp_path / "b", train=42, val=20, size=(32, 40), seed=5)
    files = [path.relative_to(first) for path in first.rglob("*") if path.is_file()]
    assert len(files) == 63 and all((first / name).read_bytes() == (again / name).read_bytes() for name in files)
    assert write_digit_classes(first, train=42, val=20, size=(32, 40), seed=5) == first, "left as it is"
    with pytest.raises(FileExistsError, match="other settings"):
        write_digit_classes(first, train=43, val=20, size=(32, 40), seed=5)
    (first / "train" / "3" / "000003.png").write_bytes(b"")
    with pytest.raises(FileExistsError, match="changed since"):
        write_digit_classes(first, train=42, val=20, size=(32, 40), seed=5)
    with pytest.raises(ValueError, match="each from 24 to 2048"):
        write_digit_classes(tmp_path / "c", size=(16, 32))
