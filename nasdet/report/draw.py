"""Boxes and masks on pictures: the one place that draws them."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from typing import Any

import numpy
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

Color = tuple[int, int, int]
Rectangle = tuple[float, float, float, float]
Record = tuple[list[float], int, "float | None", bool, Any]  # box, label, score, crowd, mask

_GOLDEN_ANGLE = 0.61803398875
_MASK_OPACITY = 0.4


def class_color(label: int) -> Color:
    """The colour of a class, the same in every picture: hues by the golden angle, so neighbouring labels differ."""
    hue = (0.02 + label * _GOLDEN_ANGLE) % 1.0
    value = 1.0 if label % 2 == 0 else 0.82
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.80, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_detections(
    image: Image.Image,
    boxes: Any,
    labels: Any,
    scores: Any = None,
    categories: Sequence[str] | None = None,
    *,
    threshold: float = 0.0,
    scale: float = 1.0,
    crowd: Any = None,
    label_size: int | None = None,
    masks: Any = None,
) -> Image.Image:
    """Draw boxes with readable labels, and masks, on a copy of a picture.

    Line width and type size follow the size of the result. Masks are tinted and outlined beneath all boxes, which are
    drawn from the lowest score to the highest, so that the surest is on top; each label takes the first free place of:
    above the box, inside its top, below it, inside its bottom. Boxes are clipped to the picture; one wholly outside is
    left out, with its mask.

    Args:
        image: any PIL picture; it is not changed.
        boxes: ``[N, 4]`` x1, y1, x2, y2 in pixels of ``image``; a tensor, an array or nested lists.
        labels: ``[N]`` integers; with ``categories`` they are indices into it.
        scores: ``[N]`` in 0..1, or None for ground truth (no number is then written).
        categories: class names by label; without them the label itself is written.
        threshold: boxes with a score below it are left out.
        scale: the result is ``scale`` times as large as ``image``; above 1 the type is readable on small pictures.
        crowd: ``[N]`` booleans; a crowd region gets a dashed outline.
        label_size: type size in pixels of the result; by default by its size. Lines are a sixth as wide.
        masks: N masks of the size of ``image``: bool ``[H, W]`` tensors or arrays, or COCO RLE (needs pycocotools).

    Returns:
        a new RGB picture.

    Raises:
        ValueError: lengths that differ, a box that is not four finite numbers, a label outside ``categories``, or a
            mask of another size than ``image``.
    """
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale must be a positive number, got {scale}")
    if label_size is not None and label_size < 1:
        raise ValueError(f"label_size must be at least 1, got {label_size}")
    records = _records(boxes, labels, scores, crowd, masks, categories)
    canvas = image.convert("RGB")
    if scale != 1.0:
        pixels = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        canvas = canvas.resize(pixels, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS)
    elif canvas is image:
        canvas = image.copy()
    painter = ImageDraw.Draw(canvas)
    size = label_size if label_size is not None else min(28, max(11, round(max(canvas.size) / 36)))
    width, font = max(2, round(size / 6)), _font(size)
    shown, outlined = [], []
    records.sort(key=lambda record: 1.0 if record[2] is None else record[2])
    for box, label, score, is_crowd, mask in records:
        place = _clip([value * scale for value in box], canvas.width, canvas.height)
        if place is None or (score is not None and score < threshold):
            continue
        if mask is not None:
            _tint(canvas, _mask_image(mask, image.size), class_color(label))
        outlined.append((place, class_color(label), width, is_crowd))
        shown.append((place, label, score))
    for outline in outlined:
        _outline(painter, *outline)
    _write_labels(painter, font, shown, categories, canvas.size)
    return canvas


def _write_labels(
    painter: ImageDraw.ImageDraw,
    font: Any,
    shown: Sequence[tuple[Rectangle, int, float | None]],
    categories: Sequence[str] | None,
    size: tuple[int, int],
) -> None:
    """The labels of ``shown`` (box, label, score; the surest last), which chooses its place first."""
    taken: list[Rectangle] = []
    places = []
    for place, label, score in reversed(shown):
        text = str(label) if categories is None else str(categories[label])
        text = text if score is None else f"{text} {score:.2f}"
        spot = _label_spot(painter, font, text, place, size, taken)
        taken.append(spot)
        places.append((spot, text, class_color(label)))
    for spot, text, color in reversed(places):
        painter.rectangle(spot, fill=color)
        painter.text((spot[0] + 3, spot[1] + 1), text, fill=_ink(color), font=font)


def _as_list(values: Any) -> list[Any]:
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _records(
    boxes: Any, labels: Any, scores: Any, crowd: Any, masks: Any, categories: Sequence[str] | None
) -> list[Record]:
    boxes, labels = _as_list(boxes), [int(label) for label in _as_list(labels)]
    given = [None] * len(boxes) if scores is None else [float(score) for score in _as_list(scores)]
    crowds = [False] * len(boxes) if crowd is None else [bool(flag) for flag in _as_list(crowd)]
    masks = [None] * len(boxes) if masks is None else list(masks)
    for name, values in (("labels", labels), ("scores", given), ("crowd", crowds), ("masks", masks)):
        if len(values) != len(boxes):
            raise ValueError(f"{name} must have one entry per box ({len(boxes)}), got {len(values)}")
    for index, (box, label) in enumerate(zip(boxes, labels, strict=True)):
        if len(box) != 4 or not all(math.isfinite(value) for value in box):
            raise ValueError(f"boxes[{index}] must be four finite numbers, got {list(box)}")
        if label < 0 or (categories is not None and label >= len(categories)):
            limit = "" if categories is None else f"..{len(categories) - 1}"
            raise ValueError(f"labels[{index}] must be in 0{limit}, got {label}")
    return list(zip(boxes, labels, given, crowds, masks, strict=True))


def _mask_image(mask: Any, size: tuple[int, int]) -> Image.Image:
    """A mask as a picture of 0 and 255, of ``size`` (width, height)."""
    if isinstance(mask, dict):
        from pycocotools import mask as coco_mask

        mask = coco_mask.decode(mask)
    pixels = numpy.asarray(mask)
    if pixels.shape != size[::-1]:
        raise ValueError(f"masks must have shape {size[::-1]}, that of the picture, got {pixels.shape}")
    return Image.fromarray(pixels.astype(numpy.uint8) * 255)


def _tint(canvas: Image.Image, mask: Image.Image, color: Color) -> None:
    """Blend a colour into the mask's pixels, and draw its inner edge in full."""
    mask = mask.resize(canvas.size, Image.Resampling.NEAREST) if mask.size != canvas.size else mask
    place = mask.getbbox()
    if place is None:
        return
    margin = (place[0] - 1, place[1] - 1, place[2] + 1, place[3] + 1)  # black beyond the picture: its border is an edge
    mask = mask.crop(margin)
    edge = ImageChops.subtract(mask, mask.filter(ImageFilter.MinFilter(3)))
    tint = mask.point(lambda value: round(_MASK_OPACITY * value))
    canvas.paste(color, margin[:2], ImageChops.lighter(tint, edge))


