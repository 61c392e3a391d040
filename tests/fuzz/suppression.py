"""Fuzz of the suppression family against plain float64 loops written for it.

Kept sets are decisions, so half of the cases have whole coordinates, on which float32 is exact but for the one rounding
of the quotient, which the loops repeat; the others are left out where an IoU is within a rounding of the threshold.
Seldom there are as many boxes as the kernels keep tables of, or share among threads.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from drawing import DTYPES, Draw
from torch import Tensor

from nasdet.ops import batched_nms, nms, nms_padded, soft_nms

THRESHOLDS = (0.5, 0.5, 0.25, 0.3, 0.7, 0.0, 1.0, -0.5, 1 / 3)
SCORES = (0.0, 0.125, 0.25, 0.5, 0.5, 0.75, 1.0)
MANY = 256  # boxes, from which a case is a large one


def _scene(draw: Draw, count: int, dtype: torch.dtype, exact: bool) -> tuple[Tensor, Tensor]:
    """Overlapping boxes, some without area, inverted, equal, NaN or infinite; scores with ties and NaN."""
    many = count >= MANY  # smaller ones then, of which more are kept
    span, side = draw.choice((300, 900) if many else (6, 20, 60)), draw.choice((0.03, 0.1) if many else (0.7,))
    corner = draw.uniform(count, 2, low=-0.3 * span, high=span)
    boxes = torch.cat([corner, corner + draw.uniform(count, 2, low=-0.05, high=1.0) * span * side], 1)
    if exact:
        boxes = boxes.round()
    for row in range(count):
        if row and draw.chance(0.1):
            boxes[row] = boxes[draw.random.randrange(row)]
        if draw.chance(0.02):
            boxes[row, draw.random.randrange(4)] = draw.choice((math.nan, math.inf, -math.inf))
        if draw.chance(0.04):
            boxes[row, 2:] = boxes[row, :2]
    scores = draw.uniform(count, low=0.01)
    for row in range(count):
        if draw.chance(0.2):
            scores[row] = draw.choice(SCORES[1:])
        if draw.chance(0.04):
            scores[row] = draw.choice((math.nan, -0.0, 0.0, -1.0, math.inf, -math.inf))
    return boxes.to(dtype), scores.to(dtype)


class _Overlaps:
    """IoUs; for whole coordinates in the op's arithmetic, whose one rounding counts, else in float64."""

    def __init__(self, boxes: Tensor, exact: bool) -> None:
        wide = boxes.dtype == torch.float64 or not exact
        self.boxes = boxes.double().numpy() if wide else boxes.float().numpy()
        with np.errstate(all="ignore"):
            self.areas = (self.boxes[:, 2] - self.boxes[:, 0]) * (self.boxes[:, 3] - self.boxes[:, 1])

    def of(self, row: int) -> np.ndarray:
        """``[N]``: of one box with every box."""
        one = self.boxes[row]
        with np.errstate(all="ignore"):
            sides = np.minimum(one[2:], self.boxes[:, 2:]) - np.maximum(one[:2], self.boxes[:, :2])
            sides = np.where(sides > 0, sides, 0)
            overlap = sides[:, 0] * sides[:, 1]
            return (overlap / (self.areas[row] + self.areas - overlap)).astype(np.float64)

    def all(self) -> np.ndarray:
        """``[N, N]``"""
        return np.stack([self.of(row) for row in range(len(self.boxes))] or [np.zeros(0)])


def _order(scores: Tensor) -> list[int]:
    values = scores.double().tolist()
    return sorted(range(len(values)), key=lambda i: (0.0, 0.0) if math.isnan(values[i]) else (1.0, -values[i]))


def _kept(overlaps: _Overlaps, scores: Tensor, classes: list[int], threshold: float) -> list[int]:
    left, own = np.ones(len(classes), dtype=bool), np.array(classes, dtype=np.int64)
    kept: list[int] = []
    for best in _order(scores):
        if left[best]:
            kept.append(best)
            left &= ~((overlaps.of(best) > threshold) & (own == own[best]))
    return kept


def _clear(overlaps: _Overlaps, threshold: float, exact: bool) -> bool:
    """Whether no IoU is so near the threshold that float32 may decide otherwise."""
    return exact or not bool((np.abs(overlaps.all() - threshold) < 1e-4).any())


