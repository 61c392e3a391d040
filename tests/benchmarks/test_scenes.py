"""The random boxes of the detection benchmarks are what their results are said to be about."""

from __future__ import annotations

import pytest
import torch

from nasdet._cases import Inputs

scenes = pytest.importorskip("scenes", reason="no benchmarks beside these tests")


def test_boxes_are_not_empty_lie_in_the_image_and_on_the_grid() -> None:
    boxes = scenes.clustered_boxes(Inputs(), 20_000)
    assert boxes.shape == (20_000, 4) and boxes.dtype == torch.float32
    assert bool((boxes[:, 2:] > boxes[:, :2]).all())
    assert float(boxes.min()) >= 0.0
    limits = torch.tensor([scenes.WIDTH, scenes.HEIGHT, scenes.WIDTH, scenes.HEIGHT]) + 1 / scenes.GRID
    assert bool((boxes <= limits).all())
    assert torch.equal(boxes * scenes.GRID, torch.round(boxes * scenes.GRID))


def test_offsets_by_class_round_nothing_away() -> None:
    boxes = scenes.clustered_boxes(Inputs(), 5000)
    offset = 79 * (boxes.max() + 1)
    assert torch.equal((boxes + offset) - offset, boxes)


def test_boxes_overlap_in_clusters() -> None:
    boxes = scenes.clustered_boxes(Inputs(), 600)
    low, high = torch.maximum(boxes[:, None, :2], boxes[:, :2]), torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
    inter = (high - low).clamp(min=0).prod(2)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    iou = inter / (area[:, None] + area - inter)
    overlapping = (iou > 0.5).sum(1) - 1
    assert 1.0 < float(overlapping.float().mean()) < 10.0


def test_sizes_reach_every_level_of_a_pyramid() -> None:
    rois = scenes.regions(Inputs(), 1000)
    assert rois.shape == (1000, 5) and bool((rois[:, 0] == 0).all())
    side = (rois[:, 3:] - rois[:, 1:3]).prod(1).sqrt()
    level = torch.floor(4 + torch.log2(side / 224)).clamp(2, 5)
    assert int(torch.bincount(level.long())[2:].min()) > 50
    shapes = [tuple(x.shape) for x in scenes.pyramid(Inputs(), 3, "channels_last")]
    assert shapes == [(1, 3, 200, 336), (1, 3, 100, 168), (1, 3, 50, 84), (1, 3, 25, 42)]


def test_no_two_scores_are_alike_and_everything_repeats() -> None:
    scores = scenes.distinct_scores(Inputs(), 20_000)
    assert len(scores.unique()) == 20_000 and 0.0 < float(scores.min()) and float(scores.max()) < 1.0
    assert torch.equal(scores, scenes.distinct_scores(Inputs(), 20_000))
    assert torch.equal(scenes.clustered_boxes(Inputs(), 99), scenes.clustered_boxes(Inputs(), 99))
    assert not torch.equal(scenes.clustered_boxes(Inputs(), 99), scenes.clustered_boxes(Inputs(seed=1), 99))
    classes = scenes.class_ids(Inputs(), 5000)
    assert classes.dtype == torch.int64 and set(classes.tolist()) == set(range(80))
