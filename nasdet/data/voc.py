"""PASCAL VOC: one XML file per picture."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from xml.etree import ElementTree

from nasdet.data.base import DetectionDataset
from nasdet.data.errors import DataError, Problems
from nasdet.data.pictures import SUFFIXES, Box, Picture, check_box, check_size

VOC_CATEGORIES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


class VocDetection(DetectionDataset):
    """A data set in the format of PASCAL VOC (Everingham et al., 2010), of any year.

    A box of VOC counts pixels from 1 and includes its last one; here it becomes ``x = xmin - 1`` and ``width = xmax -
    xmin + 1``. Objects marked ``difficult`` get ``iscrowd=True``: detectors do not train on them and COCO evaluation
    neither rewards nor punishes finding them, which is VOC's own rule (COCO matches a crowd by intersection over the
    detection's area rather than by IoU, so slightly more detections are forgiven). Image ids: the digits of VOC's own
    names (``2008_000008`` -> 2008000008), else 52 bits of the name's SHA-256.

    Args:
        root: folder with ``JPEGImages/``, ``Annotations/`` and ``ImageSets/Main/`` (``VOCdevkit/VOC2012``).
        image_set: name of a file in ``ImageSets/Main`` without ``.txt``, or several, read one after the other.
        categories: class names by label; VOC's 20 unless given, or the lines of ``root/classes.txt`` where it exists.
        keep_difficult: False drops difficult objects altogether.
        image_ids, role, skip_bad: see :class:`~nasdet.data.coco.CocoDetection`.

    Raises:
        DataError: names the file and the record.
    """

    def __init__(
        self,
        root: str | Path,
        image_set: str | Sequence[str] = "trainval",
        *,
        categories: Sequence[str] | None = None,
        keep_difficult: bool = True,
        image_ids: Collection[int] | None = None,
        role: str = "train",
        skip_bad: bool = False,
    ) -> None:
        root, problems = Path(root), Problems(skip_bad)
        sets = [image_set] if isinstance(image_set, str) else list(image_set)
        names = tuple(categories) if categories is not None else _class_names(root)
        label_of = {name: label for label, name in enumerate(names)}
        images = sorted((root / "JPEGImages").glob("*"))
        files = {path.stem: path for path in images if path.suffix.lower() in SUFFIXES}
        digest = hashlib.sha256("\n".join(names).encode())
        pictures = []
        for stem in _stems(root, sets):
            annotation = root / "Annotations" / f"{stem}.xml"
            try:
                content = _read(annotation)
                digest.update(f"\n{stem} {hashlib.sha256(content).hexdigest()}".encode())
                image = files.get(stem, root / "JPEGImages" / f"{stem}.jpg")
                pictures.append(_picture(annotation, content, image, label_of, keep_difficult, problems))
            except DataError as error:
                problems.found(error)
        super().__init__(
            pictures,
            names,
            range(1, len(names) + 1),
            annotation=root / "ImageSets" / "Main" / f"{sets[0]}.txt",
            source=digest.hexdigest(),
            role=role,
            image_ids=image_ids,
            problems=problems,
        )


def voc_image_id(stem: str) -> int:
    """The integer id of a picture from its name: VOC's digits, else 52 bits of a hash (exact in JSON's doubles)."""
    if re.fullmatch(r"\d{1,9}|\d{4}_\d{1,6}", stem):
        return int(stem.replace("_", ""))
    return int(hashlib.sha256(stem.encode()).hexdigest()[:13], 16)


def _class_names(root: Path) -> tuple[str, ...]:
    file = root / "classes.txt"
    if not file.is_file():
        return VOC_CATEGORIES
    names = tuple(line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    if not names or len(set(names)) != len(names):
        raise DataError("bad category name", file, detail="must hold one class name per line, each once")
    return names


def _stems(root: Path, sets: Sequence[str]) -> list[str]:
    """Picture names of the image sets, in order."""
    stems = []
    for name in sets:
        file = root / "ImageSets" / "Main" / f"{name}.txt"
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError("missing or unreadable image set", file) from error
        stems += [line.split()[0] for line in lines if line.strip()]
    return stems


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError("missing annotation file", file) from error


def _picture(
    file: Path, content: bytes, image: Path, label_of: dict[str, int], keep_difficult: bool, problems: Problems
) -> Picture:
    try:
        tree = ElementTree.fromstring(content)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise DataError("malformed XML", file, detail=str(error)) from error
    height, width = (_number(tree, f"size/{name}", file, "size") for name in ("height", "width"))
    size = check_size(int(height), int(width), file, "size")
    boxes = []
    for position, node in enumerate(tree.findall("object")):
        try:
            box = _box(node, file, f"object {position}", size, label_of)
            if keep_difficult or not box.iscrowd:
                boxes.append(box)
        except DataError as error:
            problems.found(error)
    return Picture(voc_image_id(file.stem), image, size, file, boxes)


def _box(node: ElementTree.Element, file: Path, record: str, size: tuple[int, int], label_of: dict[str, int]) -> Box:
    name = (node.findtext("name") or "").strip()
    if not name:
        raise DataError("missing key", file, record, "'name'")
    record = f"{record} ({name})"
    if name not in label_of:
        raise DataError("unknown category", file, record, f"{name!r} is not among the {len(label_of)} categories")
    x1, y1, x2, y2 = (_number(node, f"bndbox/{key}", file, record) for key in ("xmin", "ymin", "xmax", "ymax"))
    box = check_box((x1 - 1, y1 - 1, x2 - x1 + 1, y2 - y1 + 1), size, file, record)
    return Box(label_of[name], box, box[2] * box[3], (node.findtext("difficult") or "0").strip() == "1")


def _number(node: ElementTree.Element, path: str, file: Path, record: str) -> float:
    text = node.findtext(path)
    if text is None:
        raise DataError("missing key", file, record, repr(path))
    try:
        number = float(text)
    except ValueError as error:
        raise DataError("bad value", file, record, f"{path} must be a number, got {text!r}") from error
    if number != number or number in (float("inf"), float("-inf")):
        raise DataError("bad value", file, record, f"{path} must be finite, got {text!r}")
    return number
