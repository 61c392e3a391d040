"""COCO instance annotations: one JSON file, one folder of images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from nasdet.data.base import DetectionDataset
from nasdet.data.errors import DataError, Problems
from nasdet.data.pictures import (
    Box,
    Picture,
    check_area,
    check_box,
    check_integer,
    check_segmentation,
    check_size,
)


class CocoDetection(DetectionDataset):
    """A data set in COCO's instance format (Lin et al., 2014).

    Labels number the file's categories in the order of their ids. Crowds keep ``iscrowd=True``; pictures without
    objects are kept. The annotation is checked here, pixels when they are read.

    Args:
        images_dir: folder that ``file_name`` is relative to.
        annotation_file: the JSON file.
        image_ids: keep only these images.
        role: see :class:`~nasdet.data.base.DetectionDataset`.
        masks: give masks; every object must then have a segmentation (polygons, compressed or uncompressed RLE).
        skip_bad: drop bad records and go on; counts are in ``skipped``. A malformed file stays an error. Decodes every
            image once.

    Raises:
        DataError: names the file and the record.
    """

    def __init__(
        self,
        images_dir: str | Path,
        annotation_file: str | Path,
        *,
        image_ids: Collection[int] | None = None,
        role: str = "train",
        masks: bool = False,
        skip_bad: bool = False,
    ) -> None:
        file, problems = Path(annotation_file), Problems(skip_bad)
        document, source = _read(file)
        label_of, names = _categories(file, document)
        images = _images(file, document, problems)
        boxes = _boxes(file, document, images, label_of, masks, problems)
        pictures = [
            Picture(image_id, Path(images_dir) / name, size, file, boxes.get(number, ()), keep_segmentations=masks)
            for number, (image_id, name, size) in enumerate(images)
        ]
        super().__init__(
            pictures,
            names,
            list(label_of),
            annotation=file,
            source=source,
            role=role,
            masks=masks,
            image_ids=image_ids,
            problems=problems,
        )


def _read(file: Path) -> tuple[dict[str, Any], str]:
    """The parsed file and the SHA-256 of its bytes."""
    try:
        content = file.read_bytes()
        document = json.loads(content)
    except FileNotFoundError as error:
        raise DataError("missing annotation file", file) from error
    except OSError as error:
        raise DataError("unreadable annotation file", file, detail=str(error.strerror)) from error
    except (ValueError, RecursionError) as error:  # also of Python's limits: of digits in a number, of depth
        raise DataError("malformed JSON", file, detail=str(error)) from error
    if not isinstance(document, dict):
        raise DataError("malformed JSON", file, "top level", f"must be an object, got {type(document).__name__}")
    for key in ("images", "annotations", "categories"):
        if key not in document:
            raise DataError("missing key", file, "top level", repr(key))
        if not isinstance(document[key], list):
            raise DataError("bad value", file, "top level", f"{key!r} must be a list")
    return document, hashlib.sha256(content).hexdigest()


def _records(
    file: Path, document: dict[str, Any], kind: str, keys: tuple[str, ...], problems: Problems
) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """``(record name, id, record)`` of every well-formed record of ``images``, ``annotations`` or ``categories``."""
    plural = {"image": "images", "annotation": "annotations", "category": "categories"}[kind]
    for position, record in enumerate(document[plural]):
        name = f"{kind} at position {position}"
        try:
            if not isinstance(record, dict):
                raise DataError("bad value", file, name, f"must be an object, got {type(record).__name__}")
            if "id" not in record:
                raise DataError("missing key", file, name, "'id'")
            record_id = check_integer(record["id"], "id", file, name)
            name = f"{kind} {record_id}"
            for key in keys:
                if key not in record:
                    raise DataError("missing key", file, name, repr(key))
        except DataError as error:
            problems.found(error)
        else:
            yield name, record_id, record


def _categories(file: Path, document: dict[str, Any]) -> tuple[dict[int, int], list[str]]:
    """Label by category id (in the order of ids) and names by label. Never skipped: labels would shift."""
    names: dict[int, str] = {}
    for name, category_id, record in _records(file, document, "category", ("name",), Problems()):
        if category_id in names:
            raise DataError("duplicate category id", file, name, f"{names[category_id]!r} and {record['name']!r}")
        if not isinstance(record["name"], str) or record["name"] in names.values():
            raise DataError("bad category name", file, name, f"must be a string of its own, got {record['name']!r}")
        names[category_id] = record["name"]
    if not names:
        raise DataError("empty data set", file, "categories", "no category")
    ids = sorted(names)
    return {category_id: label for label, category_id in enumerate(ids)}, [names[category_id] for category_id in ids]


def _images(file: Path, document: dict[str, Any], problems: Problems) -> list[tuple[int, str, tuple[int, int]]]:
    """``(id, file name, (height, width))`` of every usable image record; duplicates are the base class's to judge."""
    images = []
    for name, image_id, record in _records(file, document, "image", ("file_name", "height", "width"), problems):
        try:
            file_name = record["file_name"]
            if not isinstance(file_name, str) or not file_name:
                raise DataError("bad value", file, name, f"file_name must be a string, got {file_name!r}")
            if PurePosixPath(file_name).is_absolute() or ".." in PurePosixPath(file_name).parts:
                raise DataError("bad value", file, name, f"file_name must stay in the image folder, got {file_name!r}")
            images.append((image_id, file_name, check_size(record["height"], record["width"], file, name)))
        except DataError as error:
            problems.found(error)
    return images


