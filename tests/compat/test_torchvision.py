"""nasdet.compat.torchvision without torchvision: signatures as published, box overlaps by hand."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from nasdet import compat
from nasdet.compat import torchvision as tv

# name -> (argument, default) in torchvision's order; `...` stands for no default
SIGNATURES: dict[str, list[tuple[str, Any]]] = {
    "nms": [("boxes", ...), ("scores", ...), ("iou_threshold", ...)],
    "batched_nms": [("boxes", ...), ("scores", ...), ("idxs", ...), ("iou_threshold", ...)],
    "roi_align": [
        ("input", ...),
        ("boxes", ...),
        ("output_size", ...),
        ("spatial_scale", 1.0),
        ("sampling_ratio", -1),
        ("aligned", False),
    ],
    "RoIAlign": [("output_size", ...), ("spatial_scale", ...), ("sampling_ratio", ...), ("aligned", False)],
    "MultiScaleRoIAlign": [
        ("featmap_names", ...),
        ("output_size", ...),
        ("sampling_ratio", ...),
        ("canonical_scale", 224),
        ("canonical_level", 4),
    ],
    "box_iou": [("boxes1", ...), ("boxes2", ...)],
    "generalized_box_iou": [("boxes1", ...), ("boxes2", ...)],
    "sigmoid_focal_loss": [("inputs", ...), ("targets", ...), ("alpha", 0.25), ("gamma", 2), ("reduction", "none")],
}
A = [0.0, 0.0, 4.0, 2.0]
# second box, IoU with A, generalised IoU with A
PAIRS = [
    pytest.param([0.0, 0.0, 4.0, 2.0], 1.0, 1.0, id="same"),
    pytest.param([2.0, 0.0, 6.0, 2.0], 4 / 12, 4 / 12, id="half-apart"),
    pytest.param([1.0, 0.5, 2.0, 1.5], 1 / 8, 1 / 8, id="inside"),
    pytest.param([6.0, 0.0, 8.0, 2.0], 0.0, -4 / 16, id="gap-of-two"),
    pytest.param([4.0, 2.0, 8.0, 4.0], 0.0, -16 / 32, id="corner"),
    pytest.param([1.0, 1.0, 1.0, 1.0], 0.0, 0.0, id="point-inside"),
]


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_stand_in_torchvisions_order(name: str) -> None:
    found = list(inspect.signature(getattr(tv, name)).parameters.values())
    expected = SIGNATURES[name]
    assert [p.name for p in found][: len(expected)] == [argument for argument, _ in expected]
    for parameter, (_, default) in zip(found, expected, strict=False):
        assert (... if parameter.default is inspect.Parameter.empty else parameter.default) == default, parameter
    for extra in found[len(expected) :]:  # nasdet's own come behind a star
        assert extra.kind is inspect.Parameter.KEYWORD_ONLY, extra


@pytest.mark.parametrize(("other", "iou", "giou"), PAIRS)
def test_overlaps_by_hand(other: list[float], iou: float, giou: float) -> None:
    a, b = torch.tensor([A]), torch.tensor([other])
    assert tv.box_iou(a, b).item() == pytest.approx(iou)
    assert tv.box_iou(b, a).item() == pytest.approx(iou)
    assert tv.generalized_box_iou(a, b).item() == pytest.approx(giou)


def test_overlaps_of_all_pairs_and_their_bounds() -> None:
    a, b = torch.rand(7, 4) * 50, torch.rand(5, 4) * 50
    a[:, 2:] += a[:, :2]
    b[:, 2:] += b[:, :2]
    iou, giou = tv.box_iou(a, b), tv.generalized_box_iou(a, b)
    assert iou.shape == giou.shape == (7, 5)
    assert (iou >= 0).all() and (iou <= 1).all() and (giou <= iou).all() and (giou >= -1).all()
    for i in range(7):
        assert torch.equal(tv.box_iou(a[i : i + 1], b)[0], iou[i])
    assert torch.allclose(tv.box_iou(a, a).diagonal(), torch.ones(7))


def test_no_overlap_is_defined_without_area() -> None:
    point = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    assert tv.box_iou(point, point).isnan().all()


@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
        (torch.uint8, torch.float32),
        (torch.int32, torch.float32),
        (torch.int64, torch.float32),
    ],
)
def test_overlaps_in_every_dtype(dtype: torch.dtype, result: torch.dtype) -> None:
    a, b = torch.tensor([A]).to(dtype), torch.tensor([[2.0, 0.0, 6.0, 2.0]]).to(dtype)
    iou = tv.box_iou(a, b)
    assert iou.dtype == result and iou.item() == pytest.approx(1 / 3)
    assert tv.generalized_box_iou(a, b).dtype == result


def test_areas_do_not_overflow_in_float16() -> None:
    big = torch.tensor([[0.0, 0.0, 2000.0, 2000.0], [0.0, 0.0, 2000.0, 1000.0]], dtype=torch.float16)
    assert tv.box_iou(big[:1], big[1:]).item() == 0.5


def test_empty_boxes() -> None:
    assert tv.box_iou(torch.rand(0, 4), torch.rand(3, 4)).shape == (0, 3)
    assert tv.generalized_box_iou(torch.rand(3, 4), torch.rand(0, 4)).shape == (3, 0)


def test_overlaps_refuse_what_are_no_boxes() -> None:
    boxes = torch.rand(3, 4)
    with pytest.raises(ValueError, match=r"boxes1 must have shape \(N, 4\), got \(3, 5\)"):
        tv.box_iou(torch.rand(3, 5), boxes)
    with pytest.raises(ValueError, match=r"boxes2 must have shape \(N, 4\), got \(4,\)"):
        tv.generalized_box_iou(boxes, boxes[0])
    with pytest.raises(TypeError, match="boxes2 must be a tensor of real numbers, got list"):
        tv.box_iou(boxes, [[0, 0, 1, 1]])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="boxes1 must be a tensor of real numbers, got torch.bool"):
        tv.box_iou(boxes.bool(), boxes)


def test_everything_named_is_there() -> None:
    for module in (compat, compat.torchvision, compat.mmcv, compat.detectron2):
        for name in module.__all__:
            assert getattr(module, name) is not None
