from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from nasdet.detectors.parts import assign
from nasdet.detectors.parts.assign import assign_locations, size_ranges
from nasdet.detectors.parts.locations import level_points
from nasdet.detectors.parts.objects import usable_objects

STRIDES = (8, 16, 32)


def _points(height: int = 96, width: int = 128) -> list[Tensor]:
    return [level_points(-(-height // s), -(-width // s), s) for s in STRIDES]


def _one_by_one(points: list[Tensor], ranges: list[tuple[float, float]], boxes: Tensor, radius: float) -> list[int]:
    """The definition, a point at a time."""
    result = []
    for level, stride, (low, high) in zip(points, STRIDES, ranges, strict=True):
        for x, y in level.tolist():
            best, best_area = -1, math.inf
            for index, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
                inside = x1 < x < x2 and y1 < y < y2
                central = abs(x - (x1 + x2) / 2) < radius * stride and abs(y - (y1 + y2) / 2) < radius * stride
                fits = low <= max(x - x1, y - y1, x2 - x, y2 - y) <= high
                area = (x2 - x1) * (y2 - y1)
                if inside and central and fits and area < best_area:
                    best, best_area = index, area
            result.append(best)
    return result


def _random_boxes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    # Quarters of a pixel: exact in float32, so the definition and the tensors agree to the last comparison.
    corner = (torch.rand(count, 2, generator=generator) * 400).round() / 4
    size = (torch.rand(count, 2, generator=generator) ** 3 * 500).round() / 4 + 0.25
    return torch.cat([corner, corner + size], dim=1)


@pytest.mark.parametrize("count", [0, 1, 5, 30])
@pytest.mark.parametrize("radius", [1.5, 0.5, 100.0])
def test_equals_the_definition(count: int, radius: float) -> None:
    points, ranges, boxes = _points(), size_ranges(STRIDES), _random_boxes(count, count)
    match = assign_locations(points, STRIDES, ranges, boxes, radius)
    assert match.dtype == torch.int64
    assert match.tolist() == _one_by_one(points, ranges, boxes, radius)
    assert count < 5 or bool((match >= 0).any())


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    points, ranges, boxes = _points(), size_ranges(STRIDES), _random_boxes(30, 3)
    whole = assign_locations(points, STRIDES, ranges, boxes)
    monkeypatch.setattr(assign, "_PAIRS", 100)
    assert torch.equal(assign_locations(points, STRIDES, ranges, boxes), whole)


def test_ranges_are_the_papers() -> None:
    inf = math.inf
    assert size_ranges([8, 16, 32, 64, 128]) == [(0, 64), (64, 128), (128, 256), (256, 512), (512, inf)]
    assert size_ranges([8, 16, 32]) == [(0, 64), (64, 128), (128, inf)] and size_ranges([16]) == [(0, inf)]


def test_smallest_box_wins_and_first_of_equals() -> None:
    point, everything = [torch.tensor([[50.0, 50.0]])], [(0.0, math.inf)]
    boxes = torch.tensor([[0.0, 0, 100, 100], [40.0, 40, 60, 60], [40.0, 40, 60, 60], [30.0, 30, 70, 70]])
    assert assign_locations(point, [8], everything, boxes).tolist() == [1]


@pytest.mark.parametrize(
    "box",
    [[50.0, 50, 50, 50], [60.0, 60, 40, 40], [math.nan, 0, 100, 100], [0.0, 0, math.inf, 100], [50.0, 0, 100, 100]],
    ids=["empty", "inverted", "nan", "infinite", "on-the-side"],
)
def test_boxes_never_taken(box: list[float]) -> None:
    match = assign_locations([torch.tensor([[50.0, 50.0]])], [8], [(0.0, math.inf)], torch.tensor([box]), 1e9)
    assert match.tolist() == [-1]


def test_crowds_are_left_out() -> None:
    target = {
        "boxes": torch.tensor([[0.0, 0, 9, 9], [0.0, 0, 5, 5], [1.0, 1, 4, 4]]),
        "labels": torch.tensor([3, 4, 5]),
        "iscrowd": torch.tensor([False, True, False]),
    }
    boxes, labels, _ = usable_objects(target)
    assert labels.tolist() == [3, 5] and boxes.tolist() == [[0, 0, 9, 9], [1, 1, 4, 4]]
    del target["iscrowd"]
    assert len(usable_objects(target)[1]) == 3


@pytest.mark.parametrize(
    ("boxes", "labels", "error", "text"),
    [
        (torch.zeros(7, 5), torch.zeros(7, dtype=torch.int64), ValueError, r"shape \(N, 4\), got \(7, 5\)"),
        (torch.zeros(7, 4), torch.zeros(6, dtype=torch.int64), ValueError, r"shape \(7,\), got \(6,\)"),
        (torch.zeros(2, 4), torch.zeros(2), TypeError, "labels must be int64, got torch.float32"),
    ],
)
def test_malformed_targets(boxes: Tensor, labels: Tensor, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        usable_objects({"boxes": boxes, "labels": labels})


def test_levels_must_match() -> None:
    with pytest.raises(ValueError, match="must match, got 3, 2, 3"):
        assign_locations(_points(), (8, 16), size_ranges(STRIDES), _random_boxes(1, 0))
