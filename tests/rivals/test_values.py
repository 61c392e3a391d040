"""The operators' values beside torchvision's, on random and on degenerate inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nasdet.compat import torchvision as ours
from nasdet.testing import assert_close, assert_gradient_matches, tolerance

Draw = Callable[..., Tensor]
COUNTS = (0, 1, 2, 17, 64, 65, 300)
THRESHOLDS = (0.5, 0.3, 0.7, 0.0, 1.0, -0.5, 2.0, 0.25)
FLOATS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_scores(count: int, seed: int, dtype: torch.dtype, ties: bool) -> Tensor:
    scores = torch.rand(count, generator=generator(seed), dtype=torch.float64)
    return ((scores * 8).floor() / 8 if ties else scores).to(dtype)


@FLOATS
@pytest.mark.parametrize("ties", [False, True], ids=["distinct", "ties"])
def test_nms_keeps_the_same_rows_in_the_same_order(tv: Any, draw_boxes: Draw, ties: bool, dtype: torch.dtype) -> None:
    for seed in range(6):
        for count in COUNTS:
            boxes, scores = draw_boxes(count, generator(seed), dtype), draw_scores(count, seed, dtype, ties)
            threshold = THRESHOLDS[(seed + count) % len(THRESHOLDS)]
            expected = tv.nms(boxes, scores, threshold)
            got = ours.nms(boxes, scores, threshold)
            assert got.dtype == expected.dtype and got.tolist() == expected.tolist(), (seed, count, threshold)


def test_nms_of_many_boxes(tv: Any, clustered: Draw) -> None:
    boxes, scores = clustered(5000, generator(0)), draw_scores(5000, 0, torch.float32, True)
    for threshold in (0.1, 0.5, 0.9):
        assert torch.equal(ours.nms(boxes, scores, threshold), tv.nms(boxes, scores, threshold))


@FLOATS
def test_nms_orders_unusual_scores_as_torchvision_does(tv: Any, clustered: Draw, dtype: torch.dtype) -> None:
    boxes = clustered(40, generator(3), dtype)
    scores = draw_scores(40, 3, dtype, True)
    scores[[3, 20]] = torch.nan
    scores[[5, 21]] = torch.inf
    scores[[6, 22]] = -torch.inf
    scores[7], scores[23] = 0.0, -0.0
    for threshold in (0.2, 0.5, 1.0):
        assert ours.nms(boxes, scores, threshold).tolist() == tv.nms(boxes, scores, threshold).tolist()


@FLOATS
@pytest.mark.parametrize(
    "overlap", [(3, 10), (1, 2), (7, 10), (1, 3), (3, 5)], ids=lambda pair: f"{pair[0]}-of-{pair[1]}"
)
def test_nms_at_the_threshold_itself(tv: Any, overlap: tuple[int, int], dtype: torch.dtype) -> None:
    """A box inside another, covering an exact fraction of it."""
    part, whole = overlap
    boxes = torch.tensor([[0, 0, whole, 1], [0, 0, part, 1]], dtype=dtype)
    scores = torch.tensor([0.9, 0.8], dtype=dtype)
    for threshold in (part / whole, float(torch.tensor(part / whole))):
        assert ours.nms(boxes, scores, threshold).tolist() == tv.nms(boxes, scores, threshold).tolist()


@FLOATS
def test_batched_nms_is_torchvisions_loop_over_classes(tv: Any, draw_boxes: Draw, dtype: torch.dtype) -> None:
    from torchvision.ops.boxes import _batched_nms_vanilla

    for seed in range(6):
        for count in COUNTS:
            boxes, scores = draw_boxes(count, generator(seed), dtype), draw_scores(count, seed, dtype, False)
            idxs = torch.randint(0, 1 + 3 * seed, (count,), generator=generator(seed))
            expected = _batched_nms_vanilla(boxes, scores, idxs, 0.4)
            assert ours.batched_nms(boxes, scores, idxs, 0.4).tolist() == expected.tolist(), (seed, count)


def test_batched_nms_is_torchvisions_public_call_on_ordinary_boxes(tv: Any, clustered: Draw) -> None:
    for count in (900, 3000):  # either side of where torchvision changes its method
        boxes = clustered(count, generator(count)) + 200  # none negative
        scores = draw_scores(count, count, torch.float32, False)
        idxs = torch.randint(0, 80, (count,), generator=generator(count))
        assert torch.equal(ours.batched_nms(boxes, scores, idxs, 0.5), tv.batched_nms(boxes, scores, idxs, 0.5))


def test_batched_nms_keeps_the_stable_order_of_ties(tv: Any, clustered: Draw) -> None:
    boxes = clustered(400, generator(0))
    scores, idxs = draw_scores(400, 0, torch.float32, True), torch.randint(0, 9, (400,), generator=generator(0))
    got = ours.batched_nms(boxes, scores, idxs, 0.5)
    order = sorted(got.tolist(), key=lambda row: (-scores[row].item(), row))
    assert got.tolist() == order
    assert sorted(order) == sorted(tv.boxes._batched_nms_vanilla(boxes, scores, idxs, 0.5).tolist())


def make_rois(count: int, images: int, seed: int, side: float, dtype: torch.dtype) -> Tensor:
    """RoIs in and around a square of ``side`` pixels: inside, across the border, far outside, inverted, empty."""
    values = torch.rand(count, 5, generator=generator(seed), dtype=torch.float64)
    start = (values[:, 1:3] * 1.6 - 0.3) * side
    size = values[:, 3:5] ** 2 * 0.8 * side
    kind = torch.arange(count) % 12
    size[kind == 3] *= -0.3
    size[kind == 5] = 0
    start[kind == 7] += 3 * side
    batch = torch.randint(0, images, (count, 1), generator=generator(seed)).double()
    return torch.cat((batch, start, start + size), 1).to(dtype)


ROI_OPTIONS = [
    pytest.param((7, 7), 0.25, 2, False, id="7x7-two-samples"),
    pytest.param((7, 7), 0.25, 0, True, id="7x7-adaptive-aligned"),
    pytest.param((7, 7), 0.125, -1, False, id="7x7-adaptive"),
    pytest.param((14, 14), 0.25, 2, True, id="14x14-aligned"),
    pytest.param((3, 5), 0.5, 3, True, id="3x5-three-samples"),
    pytest.param((1, 1), 1.0, 1, False, id="1x1"),
    pytest.param((2, 9), 0.3, 4, False, id="2x9-odd-scale"),
]


@FLOATS
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize(("size", "scale", "sampling", "aligned"), ROI_OPTIONS)
def test_roi_align_and_its_gradient(
    tv: Any, size: tuple[int, int], scale: float, sampling: int, aligned: bool, layout: str, dtype: torch.dtype
) -> None:
    maps = torch.randn(2, 19, 17, 23, generator=generator(1), dtype=dtype)
    if layout == "channels_last":
        maps = maps.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        maps = maps[..., ::2]
    rois = make_rois(36, 2, 2, 20 / scale, dtype)
    mine, theirs = maps.detach().requires_grad_(), maps.detach().contiguous().requires_grad_()
    got = ours.roi_align(mine, rois, size, scale, sampling, aligned)
    expected = tv.roi_align(theirs, rois, size, scale, sampling, aligned)
    terms = 4 * max(sampling, 20) ** 2
    assert got.dtype == dtype
    assert_close(got, expected, tolerance(dtype, terms, maps.abs().max().item()), "pooled")
    upstream = torch.randn(expected.shape, generator=generator(5), dtype=dtype)
    (gradient,) = torch.autograd.grad(got, mine, upstream)
    (wanted,) = torch.autograd.grad(expected, theirs, upstream)
    bound = tolerance(dtype, rois.shape[0] * size[0] * size[1], max(wanted.abs().max().item(), 1.0))
    assert_gradient_matches(gradient, wanted, bound, "gradient of the map")


def test_roi_align_of_a_list_of_boxes_and_of_nothing(tv: Any) -> None:
    maps = torch.randn(2, 4, 9, 9, generator=generator(0))
    first, second = torch.tensor([[1.0, 1.0, 6.0, 5.0]]), torch.tensor([[0.0, 2.0, 8.0, 8.0], [3.0, 3.0, 4.0, 9.0]])
    for boxes in ([first, second], [first, second[:0]], [first[:0], second], [first[:0], second[:0]]):
        got, expected = ours.roi_align(maps, boxes, 3), tv.roi_align(maps, boxes, 3)
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected)
    for shape in ((0, 4, 9, 9), (2, 0, 9, 9)):
        got = ours.roi_align(torch.rand(shape, requires_grad=True), torch.zeros(0, 5), (2, 3))
        assert got.shape == (0, shape[1], 2, 3) and got.requires_grad


def pyramid(seed: int, dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """Maps of a 200 x 300 image at strides 4, 8, 16, 32, and one more that a pooler must pass over."""
    made = {
        str(level): torch.randn(
            2, 6, 200 // stride + 1, 300 // stride + 1, generator=generator(seed + level), dtype=dtype
        )
        for level, stride in enumerate((4, 8, 16, 32))
    }
    return made | {"pool": torch.zeros(2, 6, 4, 5, dtype=dtype)}, (200, 300)


def image_boxes(count: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    values = torch.rand(count, 4, generator=generator(seed), dtype=torch.float64)
    start = values[:, :2] * torch.tensor([250.0, 150.0])
    size = 4 * torch.exp(values[:, 2:] * 5.2)  # sides of 4 to 725 pixels: every level gets some
    return torch.cat((start, start + size), 1).to(dtype)


@FLOATS
@pytest.mark.parametrize(
    ("output", "sampling", "options"),
    [
        pytest.param(7, 2, {}, id="boxes"),
        pytest.param(14, 2, {}, id="masks"),
        pytest.param((3, 5), 0, {}, id="adaptive"),
        pytest.param(2, -1, {"canonical_scale": 100, "canonical_level": 3}, id="canonical"),
    ],
)
def test_multi_scale_roi_align(
    tv: Any, output: Any, sampling: int, options: dict[str, int], dtype: torch.dtype
) -> None:
    names = ["0", "1", "2", "3"]
    maps, size = pyramid(0, dtype)
    mine = {name: m.clone().requires_grad_() for name, m in maps.items()}
    theirs = {name: m.clone().requires_grad_() for name, m in maps.items()}
    boxes = [image_boxes(60, 1, dtype), image_boxes(31, 2, dtype)]
    got = ours.MultiScaleRoIAlign(names, output, sampling, **options)(mine, boxes, [size, (180, 300)])
    expected = tv.MultiScaleRoIAlign(names, output, sampling, **options)(theirs, boxes, [size, (180, 300)])
    assert_close(got, expected, tolerance(dtype, 4 * 50**2, 5.0), "pooled")
    upstream = torch.randn(expected.shape, generator=generator(9), dtype=dtype)
    gradients = torch.autograd.grad(got, [mine[n] for n in names], upstream)
    wanted = torch.autograd.grad(expected, [theirs[n] for n in names], upstream)
    for name, gradient, right in zip(names, gradients, wanted, strict=True):
        bound = tolerance(dtype, expected[:, 0].numel(), max(right.abs().max().item(), 1.0))
        assert_gradient_matches(gradient, right, bound, f"gradient of level {name}")


@pytest.mark.parametrize("names", [["0"], ["2"], ["1", "2"], ["0", "1", "2", "3"]], ids="-".join)
def test_multi_scale_roi_align_of_some_levels_and_of_no_boxes(tv: Any, names: list[str]) -> None:
    maps, size = pyramid(3)
    mine, theirs = ours.MultiScaleRoIAlign(names, 4, 2), tv.MultiScaleRoIAlign(names, 4, 2)
    for counts in ((8, 5), (0, 5), (0, 0), (1, 0)):
        boxes = [image_boxes(count, 4 + i) for i, count in enumerate(counts)]
        got, expected = mine(maps, boxes, [size, size]), theirs(maps, boxes, [size, size])
        assert got.shape == expected.shape
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@FLOATS
def test_levels_change_exactly_where_torchvisions_do(tv: Any, dtype: torch.dtype) -> None:
    maps = {
        str(i): torch.full((1, 1, 1024 // s, 1024 // s), float(i), dtype=dtype) for i, s in enumerate((4, 8, 16, 32))
    }
    sides = [b * (1 + d) for b in (112.0, 224.0, 448.0) for d in (0, 1e-7, -1e-7, -5e-7, -1e-6, -2e-6, 1e-3, -1e-3)]
    boxes = torch.tensor([[0.0, 0.0, side, side] for side in [0.0, 1.0, *sides, 1000.0]], dtype=dtype)
    tall = torch.stack((boxes[:, 0], boxes[:, 1], boxes[:, 2] / 4, boxes[:, 3] * 4), 1).clamp(max=1020)
    inverted = boxes[:4, [2, 3, 0, 1]]
    names = list(maps)
    for rows in (boxes, tall, inverted):
        got = ours.MultiScaleRoIAlign(names, 1, 1)(maps, [rows], [(1024, 1024)])
        expected = tv.MultiScaleRoIAlign(names, 1, 1)(maps, [rows], [(1024, 1024)])
        assert got.flatten().round().tolist() == expected.flatten().round().tolist()


@pytest.mark.parametrize("name", ["box_iou", "generalized_box_iou"])
@FLOATS
def test_overlaps(tv: Any, draw_boxes: Draw, name: str, dtype: torch.dtype) -> None:
    for counts in ((0, 3), (1, 1), (40, 23)):
        a, b = draw_boxes(counts[0], generator(0), dtype), draw_boxes(counts[1], generator(1), dtype)
        got, expected = getattr(ours, name)(a, b), getattr(tv, name)(a, b)
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
def test_overlaps_of_integers(tv: Any, dtype: torch.dtype) -> None:
    corner = torch.randint(0, 60, (20, 2), generator=generator(0))
    boxes = torch.cat((corner, corner + torch.randint(1, 60, (20, 2), generator=generator(1))), 1).to(dtype)
    for name in ("box_iou", "generalized_box_iou"):
        got, expected = getattr(ours, name)(boxes, boxes[:7]), getattr(tv, name)(boxes, boxes[:7])
        assert got.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(got, expected)


@FLOATS
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    ("alpha", "gamma"), [(0.25, 2), (0.25, 2.0), (-1, 2), (0.0, 1), (1.0, 0), (0.6, 1.5), (0.5, 0.5)]
)
def test_focal_loss(tv: Any, alpha: float, gamma: float, reduction: str, dtype: torch.dtype) -> None:
    logits = (2 * torch.randn(37, 11, generator=generator(0), dtype=torch.float64)).to(dtype)
    targets = (torch.rand(37, 11, generator=generator(1)) < 0.2).to(dtype)
    targets[0] = torch.rand(11, generator=generator(2)).to(dtype)  # soft
    mine, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    got = ours.sigmoid_focal_loss(mine, targets, alpha, gamma, reduction)
    expected = tv.sigmoid_focal_loss(theirs, targets, alpha, gamma, reduction)
    assert got.dtype == expected.dtype and got.shape == expected.shape
    torch.testing.assert_close(got, expected)
    (gradient,) = torch.autograd.grad(got.sum(), mine)
    (wanted,) = torch.autograd.grad(expected.sum(), theirs)
    torch.testing.assert_close(gradient, wanted)
