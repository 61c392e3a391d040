"""Fuzz of the suppression family against plain float64 loops written for it.

Kept sets are decisions, so half of the cases have whole coordinates, on which float32 is exact but for the one rounding
of the quotient, which the loops repeat; the others are left out where an IoU is within a rounding of the threshold.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from drawing import DTYPES, Draw
from torch import Tensor

from nasdet.ops import batched_nms, nms, nms_padded, soft_nms

THRESHOLDS = (0.5, 0.5, 0.25, 0.3, 0.7, 0.0, 1.0, -0.5, 1 / 3)
SCORES = (0.0, 0.125, 0.25, 0.5, 0.5, 0.75, 1.0)


def _scene(draw: Draw, count: int, dtype: torch.dtype, exact: bool, odd_scores: bool = True) -> tuple[Tensor, Tensor]:
    """Overlapping boxes, some without area, inverted, equal, NaN or infinite; scores with ties and NaN."""
    span = draw.choice((6, 20, 60))
    corner = draw.uniform(count, 2, low=-0.3 * span, high=span)
    boxes = torch.cat([corner, corner + draw.uniform(count, 2, low=-0.05, high=1.0) * span * 0.7], 1)
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
        if odd_scores and draw.chance(0.04):
            scores[row] = draw.choice((math.nan, -0.0, 0.0, -1.0, math.inf, -math.inf))
    return boxes.to(dtype), scores.to(dtype)


def _ious(boxes: Tensor, exact: bool) -> np.ndarray:
    """``[N, N]``; for whole coordinates in the op's arithmetic, whose one rounding counts, else in float64."""
    wide = boxes.dtype == torch.float64 or not exact
    b = boxes.double().numpy() if wide else boxes.float().numpy()
    with np.errstate(all="ignore"):
        area = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
        sides = np.minimum(b[:, None, 2:], b[None, :, 2:]) - np.maximum(b[:, None, :2], b[None, :, :2])
        sides = np.where(sides > 0, sides, 0)
        overlap = sides[..., 0] * sides[..., 1]
        return (overlap / (area[:, None] + area[None] - overlap)).astype(np.float64)


def _order(scores: Tensor) -> list[int]:
    values = scores.double().tolist()
    return sorted(range(len(values)), key=lambda i: (0.0, 0.0) if math.isnan(values[i]) else (1.0, -values[i]))


def _kept(ious: np.ndarray, scores: Tensor, classes: list[int], threshold: float) -> list[int]:
    left, kept = _order(scores), []
    while left:
        best, *left = left
        kept.append(best)
        left = [i for i in left if classes[i] != classes[best] or not ious[best, i] > threshold]
    return kept


def _clear(ious: np.ndarray, threshold: float, exact: bool) -> bool:
    """Whether no IoU is so near the threshold that float32 may decide otherwise."""
    return exact or not bool((np.abs(ious - threshold) < 1e-4).any())


def _case(draw: Draw, odd_scores: bool = True) -> tuple[Tensor, Tensor, np.ndarray, float, bool]:
    """Boxes, scores, IoUs and a threshold that none of them is too near."""
    while True:
        exact, dtype = draw.chance(0.6), draw.choice(DTYPES)
        count = draw.size(60)
        threshold = draw.choice((*THRESHOLDS, draw.random.random()))
        boxes, scores = _scene(draw, count, dtype, exact, odd_scores)
        ious = _ious(boxes, exact)
        if _clear(ious, threshold, exact):
            draw.note(count=count, dtype=dtype, exact=exact, threshold=threshold)
            if count <= 12:
                draw.note(boxes=boxes.tolist(), scores=scores.tolist())
            return boxes, scores, ious, threshold, exact


def fuzz_nms(draw: Draw) -> None:
    boxes, scores, ious, threshold, _ = _case(draw)
    expected = _kept(ious, scores, [0] * len(boxes), threshold)
    kept = nms(draw.laid_out(boxes), draw.laid_out(scores), threshold, backend=draw.backend)
    assert kept.dtype == torch.int64 and kept.tolist() == expected, f"kept {kept.tolist()}, expected {expected}"


