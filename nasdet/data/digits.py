"""``digits``: a small real detection set, made on the spot from what scikit-learn ships.

Handwritten digits (1,797 real 8x8 scans of the UCI optical recognition set), drawn in random ink over crops of two
photographs. Ten classes, objects of 10 to 100 pixels, boxes and masks tight to the visible ink.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RECIPE = "digits.json"
RECIPE_VERSION = 1
MIN_SIDE, MAX_SIDE = 12, 100  # of a digit's ink, in pixels; hiding takes at most a little from the lower end
EMPTY_SHARE = 0.04  # of the pictures have no digit
MAX_HIDDEN = 0.1  # of a digit's ink may lie under digits drawn later
TRAIN_SHARE = 0.7  # of the scans of each class; the others are only in val
TRAIN_COLUMNS = 0.6  # share of each photograph, from the left, that train crops come from; val crops from the rest
MIN_CONTRAST = 70.0  # of 255, between the ink and what it covers
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


def write_digits(
    out: str | Path, *, seed: int = 0, train: int = 400, val: int = 200, size: tuple[int, int] = (192, 256)
) -> Path:
    """Write the ``digits`` data set as a COCO folder: ``annotations/instances_{train,val}.json``, ``train/``, ``val/``.

    Train and val share neither a scan nor a part of a photograph. The same arguments and library versions give the same
    bytes; picture i does not depend on how many there are. Everything is written to a hidden folder beside ``out`` and
    renamed when complete, so ``out`` is never half there; a killed process leaves only ``.{name}.*.partial``, which may
    be deleted.

    Args:
        out: folder to make. If it is not empty it must be a complete set made with the same arguments, which is then
            left as it is; ``digits.json`` in it holds arguments and a SHA-256 over all files.
        seed: of everything random.
        train, val: number of pictures, each at least 1.
        size: ``(height, width)`` in pixels, each from 64 to 2048.

    Raises:
        FileExistsError: ``out`` holds something else.
        ValueError: an argument out of range.
    """
    settings = check_settings(seed, train, val, size, least=64)
    return write_whole(Path(out), settings, _write)


def check_settings(seed: int, train: int, val: int, size: tuple[int, int], least: int) -> dict[str, Any]:
    """The arguments of a set as plain data, or ``ValueError``; ``size`` is of ``least`` pixels or more."""
    if min(train, val) < 1:
        raise ValueError(f"train and val must be at least 1, got {train} and {val}")
    if not all(least <= length <= 2048 for length in size):
        raise ValueError(f"size must be (height, width), each from {least} to 2048, got {tuple(size)}")
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    return {"seed": seed, "train": train, "val": val, "size": list(size)}


def write_whole(out: Path, settings: Mapping[str, Any], write: Callable[[Path, Mapping[str, Any]], Any]) -> Path:
    """Have ``write(folder, settings)`` make a set beside ``out``, add its recipe, and give it the name ``out``."""
    if _already_there(out, settings):
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        write(partial, settings)
        recipe = {"recipe": "nasdet digits", "version": RECIPE_VERSION, "settings": settings}
        text = json.dumps(recipe | {"sha256": _digest(partial)}, indent=1) + "\n"
        (partial / RECIPE).write_text(text, encoding="utf-8")
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o777 & ~umask)  # mkdtemp made it private
        try:
            os.rename(partial, out)
        except OSError:
            if not _already_there(out, settings):  # another process may have finished the same set first
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def _already_there(out: Path, settings: Mapping[str, Any]) -> bool:
    """Whether ``out`` is this very set, complete; False when it is absent or empty.

    Raises:
        FileExistsError: it is anything else.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    if not out.is_dir():
        raise FileExistsError(f"{out} is a file; name a folder to make")
    advice = "name another folder, or delete this one"
    try:
        recipe = json.loads((out / RECIPE).read_text(encoding="utf-8"))
        made_with, digest = recipe["settings"], recipe["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        raise FileExistsError(f"{out} is not empty and holds no digits data set; {advice}") from None
    if made_with != settings or recipe.get("version") != RECIPE_VERSION:
        raise FileExistsError(f"{out} holds digits made with other settings ({made_with}, now {settings}); {advice}")
    if digest != _digest(out):
        raise FileExistsError(f"{out} holds digits whose files were changed since they were made; {advice}")
    return True


def _digest(folder: Path) -> str:
    """SHA-256 over the names and contents of all files of the set, its recipe aside."""
    digest = hashlib.sha256()
    for part in ("annotations", "train", "val"):
        for file in sorted(path for path in (folder / part).rglob("*") if path.is_file()):
            name = file.relative_to(folder).as_posix()
            digest.update(f"{name} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _write(folder: Path, settings: Mapping[str, Any]) -> None:
    from PIL import Image
    from tqdm import tqdm

    height, width = settings["size"]
    source = Source.load(settings["seed"])
    (folder / "annotations").mkdir()
    first_id = 1
    with tqdm(total=settings["train"] + settings["val"], desc="digits", unit="image", disable=None) as progress:
        for part in ("train", "val"):
            (folder / part).mkdir()
            images: list[dict[str, Any]] = []
            annotations: list[dict[str, Any]] = []
            for index in range(settings[part]):
                rng = np.random.default_rng([settings["seed"], part == "val", index])
                empty_share = EMPTY_SHARE if index else 0.0  # never the first: a set without objects is refused
                pixels, objects = draw_picture(source, part, (height, width), rng, empty_share)
                image_id, name = first_id + index, f"{first_id + index:06d}.jpg"
                Image.fromarray(pixels).save(folder / part / name, quality=95, subsampling=0)
                images.append({"id": image_id, "file_name": name, "height": height, "width": width})
                for item in objects:
                    annotations.append({"id": len(annotations) + 1, "image_id": image_id, **item})
                progress.update()
            first_id += settings[part]
            categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
            document = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
            path = folder / "annotations" / f"instances_{part}.json"
            path.write_text(json.dumps(document, separators=(",", ":")) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class Source:
    """What pictures are made of: ``scans[part][digit]`` float32 ``[n, 8, 8]`` in 0..1, photographs uint8 [H, W, 3]."""

    scans: dict[str, list[np.ndarray]]
    photographs: list[np.ndarray]

    @classmethod
    def load(cls, seed: int) -> Source:
        try:
            from sklearn.datasets import load_digits, load_sample_images
        except ImportError as error:
            raise ImportError("the digits data set needs scikit-learn: pip install scikit-learn") from error
        data = load_digits()
        rng = np.random.default_rng([seed, 2])
        scans: dict[str, list[np.ndarray]] = {"train": [], "val": []}
        for digit in range(10):
            chosen = rng.permutation(np.flatnonzero(data.target == digit))
            cut = round(TRAIN_SHARE * len(chosen))
            for part, indices in (("train", chosen[:cut]), ("val", chosen[cut:])):
                scans[part].append((data.images[indices] / 16.0).astype(np.float32))
        return cls(scans, [np.asarray(image) for image in load_sample_images().images])


def draw_picture(
    source: Source, part: str, size: tuple[int, int], rng: np.random.Generator, empty_share: float = 0.0
) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """One picture uint8 ``[H, W, 3]`` and its objects as COCO annotations without ids."""
    canvas = background(source, part, size, rng)
    wanted = 0 if rng.random() < empty_share else int(rng.integers(1, 9))
    owner = np.zeros(size, dtype=np.uint8)  # 1 + number of the digit whose ink is on top
    labels: list[int] = []
    inks: list[int] = []  # pixels of each before anything covers it
    for _ in range(wanted):
        digit = int(rng.integers(10))
        pool = source.scans[part][digit]
        alpha = glyph(pool[rng.integers(len(pool))], _side(size, rng), rng.uniform(-15, 15))
        place = _place(alpha > 0.5, owner, inks, rng)
        if place is None:
            continue
        y, x = place
        window = (slice(y, y + alpha.shape[0]), slice(x, x + alpha.shape[1]))
        paint(canvas[window], alpha, rng)
        labels.append(digit)
        inks.append(int((alpha > 0.5).sum()))
        owner[window][alpha > 0.5] = len(labels)
    objects = [_annotation(owner == number + 1, digit) for number, digit in enumerate(labels)]
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8), objects


def background(source: Source, part: str, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """A crop of a photograph, scaled to ``size``, mirrored and with other light at random; float32."""
    from PIL import Image

    photograph = source.photographs[rng.integers(len(source.photographs))]
    edge = round(TRAIN_COLUMNS * photograph.shape[1])
    region = photograph[:, :edge] if part == "train" else photograph[:, edge:]
    scale = rng.uniform(0.5, 1.0) * min(region.shape[0] / size[0], region.shape[1] / size[1])
    height, width = size[0] * scale, size[1] * scale
    top, left = rng.uniform(0, region.shape[0] - height), rng.uniform(0, region.shape[1] - width)
    box = (left, top, left + width, top + height)
    crop = Image.fromarray(region).resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(crop, dtype=np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    gain, lift = rng.uniform(0.6, 1.1), rng.uniform(-20, 30)
    return np.clip(pixels * gain + lift, 0, 255).astype(np.float32)


def _side(size: tuple[int, int], rng: np.random.Generator) -> int:
    """Length of a digit's longer side: log-uniform, so that every octave of sizes is as frequent."""
    largest = min(MAX_SIDE, 0.7 * min(size))
    return round(float(np.exp(rng.uniform(np.log(MIN_SIDE), np.log(largest)))))


def glyph(scan: np.ndarray, side: int, angle: float) -> np.ndarray:
    """Opacity of a digit's ink, float32 ``[h, w]`` with max(h, w) = ``side``, cut tight to opacity > 0.5."""
    from PIL import Image

    padded = Image.fromarray(np.pad(np.rint(scan * 255).astype(np.uint8), 2))
    smooth = padded.resize((144, 144), Image.Resampling.BICUBIC).rotate(angle, Image.Resampling.BICUBIC)
    ink = np.clip((np.asarray(smooth, dtype=np.float32) / 255 - 0.35) / 0.2, 0, 1)
    tight = Image.fromarray(np.rint(ink[_extent(ink > 0.5)] * 255).astype(np.uint8))
    scale = side / max(tight.size)
    width, height = (max(1, round(length * scale)) for length in tight.size)
    alpha = np.asarray(tight.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32) / 255
    return alpha[_extent(alpha > 0.5)]


def _extent(mask: np.ndarray) -> tuple[slice, slice]:
    """The smallest rows and columns that hold every True of ``mask``."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)


def _place(ink: np.ndarray, owner: np.ndarray, inks: list[int], rng: np.random.Generator) -> tuple[int, int] | None:
    """A corner (y, x) where the digit hides little of the earlier ones, or None after 20 tries."""
    height, width = ink.shape
    for _ in range(20):
        y, x = (int(rng.integers(0, limit - length + 1)) for limit, length in zip(owner.shape, ink.shape, strict=True))
        covered = np.bincount(owner[y : y + height, x : x + width][ink], minlength=len(inks) + 1)
        if not covered[1:].any():
            return y, x
        visible = np.bincount(owner.ravel(), minlength=len(inks) + 1) - covered
        shares = visible[1:] / np.array(inks)
        if shares.min() >= 1 - MAX_HIDDEN and covered[1:].sum() <= 0.5 * ink.sum():
            return y, x
    return None


def paint(window: np.ndarray, alpha: np.ndarray, rng: np.random.Generator) -> None:
    """Blend ink of a random colour that stands out from what it covers into ``window``, in place."""
    under = float((window[alpha > 0.5] @ _LUMA).mean())
    for _ in range(20):
        colour = rng.uniform(0, 255, 3).astype(np.float32)
        if abs(float(colour @ _LUMA) - under) >= MIN_CONTRAST:
            break
    else:
        colour = np.full(3, 0.0 if under > 127 else 255.0, dtype=np.float32)
    opacity = alpha[:, :, None] * np.float32(rng.uniform(0.8, 1.0))
    window[:] = window * (1 - opacity) + colour * opacity


def _annotation(mask: np.ndarray, digit: int) -> dict[str, Any]:
    """COCO annotation of a mask: box and area of exactly its pixels, compressed RLE."""
    from pycocotools import mask as coco_mask

    rows, columns = _extent(mask)
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {
        "category_id": digit + 1,
        "bbox": [int(columns.start), int(rows.start), int(columns.stop - columns.start), int(rows.stop - rows.start)],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode("ascii")},
    }
