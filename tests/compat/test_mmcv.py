"""nasdet.compat.mmcv against values computed by hand, since mmcv itself cannot be installed here."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nasdet.compat import mmcv, torchvision

# Row 1 overlaps row 0 by 80/120 = 2/3 (with offset 1: 99/143 = 0.6923), row 2 by nothing, row 3 overlaps row 2 by 0.25.
BOXES = [[0.0, 0.0, 10.0, 10.0], [2.0, 0.0, 12.0, 10.0], [20.0, 20.0, 28.0, 28.0], [20.0, 20.0, 24.0, 24.0]]
SCORES = [0.5, 0.9, 0.7, 0.3]


def boxes() -> tuple[Tensor, Tensor]:
    return torch.tensor(BOXES), torch.tensor(SCORES)


SIGNATURES: dict[str, list[tuple[str, Any]]] = {
    "nms": [("offset", 0), ("score_threshold", 0), ("max_num", -1)],
    "soft_nms": [
        ("iou_threshold", 0.3),
        ("sigma", 0.5),
        ("min_score", 1e-3),
        ("method", "linear"),
        ("offset", 0),
    ],
    "batched_nms": [("class_agnostic", False)],
    "roi_align": [("spatial_scale", 1.0), ("sampling_ratio", 0), ("pool_mode", "avg"), ("aligned", True)],
    "RoIAlign": [
        ("spatial_scale", 1.0),
        ("sampling_ratio", 0),
        ("pool_mode", "avg"),
        ("aligned", True),
        ("use_torchvision", False),
    ],
    "sigmoid_focal_loss": [("gamma", 2.0), ("alpha", 0.25), ("weight", None), ("reduction", "mean")],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_defaults_and_their_order(name: str) -> None:
    parameters = inspect.signature(getattr(mmcv, name)).parameters.values()
    positional = [(p.name, p.default) for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional[-len(SIGNATURES[name]) :] == SIGNATURES[name]


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        pytest.param({"iou_threshold": 0.5}, [1, 2, 3], id="plain"),
        pytest.param({"iou_threshold": 0.68}, [1, 2, 0, 3], id="below-the-threshold"),
        pytest.param({"iou_threshold": 0.68, "offset": 1}, [1, 2, 3], id="offset-makes-them-overlap-more"),
        pytest.param({"iou_threshold": 0.2}, [1, 2], id="low-threshold"),
        pytest.param({"iou_threshold": 0.5, "score_threshold": 0.3}, [1, 2], id="score-threshold-is-strict"),
        pytest.param({"iou_threshold": 0.5, "max_num": 1}, [1], id="max-num"),
        pytest.param({"iou_threshold": 0.5, "max_num": 0}, [1, 2, 3], id="max-num-0-is-no-limit"),
        pytest.param({"iou_thr": 0.2}, [1, 2], id="older-name"),
    ],
)
def test_nms(arguments: dict[str, Any], rows: list[int]) -> None:
    tensor, scores = boxes()
    dets, inds = mmcv.nms(tensor, scores, **arguments)
    assert inds.tolist() == rows and inds.dtype == torch.int64
    assert torch.equal(dets, torch.cat((tensor[rows], scores[rows][:, None]), 1))


def test_nms_of_numpy_arrays_gives_numpy_arrays() -> None:
    tensor, scores = boxes()
    dets, inds = mmcv.nms(tensor.numpy(), scores.numpy(), 0.5)
    expected, rows = mmcv.nms(tensor, scores, 0.5)
    assert isinstance(dets, np.ndarray) and isinstance(inds, np.ndarray)
    assert np.array_equal(dets, expected.numpy()) and np.array_equal(inds, rows.numpy())
    reversed_rows = mmcv.nms(tensor.numpy()[::-1], scores.numpy()[::-1], 0.5)[1]
    assert reversed_rows.tolist() == [3 - row for row in rows.tolist()]


def test_nms_of_nothing() -> None:
    dets, inds = mmcv.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)
    assert dets.shape == (0, 5) and inds.shape == (0,) and inds.dtype == torch.int64


def test_nms_refuses() -> None:
    tensor, scores = boxes()
    with pytest.raises(ValueError, match="offset must be 0 or 1, got 2"):
        mmcv.nms(tensor, scores, 0.5, offset=2)
    with pytest.raises(TypeError, match="iou_threshold must be given once .* got both"):
        mmcv.nms(tensor, scores, 0.5, iou_thr=0.5)
    with pytest.raises(TypeError, match="iou_threshold must be given once .* got none"):
        mmcv.nms(tensor, scores)
    with pytest.raises(TypeError, match="boxes must be a tensor or a numpy array, got list"):
        mmcv.nms(BOXES, scores, 0.5)
    with pytest.raises(ValueError, match="boxes must"):
        mmcv.nms(torch.rand(4, 5), scores, 0.5)


@pytest.mark.parametrize(
    ("arguments", "rows", "scores"),
    [
        # linear: a score is multiplied by 1 - IoU where the IoU is above the threshold
        pytest.param({}, [1, 2, 3, 0], [0.9, 0.7, 0.3, 0.5 / 3], id="linear"),
        pytest.param({"iou_threshold": 0.2}, [1, 2, 3, 0], [0.9, 0.7, 0.225, 0.5 / 3], id="linear-low-threshold"),
        pytest.param({"iou_threshold": 0.7}, [1, 2, 0, 3], [0.9, 0.7, 0.5, 0.3], id="linear-high-threshold"),
        pytest.param(
            {"offset": 1}, [1, 2, 3, 0], [0.9, 0.7, 0.3 * (1 - 25 / 81), 0.5 * (1 - 99 / 143)], id="linear-offset"
        ),
        # gaussian: multiplied by exp(-IoU^2 / sigma), whatever the threshold
        pytest.param(
            {"method": "gaussian"},
            [1, 2, 3, 0],
            [0.9, 0.7, 0.3 * math.exp(-0.0625 / 0.5), 0.5 * math.exp(-(4 / 9) / 0.5)],
            id="gaussian",
        ),
        pytest.param(
            {"method": "gaussian", "sigma": 2.0},
            [1, 2, 0, 3],
            [0.9, 0.7, 0.5 * math.exp(-(4 / 9) / 2), 0.3 * math.exp(-0.0625 / 2)],
            id="gaussian-wide",
        ),
        pytest.param({"method": "naive", "iou_threshold": 0.5}, [1, 2, 3], [0.9, 0.7, 0.3], id="naive"),
        pytest.param({"min_score": 0.2}, [1, 2, 3], [0.9, 0.7, 0.3], id="min-score"),
    ],
)
def test_soft_nms(arguments: dict[str, Any], rows: list[int], scores: list[float]) -> None:
    tensor, values = boxes()
    dets, inds = mmcv.soft_nms(tensor, values, **arguments)
    assert inds.tolist() == rows and inds.dtype == torch.int64
    assert torch.equal(dets[:, :4], tensor[rows])
    torch.testing.assert_close(dets[:, 4], torch.tensor(scores))
    as_arrays = mmcv.soft_nms(tensor.numpy(), values.numpy(), **arguments)
    assert np.array_equal(as_arrays[0], dets.numpy()) and np.array_equal(as_arrays[1], inds.numpy())


def test_soft_nms_refuses() -> None:
    tensor, scores = boxes()
    with pytest.raises(ValueError, match="method must"):
        mmcv.soft_nms(tensor, scores, method="softer")
    with pytest.raises(ValueError, match="offset must be 0 or 1, got -1"):
        mmcv.soft_nms(tensor, scores, offset=-1)


CLASSES = torch.tensor([0, 1, 0, 0])


@pytest.mark.parametrize(
    ("cfg", "agnostic", "rows", "scores"),
    [
        pytest.param({"type": "nms", "iou_threshold": 0.2}, False, [1, 2, 0], [0.9, 0.7, 0.5], id="nms"),
        pytest.param({"iou_threshold": 0.5}, False, [1, 2, 0, 3], SCORES, id="type-is-nms"),
        pytest.param({"type": "nms", "iou_thr": 0.2}, False, [1, 2, 0], SCORES, id="older-name"),
        pytest.param({"iou_threshold": 0.2}, True, [1, 2], SCORES, id="agnostic-argument"),
        pytest.param({"iou_threshold": 0.2, "class_agnostic": True}, False, [1, 2], SCORES, id="agnostic-entry"),
        pytest.param({"iou_threshold": 0.2, "class_agnostic": False}, True, [1, 2, 0], SCORES, id="entry-goes-before"),
        pytest.param({"iou_threshold": 0.2, "max_num": 2, "split_thr": 1}, False, [1, 2], SCORES, id="max-num"),
        pytest.param({"iou_threshold": 0.5, "score_threshold": 0.4}, False, [1, 2, 0], SCORES, id="score-threshold"),
        pytest.param({"type": "soft_nms", "min_score": 0.2}, True, [1, 2, 3], SCORES, id="soft-agnostic"),
        pytest.param(
            {"type": "soft_nms", "iou_threshold": 0.2, "method": "linear"},
            False,
            [1, 2, 0, 3],
            [0.9, 0.7, 0.5, 0.225],
            id="soft",
        ),
        pytest.param({"type": "soft_nms", "max_num": 1}, False, [1], SCORES, id="soft-max-num"),
        pytest.param(None, False, [1, 2, 0, 3], SCORES, id="only-sorted"),
    ],
)
def test_batched_nms(cfg: dict[str, Any] | None, agnostic: bool, rows: list[int], scores: list[float]) -> None:
    tensor, values = boxes()
    expected = values[rows] if scores is SCORES else torch.tensor(scores)
    before = None if cfg is None else dict(cfg)
    dets, keep = mmcv.batched_nms(tensor, values, CLASSES, cfg, class_agnostic=agnostic)
    assert keep.tolist() == rows and cfg == before
    assert torch.equal(dets[:, :4], tensor[rows])
    torch.testing.assert_close(dets[:, 4], expected)


def test_batched_nms_keeps_classes_apart_at_negative_coordinates() -> None:
    same = torch.tensor([[-100.0, -100.0, -90.0, -90.0]] * 2)
    _, keep = mmcv.batched_nms(same, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), {"iou_threshold": 0.5})
    assert keep.tolist() == [0, 1]


def test_batched_nms_refuses() -> None:
    tensor, scores = boxes()
    with pytest.raises(ValueError, match=r"nms_cfg\['type'\] must be one of \['nms', 'soft_nms'\], got 'nms_rotated'"):
        mmcv.batched_nms(tensor, scores, CLASSES, {"type": "nms_rotated", "iou_threshold": 0.5})
    with pytest.raises(TypeError, match=r"nms_cfg must have entries of nms only, got \['sigma'\]"):
        mmcv.batched_nms(tensor, scores, CLASSES, {"iou_threshold": 0.5, "sigma": 1})
    with pytest.raises(TypeError, match="iou_threshold must be given once"):
        mmcv.batched_nms(tensor, scores, CLASSES, {"type": "nms"})


def ramp(height: int, width: int) -> Tensor:
    """A map whose value at pixel (y, x) is 10 y + x."""
    y, x = torch.arange(height)[:, None], torch.arange(width)[None]
    return (10.0 * y + x)[None, None]


# A bilinear sample of a ramp is exact, so a bin holds the ramp's value at the bin's middle. With `aligned` that middle
# lies half a pixel up and left of where the older form has it.
ROI = torch.tensor([[0.0, 4.0, 2.0, 8.0, 6.0]])
MIDDLES_Y, MIDDLES_X = torch.tensor([3.0, 5.0]), torch.tensor([5.0, 7.0])


def test_roi_align_shifts_by_half_a_pixel_unless_told_otherwise() -> None:
    shifted = 10 * (MIDDLES_Y[:, None] - 0.5) + (MIDDLES_X[None] - 0.5)
    torch.testing.assert_close(mmcv.roi_align(ramp(12, 12), ROI, 2)[0, 0], shifted)
    torch.testing.assert_close(mmcv.RoIAlign(2)(ramp(12, 12), ROI)[0, 0], shifted)
    plain = 10 * MIDDLES_Y[:, None] + MIDDLES_X[None]
    torch.testing.assert_close(mmcv.roi_align(ramp(12, 12), ROI, (2, 2), 1.0, 0, "avg", False)[0, 0], plain)
    torch.testing.assert_close(mmcv.RoIAlign((2, 2), aligned=False)(ramp(12, 12), ROI)[0, 0], plain)


def test_roi_align_positions_mean_what_they_mean_in_mmcv() -> None:
    maps, rois = torch.randn(2, 3, 9, 11), torch.tensor([[1, 3.0, 2.0, 30.0, 25.0], [0, 0.0, 0.0, 44.0, 36.0]])
    got = mmcv.roi_align(maps, rois, (3, 2), 0.25, 2)
    assert torch.equal(got, torchvision.roi_align(maps, rois, (3, 2), 0.25, 2, True))
    module = mmcv.RoIAlign((3, 2), 0.25, 2)
    assert torch.equal(module(maps, rois), got)
    older = mmcv.RoIAlign(out_size=(3, 2), spatial_scale=0.25, sample_num=2, use_torchvision=True)
    assert torch.equal(older(maps, rois), got)
    assert module.output_size == (3, 2) and mmcv.RoIAlign(7).output_size == (7, 7)
    assert "sampling_ratio=2" in repr(module) and "aligned=True" in repr(module)


def test_roi_align_refuses() -> None:
    with pytest.raises(ValueError, match="pool_mode must be 'avg' .* got 'max'"):
        mmcv.roi_align(ramp(4, 4), ROI, 2, 1.0, 0, "max")
    with pytest.raises(ValueError, match="pool_mode must be 'avg' .* got 'max'"):
        mmcv.RoIAlign(2, pool_mode="max")
    with pytest.raises(TypeError, match="output_size must be given once .* got none"):
        mmcv.RoIAlign()


def focal_by_hand(logits: Tensor, target: list[int], gamma: float, alpha: float) -> Tensor:
    """The formula element by element, in Python's own float64."""
    rows = []
    for values, label in zip(logits.tolist(), target, strict=True):
        row = []
        for column, x in enumerate(values):
            p = 1 / (1 + math.exp(-x))
            positive, negative = -alpha * (1 - p) ** gamma * math.log(p), -(1 - alpha) * p**gamma * math.log(1 - p)
            row.append(positive if column == label else negative)
        rows.append(row)
    return torch.tensor(rows, dtype=torch.float64)