def _font(size: int) -> Any:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one fixed size
        return ImageFont.load_default()


def _ink(color: Color) -> Color:
    red, green, blue = color
    return (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 130 else (255, 255, 255)


def _clip(box: Sequence[float], width: int, height: int) -> Rectangle | None:
    left, right = sorted((box[0], box[2]))
    top, bottom = sorted((box[1], box[3]))
    if right < 0 or bottom < 0 or left > width - 1 or top > height - 1:
        return None
    return max(0.0, left), max(0.0, top), min(width - 1.0, right), min(height - 1.0, bottom)


def _outline(painter: ImageDraw.ImageDraw, box: Rectangle, color: Color, width: int, dashed: bool) -> None:
    if not dashed:
        # A dark hairline outside the colour keeps the box visible on a background of its own colour.
        painter.rectangle((box[0] - 1, box[1] - 1, box[2] + 1, box[3] + 1), outline=(0, 0, 0), width=1)
        painter.rectangle(box, outline=color, width=width)
        return
    left, top, right, bottom = box
    dash = 4 * width
    for x in range(int(left), int(right), 2 * dash):
        for y in (top, bottom):
            painter.line((x, y, min(x + dash, right), y), fill=color, width=width)
    for y in range(int(top), int(bottom), 2 * dash):
        for x_side in (left, right):
            painter.line((x_side, y, x_side, min(y + dash, bottom)), fill=color, width=width)


def _label_spot(
    painter: ImageDraw.ImageDraw, font: Any, text: str, box: Rectangle, size: tuple[int, int], taken: list[Rectangle]
) -> Rectangle:
    # The height is that of a fixed text, so that all labels of a picture are equally tall.
    width = painter.textbbox((0, 0), text, font=font)[2] + 6
    height = painter.textbbox((0, 0), "Ag0|", font=font)[3] + 3
    left = max(0.0, min(box[0], size[0] - 1 - width))
    candidates = []
    for top in (box[1] - height, box[1], box[3], box[3] - height):
        if 0 <= top <= size[1] - 1 - height:
            candidates.append((left, top, left + width, top + height))
    if not candidates:
        candidates = [(left, 0.0, left + width, float(height))]
    for spot in candidates:
        if not any(spot[0] < t[2] and t[0] < spot[2] and spot[1] < t[3] and t[1] < spot[3] for t in taken):
            return spot
    return candidates[0]
