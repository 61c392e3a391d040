from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nasdet.detectors.parts import matcher
from nasdet.detectors.parts.boxes import pairwise_iou
from nasdet.detectors.parts.matcher import BACKGROUND, IGNORED, match_boxes
from nasdet.detectors.parts.objects import Objects
from nasdet.detectors.parts.sampler import label_proposals, sample, sample_proposals


def _boxes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = (torch.rand(count, 2, generator=generator) * 20).floor()
    return torch.cat([corner, corner + 1 + (torch.rand(count, 2, generator=generator) * 12).floor()], dim=1)


def _one_by_one(anchors: Tensor, boxes: Tensor, low: float, high: float, keep_best: bool) -> list[int]:
    """The definition, an anchor at a time."""
    overlap = pairwise_iou(boxes, anchors)
    result = []
    for anchor in range(len(anchors)):
        column = overlap[:, anchor].tolist()
        best = max(column, default=0.0)
        forced = keep_best and any(v > 0 and v == float(overlap[box].max()) for box, v in enumerate(column))
        if forced or (best >= high and best > 0):
            result.append(column.index(best))
        else:
            result.append(BACKGROUND if best < low else IGNORED)
    return result


@pytest.mark.parametrize("pairs", [1 << 21, 300], ids=["at once", "in parts"])
@pytest.mark.parametrize("keep_best", [False, True])
@pytest.mark.parametrize(("low", "high"), [(0.3, 0.7), (0.4, 0.5), (0.5, 0.5)])
def test_follows_the_definition(
    low: float, high: float, keep_best: bool, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matcher, "_PAIRS", pairs)
    anchors, boxes = _boxes(120, 0), _boxes(9, 1)  # integer corners: many exact ties
    found = match_boxes(anchors, boxes, low, high, keep_best=keep_best)
    assert found.tolist() == _one_by_one(anchors, boxes, low, high, keep_best)


def test_a_box_that_nothing_touches_takes_nothing() -> None:
    anchors = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]])
    found = match_boxes(anchors, torch.tensor([[100.0, 100, 110, 110]]), 0.3, 0.7, keep_best=True)
    assert found.tolist() == [BACKGROUND, BACKGROUND]


def test_every_touched_box_is_learnt() -> None:
    anchors, boxes = _boxes(200, 2), torch.tensor([[3.25, 3.25, 4.0, 4.0], [0.0, 0, 30, 30]])
    found = match_boxes(anchors, boxes, 0.3, 0.99, keep_best=True)
    assert set(found.tolist()) >= {0, 1}


@pytest.mark.parametrize("bad", [[5.0, 5, 5, 9], [9, 9, 2, 2], [float("nan")] * 4], ids=["flat", "inverted", "nan"])
def test_anchors_that_are_no_boxes_are_background(bad: list[float]) -> None:
    found = match_boxes(torch.tensor([bad]), torch.tensor([[0.0, 0, 10, 10]]), 0.3, 0.7, keep_best=True)
    assert found.tolist() == [BACKGROUND]


def test_nothing_to_match() -> None:
    assert match_boxes(_boxes(4, 0), torch.zeros(0, 4), 0.3, 0.7, keep_best=True).tolist() == [BACKGROUND] * 4
    assert match_boxes(torch.zeros(0, 4), _boxes(3, 0), 0.3, 0.7, keep_best=True).shape == (0,)
    with pytest.raises(ValueError, match="0 <= low <= high, got 0.7 and 0.3"):
        match_boxes(_boxes(1, 0), _boxes(1, 0), 0.7, 0.3)


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [(100, 100, (8, 24)), (3, 100, (3, 29)), (100, 5, (8, 5)), (0, 3, (0, 3)), (2, 0, (2, 0)), (0, 0, (0, 0))],
)
def test_balance_of_a_sample(positives: int, negatives: int, expected: tuple[int, int]) -> None:
    matches = torch.cat([torch.full((positives,), 4), torch.full((negatives,), -1), torch.full((50,), -2)])
    matches = matches[torch.randperm(len(matches))]
    chosen, rest = sample(matches, 32, 0.25)
    assert (len(chosen), len(rest)) == expected
    assert bool((matches[chosen] == 4).all()) and bool((matches[rest] == -1).all())
    assert len({*chosen.tolist(), *rest.tolist()}) == len(chosen) + len(rest)


def test_a_sample_is_random_and_seeded() -> None:
    matches = torch.full((1000,), -1)
    torch.manual_seed(5)
    first = sample(matches, 10, 0.5)[1]
    second = sample(matches, 10, 0.5)[1]
    torch.manual_seed(5)
    assert torch.equal(first, sample(matches, 10, 0.5)[1]) and not torch.equal(first, second)
    with pytest.raises(ValueError, match="count must be positive"):
        sample(matches, 0, 0.5)


def _objects(boxes: list[list[float]], labels: list[int]) -> Objects:
    return Objects(
        torch.tensor(boxes).reshape(-1, 4), torch.tensor(labels, dtype=torch.int64), torch.arange(len(labels))
    )


def test_labels_of_proposals() -> None:
    batch = [_objects([[0.0, 0, 10, 10], [20, 20, 30, 30]], [4, 0]), _objects([], [])]
    proposals = [torch.tensor([[20.0, 20, 30, 29], [0, 0, 10, 6], [50, 50, 60, 60]]), torch.tensor([[0.0, 0, 9, 9]])]
    found = label_proposals(proposals, batch, 0.5)
    assert [v.tolist() for v in found.labels] == [[1, 5, 0], [0]]
    assert [v.tolist() for v in found.matches] == [[1, 0, 0], [0]]
    strict = label_proposals(proposals, batch, 0.7)
    assert [v.tolist() for v in strict.labels] == [[1, 0, 0], [0]]
    positives = found.positives()
    assert [len(v) for v in positives.boxes] == [2, 0] and positives.labels[0].tolist() == [1, 5]


def test_objects_are_proposals_too_and_no_image_is_empty() -> None:
    batch = [_objects([[0.0, 0, 10, 10]], [2]), _objects([], [])]
    found = sample_proposals([torch.zeros(0, 4)] * 2, batch, (64, 96), 0.5, 8, 0.25)
    assert found.boxes[0].tolist() == [[0, 0, 10, 10]] and found.labels[0].tolist() == [3]
    assert found.boxes[1].tolist() == [[0, 0, 96, 64]] and found.labels[1].tolist() == [0]
