"""A folder of data, recognised by what lies in it, and its parts by role."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from nasdet.data.base import DetectionDataset, PictureDataset
from nasdet.data.coco import CocoDetection
from nasdet.data.errors import DataError
from nasdet.data.split import Split
from nasdet.data.voc import VocDetection

EXPECTED = (
    "expected a COCO folder (annotations/instances_train*.json with train*/, and the same with val for the test part) "
    "or a VOC folder (JPEGImages/, Annotations/, ImageSets/Main/; inside a VOCdevkit pass VOCdevkit/VOC2012)"
)

D = TypeVar("D", bound=PictureDataset)
F = TypeVar("F", bound="Folder")


@dataclass(frozen=True)
class Folder(Generic[D]):
    """An opened data folder: its data sets, and their parts by role.

    Attributes:
        path: the folder.
        layout: ``"coco"`` or ``"voc"``, or ``"classes"`` for classification.
        trainval: everything annotated for training.
        testset: the folder's own validation or test annotations, or None: then a part of ``trainval`` is held out.
        split: the division in use.
    """

    path: Path
    layout: str
    trainval: D
    testset: D | None
    split: Split

    @property
    def categories(self) -> tuple[str, ...]:
        """Class names by label."""
        return self.trainval.categories

    @property
    def skipped(self) -> dict[str, int]:
        """Reason -> number of dropped records in all parts."""
        counts = dict(self.trainval.skipped)
        for reason, number in (self.testset.skipped if self.testset else {}).items():
            counts[reason] = counts.get(reason, 0) + number
        return counts

    def drawn(self, seed: int) -> Split:
        """A new division of these data; not the one in use."""
        return Split.make(self.trainval, self.testset, seed=seed)

    def divided(self: F, split: Split) -> F:
        """The same data with another division in use. Raises DataError for one that was made for other data."""
        split.check(self)
        other = copy.copy(self)
        object.__setattr__(other, "split", split)
        return other

    def train(self) -> D:
        """All that may be trained on: to train a chosen architecture (role ``"train"``)."""
        return self.trainval.subset(self.split.train, "train", self.split)

    def search_train(self) -> D:
        """The half that trains a supernet's weights (role ``"search-train"``)."""
        return self.trainval.subset(self.split.search_train, "search-train", self.split)

    def search_val(self) -> D:
        """The half that chooses the architecture (role ``"search-val"``)."""
        return self.trainval.subset(self.split.search_val, "search-val", self.split)

    def test(self) -> D:
        """The part for the final number (role ``"test"``); searches refuse it."""
        source = self.trainval if self.testset is None else self.testset
        return source.subset(self.split.test, "test", self.split)


class DataFolder(Folder[DetectionDataset]):
    """An opened folder of detection data; made by :func:`open_data`."""


def open_data(
    path: str | Path, *, split: Split | None = None, seed: int = 0, skip_bad: bool = False, masks: bool = False
) -> DataFolder:
    """Open a COCO or VOC folder.

    COCO: ``annotations/instances_{train,val}*.json``, each with its images in ``{train,val}*/`` (or ``images/{...}/``,
    or ``images/``). VOC: trains on ``trainval`` and tests on ``test`` where the latter is annotated, else on ``train``
    and ``val``, else on ``trainval`` with a part held out.

    Args:
        path: the folder.
        split: a stored division; the folder must be the one it was made for. Without it one is made.
        seed: what a new split is drawn with.
        skip_bad: drop bad records and images, count them in ``skipped``. Decodes every image once, in threads.
        masks: give masks (COCO only).

    Raises:
        DataError: no data folder, or bad data; names the file and the record.
    """
    path = Path(path)
    if not path.is_dir():
        raise DataError("not a data folder", path, detail="a file" if path.is_file() else "no such folder")
    if list((path / "annotations").glob("instances_*.json")):
        layout, (trainval, test) = "coco", _open_coco(path, skip_bad, masks)
    elif (path / "ImageSets" / "Main").is_dir():
        if masks:
            raise DataError("no masks", path, detail="VOC's XML holds boxes only; masks need a COCO folder")
        layout, (trainval, test) = "voc", _open_voc(path, skip_bad)
    else:
        raise DataError("not a data folder", path, detail=EXPECTED)
    if test is not None:
        _require_same_categories(trainval, test)
        _require_apart(trainval, test)
    if split is None:
        split = Split.make(trainval, test, seed=seed)
    folder = DataFolder(path, layout, trainval, test, split)
    split.check(folder)
    for dataset in (trainval, test):
        if dataset is not None:
            dataset.split = split  # whatever is cut from them by hand is still known to hold test images
    return folder


Pair = tuple[DetectionDataset, "DetectionDataset | None"]


def _open_coco(path: Path, skip_bad: bool, masks: bool) -> Pair:
    train, val = _coco_file(path, "train"), _coco_file(path, "val")
    if train is None:
        raise DataError("not a data folder", path, detail="annotations/instances_train*.json is missing")

    def load(file: Path, role: str) -> DetectionDataset:
        return CocoDetection(_coco_images(path, file), file, role=role, masks=masks, skip_bad=skip_bad)

    return load(train, "train"), None if val is None else load(val, "test")


def _coco_file(path: Path, part: str) -> Path | None:
    files = sorted((path / "annotations").glob(f"instances_{part}*.json"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise DataError("ambiguous data folder", path / "annotations", f"instances_{part}*.json", f"{names}: keep one")
    return files[0] if files else None


def _coco_images(path: Path, file: Path) -> Path:
    name = file.stem.removeprefix("instances_")
    candidates = [path / name, path / "images" / name, path / "images"]
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    detail = f"for {file.name}; images/{name} and images/ are missing too"
    raise DataError("missing image folder", path / name, detail=detail)


def _open_voc(path: Path, skip_bad: bool) -> Pair:
    sets = {file.stem for file in (path / "ImageSets" / "Main").glob("*.txt")}
    both = ["trainval"] if "trainval" in sets else ["train", "val"] if {"train", "val"} <= sets else ["train"]
    if "test" in sets and _annotated(path, "test"):
        train, test = both, "test"
    elif {"train", "val"} <= sets:
        train, test = ["train"], "val"
    else:
        train, test = both, None
    trainval = VocDetection(path, train, skip_bad=skip_bad)
    return trainval, None if test is None else VocDetection(path, test, role="test", skip_bad=skip_bad)


def _annotated(path: Path, image_set: str) -> bool:
    """Whether the set's first picture has its XML: VOC 2012 lists its test pictures but keeps their annotations."""
    words = (path / "ImageSets" / "Main" / f"{image_set}.txt").read_text(encoding="utf-8").split()
    return bool(words) and (path / "Annotations" / f"{words[0]}.xml").is_file()


def _require_same_categories(trainval: DetectionDataset, test: DetectionDataset) -> None:
    if (trainval.categories, trainval.category_ids) != (test.categories, test.category_ids):
        odd = sorted(
            set(zip(trainval.category_ids, trainval.categories, strict=True))
            ^ set(zip(test.category_ids, test.categories, strict=True))
        )
        detail = f"differ from those of {trainval.annotation}, first (id, name) {odd[0]}"
        raise DataError("categories differ", test.annotation, "categories", detail)


def _require_apart(trainval: DetectionDataset, test: DetectionDataset) -> None:
    shared = {p.path for p in trainval.pictures} & {p.path for p in test.pictures}
    if shared:
        first = min(shared)
        detail = f"also in {trainval.annotation}: {len(shared)} images would be trained on and tested on"
        raise DataError("test image is a training image", test.annotation, first.name, detail)
