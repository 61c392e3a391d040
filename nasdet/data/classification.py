"""Pictures sorted into classes by folder, as ImageNet is, for pretraining backbones and searching by accuracy."""

from __future__ import annotations

import hashlib
import os
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nasdet.data.base import Item, PictureDataset, check_role
from nasdet.data.errors import DataError, Problems, format_counts
from nasdet.data.folder import Folder
from nasdet.data.pictures import SUFFIXES, read_image, those_that
from nasdet.data.split import TEST_SHARE, Split, fingerprint
from nasdet.data.transforms import Compose, HorizontalFlip, Resize, Target, Transform, resize

SEARCH_VAL = 50
"""Images of each class that choose an architecture (Guo et al., SPOS, ECCV 2020: 50,000 of ImageNet's)."""
SEARCH_SHARE = 0.2
"""And the largest share of a class that may."""
_LUMA = (0.299, 0.587, 0.114)


class LabelledPicture(NamedTuple):
    """One picture: its number, the name of its file in the class's folder, and the class's number."""

    image_id: int
    name: str
    label: int


class ClassificationDataset(PictureDataset):
    """Pictures of one class each, from ``folder/<class>/*.jpg`` (jpeg, png, bmp; hidden files are passed over).

    ``dataset[i]`` is ``(image, target)``: ``image`` uint8 ``[3, H, W]`` RGB; ``target`` holds ``label`` int in
    ``0..K-1``, classes in the order of their names, ``image_id`` int, the place in the sorted list of all files of the
    folder, and ``size`` ``(H, W)``. ``source`` is a hash over the files' names, not over their content, which for
    ImageNet would take hours.

    Args:
        folder: holds a folder for each class.
        role: see :class:`~nasdet.data.base.PictureDataset`.
        skip_bad: decode every image once; those that cannot be read are dropped and counted in ``skipped``. Without
            it a broken image is an error when it is read.

    Raises:
        DataError: no such folder, no class, or a class without a (usable) image; names the folder or file.
    """

    def __init__(self, folder: str | Path, *, role: str = "train", skip_bad: bool = False) -> None:
        check_role(role)
        self.annotation, self.role = Path(folder), role
        self.categories = _classes(self.annotation)
        problems, pictures = Problems(skip_bad), _pictures(self.annotation, self.categories)
        names = (f"{self.categories[picture.label]}/{picture.name}" for picture in pictures)
        self.source = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()
        if skip_bad:
            pictures = those_that(lambda picture: read_image(self.path(picture)), pictures, problems)
        self.skipped, self.skipped_examples = dict(problems.counts), dict(problems.examples)
        self._set_pictures(pictures)
        self._require_every_class()

    def path(self, picture: LabelledPicture) -> Path:
        """The image file."""
        return self.annotation / self.categories[picture.label] / picture.name

    def __getitem__(self, index: int) -> Item:
        picture = self.pictures[index]
        image = read_image(self.path(picture))
        size = (int(image.shape[-2]), int(image.shape[-1]))
        return image, {"label": picture.label, "image_id": picture.image_id, "size": size}

    def per_class(self) -> dict[int, list[int]]:
        """The image ids of each label that has any."""
        ids: dict[int, list[int]] = defaultdict(list)
        for picture in self.pictures:
            ids[picture.label].append(picture.image_id)
        return dict(ids)

    def _require_every_class(self) -> None:
        have = self.per_class()
        for label, name in enumerate(self.categories):
            if label not in have:
                dropped = f" (skipped: {format_counts(self.skipped)})" if self.skipped else ""
                detail = f"no usable image ({', '.join(sorted(SUFFIXES))}){dropped}"
                raise DataError("empty class folder", self.annotation / name, detail=detail)

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({str(self.annotation)!r}, role={self.role!r}, {len(self)} images, "
            f"{len(self.categories)} classes)"
        )


