"""Which pictures a run was evaluated on, what is in them, and what was found: read from the run's data folder."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nasdet._files import read_json
from nasdet.report.read import Run, number

_TABLES = ("images", "annotations", "categories")
_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}


@dataclass
class Boxes:
    """The boxes of one picture: ``[x1, y1, x2, y2]`` in pixels, labels into the category list, scores, crowd flags."""

    boxes: list[list[float]]
    labels: list[int]
    scores: list[float]
    crowd: list[bool]


@dataclass
class Picture:
    """One picture of the page: where it is, what is in it, what was found."""

    name: str
    path: Path
    truth: Boxes
    found: Boxes


def choose(run: Run, most: int) -> tuple[list[Picture], list[str], str]:
    """Pictures with ground truth and detections, the category names by label, and, when there are none, why."""
    folder = _data_folder(run)
    if folder is None:
        return [], [], "the data folder of the run cannot be reached from here"
    wanted = {entry["image_id"] for entry in run.detections or []} or _tested(run)
    try:
        best = _annotations(folder, run, wanted)
    except (
        OSError,
        ValueError,
    ) as error:  # the data folder is not the run: what is wrong with it must not cost the page
        return [], [], str(error)
    if best is None:
        return [], [], f"no annotations in {folder} list the evaluated pictures"
    file, content = best
    names = {entry["id"]: str(entry.get("name", entry["id"])) for entry in content["categories"]}
    label = {category: index for index, category in enumerate(sorted(names))}
    truths, founds = defaultdict(list), defaultdict(list)
    for entry in content["annotations"]:
        if isinstance(entry.get("image_id"), int):
            truths[entry["image_id"]].append(entry)
    for entry in run.detections or []:
        founds[entry["image_id"]].append(entry)
    images = _evaluated(run, content["images"], wanted)
    count = min(most, len(images))
    result = []
    for i in range(count):
        entry = images[i * len(images) // count]
        path = _image_file(folder, file, str(entry.get("file_name", "")))
        if path is not None:
            truth, found = (_boxes(rows[entry["id"]], label) for rows in (truths, founds))
            result.append(Picture(str(entry["file_name"]), path, truth, found))
    why = "" if result else f"the picture files named in {file} are not in {folder}"
    return result, [names[category] for category in sorted(names)], why


def _data_folder(run: Run) -> Path | None:
    arguments = run.info.get("arguments")
    named = run.info.get("data") or (arguments.get("data") if isinstance(arguments, dict) else None)
    if isinstance(named, dict):
        named = named.get("path") or named.get("folder")
    if not isinstance(named, str):
        return None
    for folder in (Path(named), run.path / named, run.path.parent / named):
        if folder.is_dir():
            return folder
    return None


def _annotations(folder: Path, run: Run, wanted: set[Any]) -> tuple[Path, dict[str, Any]] | None:
    """The annotations that list the most evaluated pictures; ids of two files may collide: the likeliest is first."""
    best: tuple[int, Path, dict[str, Any]] | None = None
    for file, content in _contents(folder, (run.split or {}).get("test_source")):
        if not isinstance(content, dict) or not all(_objects(content.get(key)) for key in _TABLES):
            continue
        if not all(isinstance(entry.get("id"), int) for key in ("images", "categories") for entry in content[key]):
            continue
        hits = len(wanted & {entry["id"] for entry in content["images"]})
        if hits and (best is None or hits > best[0]):
            best = (hits, file, content)
        if hits == len(wanted):
            break
    return best[1:] if best else None


def _contents(folder: Path, test_source: Any) -> Iterator[tuple[Path, Any]]:
    """Annotations of a COCO or VOC folder: first the file that the split's test part came from, then test and val."""
    if (folder / "ImageSets" / "Main").is_dir():
        from nasdet.data.folder import open_data

        opened = open_data(folder)
        for part in (opened.testset, opened.trainval):
            if part is not None:
                yield Path(part.annotation), part.ground_truth()
        return
    files = [*folder.glob("annotations/*.json"), *folder.glob("*.json")]
    files.sort(key=lambda file: (not any(word in file.stem.lower() for word in ("test", "val")), file.name))
    if isinstance(test_source, str):
        files.sort(key=lambda file: hashlib.sha256(file.read_bytes()).hexdigest() != test_source)
    for file in files:
        yield file, read_json(file)


def _objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _evaluated(run: Run, images: list[dict[str, Any]], wanted: set[Any]) -> list[dict[str, Any]]:
    """The evaluated pictures in the order of their ids: those of the stored test split, else those with a detection."""
    tested = _tested(run)
    ids = tested if wanted <= tested else wanted
    return sorted((entry for entry in images if entry["id"] in ids), key=lambda entry: entry["id"])


def _tested(run: Run) -> set[int]:
    """The image ids of the stored split's test part."""
    ids = (run.split or {}).get("test")
    return {i for i in ids if isinstance(i, int)} if isinstance(ids, list) else set()


def _image_file(folder: Path, annotations: Path, name: str) -> Path | None:
    stem = annotations.stem.removeprefix("instances_")
    if not name:
        return None
    inside = folder.resolve()
    others = sorted(child for child in folder.iterdir() if child.is_dir())
    for parent in (folder / stem, folder / "images" / stem, folder / "images", folder / "JPEGImages", folder, *others):
        place = parent / name
        # A file name from an annotation file must not reach out of the data folder.
        if place.suffix.lower() in _SUFFIXES and place.is_file() and place.resolve().is_relative_to(inside):
            return place
    return None


def _boxes(rows: Sequence[dict[str, Any]], label: dict[Any, int]) -> Boxes:
    result = Boxes([], [], [], [])
    for row in rows:
        box = row.get("bbox")
        if not isinstance(box, list) or len(box) != 4 or any(number(v) is None for v in box):
            continue
        if not isinstance(row.get("category_id"), int) or row["category_id"] not in label:
            continue
        x, y, width, height = (float(value) for value in box)
        result.boxes.append([x, y, x + width, y + height])
        result.labels.append(label[row["category_id"]])
        result.scores.append(number(row.get("score", 1.0)) or 0.0)
        result.crowd.append(bool(row.get("iscrowd", 0)))
    return result
