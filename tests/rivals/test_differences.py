"""Where nasdet is meant to differ from torchvision: each documented difference, seen in both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nasdet.compat import torchvision as ours


def test_classes_stay_apart_at_negative_coordinates(tv: Any) -> None:
    boxes = torch.tensor([[-11.0, -11.0, -1.0, -1.0]] * 2)  # the largest coordinate is -1: torchvision shifts by 0
    scores, idxs = torch.tensor([0.9, 0.8]), torch.tensor([0, 1])
    assert tv.batched_nms(boxes, scores, idxs, 0.5).tolist() == [0]
    assert ours.batched_nms(boxes, scores, idxs, 0.5).tolist() == [0, 1]


def test_large_class_ids_do_not_round_the_boxes(tv: Any) -> None:
    """1,203 x 16 classes of a 1,333-pixel image: torchvision's offsets leave float32 steps of 2 pixels."""
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0], [1.0, 0.0, 5.0, 4.0], [0.0, 0.0, 1333.0, 1333.0]])
    scores = torch.tensor([0.9, 0.8, 0.7])
    idxs = torch.tensor([19_247, 19_247, 0])  # the first two overlap by 12 / 20
    assert ours.batched_nms(boxes, scores, idxs, 0.5).tolist() == [0, 2]
    assert tv.batched_nms(boxes, scores, idxs, 0.5).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_nms_of_16_bit_boxes_on_the_cpu(tv: Any, dtype: torch.dtype, clustered: Callable[..., Tensor]) -> None:
    boxes, scores = clustered(50, torch.Generator().manual_seed(0)).to(dtype), torch.rand(50).to(dtype)
    with pytest.raises(RuntimeError, match="not implemented"):
        tv.nms(boxes, scores, 0.5)
    assert ours.nms(boxes, scores, 0.5).tolist() == tv.nms(boxes.float(), scores.float(), 0.5).tolist()


def test_roi_align_in_bfloat16_on_the_cpu(tv: Any) -> None:
    maps, rois = torch.randn(1, 3, 12, 12).bfloat16(), torch.tensor([[0.0, 1.0, 2.0, 9.0, 10.0]])
    with pytest.raises(RuntimeError, match="not implemented"):
        tv.roi_align(maps, rois.bfloat16(), 3)
    got = ours.roi_align(maps, rois, 3)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), tv.roi_align(maps.float(), rois, 3), atol=2e-2, rtol=1e-2)


def test_float16_features_keep_the_coordinates_of_large_images(tv: Any) -> None:
    """At 1,333 pixels float16 counts in whole pixels; torchvision computes the sampling points in it."""
    ramp = torch.arange(334.0).expand(1, 1, 334, 334).contiguous()
    rois = torch.tensor([[0.0, 1100.3, 10.0, 1101.4, 200.0]])
    exact = tv.roi_align(ramp, rois, 2, 0.25, 2, True)
    got = ours.roi_align(ramp.half(), rois, 2, 0.25, 2, True).float()
    torch.testing.assert_close(got, exact, atol=0.13, rtol=0)  # half a step of float16 at 275
    theirs = tv.roi_align(ramp.half(), rois.half(), 2, 0.25, 2, True).float()
    assert (theirs - exact).abs().max() > (got - exact).abs().max()
    with pytest.raises(RuntimeError, match="same type"):
        tv.roi_align(ramp.half(), rois, 2, 0.25, 2, True)


@pytest.mark.parametrize("index", [-1.0, 2.0, 1e9, float("nan")])
def test_a_batch_index_outside_the_batch_is_an_error(index: float) -> None:
    """torchvision reads out of bounds here, so it is not called."""
    rois = torch.tensor([[0.0, 1.0, 1.0, 4.0, 4.0], [index, 1.0, 1.0, 4.0, 4.0]])
    with pytest.raises((ValueError, RuntimeError, IndexError), match=r"rois\[1\] must have a batch index in \[0, 2\)"):
        ours.roi_align(torch.rand(2, 3, 8, 8), rois, 2)