def _count(draw: Draw) -> int:
    """Mostly a few; seldom enough for the table of kept boxes, and for several threads on one class."""
    if draw.backend == "cpp" and draw.chance(0.01):
        return draw.random.randint(*draw.choice(((MANY, 1100), (1024, 2600), (1024, 2600), (8192, 9500))))
    return draw.size(60)


def _case(draw: Draw, count: int) -> tuple[Tensor, Tensor, _Overlaps, float, bool]:
    """Boxes, scores, IoUs and a threshold that none of them is too near."""
    while True:
        exact, dtype = count >= MANY or draw.chance(0.6), draw.choice(DTYPES)
        threshold = draw.choice((*THRESHOLDS, draw.random.random()))
        boxes, scores = _scene(draw, count, dtype, exact)
        overlaps = _Overlaps(boxes, exact)
        if _clear(overlaps, threshold, exact):
            draw.note(count=count, dtype=dtype, exact=exact, threshold=threshold)
            if count <= 12:
                draw.note(boxes=boxes.tolist(), scores=scores.tolist())
            return boxes, scores, overlaps, threshold, exact


@contextlib.contextmanager
def _threads(draw: Draw, count: int) -> Iterator[None]:
    """Several threads for some of the large cases, whatever the process has."""
    before = torch.get_num_threads()
    if count >= MANY:
        torch.set_num_threads(draw.choice((1, 2, 3)))
        draw.note(threads=torch.get_num_threads())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _right(kept: Tensor, expected: list[int]) -> None:
    shown = (kept.tolist(), expected) if len(expected) <= 60 else (f"{len(kept)} boxes", f"{len(expected)} boxes")
    assert kept.dtype == torch.int64 and kept.tolist() == expected, f"kept {shown[0]}, expected {shown[1]}"


def fuzz_nms(draw: Draw) -> None:
    boxes, scores, overlaps, threshold, _ = _case(draw, _count(draw))
    expected = _kept(overlaps, scores, [0] * len(boxes), threshold)
    with _threads(draw, len(boxes)):
        _right(nms(draw.laid_out(boxes), draw.laid_out(scores), threshold, backend=draw.backend), expected)


def fuzz_batched_nms(draw: Draw) -> None:
    boxes, scores, overlaps, threshold, _ = _case(draw, _count(draw))
    classes = draw.integers(0, draw.choice((0, 2, 80)), len(boxes))
    classes = classes * draw.choice((1, 1, -1, 2**40)) + draw.choice((0, -1, 7))
    small = bool((classes.abs() < 2**31).all())
    given = classes.to(draw.choice((torch.int32, torch.int64))) if small else classes
    draw.note(classes=classes.tolist() if len(boxes) <= 12 else len(set(classes.tolist())))
    expected = _kept(overlaps, scores, classes.tolist(), threshold)
    laid = [draw.laid_out(tensor) for tensor in (boxes, scores, given)]
    with _threads(draw, len(boxes)):
        _right(batched_nms(*laid, threshold, backend=draw.backend), expected)


def fuzz_nms_padded(draw: Draw) -> None:
    leading = draw.choice(((), (1,), (2,), (3,), (2, 2), (0,)))
    images, max_out = math.prod(leading), draw.choice((0, 1, 3, 30, 40, 2000))
    count = _count(draw) if images == 1 else draw.size(30)
    dtype, exact, threshold = draw.choice(DTYPES), True, draw.choice((*THRESHOLDS, draw.random.random()))
    draw.note(leading=leading, count=count, max_out=max_out, dtype=dtype, threshold=threshold)
    scenes = [_scene(draw, count, dtype, exact) for _ in range(images)]
    boxes = torch.stack([b for b, _ in scenes]) if scenes else torch.zeros(0, count, 4, dtype=dtype)
    scores = torch.stack([s for _, s in scenes]) if scenes else torch.zeros(0, count, dtype=dtype)
    classes = draw.integers(-1, 2, images, count) if draw.chance(0.6) else None
    shaped = [t.reshape(*leading, *t.shape[1:]) for t in (boxes, scores)]
    idxs = None if classes is None else draw.laid_out(classes.reshape(*leading, count))
    laid = [draw.laid_out(tensor) for tensor in shaped]
    with _threads(draw, count):
        index, kept = nms_padded(*laid, threshold, max_out, idxs=idxs, backend=draw.backend)
    assert index.shape == (*leading, max_out) and kept.shape == leading
    for image, (got, number) in enumerate(zip(index.reshape(images, max_out), kept.reshape(images), strict=True)):
        own = [0] * count if classes is None else classes[image].tolist()
        expected = _kept(_Overlaps(boxes[image], exact), scores[image], own, threshold)[:max_out]
        padded = expected + [-1] * (max_out - len(expected))
        assert got.tolist() == padded and int(number) == len(expected), f"image {image}: {got.tolist()}, not {padded}"