def fuzz_batched_nms(draw: Draw) -> None:
    boxes, scores, ious, threshold, _ = _case(draw)
    classes = draw.integers(0, draw.choice((0, 2, 80)), len(boxes))
    classes = classes * draw.choice((1, 1, -1, 2**40)) + draw.choice((0, -1, 7))
    small = bool((classes.abs() < 2**31).all())
    given = classes.to(draw.choice((torch.int32, torch.int64))) if small else classes
    draw.note(classes=classes.tolist() if len(boxes) <= 12 else len(set(classes.tolist())))
    expected = _kept(ious, scores, classes.tolist(), threshold)
    kept = batched_nms(
        draw.laid_out(boxes), draw.laid_out(scores), draw.laid_out(given), threshold, backend=draw.backend
    )
    assert kept.dtype == torch.int64 and kept.tolist() == expected, f"kept {kept.tolist()}, expected {expected}"


def fuzz_nms_padded(draw: Draw) -> None:
    leading = draw.choice(((), (1,), (2,), (3,), (2, 2), (0,)))
    images, count, max_out = math.prod(leading), draw.size(30), draw.choice((0, 1, 3, 30, 40))
    dtype, exact, threshold = draw.choice(DTYPES), True, draw.choice((*THRESHOLDS, draw.random.random()))
    draw.note(leading=leading, count=count, max_out=max_out, dtype=dtype, threshold=threshold)
    scenes = [_scene(draw, count, dtype, exact) for _ in range(images)]
    boxes = torch.stack([b for b, _ in scenes]) if scenes else torch.zeros(0, count, 4, dtype=dtype)
    scores = torch.stack([s for _, s in scenes]) if scenes else torch.zeros(0, count, dtype=dtype)
    classes = draw.integers(-1, 2, images, count) if draw.chance(0.6) else None
    shaped = [t.reshape(*leading, *t.shape[1:]) for t in (boxes, scores)]
    idxs = None if classes is None else draw.laid_out(classes.reshape(*leading, count))
    index, kept = nms_padded(
        draw.laid_out(shaped[0]), draw.laid_out(shaped[1]), threshold, max_out, idxs=idxs, backend=draw.backend
    )
    assert index.shape == (*leading, max_out) and kept.shape == leading
    for image, (got, number) in enumerate(zip(index.reshape(images, max_out), kept.reshape(images), strict=True)):
        own = [0] * count if classes is None else classes[image].tolist()
        expected = _kept(_ious(boxes[image], exact), scores[image], own, threshold)[:max_out]
        padded = expected + [-1] * (max_out - len(expected))
        assert got.tolist() == padded and int(number) == len(expected), f"image {image}: {got.tolist()}, not {padded}"


def fuzz_soft_nms(draw: Draw) -> None:
    for _ in range(50):
        boxes, scores, ious, threshold, exact = _case(draw, odd_scores=False)
        method, sigma = draw.choice(("linear", "gaussian", "naive")), draw.choice((0.5, 0.1, 2.0))
        min_score = draw.choice((1e-3, 0.05, 0.3, 2.0))
        classes = draw.integers(0, 2, len(boxes)) if draw.chance(0.5) else None
        own = [0] * len(boxes) if classes is None else classes.tolist()
        found = _selected(boxes, ious, scores, own, method, threshold, sigma, min_score)
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
    room = (torch.finfo(scores.dtype).eps + 1e-5 * (scores.dtype != torch.float64)) * wanted + 1e-7
    assert bool(((lowered.double() - wanted).abs() <= room).all()), f"scores {lowered.tolist()}, expected {values}"


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
    """Indices by selection and their scores; None where a choice hangs on less than float32 resolves."""
    current = scores.double().tolist()
    twins = [(*box, score, own) for box, score, own in zip(boxes.tolist(), current, classes, strict=True)]
    if any(abs(score - min_score) < 1e-5 for score in current):
        return None
    left, keep = [i for i, score in enumerate(current) if score >= min_score], []
    while left:
        best = max(left, key=lambda i: (current[i], -i))
        if any(abs(current[i] - current[best]) < 1e-5 and repr(twins[i]) != repr(twins[best]) for i in left):
            return None
        keep.append(best)
        left.remove(best)
        for i in left:
            if classes[i] == classes[best]:
                current[i] *= _weight(float(ious[best, i]), method, threshold, sigma)
        if any(abs(current[i] - min_score) < 1e-5 for i in left):
            return None
        left = [i for i in left if current[i] >= min_score]
    return keep, [current[i] for i in keep]


def _weight(iou: float, method: str, threshold: float, sigma: float) -> float:
    if math.isnan(iou):
        return 1.0
    if method == "gaussian":
        return math.exp(-iou * iou / sigma)
    if not iou > threshold:
        return 1.0
    return 1 - iou if method == "linear" else 0.0
