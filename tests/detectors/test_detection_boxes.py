from __future__ import annotations

import pytest
import torch

from nasdet.detectors.parts.boxes import box_area, clip_boxes, decode_ltrb, encode_ltrb, giou, iou, pairwise_iou
from nasdet.detectors.parts.locations import flatten_levels, level_points, pyramid_points
from nasdet.detectors.parts.postprocess import AS_MANY, top_candidates


def _boxes(count: int, seed: int = 0, low: float = -50, span: float = 100) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * span + low
    return torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * span * 0.6 + 0.1], dim=1)


def _formula(a: list[float], b: list[float]) -> tuple[float, float]:
    """IoU and GIoU of two boxes in plain Python (float64)."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    union = sum(areas) - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    return width * height / union, width * height / union - (hull - union) / hull


def test_iou_and_giou_match_the_formula() -> None:
    a, b = _boxes(40, 1), _boxes(40, 2)
    for index in range(40):
        overlap, general = _formula(a[index].double().tolist(), b[index].double().tolist())
        assert float(iou(a, b)[index]) == pytest.approx(overlap, abs=2e-6)
        assert float(giou(a, b)[index]) == pytest.approx(general, abs=4e-6)
    table = pairwise_iou(a, b)
    assert table.shape == (40, 40) and torch.equal(table.diagonal(), iou(a, b))


def test_giou_invariants() -> None:
    a, b = _boxes(60, 3).double(), _boxes(60, 4).double()
    value = giou(a, b)
    assert torch.equal(value, giou(b, a)) and bool((value <= iou(a, b) + 1e-12).all()) and bool((value >= -1).all())
    torch.testing.assert_close(giou(a, a), torch.ones(60, dtype=torch.float64))
    torch.testing.assert_close(giou(a * 3 + 7, b * 3 + 7), value)


def test_giou_gradient() -> None:
    a, b = _boxes(8, 5).double().requires_grad_(), _boxes(8, 6).double()
    assert torch.autograd.gradcheck(lambda x: giou(x, b), a)


@pytest.mark.parametrize("a", [[0.0, 0, 0, 0], [5.0, 5, 5, 9]], ids=["point", "line"])
@pytest.mark.parametrize("b", [[0.0, 0, 0, 0], [1.0, 1, 3, 3]], ids=["point", "box"])
def test_giou_of_empty_boxes_is_finite(a: list[float], b: list[float]) -> None:
    box = torch.tensor([a], requires_grad=True)
    value = giou(box, torch.tensor([b]))
    value.sum().backward()
    assert bool(value.isfinite().all()) and box.grad is not None and bool(box.grad.isfinite().all())
    assert float(iou(box.detach(), torch.tensor([b]))) == 0.0


def test_area_counts_inverted_boxes_as_empty() -> None:
    assert box_area(torch.tensor([[0.0, 0, 2, 3], [2.0, 3, 0, 0], [1.0, 1, 0, 5]])).tolist() == [6, 0, 0]


def test_encoding_is_undone() -> None:
    boxes, points = _boxes(50, 7), torch.randn(50, 2) * 30
    torch.testing.assert_close(decode_ltrb(points, encode_ltrb(points, boxes)), boxes)
    assert encode_ltrb(torch.tensor([3.0, 4.0]), torch.tensor([1.0, 1, 10, 20])).tolist() == [2, 3, 7, 16]


def test_clip() -> None:
    boxes = torch.tensor([[-5.0, -5, 200, 300], [10.0, 20, 30, 40], [500.0, 500, 600, 600]])
    assert clip_boxes(boxes, (100, 50)).tolist() == [[0, 0, 50, 100], [10, 20, 30, 40], [50, 100, 50, 100]]


def test_points_are_cell_centres_in_map_order() -> None:
    assert level_points(2, 3, 8).tolist() == [[4, 4], [12, 4], [20, 4], [4, 12], [12, 12], [20, 12]]
    maps = [torch.arange(6.0).view(1, 1, 2, 3), torch.tensor([[[[6.0]]]])]
    assert flatten_levels(maps).flatten().tolist() == list(range(7))
    points = pyramid_points(maps, [8, 16])
    assert [len(level) for level in points] == [6, 1] and points[1].tolist() == [[8, 8]]
    with pytest.raises(ValueError, match=r"one entry per stride \(1\), got 2"):
        pyramid_points(maps, [8])


def _scene(count: int, classes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(count, generator=generator)
    return _boxes(count, seed), scores, torch.randint(classes, (count,), generator=generator)


@pytest.mark.parametrize(("count", "classes"), [(0, 3), (1, 1), (2, 1), (150, 1), (150, 4)])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.6, 1.0])
def test_finish_keeps_an_independent_dominating_set_per_class(count: int, classes: int, threshold: float) -> None:
    boxes, scores, labels = _scene(count, classes, 11)
    boxes = boxes + 60  # inside the picture: nothing is clipped
    result = AS_MANY.finish(boxes, scores, labels, (400, 400), threshold, count)
    assert result["labels"].dtype == torch.int64 and bool((result["scores"].diff() <= 0).all())
    kept = (scores == result["scores"][:, None]).nonzero()[:, 1]  # scores are distinct
    assert torch.equal(boxes[kept], result["boxes"]) and torch.equal(labels[kept], result["labels"])
    clash = (pairwise_iou(boxes, boxes) > threshold) & (labels[:, None] == labels[None])
    assert not bool(clash[kept][:, kept].triu(1).any())
    for dropped in set(range(count)) - set(kept.tolist()):
        assert bool((clash[dropped, kept] & (scores[kept] >= scores[dropped])).any())
    first = AS_MANY.finish(boxes, scores, labels, (400, 400), threshold, 5)
    assert torch.equal(first["boxes"], result["boxes"][:5]) and torch.equal(first["scores"], result["scores"][:5])


def test_finish_keeps_the_first_of_equal_scores_and_boxes_of_other_classes() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 10.5], [0.0, 0, 10, 10]])
    result = AS_MANY.finish(boxes, torch.ones(3), torch.tensor([4, 4, 2]), (20, 20), 0.5, 100)
    assert result["boxes"].tolist() == [[0, 0, 10, 10]] * 2 and result["labels"].tolist() == [4, 2]


def test_candidates() -> None:
    scores = torch.tensor([[0.1, 0.9], [0.9, float("nan")], [0.5, 0.7]])
    values, rows, columns = top_candidates(scores, scores > 0.2, 3)
    assert rows.tolist() == [0, 1, 2] and columns.tolist() == [1, 0, 1]
    torch.testing.assert_close(values, torch.tensor([0.9, 0.9, 0.7]))
    assert all(len(part) == 0 for part in top_candidates(scores, scores > 2, 3))
    assert len(top_candidates(scores, torch.ones_like(scores, dtype=torch.bool), 100)[0]) == 5


def test_finish_drops_empty_and_nan_boxes() -> None:
    nan, inf = float("nan"), float("inf")
    rows = [[-9.0, 2, 30, 8], [40.0, 0, 50, 10], [nan, 0, 5, 5], [0.0, 0, nan, 5], [-inf, -inf, inf, inf]]
    boxes = torch.tensor(rows)
    result = AS_MANY.finish(boxes, torch.linspace(0.5, 0.9, 5), torch.arange(5), (10, 20), 0.6, 100)
    assert result["boxes"].tolist() == [[0, 0, 20, 10], [0, 2, 20, 8]] and result["labels"].tolist() == [4, 0]