def fuzz_soft_nms(draw: Draw) -> None:
    for _ in range(50):
        boxes, scores, overlaps, threshold, exact = _case(draw, draw.size(60))
        method, sigma = draw.choice(("linear", "gaussian", "naive")), draw.choice((0.5, 0.1, 2.0))
        min_score = draw.choice((1e-3, 0.05, 0.3, 2.0, 0.0, -2.0, -math.inf))
        classes = draw.integers(0, 2, len(boxes)) if draw.chance(0.5) else None
        own = [0] * len(boxes) if classes is None else classes.tolist()
        found = _selected(boxes, overlaps.all(), scores, own, method, threshold, sigma, min_score)
        if found is not None:
            break
    else:
        raise AssertionError("no case of fifty was clear enough: the margins are too wide")
    draw.note(method=method, sigma=sigma, min_score=min_score, classes=own if len(own) <= 12 else len(set(own)))
    expected, values = found
    keep, lowered = soft_nms(
        draw.laid_out(boxes), draw.laid_out(scores), threshold, sigma, min_score, method,
        idxs=None if classes is None else draw.laid_out(classes), backend=draw.backend,
    )  # fmt: skip
    assert lowered.dtype == scores.dtype and keep.tolist() == expected, f"kept {keep.tolist()}, expected {expected}"
    wanted = torch.tensor(values, dtype=torch.float64)
    room = (torch.finfo(scores.dtype).eps + 1e-5 * (scores.dtype != torch.float64)) * wanted.abs() + 1e-7
    near = (lowered.double() - wanted).abs() <= room
    same = (lowered == wanted) | (lowered.isnan() & wanted.isnan())  # infinities, and NaN
    assert bool((near | same).all()), f"scores {lowered.tolist()}, expected {values}"


def _selected(
    boxes: Tensor,
    ious: np.ndarray,
    scores: Tensor,
    classes: list[int],
    method: str,
    threshold: float,
    sigma: float,
    min_score: float,
) -> tuple[list[int], list[float]] | None:
    """Indices by selection and their scores; None where a choice hangs on less than float32 resolves.

    That can only be one of a score that was lowered: the others are as given. NaN is above all and stays NaN, a weight
    of 0 makes 0 of any other score.
    """
    current = scores.double().tolist()
    least = min_score if scores.dtype == torch.float64 else float(np.float32(min_score))
    twins = [repr((*box, score, own)) for box, score, own in zip(boxes.tolist(), current, classes, strict=True)]
    left, keep = [i for i, score in enumerate(current) if not score < least], []
    lowered: set[int] = set()

    def unclear(i: int, other: float) -> bool:
        return current[i] != other and abs(current[i] - other) < 1e-5

    while left:
        best = max(left, key=lambda i: (math.isnan(current[i]), 0.0 if math.isnan(current[i]) else current[i], -i))
        for i in left:
            close = abs(current[i] - current[best]) < 1e-5
            if close and twins[i] != twins[best] and (i in lowered or best in lowered):
                return None
        keep.append(best)
        left.remove(best)
        for i in left:
            weight = _weight(float(ious[best, i]), method, threshold, sigma) if classes[i] == classes[best] else 1.0
            if weight != 1:
                current[i] = 0.0 if weight == 0 and not math.isnan(current[i]) else current[i] * weight
                lowered |= {i} if method != "naive" else set()  # whose 0 has no rounding
        if any(i in lowered and unclear(i, least) for i in left):
            return None
        left = [i for i in left if not current[i] < least]
    return keep, [current[i] for i in keep]


def _weight(iou: float, method: str, threshold: float, sigma: float) -> float:
    if math.isnan(iou):
        return 1.0
    if method == "gaussian":
        return math.exp(-iou * iou / sigma)
    if not iou > threshold:
        return 1.0
    return 1 - iou if method == "linear" else 0.0
