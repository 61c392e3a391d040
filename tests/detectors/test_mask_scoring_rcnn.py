from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasdet.detectors import FasterRCNN, MaskIoUHead, MaskScoringStage, RoIPooler, build_mask_scoring_rcnn
from nasdet.detectors.mask_scoring_rcnn import mask_iou, object_shares
from nasdet.detectors.parts.objects import batch_objects
from nasdet.detectors.parts.sampler import Samples


def test_iou_of_a_box_around_the_whole_object_is_the_plain_one() -> None:
    predicted, object_ = torch.rand(20, 6, 6) > 0.4, torch.rand(20, 6, 6) > 0.5
    shares = object_.float().mean(dim=(1, 2))
    plain = (predicted & object_).sum(dim=(1, 2)) / (predicted | object_).sum(dim=(1, 2))
    torch.testing.assert_close(mask_iou(predicted, object_, shares), plain)


def test_iou_counts_what_the_box_cuts_off() -> None:
    full = torch.ones(1, 4, 4, dtype=torch.bool)
    # The object fills the box and goes on for as much again: perfect within, half of the whole.
    assert mask_iou(full, full, torch.tensor([2.0])).tolist() == [0.5]
    assert mask_iou(full, full, torch.tensor([0.9])).tolist() == [1.0]  # rounding of the crop never lifts it above 1
    assert mask_iou(~full, ~full, torch.tensor([0.0])).tolist() == [0.0]
    assert mask_iou(full[:0], full[:0], torch.zeros(0)).shape == (0,)


def test_shares_are_areas_over_areas(make_target: Callable) -> None:
    targets = [make_target([[10, 10, 50, 50], [60, 60, 90, 90]], [0, 1]), make_target([], [])]
    boxes = [torch.tensor([[10.0, 10, 30, 50], [60, 60, 90, 90]]), torch.zeros(0, 4)]
    empty = torch.zeros(0, dtype=torch.int64)
    samples = Samples(boxes, [torch.tensor([1, 2]), empty], [torch.tensor([0, 1]), empty])
    assert object_shares(samples, batch_objects(targets, 2, 2), targets).tolist() == [2.0, 1.0]


class _Masks(nn.Module):
    """A mask head of fixed answers: everything is object for class 0, nothing for class 1."""

    num_classes = 2

    def forward(self, pooled: Tensor) -> Tensor:
        return torch.tensor([0.0, 9.0, -9.0]).view(1, 3, 1, 1).expand(len(pooled), 3, 28, 28)


class _IoUs(nn.Module):
    def __init__(self, values: Sequence[float]) -> None:
        super().__init__()
        self.values = torch.tensor(values)
        self.seen: list[Tensor] = []

    def forward(self, pooled: Tensor, masks: Tensor) -> Tensor:
        self.seen.append(masks)
        return self.values.expand(len(pooled), 3)


def _stage(values: Sequence[float]) -> MaskScoringStage:
    return MaskScoringStage(_Masks(), _IoUs(values), RoIPooler((8,), 14), iou_weight=1.0)  # type: ignore[arg-type]  # heads in all but name


def test_the_loss_is_the_square_error_over_masks_that_hit(make_target: Callable) -> None:
    stage, target = _stage([0.0, 0.25, 0.75]), make_target([[10, 10, 50, 50], [60, 60, 90, 90]], [0, 1])
    boxes = [torch.tensor([[10.0, 10, 30, 50], [60, 60, 90, 90]])]
    samples = Samples(boxes, [torch.tensor([1, 2])], [torch.tensor([0, 1])])
    losses = stage.losses([torch.zeros(1, 4, 12, 12)], samples, batch_objects([target], 1, 2), [target])
    # The first box shows half of its object: IoU 1/2, said 1/4. The second's mask is empty: IoU 0, left out.
    assert float(losses["loss_mask_iou"]) == pytest.approx(0.0625, abs=1e-3)
    (masks,) = stage.iou_head.seen  # type: ignore[union-attr, misc]  # ours
    torch.testing.assert_close(masks.mean(dim=(1, 2)), torch.tensor([9.0, -9.0]).sigmoid())


def test_masks_are_ranked_by_score_times_iou_and_boxes_by_score() -> None:
    stage = _stage([0.0, 0.5, 1.5])
    found = {"boxes": torch.tensor([[0.0, 0, 9, 9], [9, 9, 20, 20]])}
    found |= {"labels": torch.tensor([0, 1]), "scores": torch.tensor([0.9, 0.6])}
    (done,) = stage.complete([torch.zeros(1, 4, 12, 12)], [found])
    assert done["scores"].tolist() == pytest.approx([0.9, 0.6])
    assert done["mask_scores"].tolist() == pytest.approx([0.45, 0.6])  # an IoU is at most 1
    assert done["mask_logits"].amax(dim=(1, 2)).tolist() == [9, -9]


def _small(**options: Any) -> FasterRCNN:
    torch.manual_seed(0)
    return build_mask_scoring_rcnn("resnet18", 5, width=0.125, fpn_channels=16, hidden=32, samples=32, **options)


def test_gradients_reach_the_iou_head(make_target: Callable) -> None:
    model = _small()
    losses = model.loss(model(torch.randn(1, 3, 96, 96)), [make_target([[4, 6, 40, 50], [50, 50, 90, 90]], [1, 2])])
    assert list(losses)[-2:] == ["loss_mask", "loss_mask_iou"]
    losses["loss_mask_iou"].backward()
    for name, parameter in model.get_submodule("masks.iou_head").named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name


def test_shape_of_the_iou_head() -> None:
    head = MaskIoUHead(16, 3, hidden=8, fc=12)
    assert head(torch.randn(5, 16, 14, 14), torch.rand(5, 28, 28)).shape == (5, 4)
    assert head(torch.randn(0, 16, 14, 14), torch.rand(0, 28, 28)).shape == (0, 4)
    assert [m.stride for m in head.convs if isinstance(m, nn.Conv2d)] == [(1, 1)] * 3 + [(2, 2)]
    assert head.fcs[0].in_features == 8 * 49  # type: ignore[union-attr]  # a linear layer
