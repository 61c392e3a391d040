"""Detections on the pictures of a run's data folder, beside the ground truth."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nasdet.report.ground_truth import Boxes, Picture, choose
from nasdet.report.markup import figure, text
from nasdet.report.read import Run

_MOST_BOXES = 30
_THRESHOLDS = (0.5, 0.3, 0.2, 0.1, 0.05)


def picture_section(run: Run, budget: int, most: int = 8) -> str:
    """Up to ``most`` pictures of a run as HTML, at most ``budget`` bytes; empty without detections or data folder.

    The pictures are evenly spaced over those that were evaluated, in the order of their ids: none is picked by result.
    """
    if run.detections is None:
        return ""
    chosen, categories, why = choose(run, most)
    if not chosen:
        return f'<p class="note">No pictures here: {text(why)}.</p>'
    threshold = _threshold(chosen)
    for width, quality in ((520, 80), (460, 74), (400, 66), (320, 55), (240, 45)):
        parts = [_pair(picture, categories, threshold, width, quality) for picture in chosen]
        if sum(len(part) for part in parts) <= budget:
            break
    while parts and sum(len(part) for part in parts) > budget:
        parts.pop()
    note = (
        f"{len(parts)} pictures, evenly spaced over the evaluated ones and not picked by result. Detections that score "
        f"{threshold:g} or more are drawn: of {', '.join(f'{t:g}' for t in _THRESHOLDS)} the first that draws at least "
        "as many boxes as there are objects, else the last. An object is found by a box of its class with an IoU of "
        "0.5 or more; every other box is false."
    )
    return f'<p class="note">{note}</p><div class="pictures">{"".join(parts)}</div>'


def _threshold(pictures: Sequence[Picture]) -> float:
    objects = sum(len(picture.truth.boxes) for picture in pictures)
    for threshold in _THRESHOLDS:
        if sum(score >= threshold for picture in pictures for score in picture.found.scores) >= objects:
            return threshold
    return _THRESHOLDS[-1]


def _pair(picture: Picture, categories: Sequence[str], threshold: float, width: int, quality: int) -> str:
    from PIL import Image, UnidentifiedImageError

    from nasdet.report.draw import draw_detections

    try:
        with Image.open(picture.path) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        return f'<p class="note">{text(picture.name)} cannot be read: {text(error)}.</p>'
    truth, found = picture.truth, _surest(picture.found, threshold)
    look: dict[str, Any] = {"categories": categories, "scale": width / max(image.size), "label_size": width // 26}
    left = draw_detections(image, truth.boxes, truth.labels, crowd=truth.crowd, **look)
    right = draw_detections(image, found.boxes, found.labels, found.scores, **look)
    right_boxes, false_boxes = match(truth, found)
    objects = truth.crowd.count(False)
    verdict = f"{right_boxes} of {objects} object{'s' if objects != 1 else ''} found, {false_boxes} false"
    pairs = zip(found.labels, found.scores, strict=True)
    listed = ", ".join(f"{categories[label]} {score:.2f}" for label, score in pairs)
    there = ", ".join(categories[label] for label in truth.labels)
    return figure(
        '<div class="pair">'
        + _embed(left, f"Ground truth of {picture.name}: {there or 'nothing'}", quality, "ground truth")
        + _embed(right, f"Detections on {picture.name}: {listed or 'nothing'}", quality, "detections")
        + "</div>",
        f"{text(Path(picture.name).name)}: {verdict}",
    )


def _surest(found: Boxes, threshold: float) -> Boxes:
    order = sorted(range(len(found.boxes)), key=lambda i: -found.scores[i])
    order = [i for i in order if found.scores[i] >= threshold][:_MOST_BOXES]
    return Boxes(
        [found.boxes[i] for i in order],
        [found.labels[i] for i in order],
        [found.scores[i] for i in order],
        [found.crowd[i] for i in order],
    )


def match(truth: Boxes, found: Boxes, threshold: float = 0.5) -> tuple[int, int]:
    """(right, false) boxes: the surest first, each takes the free object of its class that it overlaps most.

    Right needs an IoU of at least ``threshold``. A box that finds no free object but lies on a crowd region of its
    class counts as neither.
    """
    free = set(range(len(truth.boxes)))
    right = false = 0
    for i in sorted(range(len(found.boxes)), key=lambda i: -found.scores[i]):
        same = [j for j in free if truth.labels[j] == found.labels[i]]
        near = [(iou(found.boxes[i], truth.boxes[j]), j) for j in same if not truth.crowd[j]]
        if near and max(near)[0] >= threshold:
            free.remove(max(near)[1])
            right += 1
        elif not any(truth.crowd[j] and _covered(found.boxes[i], truth.boxes[j]) >= threshold for j in same):
            false += 1
    return right, false


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes."""
    shared = _shared(a, b)
    union = _area(a) + _area(b) - shared
    return shared / union if union > 0 else 0.0


def _covered(a: Sequence[float], b: Sequence[float]) -> float:
    return _shared(a, b) / _area(a) if _area(a) > 0 else 0.0


def _shared(a: Sequence[float], b: Sequence[float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _area(a: Sequence[float]) -> float:
    return max(0.0, a[2] - a[0]) * max(0.0, a[3] - a[1])


def _embed(image: Any, alt: str, quality: int, caption: str) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, optimize=True, progressive=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<div><img src="data:image/jpeg;base64,{data}" alt="{text(alt)}" width="{image.width}" '
        f'height="{image.height}"><span class="which">{caption}</span></div>'
    )
