from __future__ import annotations

import math

import pytest
import torch

from nasdet.detectors.parts.losses import (
    centerness_loss,
    centerness_target,
    giou_loss,
    mean_over_ranks,
    sigmoid_focal_loss,
)


def _focal(logit: float, positive: bool, alpha: float, gamma: float) -> float:
    p = 1 / (1 + math.exp(-logit))
    if positive:
        return -alpha * (1 - p) ** gamma * math.log(p)
    return -(1 - alpha) * p**gamma * math.log(1 - p)


@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (0.5, 0.0), (0.9, 1.5)])
def test_focal_loss_matches_the_formula(alpha: float, gamma: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64) * 4
    labels = torch.randint(-1, 4, (3, 5), generator=generator)
    expected = sum(
        _focal(float(logits[n, i, k]), int(labels[n, i]) == k, alpha, gamma)
        for n in range(3)
        for i in range(5)
        for k in range(4)
    )
    assert float(sigmoid_focal_loss(logits, labels, alpha, gamma)) == pytest.approx(expected, rel=1e-12)
    assert float(sigmoid_focal_loss(logits.float(), labels, alpha, gamma)) == pytest.approx(expected, rel=1e-5)


def test_focal_loss_gradient_and_extremes() -> None:
    logits = torch.randn(6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    labels = torch.tensor([0, 1, 2, -1, -1, 0])
    assert torch.autograd.gradcheck(lambda x: sigmoid_focal_loss(x, labels), logits)
    huge = torch.tensor([[1e4, -1e4], [-1e4, 1e4]], requires_grad=True)
    value = sigmoid_focal_loss(huge, torch.tensor([1, -1]))
    value.backward()
    assert bool(value.isfinite()) and huge.grad is not None and bool(huge.grad.isfinite().all())
    assert float(value.detach()) == pytest.approx(1e4 * (0.75 + 0.25 + 0.75), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    logits = torch.full((2000, 80), -4.0, dtype=dtype)
    value = sigmoid_focal_loss(logits, torch.full((2000,), -1))
    assert value.dtype == torch.float32
    assert float(value) == pytest.approx(160_000 * _focal(-4.0, False, 0.25, 2.0), rel=1e-3)


def test_empty_inputs_give_zero_with_a_gradient() -> None:
    logits = torch.zeros(0, 3, requires_grad=True)
    loss = sigmoid_focal_loss(logits, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert float(loss.detach()) == 0.0 and logits.grad is not None


def test_centerness_target() -> None:
    distances = torch.tensor([[2.0, 2, 2, 2], [1.0, 2, 4, 8], [0.0, 3, 5, 3], [-1.0, 3, 5, 3], [0.0, 0, 0, 0]])
    assert centerness_target(distances).tolist() == pytest.approx([1.0, math.sqrt(1 / 4 * 2 / 8), 0.0, 0.0, 0.0])


def test_weighted_sums() -> None:
    boxes = torch.tensor([[0.0, 0, 2, 2], [0.0, 0, 1, 1], [0.0, 0, 5, 5]])
    targets = torch.tensor([[0.0, 0, 2, 2], [0.0, 0, 2, 1], [9.0, 9, 10, 10]])
    assert float(giou_loss(boxes, targets, torch.tensor([3.0, 2.0, 0.0]))) == pytest.approx(2 * 0.5)
    logits, wanted = torch.tensor([0.0, 2.0]), torch.tensor([0.5, 1.0])
    expected = math.log(2) + 2 * math.log(1 + math.exp(-2))
    assert float(centerness_loss(logits, wanted, torch.tensor([1.0, 2.0]))) == pytest.approx(expected)


def test_mean_over_one_rank_is_the_value_without_gradient() -> None:
    value = torch.tensor(3.0, requires_grad=True)
    assert float(mean_over_ranks(value)) == 3.0 and not mean_over_ranks(value).requires_grad
