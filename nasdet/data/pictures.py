"""One annotated picture: reading its pixels, checking its boxes, decoding its masks. What every data set shares."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from os import cpu_count, listdir
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from nasdet.data.errors import DataError, Problems

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp"}
"""Endings of image files, in lower case, where a folder has to be searched for them."""

MIN_SHARE_INSIDE = 0.5
"""A box that sticks out of its picture is clipped when at least this share of its area is inside, else refused."""


@dataclass(frozen=True, slots=True)
class Box:
    """One checked object of a picture.

    ``xywh`` is the box as the file has it (pixels, x and y of the top left corner, unclipped), ``area`` the area that
    COCO's small / medium / large is measured by (the mask's where there is one), ``segmentation`` COCO polygons or RLE.
    """

    label: int
    xywh: tuple[float, float, float, float]
    area: float
    iscrowd: bool = False
    segmentation: Any = None


class Picture:
    """One picture and its objects, in arrays, so that a large data set stays small in memory.

    Args:
        image_id: the integer that names it in ground truth and results.
        path: image file.
        size: ``(height, width)`` in pixels, as the annotation says.
        annotation: file that describes it, for error messages.
        boxes: its objects; none is allowed.
        keep_segmentations: keep what masks are made from.
    """

    __slots__ = ("image_id", "path", "size", "annotation", "xywh", "labels", "area", "iscrowd", "segmentations")

    def __init__(
        self,
        image_id: int,
        path: Path,
        size: tuple[int, int],
        annotation: Path,
        boxes: Sequence[Box] = (),
        keep_segmentations: bool = False,
    ) -> None:
        self.image_id, self.path, self.size, self.annotation = image_id, path, size, annotation
        self.xywh = np.array([box.xywh for box in boxes], dtype=np.float64).reshape(-1, 4)
        self.labels = np.array([box.label for box in boxes], dtype=np.int64)
        self.area = np.array([box.area for box in boxes], dtype=np.float64)
        self.iscrowd = np.array([box.iscrowd for box in boxes], dtype=bool)
        self.segmentations = [box.segmentation for box in boxes] if keep_segmentations else None

    @property
    def record(self) -> str:
        """How error messages call it."""
        return f"image {self.image_id} ({self.path.name})"

    def target(self, masks: bool = False) -> dict[str, Any]:
        """The training target: boxes as corners, clipped to the picture; masks as bool ``[N, H, W]`` when asked for."""
        target: dict[str, Any] = {
            "boxes": torch.from_numpy(_clipped(self.xywh, self.size)),
            "labels": torch.from_numpy(self.labels.copy()),
            "iscrowd": torch.from_numpy(self.iscrowd.copy()),
            "area": torch.from_numpy(self.area.astype(np.float32)),
            "image_id": self.image_id,
            "size": self.size,
        }
        if masks:
            target["masks"] = decode_masks(self.segmentations or [], self.size, self.annotation, self.record)
        return target


def _clipped(xywh: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """``[N, 4]`` boxes (x, y, w, h) as float32 corners inside a picture of ``(height, width)``."""
    corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
    return np.clip(corners, 0.0, np.array([size[1], size[0]] * 2, dtype=np.float64)).astype(np.float32)


def check_box(bbox: Any, size: tuple[int, int], file: Path, record: str) -> tuple[float, float, float, float]:
    """Check ``bbox = [x, y, width, height]`` (pixels) against a picture of ``(height, width)``; returns it as floats.

    A box that sticks out is accepted, and clipped in targets, when at least half of its area is inside: annotation
    tools round outwards. Less than that is a box of another picture or another scale.

    Raises:
        DataError: not four finite numbers (``bad box``), ``box without area``, ``box outside the image``.
    """
    numbers = isinstance(bbox, (list, tuple)) and len(bbox) == 4 and all(_is_number(value) for value in bbox)
    if not numbers:
        detail = f"bbox must be [x, y, width, height], four finite numbers, got {bbox!r}"
        raise DataError("bad box", file, record, detail)
    x, y, width, height = (float(value) for value in bbox)
    if width <= 0 or height <= 0:
        raise DataError("box without area", file, record, f"bbox is {list(bbox)!r} ([x, y, width, height])")
    inside_x = min(x + width, size[1]) - max(x, 0.0)
    inside_y = min(y + height, size[0]) - max(y, 0.0)
    overlaps = inside_x > 0 and inside_y > 0
    if not overlaps or inside_x * inside_y < MIN_SHARE_INSIDE * width * height:
        detail = f"bbox is {list(bbox)!r}, the image is {size[1]}x{size[0]} (width x height)"
        partly = "; less than half of the box is inside" if overlaps else ""
        raise DataError("box outside the image", file, record, detail + partly)
    if min(inside_x, inside_y) < 0.01:  # so thin that float32 corners may coincide
        x1, y1, x2, y2 = _clipped(np.array([[x, y, width, height]]), size)[0]
        if x2 <= x1 or y2 <= y1:
            raise DataError("box without area", file, record, f"bbox is {list(bbox)!r}: nothing is left in float32")
    return x, y, width, height


def check_area(area: Any, file: Path, record: str) -> float:
    """Check an object's area in pixels: a finite number, not negative."""
    if not _is_number(area) or area < 0:
        raise DataError("bad area", file, record, f"area must be a finite number >= 0, got {area!r}")
    return float(area)


