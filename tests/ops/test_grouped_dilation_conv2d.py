"""What is particular to ``grouped_dilation_conv2d``: its invariants, its cost, its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasdet.measure import count, total
from nasdet.ops import grouped_dilation_conv2d

DILATIONS = (1, 2, (1, 3))
SPLITS = (4, 2, 6)


def operands(groups: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(2, 8, 9, 10, dtype=dtype), torch.randn(12, 8 // groups, 3, 3, dtype=dtype)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("stride", [1, 2, (1, 2)])
def test_every_slice_is_that_slice_of_the_whole_convolution(groups: int, stride: Any) -> None:
    x, weight = operands(groups)
    splits = (3, 3, 6) if groups == 4 else (6, 6) if groups == 2 else SPLITS
    y = grouped_dilation_conv2d(x, weight, DILATIONS[: len(splits)], splits, stride, groups)
    first = 0
    for dilation, size in zip(DILATIONS, splits, strict=False):
        pair = (dilation, dilation) if isinstance(dilation, int) else dilation
        whole = F.conv2d(x, weight, None, stride, pair, pair, groups)
        torch.testing.assert_close(y[:, first : first + size], whole[:, first : first + size])
        first += size
    assert first == y.shape[1] == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, 2])
def test_equal_dilations_are_conv2d_bit_for_bit(groups: int, layout: torch.memory_format, dtype: torch.dtype) -> None:
    x, weight = operands(groups, dtype)
    x = x.to(memory_format=layout)
    for stride, dilation in ((1, 1), (2, 1), (1, 3)):
        y = grouped_dilation_conv2d(x, weight, [dilation] * 2, (6, 6), stride, groups, backend="reference")
        expected = F.conv2d(x, weight, None, stride, dilation, dilation, groups)
        assert torch.equal(y, expected) and y.stride() == expected.stride()


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_every_input(groups: int, stride: int) -> None:
    x = torch.randn(1, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4 // groups, 3, 3, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, weight: Tensor) -> Tensor:
        return grouped_dilation_conv2d(x, weight, (1, (3, 1)), (3, 3), stride, groups)

    assert torch.autograd.gradcheck(f, (x, weight))


def test_linear_in_both_operands() -> None:
    (x, weight), (other_x, other_weight) = operands(), operands()
    y = grouped_dilation_conv2d(x, weight, DILATIONS, SPLITS)
    torch.testing.assert_close(
        grouped_dilation_conv2d(x - 2 * other_x, weight, DILATIONS, SPLITS),
        y - 2 * grouped_dilation_conv2d(other_x, weight, DILATIONS, SPLITS),
    )
    torch.testing.assert_close(
        grouped_dilation_conv2d(x, weight + other_weight, DILATIONS, SPLITS),
        y + grouped_dilation_conv2d(x, other_weight, DILATIONS, SPLITS),
    )


class _Net(nn.Module):
    def __init__(self, splits: tuple[int, ...], groups: int) -> None:
        super().__init__()
        self.splits, self.groups = splits, groups
        self.weight = nn.Parameter(torch.empty(12, 8 // groups, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        dilations = DILATIONS[: len(self.splits)]
        return grouped_dilation_conv2d(x, self.weight, dilations, self.splits, 2, self.groups)


@pytest.mark.parametrize("groups", [1, 2])
def test_costs_one_convolution(groups: int) -> None:
    image = torch.empty(1, 8, 19, 24, device="meta")
    costs = [total(count(_Net(splits, groups), image)) for splits in ((12,), (6, 6), SPLITS if groups == 1 else (12,))]
    macs = 10 * 12 * 12 * 8 // groups * 9
    assert {(cost.parameters, cost.macs) for cost in costs} == {(12 * 8 // groups * 9, macs)}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout_and_dtype_are_those_of_x(layout: torch.memory_format) -> None:
    x, weight = operands(dtype=torch.float32)
    y = grouped_dilation_conv2d(x.to(memory_format=layout), weight, DILATIONS, SPLITS)
    assert y.is_contiguous(memory_format=layout) and y.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = grouped_dilation_conv2d(x, weight, DILATIONS, SPLITS)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow, grouped_dilation_conv2d(x.bfloat16(), weight.bfloat16(), DILATIONS, SPLITS))


def test_compiles_without_graph_breaks() -> None:
    values = [value.requires_grad_() for value in operands(2, torch.float32)]

    def step(x: Tensor, weight: Tensor) -> Tensor:
        return grouped_dilation_conv2d(x, weight, (1, 2), (6, 6), 1, 2, backend="reference").sin()

    torch._dynamo.reset()
    y, expected = torch.compile(step, fullgraph=True, backend="aot_eager")(*values), step(*values)
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(
        torch.autograd.grad(y.sum(), values), torch.autograd.grad(expected.sum(), values), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"splits": (4, 2)}, "splits must have one entry for each of the 3 dilations, got 2"),
        ({"splits": (4, 2, 5)}, r"splits must sum to the 12 output channels, got \(4, 2, 5\) with sum 11"),
        ({"splits": (8, 4, 0)}, r"splits\[2\] must be a positive integer, got 0"),
        ({"splits": (8, 6, -2)}, r"splits\[2\] must be a positive integer, got -2"),
        ({"splits": (8, 2.0, 2)}, r"splits\[1\] must be a positive integer, got 2.0"),
        ({"groups": 2, "splits": (6, 2, 4)}, r"splits\[1\] must cover whole convolution groups of 6 .*got 2"),
        ({"dilations": (1, 2, 0)}, r"dilations\[2\] must be a positive integer or a pair of them, got 0"),
        ({"dilations": (1, 2, (2, -1))}, r"dilations\[2\] must be .*got \(2, -1\)"),
        ({"dilations": ()}, "dilations must hold at least one dilation, got none"),
        ({"stride": (1, 2, 1)}, r"stride must be a positive integer or a pair of them, got \(1, 2, 1\)"),
        ({"groups": 3}, "groups must divide the 8 input and the 12 output channels, got 3"),
        ({"weight": torch.zeros(12, 8, 3)}, r"weight must have shape \(Cout, Cin / groups, k, k\), got \(12, 8, 3\)"),
        ({"weight": torch.zeros(12, 7, 3, 3)}, "weight must have 8 / 1 input channels .*got 7"),
        ({"weight": torch.zeros(12, 8, 5, 3)}, "weight must have a square kernel of odd size, got 5x3"),
        ({"algorithm": "fft"}, "algorithm must be one of direct, frequency, winograd or None, got 'fft'"),
        ({"algorithm": "direct", "backend": "reference"}, "'direct' cannot be asked for"),
        ({"precision": None}, "precision must be one of fast, exact, got None"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    groups = change.get("groups", 1) if 8 % change.get("groups", 1) == 0 else 1
    x, weight = operands(groups)
    arguments = {"x": x, "weight": weight, "dilations": DILATIONS, "splits": SPLITS} | change
    with pytest.raises(ValueError, match=message):
        grouped_dilation_conv2d(**arguments)


def test_splits_must_be_a_sequence() -> None:
    with pytest.raises(TypeError, match="splits must be a sequence of integers, got int"):
        grouped_dilation_conv2d(*operands(), DILATIONS, 12)  # type: ignore[arg-type]  # the point of the test


def test_the_weights_gradient_of_groups_does_not_depend_on_layouts() -> None:
    x, weight = torch.randn(3, 20, 6, 1, dtype=torch.float64), torch.randn(80, 4, 3, 3, dtype=torch.float64)
    upstream = torch.randn(3, 80, 6, 1, dtype=torch.float64)
    gradients = []
    for layout in (torch.contiguous_format, torch.channels_last):
        # A map of one column is dense in both layouts: only strides given by hand say which it is.
        strides = (120, 6, 1, 1) if layout == torch.contiguous_format else (120, 1, 20, 120)
        own = torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x)
        leaf = weight.clone(memory_format=layout).requires_grad_()
        y = grouped_dilation_conv2d(own, leaf, (1,), (80,), (1, 2), 5, backend="reference")
        gradients += torch.autograd.grad(y, leaf, upstream)
    torch.testing.assert_close(gradients[0], gradients[1])