LOGITS = torch.tensor([[0.3, -1.2, 2.0], [0.0, 0.7, -0.4], [1.5, -2.5, 0.1], [-0.6, 0.2, 0.9]], dtype=torch.float64)
TARGET = [2, 0, 3, 1]  # 3 = C: background


@pytest.mark.parametrize(("gamma", "alpha"), [(2.0, 0.25), (1.5, 0.6), (0.0, 0.5)])
def test_focal_loss_by_hand(gamma: float, alpha: float) -> None:
    expected, target = focal_by_hand(LOGITS, TARGET, gamma, alpha), torch.tensor(TARGET)
    torch.testing.assert_close(mmcv.sigmoid_focal_loss(LOGITS, target, gamma, alpha, None, "none"), expected)
    torch.testing.assert_close(mmcv.sigmoid_focal_loss(LOGITS, target, gamma, alpha, None, "sum"), expected.sum())
    mean = mmcv.sigmoid_focal_loss(LOGITS, target, gamma, alpha)
    torch.testing.assert_close(mean, expected.sum() / 4)  # by rows, not by elements


def test_focal_loss_defaults() -> None:
    expected = focal_by_hand(LOGITS, TARGET, 2.0, 0.25).sum() / 4
    torch.testing.assert_close(mmcv.sigmoid_focal_loss(LOGITS, torch.tensor(TARGET)), expected)