def check_integer(value: Any, name: str, file: Path, record: str) -> int:
    """Check an id or a count: an integer (a bool or a string is none)."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError("bad value", file, record, f"{name} must be an integer, got {value!r}")
    return value


def check_size(height: Any, width: Any, file: Path, record: str) -> tuple[int, int]:
    """Check a picture's ``(height, width)``: positive integers."""
    height, width = check_integer(height, "height", file, record), check_integer(width, "width", file, record)
    if height < 1 or width < 1:
        raise DataError("bad value", file, record, f"width and height must be positive, got {width}x{height}")
    return height, width


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of float
        return False


def check_segmentation(segmentation: Any, size: tuple[int, int], file: Path, record: str) -> Any:
    """Check COCO polygons (lists of at least 3 points) or RLE (``{"size": [h, w], "counts": list or string}``)."""

    def bad(detail: str) -> DataError:
        return DataError("bad segmentation", file, record, detail)

    if isinstance(segmentation, list):
        if not segmentation:
            raise bad("segmentation has no polygon")
        reach = 2 * max(size)  # beyond it no box of this picture would have passed, and rasterising would take for ever
        for polygon in segmentation:
            points = isinstance(polygon, list) and len(polygon) >= 6 and len(polygon) % 2 == 0
            if not points or not all(_is_number(value) and abs(value) <= reach for value in polygon):
                raise bad("a polygon must be [x1, y1, x2, y2, ...], numbers near the image, at least three points")
        return segmentation
    if not isinstance(segmentation, dict) or not {"size", "counts"} <= segmentation.keys():
        raise bad("segmentation must be a list of polygons or an RLE object with size and counts")
    if segmentation["size"] != list(size):
        raise bad(f"RLE size must be [height, width] = {list(size)}, got {segmentation['size']!r}")
    counts = segmentation["counts"]
    runs = _runs(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        raise bad("RLE counts must be integers >= 0, or their compressed string")
    if sum(runs) != size[0] * size[1]:  # pycocotools would leave the rest of the mask to chance
        raise bad(f"RLE counts must sum to height x width = {size[0] * size[1]}, got {sum(runs)}")
    return segmentation


def _runs(counts: str) -> list[int] | None:
    """The run lengths of COCO's compressed RLE, or None where it is malformed.

    Each number is little-endian in 5-bit groups, one character from "0" on for each, bit 5 saying that more follow;
    from the fourth on it is the difference to the number two before.
    """
    runs: list[int] = []
    value = shift = 0
    for character in counts:
        code = ord(character) - 48
        if not 0 <= code < 64 or shift > 30:
            return None
        value |= (code & 31) << shift
        shift += 5
        if not code & 32:
            value -= (code & 16) << (shift - 4)  # the last group's top bit is the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return None if shift else runs


def decode_masks(segmentations: Sequence[Any], size: tuple[int, int], file: Path, record: str) -> torch.Tensor:
    """COCO segmentations as a bool tensor ``[N, H, W]`` for a picture of ``(H, W)``, rasterised by pycocotools."""
    from pycocotools import mask as coco_mask

    masks = np.zeros((len(segmentations), *size), dtype=bool)
    for index, segmentation in enumerate(segmentations):
        try:
            if isinstance(segmentation, list):
                rle = coco_mask.merge(coco_mask.frPyObjects(segmentation, *size))
            elif isinstance(segmentation["counts"], list):
                rle = coco_mask.frPyObjects(segmentation, *size)
            else:
                rle = segmentation
            masks[index] = coco_mask.decode(rle)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise DataError("bad segmentation", file, f"{record}, object {index}", str(error)) from error
    return torch.from_numpy(masks)


def read_image(path: str | Path, record: str = "") -> torch.Tensor:
    """Read an image file as uint8 RGB ``[3, H, W]`` (channels last in memory), whatever its mode of 8 or 16 bits.

    Pixels come as stored: an EXIF orientation is not applied, because annotations are drawn on the stored pixels.

    Raises:
        DataError: the file is missing, truncated or no image, or its pixels have 32 bits, whose scale no file says.
    """
    from PIL import Image

    try:
        with Image.open(path) as file:
            if file.mode.startswith("I;16"):  # Pillow would clip 16-bit grey at 255 instead of scaling it
                pixels = np.repeat((np.asarray(file).astype(np.uint16) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
            elif file.mode in ("I", "F"):  # Pillow would clip at 0 and 255 what may run to 1 or to 65535
                raise ValueError(f"pixels must have 8 or 16 bits, got 32 (Pillow's mode {file.mode})")
            else:
                pixels = np.array(file.convert("RGB"))
    except FileNotFoundError as error:
        raise DataError("missing image", path, record) from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, Image.DecompressionBombError) as error:
        raise DataError("truncated or unreadable image", path, record, _without_path(error, path)) from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _without_path(error: Exception, path: str | Path) -> str:
    """Pillow's words, without the path that the message already begins with."""
    name = repr(str(path))
    return str(error).replace(f"file {name}", "file").replace(name, "the file")


def read_picture(picture: Picture) -> torch.Tensor:
    """The pixels of ``picture``; a size other than the annotation's is refused, as its boxes would be wrong."""
    image = read_image(picture.path, picture.record)
    height, width = image.shape[-2:]
    if (height, width) != tuple(picture.size):
        detail = f"the file is {width}x{height}, its annotation says {picture.size[1]}x{picture.size[0]}"
        raise DataError("image size mismatch", picture.path, picture.record, detail)
    return image


def existing(pictures: Sequence[Picture], problems: Problems) -> list[Picture]:
    """The pictures whose files exist. Lists each folder once: 100,000 single look-ups are slow on network disks."""
    folders: dict[Path, set[str]] = {}
    kept = []
    for picture in pictures:
        folder = picture.path.parent
        if folder not in folders:
            folders[folder] = set(listdir(folder)) if folder.is_dir() else set()
        if picture.path.name in folders[folder]:
            kept.append(picture)
        else:
            problems.found(DataError("missing image", picture.path, picture.record, f"named in {picture.annotation}"))
    return kept


def readable(pictures: Sequence[Picture], problems: Problems, masks: bool = False) -> list[Picture]:
    """Decode every picture (and its masks when ``masks``), in threads, and return those that decode."""

    def decode(picture: Picture) -> None:
        read_picture(picture)
        if masks:
            picture.target(masks=True)

    return those_that(decode, pictures, problems)


P = TypeVar("P")


def those_that(decode: Callable[[P], Any], pictures: Sequence[P], problems: Problems) -> list[P]:
    """The pictures that ``decode`` raises no :class:`DataError` for, tried in threads; errors go to ``problems``."""
    from tqdm import tqdm

    def attempt(picture: P) -> DataError | None:
        try:
            decode(picture)
        except DataError as error:
            return error
        return None

    kept = []
    with ThreadPoolExecutor(min(8, cpu_count() or 1)) as pool:
        errors = pool.map(attempt, pictures)
        shown = tqdm(errors, total=len(pictures), desc="checking images", unit="image", disable=None)
        for picture, error in zip(pictures, shown, strict=True):
            if error is None:
                kept.append(picture)
            else:
                problems.found(error)
    return kept