class ClassificationFolder(Folder[ClassificationDataset]):
    """An ImageNet-style folder: ``train/<class>/*``, and ``val/<class>/*`` where there is a test part.

    ``train()`` gives all that may be trained on, ``search_train()`` and ``search_val()`` its parts for a search, and
    ``test()`` the folder's ``val/``, or where there is none a fifth of each class of ``train/``. Search-val is
    :data:`SEARCH_VAL` images of each class, at most a fifth of it (:data:`SEARCH_SHARE`) and at least one. Which ones
    is a function of ``seed`` and names alone.

    Args:
        root: the folder.
        split: a stored division; the folder must be the one that it was made for. Without it one is made.
        seed: what a new division is drawn with.
        skip_bad: see :class:`ClassificationDataset`.

    Raises:
        DataError: no such folder, an empty class, ``val`` of other classes than ``train``, a class of too few images.
    """

    def __init__(self, root: str | Path, *, split: Split | None = None, seed: int = 0, skip_bad: bool = False) -> None:
        path = Path(root)
        if not (path / "train").is_dir():
            detail = "expected train/CLASS/*.jpg, and val/CLASS/*.jpg for the test part: train/ is missing"
            raise DataError("not a classification folder", path, detail=detail)
        train = ClassificationDataset(path / "train", skip_bad=skip_bad)
        test = None
        if (path / "val").is_dir():
            test = ClassificationDataset(path / "val", role="test", skip_bad=skip_bad)
            _require_same_classes(train, test)
        split = _divide(train, test, seed) if split is None else split
        super().__init__(path, "classes", train, test, split)
        split.check(self)
        for dataset in (train, test):
            if dataset is not None:
                dataset.split = split  # whatever is cut from them by hand is still known to hold test images

    def drawn(self, seed: int) -> Split:
        """A new division of these data, class by class; not the one in use."""
        return _divide(self.trainval, self.testset, seed)


def _classes(folder: Path) -> tuple[str, ...]:
    try:
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != ".")
    except OSError as error:
        raise DataError("unreadable folder", folder, detail=str(error.strerror)) from error
    if not names:
        raise DataError("empty data set", folder, detail="no class: it must hold a folder for each")
    return tuple(names)


def _pictures(folder: Path, classes: Sequence[str]) -> list[LabelledPicture]:
    pictures: list[LabelledPicture] = []
    for label, name in enumerate(classes):
        names = (file for file in os.listdir(folder / name) if not file.startswith("."))
        files = sorted(file for file in names if os.path.splitext(file)[1].lower() in SUFFIXES)
        pictures += [LabelledPicture(number, file, label) for number, file in enumerate(files, len(pictures))]
    return pictures


def _require_same_classes(train: ClassificationDataset, test: ClassificationDataset) -> None:
    if train.categories == test.categories:
        return
    name = min(set(train.categories) ^ set(test.categories))
    where = "missing here" if name in train.categories else f"not in {train.annotation}"
    raise DataError("classes differ", test.annotation, name, where)


def _divide(train: ClassificationDataset, test: ClassificationDataset | None, seed: int) -> Split:
    """Class by class: the test part where there is no other, search-val, and the rest."""
    tested: list[int] = [] if test is None else list(test.image_ids)
    learn: list[int] = []
    choose: list[int] = []
    needed = 3 if test is None else 2
    for label, ids in train.per_class().items():
        if len(ids) < needed:
            detail = f"{len(ids)} images; a split needs at least {needed} of each class"
            raise DataError("too few images", train.annotation, train.categories[label], detail)
        ranked = sorted(ids, key=lambda number: hashlib.sha256(f"{seed}:{number}".encode()).digest())
        if test is None:
            held_out = max(1, round(TEST_SHARE * len(ranked)))
            tested += ranked[:held_out]
            ranked = ranked[held_out:]
        chosen = min(SEARCH_VAL, max(1, round(SEARCH_SHARE * len(ranked))))
        choose += ranked[:chosen]
        learn += ranked[chosen:]
    return Split(
        search_train=tuple(sorted(learn)),
        search_val=tuple(sorted(choose)),
        test=tuple(sorted(tested)),
        seed=seed,
        fingerprint=fingerprint(train, test),
        test_source=train.source if test is None else test.source,
    )