def _boxes(
    file: Path,
    document: dict[str, Any],
    images: list[tuple[int, str, tuple[int, int]]],
    label_of: dict[int, int],
    masks: bool,
    problems: Problems,
) -> dict[int, list[Box]]:
    """Checked objects by position of their image in ``images`` (the first of its id)."""
    position: dict[int, int] = {}
    for number, (image_id, _, _) in enumerate(images):
        position.setdefault(image_id, number)
    named = [record.get("id") for record in document["images"] if isinstance(record, dict)]
    known = {image_id for image_id in named if isinstance(image_id, int)}
    seen: set[int] = set()
    boxes: dict[int, list[Box]] = {}
    keys = ("image_id", "category_id", "bbox")
    for name, annotation_id, record in _records(file, document, "annotation", keys, problems):
        try:
            if annotation_id in seen:
                raise DataError("duplicate annotation id", file, name)
            seen.add(annotation_id)
            image_id = check_integer(record["image_id"], "image_id", file, name)
            if image_id not in position:
                if image_id in known:  # its image was dropped and counted: this is no second problem
                    continue
                raise DataError("unknown image", file, name, f"image_id {image_id} is not among the images")
            number = position[image_id]
            name = f"{name} of image {image_id}"
            boxes.setdefault(number, []).append(_box(file, name, record, images[number][2], label_of, masks))
        except DataError as error:
            problems.found(error)
    return boxes


def _box(
    file: Path, name: str, record: dict[str, Any], size: tuple[int, int], label_of: dict[int, int], masks: bool
) -> Box:
    category_id = check_integer(record["category_id"], "category_id", file, name)
    if category_id not in label_of:
        raise DataError("unknown category", file, name, f"category_id {category_id} is not among the categories")
    x, y, width, height = check_box(record["bbox"], size, file, name)
    area = check_area(record.get("area", width * height), file, name)
    iscrowd = record.get("iscrowd", 0)
    if iscrowd not in (0, 1):
        raise DataError("bad value", file, name, f"iscrowd must be 0 or 1, got {iscrowd!r}")
    segmentation = None
    if masks:
        if "segmentation" not in record:
            raise DataError("missing key", file, name, "'segmentation' (masks were asked for)")
        segmentation = check_segmentation(record["segmentation"], size, file, name)
    return Box(label_of[category_id], (x, y, width, height), area, bool(iscrowd), segmentation)