@pytest.mark.parametrize("sampling", [0, 2])
def test_a_box_with_a_nan_pools_to_zero(sampling: int) -> None:
    """torchvision computes an address from the NaN here and may crash, so it is not called."""
    maps = torch.rand(1, 3, 8, 8).requires_grad_()
    for column in range(1, 5):
        rois = torch.tensor([[0.0, 1.0, 1.0, 4.0, 4.0]] * 2)
        rois[1, column] = torch.nan
        for aligned in (False, True):
            pooled = ours.roi_align(maps, rois, 2, 1.0, sampling, aligned)
            assert (pooled[1] == 0).all() and (pooled[0] > 0).all()
            (gradient,) = torch.autograd.grad(pooled[1].sum(), maps)
            assert (gradient == 0).all()


def test_pooled_maps_keep_channels_last(tv: Any) -> None:
    maps = torch.randn(2, 8, 12, 12).to(memory_format=torch.channels_last)
    rois = torch.tensor([[0.0, 1.0, 2.0, 9.0, 10.0], [1.0, 0.0, 0.0, 5.0, 5.0]])
    got, theirs = ours.roi_align(maps, rois, 3), tv.roi_align(maps, rois, 3)
    assert got.is_contiguous(memory_format=torch.channels_last) and theirs.is_contiguous()
    torch.testing.assert_close(got.contiguous(), theirs)


@pytest.mark.parametrize("survivors", [0, 1, 3])
def test_compiled_nms_may_keep_none_or_one(survivors: int) -> None:
    boxes = torch.arange(survivors)[:, None] * 20.0 + torch.tensor([[0.0, 0.0, 10.0, 10.0]])

    def kept(boxes: Tensor, scores: Tensor) -> Tensor:
        return boxes[ours.nms(boxes, scores, 0.5)] + 1

    torch._dynamo.reset()
    compiled = torch.compile(kept, fullgraph=True, backend="aot_eager", dynamic=True)
    assert compiled(boxes, torch.rand(survivors)).shape == (survivors, 4)


def test_nms_of_meta_tensors_says_what_is_wrong(tv: Any) -> None:
    boxes, scores = torch.rand(5, 4, device="meta"), torch.rand(5, device="meta")
    with pytest.raises(ValueError, match="boxes must hold data, got a meta tensor"):
        ours.nms(boxes, scores, 0.5)


def test_overlaps_of_unsigned_integers_do_not_wrap_around(tv: Any) -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [20, 20, 30, 30]], dtype=torch.uint8)
    assert torch.equal(ours.box_iou(boxes, boxes), torch.eye(2))
    assert not torch.equal(tv.box_iou(boxes, boxes), torch.eye(2))


def test_focal_loss_has_finite_gradients_below_gamma_one(tv: Any) -> None:
    logits, targets = torch.tensor([20.0, -20.0, 0.5]), torch.tensor([1.0, 0.0, 1.0])

    def gradient(loss: Callable[..., Tensor]) -> Tensor:
        leaf = logits.clone().requires_grad_()
        return torch.autograd.grad(loss(leaf, targets, 0.25, 0.5, "sum"), leaf)[0]

    assert gradient(tv.sigmoid_focal_loss).isnan().tolist() == [True, True, False]
    assert gradient(ours.sigmoid_focal_loss).isfinite().all()


def test_16_bit_overlaps_are_those_of_the_float32_boxes(tv: Any) -> None:
    boxes = (torch.rand(30, 4) * 300).half()
    boxes[:, 2:] += boxes[:, :2]
    for name in ("box_iou", "generalized_box_iou"):
        assert torch.equal(getattr(ours, name)(boxes, boxes), getattr(ours, name)(boxes.float(), boxes.float()))
        theirs = getattr(tv, name)(boxes, boxes)
        torch.testing.assert_close(getattr(ours, name)(boxes, boxes), theirs, atol=5e-3, rtol=5e-3)