class RandomResizedCrop:
    """A random part of the picture, scaled to ``size`` x ``size`` pixels: ImageNet training's usual crop (Szegedy et
    al., 2015).

    Its area is a share of the picture's, uniform in ``scale``; width over height is log-uniform in ``ratio``. Where ten
    draws do not fit, the largest central part with a ratio in range is taken. Bilinear with antialiasing.
    """

    def __init__(
        self, size: int = 224, scale: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be positive, got {size}")
        for name, (low, high), most in (("scale", scale, 1.0), ("ratio", ratio, float("inf"))):
            if not 0 < low <= high <= most:
                raise ValueError(f"{name} must be (low, high) with 0 < low <= high <= {most:g}, got {(low, high)}")
        self.size, self.scale, self.ratio = size, scale, ratio

    def __call__(self, image: torch.Tensor, target: Target, rng: random.Random) -> tuple[torch.Tensor, Target]:
        y, x, height, width = self._window(int(image.shape[-2]), int(image.shape[-1]), rng)
        return resize(image[:, y : y + height, x : x + width], target, (self.size, self.size))

    def _window(self, height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
        for _ in range(10):
            area = height * width * rng.uniform(*self.scale)
            ratio = self.ratio[0] * (self.ratio[1] / self.ratio[0]) ** rng.random()
            w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if 0 < w <= width and 0 < h <= height:
                return rng.randint(0, height - h), rng.randint(0, width - w), h, w
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, max(1, round(height * ratio))), min(height, max(1, round(width / ratio)))
        return (height - h) // 2, (width - w) // 2, h, w


class ColorJitter:
    """Brightness, contrast and saturation, in random order, each times a factor uniform in ``[1 - strength, 1 +
    strength]``: colours move from black, from the picture's mean grey, and from each pixel's own grey."""

    def __init__(self, strength: float = 0.4) -> None:
        if not 0 <= strength <= 1:
            raise ValueError(f"strength must be in [0, 1], got {strength}")
        self.strength = strength

    def __call__(self, image: torch.Tensor, target: Target, rng: random.Random) -> tuple[torch.Tensor, Target]:
        if not self.strength:
            return image, target
        pixels = image.float()
        for kind in rng.sample(("brightness", "contrast", "saturation"), 3):
            factor = rng.uniform(1 - self.strength, 1 + self.strength)
            if kind == "brightness":
                pixels = pixels * factor
            else:
                grey = torch.einsum("chw,c->hw", pixels, pixels.new_tensor(_LUMA))
                grey = grey.mean() if kind == "contrast" else grey
                pixels = grey + (pixels - grey) * factor
            pixels = pixels.clamp(0, 255)
        return pixels.round().to(torch.uint8), target


class CentreCrop:
    """The central ``size`` x ``size`` pixels of a picture that is at least as large."""

    def __init__(self, size: int = 224) -> None:
        if size < 1:
            raise ValueError(f"size must be positive, got {size}")
        self.size = size

    def __call__(self, image: torch.Tensor, target: Target, rng: random.Random) -> tuple[torch.Tensor, Target]:
        height, width = image.shape[-2:]
        if min(height, width) < self.size:
            raise ValueError(f"image must be at least {self.size} pixels high and wide, got {height} x {width}")
        y, x = (height - self.size) // 2, (width - self.size) // 2
        return image[:, y : y + self.size, x : x + self.size], target


def training_transform(
    size: int = 224, *, least_area: float = 0.08, jitter: float = 0.4, flip: bool = True
) -> Transform:
    """DetNAS's and SPOS's: a random part of at least ``least_area`` of the picture, mirrored half of the time, with
    jittered colours."""
    steps: list[Any] = [RandomResizedCrop(size, (least_area, 1.0)), *([HorizontalFlip()] if flip else [])]
    return Compose([*steps, ColorJitter(jitter)])


def evaluation_transform(size: int = 224, short: int | None = None) -> Transform:
    """The picture's shorter side scaled to ``short`` (by default 8/7 of ``size``: 256 for 224), and its centre."""
    short = round(size * 8 / 7) if short is None else short
    if short < size:
        raise ValueError(f"short must be at least size = {size}, got {short}")
    return Compose([Resize(short), CentreCrop(size)])