def test_focal_loss_weighs_rows_by_their_class() -> None:
    weight, target = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64), torch.tensor(TARGET)
    expected = focal_by_hand(LOGITS, TARGET, 2.0, 0.25) * torch.tensor([[5.0], [2.0], [1.0], [3.0]])
    torch.testing.assert_close(mmcv.sigmoid_focal_loss(LOGITS, target, 2.0, 0.25, weight, "none"), expected)
    torch.testing.assert_close(mmcv.sigmoid_focal_loss(LOGITS, target, weight=weight), expected.sum() / 4)


def test_focal_loss_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    weight = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: mmcv.sigmoid_focal_loss(x, torch.tensor(TARGET)), logits)
    assert torch.autograd.gradcheck(lambda x: mmcv.sigmoid_focal_loss(x, torch.tensor(TARGET), weight=weight), logits)


def test_focal_loss_of_no_rows_is_zero() -> None:
    assert mmcv.sigmoid_focal_loss(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).item() == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param(
            (torch.zeros(3), torch.zeros(3).long()), ValueError, r"input must have shape \(N, C\)", id="input"
        ),
        pytest.param((torch.zeros(3, 2), torch.zeros(3)), TypeError, "target must be an int64 tensor", id="dtype"),
        pytest.param(
            (torch.zeros(3, 2), torch.zeros(2).long()), ValueError, r"target must have shape \(3,\)", id="rows"
        ),
        pytest.param(
            (torch.zeros(3, 2), torch.zeros(3).long(), 2.0, 0.25, torch.zeros(3)),
            ValueError,
            r"weight must have shape \(2,\), got \(3,\)",
            id="weight",
        ),
        pytest.param(
            (torch.zeros(3, 2), torch.zeros(3).long(), 2.0, 0.25, None, "average"),
            ValueError,
            "reduction must be 'none', 'mean' or 'sum', got 'average'",
            id="reduction",
        ),
    ],
)
def test_focal_loss_refuses(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mmcv.sigmoid_focal_loss(*arguments)
