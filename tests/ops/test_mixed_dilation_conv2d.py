"""What is particular to ``mixed_dilation_conv2d``: its invariants, its size and layout, its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nasdet.nn import MixedDilationConv2d
from nasdet.ops import grouped_dilation_conv2d, mixed_dilation_conv2d

DILATIONS = (1, 2, (1, 3), (3, 1))
BACKENDS = ("folded", "reference")


def operands(columns: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(2, 4, 9, 10, dtype=dtype)
    weight = torch.randn(len(DILATIONS), 6, 4, 3, 3, dtype=dtype)
    return x, weight, torch.rand(len(DILATIONS), columns, dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride", [1, 2, (2, 1)])
def test_every_output_by_hand(backend: str, stride: Any) -> None:
    """Against the sum over taps, written out with the zero padding as a condition."""
    x, weight, mix = operands()
    y = mixed_dilation_conv2d(x, weight, mix, DILATIONS, stride, backend=backend)
    down, across = (stride, stride) if isinstance(stride, int) else stride
    assert y.shape == (2, 6, -(-9 // down), -(-10 // across))
    for row, column in ((0, 0), (y.shape[2] - 1, 1), (2, y.shape[3] - 1), (3, 4)):
        total = torch.zeros(2, 6, dtype=torch.float64)
        for g, dilation in enumerate(DILATIONS):
            dh, dw = (dilation, dilation) if isinstance(dilation, int) else dilation
            for i in range(3):
                for j in range(3):
                    at, to = row * down + (i - 1) * dh, column * across + (j - 1) * dw
                    if 0 <= at < 9 and 0 <= to < 10:
                        total += mix[g] * (x[:, :, at, to] @ weight[g, :, :, i, j].T)
        torch.testing.assert_close(y[:, :, row, column], total)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_dilations_are_one_convolution_of_the_mixed_kernel(backend: str) -> None:
    x, weight, mix = operands()
    y = mixed_dilation_conv2d(x, weight, mix, [1] * 4, backend=backend)
    kernel = (mix[:, :, None, None, None] * weight).sum(0)
    torch.testing.assert_close(y, F.conv2d(x, kernel, padding=1))
    copies = weight[:1].expand_as(weight)
    softmax = mix.softmax(0)
    y = mixed_dilation_conv2d(x, copies, softmax, [1] * 4, backend=backend)
    torch.testing.assert_close(y, F.conv2d(x, weight[0], padding=1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("stride", [1, 2])
def test_one_hot_mixtures_are_the_grouped_form(backend: str, stride: int) -> None:
    x, weight, _ = operands()
    chosen = [0, 0, 2, 1, 3, 3]
    mix = F.one_hot(torch.tensor(chosen), 4).T.double()
    rows = torch.stack([weight[g, o] for o, g in enumerate(chosen)])
    expected = grouped_dilation_conv2d(x, rows, [1, (1, 3), 2, (3, 1)], [2, 1, 1, 2], stride)
    torch.testing.assert_close(mixed_dilation_conv2d(x, weight, mix, DILATIONS, stride, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_linear_in_every_operand(backend: str) -> None:
    x, weight, mix = operands()
    other_x, other_weight, other_mix = operands()

    def f(*values: Tensor) -> Tensor:
        return mixed_dilation_conv2d(*values, DILATIONS, backend=backend)

    y = f(x, weight, mix)
    torch.testing.assert_close(f(x, weight, 2 * mix - other_mix), 2 * y - f(x, weight, other_mix))
    torch.testing.assert_close(f(x + other_x, weight, mix), y + f(other_x, weight, mix))
    torch.testing.assert_close(f(x, weight + 3 * other_weight, mix), y + 3 * f(x, other_weight, mix))
    assert not torch.equal(y, torch.zeros_like(y))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_column_per_slice_is_that_column_for_each_of_its_channels(backend: str) -> None:
    x, weight, mix = operands(columns=3)
    wide = mix.repeat_interleave(2, dim=1)
    ours = mixed_dilation_conv2d(x, weight, mix, DILATIONS, backend=backend)
    assert torch.equal(ours, mixed_dilation_conv2d(x, weight, wide, DILATIONS, backend=backend))
    shared = mixed_dilation_conv2d(x, weight, mix[:, :1], DILATIONS, backend=backend)
    torch.testing.assert_close(
        shared, mixed_dilation_conv2d(x, weight, mix[:, :1].expand(4, 6), DILATIONS, backend=backend)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradients_of_every_input(backend: str, groups: int, stride: int) -> None:
    x = torch.randn(1, 4, 5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, 4 // groups, 3, 3, dtype=torch.float64, requires_grad=True)
    mix = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)

    def f(*values: Tensor) -> Tensor:
        return mixed_dilation_conv2d(*values, (1, 2, (3, 1)), stride, groups, backend=backend)

    assert torch.autograd.gradcheck(f, (x, weight, mix))


def test_folded_gradients_where_the_kernels_are_scaled() -> None:
    """gradcheck's maps are small, where ``folded`` scales the maps: here it scales the kernels."""
    values = [value.requires_grad_() for value in operands(columns=3)]
    assert values[0][:, 0].numel() >= values[1][0, 0].numel()
    gradients = []
    for backend in BACKENDS:
        y = mixed_dilation_conv2d(*values, DILATIONS, backend=backend)
        gradients.append(torch.autograd.grad(y.square().sum(), values))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert theirs.abs().max() > 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_layout_and_dtype_are_those_of_x(backend: str, layout: torch.memory_format) -> None:
    x, weight, mix = operands(dtype=torch.float32)
    y = mixed_dilation_conv2d(x.to(memory_format=layout), weight, mix, DILATIONS, backend=backend)
    assert y.is_contiguous(memory_format=layout) and y.dtype == torch.float32
    half = mixed_dilation_conv2d(x.bfloat16(), weight.bfloat16(), mix, DILATIONS, backend=backend)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_takes_its_dtype_as_conv2d_does(backend: str) -> None:
    x, weight, mix = operands(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = mixed_dilation_conv2d(x, weight, mix, DILATIONS, backend=backend)
    expected = mixed_dilation_conv2d(x.bfloat16(), weight.bfloat16(), mix, DILATIONS, backend=backend)
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_without_graph_breaks(backend: str) -> None:
    values = [value.requires_grad_() for value in operands(columns=2, dtype=torch.float32)]

    def step(*inputs: Tensor) -> Tensor:
        return mixed_dilation_conv2d(*inputs, DILATIONS, 2, backend=backend).sin()

    torch._dynamo.reset()
    y, expected = torch.compile(step, fullgraph=True, backend="aot_eager")(*values), step(*values)
    torch.testing.assert_close(y, expected)
    for ours, theirs in zip(
        torch.autograd.grad(y.sum(), values), torch.autograd.grad(expected.sum(), values), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_empty_batch_gives_zero_gradients() -> None:
    x, weight, mix = operands()
    weight.requires_grad_()
    mix.requires_grad_()
    y = mixed_dilation_conv2d(x[:0], weight, mix, DILATIONS)
    assert y.shape == (0, 6, 9, 10)
    for gradient in torch.autograd.grad(y.sum(), (weight, mix)):
        assert gradient.abs().sum() == 0


def test_large_mixing_weights_are_finite() -> None:
    x, weight = torch.ones(1, 1, 2, 2, dtype=torch.float64), torch.full((2, 1, 1, 1, 1), 1e-308, dtype=torch.float64)
    y = mixed_dilation_conv2d(x, weight, torch.full((2, 1), 1e308, dtype=torch.float64), [1, 2])
    torch.testing.assert_close(y, torch.full_like(x, 2.0))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_an_algorithm_that_was_asked_for_is_traced() -> None:
    module, x = MixedDilationConv2d(16, 16, 3, [1, 2], algorithm="direct"), torch.randn(1, 16, 9, 10)
    torch.testing.assert_close(torch.jit.trace(module, x)(2 * x), module(2 * x))


def test_an_algorithm_is_forced_or_refused_but_never_ignored() -> None:
    x, weight, mix = operands()
    with pytest.raises(ValueError, match="'direct' cannot be asked for"):
        mixed_dilation_conv2d(x, weight, mix, DILATIONS, algorithm="direct", backend="reference")
    exact = mixed_dilation_conv2d(x, weight, mix, DILATIONS, precision="exact", backend="reference")
    assert torch.equal(exact, mixed_dilation_conv2d(x, weight, mix, DILATIONS, backend="reference"))


def _nan(mix: Tensor) -> Tensor:
    mix = mix.clone()
    mix[1, 2] = float("nan")
    return mix


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": [1.0]}, TypeError, "x must be a float32, float64, float16 or bfloat16 tensor, got list"),
        ({"x": lambda v: v.long()}, TypeError, "x must be a float32.*got torch.int64"),
        ({"x": lambda v: v[0]}, ValueError, r"x must have shape \(N, Cin, H, W\), got \(4, 9, 10\)"),
        ({"x": lambda v: v[..., :0]}, ValueError, "x must have a height and width of at least 1"),
        ({"x": lambda v: v.float()}, TypeError, "weight must have the dtype of x, torch.float32, got torch.float64"),
        ({"x": lambda v: v[:, :3]}, ValueError, "weight must have 3 / 1 input channels .* got 4"),
        ({"weight": lambda v: v[0]}, ValueError, r"weight must have shape \(G, Cout, Cin / groups, k, k\), got"),
        ({"weight": lambda v: v[:3]}, ValueError, "weight must have a kernel for each of the 4 dilations, got 3"),
        ({"weight": lambda v: v[..., :2]}, ValueError, "weight must have a square kernel of odd size, got 3x2"),
        ({"weight": lambda v: v[..., :2, :2]}, ValueError, "square kernel of odd size, got 2x2"),
        ({"weight": lambda v: v.to("meta")}, ValueError, "weight must be on cpu, got meta"),
        ({"mix": lambda v: v.T}, ValueError, r"mix must have shape \(4, n\), n a divisor of the 6 .*got \(6, 4\)"),
        ({"mix": lambda v: v[:3]}, ValueError, r"mix must have shape \(4, 6\), got \(3, 6\)"),
        ({"mix": lambda v: v[:, :0]}, ValueError, r"mix must have shape \(4, n\).*got \(4, 0\)"),
        ({"mix": lambda v: v.int()}, TypeError, "mix must be a floating-point tensor, got torch.int32"),
        ({"mix": lambda v: v.to("meta")}, ValueError, "mix must be on cpu, got meta"),
        ({"mix": _nan}, ValueError, "mix must be finite, got NaN or infinity"),
        ({"mix": lambda v: v / 0}, ValueError, "mix must be finite"),
        ({"dilations": 2}, TypeError, "dilations must be a sequence of integers or pairs, got int"),
        ({"dilations": []}, ValueError, "dilations must hold at least one dilation, got none"),
        ({"dilations": (1, 2, 0, 1)}, ValueError, r"dilations\[2\] must be a positive integer or a pair.*got 0"),
        ({"dilations": (1, 2, (1, 0), 1)}, ValueError, r"dilations\[2\] must be .*got \(1, 0\)"),
        ({"dilations": (1, 2, 1.5, 1)}, ValueError, r"dilations\[2\] must be .*got 1.5"),
        ({"dilations": (1, 2, True, 1)}, ValueError, r"dilations\[2\] must be .*got True"),
        ({"stride": 0}, ValueError, "stride must be a positive integer or a pair of them, got 0"),
        ({"groups": 0}, ValueError, "groups must be a positive integer, got 0"),
        ({"groups": 4}, ValueError, "groups must divide the 4 input and the 6 output channels, got 4"),
        ({"groups": 2}, ValueError, "weight must have 4 / 2 input channels .*groups = 2, got 4"),
        ({"algorithm": "magic"}, ValueError, "algorithm must be one of direct, frequency, winograd or None"),
        ({"precision": "low"}, ValueError, "precision must be one of fast, exact, got 'low'"),
        ({"precision": "exact", "algorithm": "winograd"}, ValueError, "excludes it"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_errors_name_the_argument(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = dict(zip(("x", "weight", "mix"), operands(), strict=True))
    arguments["dilations"] = DILATIONS
    for name, value in change.items():
        arguments[name] = value(arguments[name]) if callable(value) else value
    with pytest.raises(error, match=message):
        mixed_dilation_conv2d(**arguments)
