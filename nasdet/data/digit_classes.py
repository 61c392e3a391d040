"""``digits`` for classification: one digit to a picture, in a folder for each class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nasdet.data.digits import Source, background, check_settings, glyph, paint, write_whole


def write_digit_classes(
    out: str | Path, *, seed: int = 0, train: int = 2000, val: int = 500, size: tuple[int, int] = (32, 32)
) -> Path:
    """Write ``{train,val}/{0..9}/*.png``: a handwritten digit in random ink somewhere on a crop of a photograph.

    The material is that of :func:`nasdet.data.digits.write_digits`, and so is all that is said there of ``out``, of
    repeating a set and of what train and val share; the longer side of a digit is 0.6 to 0.95 of the picture's shorter
    one. Classes take turns, so that their numbers of pictures differ by at most one.

    Args:
        out: folder to make.
        seed: of everything random.
        train, val: number of pictures over all classes, each at least 1.
        size: ``(height, width)`` in pixels, each from 24 to 2048.

    Raises:
        FileExistsError: ``out`` holds something else.
        ValueError: an argument out of range.
    """
    settings = check_settings(seed, train, val, size, least=24)
    return write_whole(Path(out), settings | {"classification": True}, _write)


def _write(folder: Path, settings: Mapping[str, Any]) -> None:
    from PIL import Image
    from tqdm import tqdm

    size = (settings["size"][0], settings["size"][1])
    source = Source.load(settings["seed"])
    with tqdm(total=settings["train"] + settings["val"], desc="digits", unit="image", disable=None) as progress:
        for part in ("train", "val"):
            for digit in range(10):
                (folder / part / str(digit)).mkdir(parents=True)
            for index in range(settings[part]):
                rng = np.random.default_rng([settings["seed"], 3, part == "val", index])
                pixels = draw_digit(source, part, index % 10, size, rng)
                Image.fromarray(pixels).save(folder / part / str(index % 10) / f"{index:06d}.png")
                progress.update()


def draw_digit(source: Source, part: str, digit: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """One picture of one digit, uint8 ``[H, W, 3]``."""
    canvas = background(source, part, size, rng)
    pool = source.scans[part][digit]
    side = round(rng.uniform(0.6, 0.95) * min(size))
    alpha = glyph(pool[rng.integers(len(pool))], side, rng.uniform(-15, 15))
    height, width = alpha.shape
    y, x = int(rng.integers(0, size[0] - height + 1)), int(rng.integers(0, size[1] - width + 1))
    paint(canvas[y : y + height, x : x + width], alpha, rng)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)
