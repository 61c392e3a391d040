"""What is particular to ``depthwise_conv2d``: its invariants, the forms of its kernels, its errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

import nasdet
from nasdet._dispatch import OPS
from nasdet.ops import depthwise_conv2d
from nasdet.testing import assert_close, tolerance

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def operands(channels: int = 20, kernel: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(2, channels, 9, 10, dtype=dtype), torch.randn(channels, 1, kernel, kernel, dtype=dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dilation", [1, 2, (1, 3)])
@pytest.mark.parametrize("stride", [1, 2, (3, 1)])
@pytest.mark.parametrize("kernel", [1, 3, 5, 7])
def test_is_torchs_depthwise_convolution(kernel: int, stride: Any, dilation: Any, layout: torch.memory_format) -> None:
    x, weight = operands(kernel=kernel)
    d = dilation if isinstance(dilation, tuple) else (dilation, dilation)
    padding = (d[0] * (kernel // 2), d[1] * (kernel // 2))
    expected = F.conv2d(x, weight, None, stride, padding, dilation, groups=20)
    y = depthwise_conv2d(x.to(memory_format=layout), weight, stride, dilation=dilation)
    torch.testing.assert_close(y, expected)
    assert y.is_contiguous(memory_format=layout) or y.shape[2:] == (1, 1)


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", range(1, 24))
def test_every_number_of_rows_is_cut_into_tiles(rows: int, layout: torch.memory_format) -> None:
    x = torch.randn(1, 16, rows, 19, generator=torch.Generator().manual_seed(rows)).to(memory_format=layout)
    weight = torch.linspace(-1, 1, 16 * 25).reshape(16, 1, 5, 5)
    for dilation in (1, 2, 5):
        exact = depthwise_conv2d(x.double(), weight.double(), dilation=dilation, backend="reference")
        y = depthwise_conv2d(x, weight, dilation=dilation, backend="cpp")
        assert_close(y, exact, tolerance(torch.float32, 25, exact.abs().max().item()), f"dilation {dilation}")


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("channels", range(16, 50))
def test_every_number_of_channels_is_cut_into_vectors(channels: int) -> None:
    """Channels that come in two blocks count once in the weights' gradient."""
    x = torch.ones(1, channels, 2, 3).to(memory_format=torch.channels_last)
    weight = torch.arange(channels, dtype=torch.float32).reshape(-1, 1, 1, 1).requires_grad_()
    y = depthwise_conv2d(x, weight, backend="cpp")
    assert torch.equal(y, weight.expand(channels, 1, 2, 3).transpose(0, 1))
    (gradient,) = torch.autograd.grad(y.sum(), weight)
    assert torch.equal(gradient, torch.full_like(weight, 6.0))


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_both_layouts_give_the_same_values(stride: int) -> None:
    x, weight = operands(40, 7, torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        values = [
            depthwise_conv2d(x.to(dtype).to(memory_format=layout), weight.to(dtype), stride, backend="cpp")
            for layout in LAYOUTS
        ]
        bound = tolerance(dtype, 49, values[0].abs().max().item())
        assert_close(values[0], values[1].double(), 2 * bound, str(dtype))


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_impulse_gives_the_kernel_turned_round(layout: torch.memory_format) -> None:
    x = torch.zeros(1, 18, 40, 50).to(memory_format=layout)
    x[:, :, 20, 21] = 1
    weight = torch.randn(18, 1, 5, 5)
    y = depthwise_conv2d(x, weight, dilation=(3, 4), backend="cpp")
    expected = torch.zeros_like(y)
    for i, j in itertools.product(range(5), repeat=2):
        expected[0, :, 20 - 3 * (i - 2), 21 - 4 * (j - 2)] = weight[:, 0, i, j]
    assert torch.equal(y, expected)


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (1, 3), (2, 1), (3, 2)])
def test_the_gradient_of_the_map_is_the_adjoint(stride: int, dilation: int, layout: torch.memory_format) -> None:
    x = torch.randn(2, 17, 23, 37, dtype=torch.float64).to(memory_format=layout).float().requires_grad_()
    weight = torch.randn(17, 1, 5, 5, requires_grad=True)
    y = depthwise_conv2d(x, weight, stride, dilation=dilation, backend="cpp")
    upstream = torch.randn_like(y)
    dx, dweight = torch.autograd.grad(y, (x, weight), upstream)
    product = (y.double() * upstream.double()).sum()
    size = (y.double() * upstream.double()).abs().sum()
    for gradient, leaf in ((dx, x), (dweight, weight)):
        assert abs((gradient.double() * leaf.detach().double()).sum() - product) < 1e-6 * size


@pytest.mark.needs("cpp")
def test_the_weights_gradient_of_a_large_map_keeps_its_digits() -> None:
    """A sum of 160,000 terms in float32 alone would be off by about 1e-4."""
    x = torch.rand(1, 16, 400, 400).to(memory_format=torch.channels_last)
    for own in (x, x.contiguous()):
        weight = torch.zeros(16, 1, 1, 1, requires_grad=True)
        (gradient,) = torch.autograd.grad(depthwise_conv2d(own, weight, backend="cpp").sum(), weight)
        expected = x.double().sum((0, 2, 3)).reshape(-1, 1, 1, 1)
        torch.testing.assert_close(gradient.double(), expected, rtol=3e-7, atol=0)


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_beyond_the_caches(layout: torch.memory_format) -> None:
    """They are stored past them, by other instructions."""
    x = torch.randn(1, 64, 130, 131).to(memory_format=layout)
    weight = torch.randn(64, 1, 3, 3)
    exact = depthwise_conv2d(x.double(), weight.double(), backend="reference")
    y = depthwise_conv2d(x, weight, backend="cpp")
    assert_close(y, exact, tolerance(torch.float32, 9, exact.abs().max().item()), "y")


@pytest.mark.needs("cpp")
def test_only_the_gradients_asked_for_are_computed() -> None:
    x, weight = operands(dtype=torch.float32)
    raw = torch.ops.nasdet.depthwise_conv2d_backward
    options = (1, 1, 1, 1, 1, 1)
    dx, dweight = raw(torch.ones_like(x), x, weight, *options, True, True)
    assert torch.equal(raw(torch.ones_like(x), x, weight, *options, True, False)[0], dx)
    assert torch.equal(raw(torch.ones_like(x), x, weight, *options, False, True)[1], dweight)
    assert raw(torch.ones_like(x), x, weight, *options, True, False)[1].numel() == 0


@pytest.mark.needs("cpp")
def test_second_derivatives_raise() -> None:
    x, weight = (value.requires_grad_() for value in operands())
    (dx,) = torch.autograd.grad(depthwise_conv2d(x, weight, backend="cpp").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="depthwise_conv2d has no second derivative in this backend"):
        dx.sum().backward()


@pytest.mark.needs("cpp")
def test_passes_torchs_own_checks_of_an_op() -> None:
    for layout in LAYOUTS:
        x, weight = operands(dtype=torch.float32)
        x = x.to(memory_format=layout).requires_grad_()
        for options in ((1, 1, 1, 1, 1, 1), (2, 1, 0, 3, 2, 1)):
            torch.library.opcheck(torch.ops.nasdet.depthwise_conv2d.default, (x, weight.requires_grad_(), *options))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_autocast_takes_both_operands_in_its_dtype(backend: str, request: pytest.FixtureRequest) -> None:
    if backend == "cpp" and (reason := OPS["depthwise_conv2d"].backends[0].available()):
        request.getfixturevalue("require")(backend, reason)
    x, weight = operands(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        narrow = depthwise_conv2d(x, weight, backend=backend)
    assert torch.equal(narrow, depthwise_conv2d(x.bfloat16(), weight.bfloat16(), backend=backend))
    assert narrow.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(20, 9, 10)}, r"x must have shape \(N, C.*got \(20, 9, 10\)"),
        ({"x": torch.zeros(1, 20, 0, 10)}, "x must have a height and width of at least 1"),
        ({"weight": torch.zeros(20, 3, 3)}, r"weight must have shape \(C, 1, k, k\), got \(20, 3, 3\)"),
        ({"weight": torch.zeros(20, 2, 3, 3)}, r"weight must have shape \(20, 1, k, k\) .*got \(20, 2, 3, 3\)"),
        ({"weight": torch.zeros(40, 1, 3, 3)}, r"weight must have shape \(20, 1, k, k\) .*got \(40, 1, 3, 3\)"),
        ({"weight": torch.zeros(20, 1, 3, 5)}, "weight must have a square kernel of odd size, got 3x5"),
        ({"weight": torch.zeros(20, 1, 4, 4)}, "weight must have a square kernel of odd size, got 4x4"),
        ({"weight": torch.zeros(20, 1, 257, 257)}, "weight must have a kernel of at most 255, got 257"),
        ({"stride": (1, 2, 3)}, r"stride must be a positive integer or a pair of them, got \(1, 2, 3\)"),
        ({"dilation": 0}, "dilation must be a positive integer or a pair of them, got 0"),
        ({"padding": -1}, "padding must be 'same', an integer of at least 0 or a pair of them, got -1"),
        ({"padding": 2**40}, r"padding must be below 2\*\*30, got 1099511627776"),
        ({"padding": "valid"}, "padding must be 'same', .*got 'valid'"),
        ({"padding": 0, "dilation": (1, 5)}, r"x must be at least 11 wide with its padding .*got 10 \+ 2 x 0"),
        ({"padding": (1, 0), "dilation": (6, 1)}, r"x must be at least 13 high with its padding .*got 9 \+ 2 x 1"),
        ({"backend": "triton"}, "backend must be one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    x, weight = operands(dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        depthwise_conv2d(**({"x": x, "weight": weight} | change))


def test_dtypes_must_agree() -> None:
    x, weight = operands()
    with pytest.raises(TypeError, match="weight must have the dtype of x, torch.float64, got torch.float32"):
        depthwise_conv2d(x, weight.float())
    with pytest.raises(TypeError, match="x must be a float32, .*got torch.int64"):
        depthwise_conv2d(x.long(), weight)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_traced_by_older_means_too() -> None:
    x, weight = (value.float() for value in operands())

    def call(x: Tensor, weight: Tensor) -> Tensor:
        return depthwise_conv2d(x, weight)

    for traced in (torch.jit.trace(call, (x, weight)), make_fx(call, tracing_mode="symbolic")(x, weight)):
        torch.testing.assert_close(traced(2 * x, weight), call(2 * x, weight))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stride", [7, 10**6, 2**30 - 1])
def test_a_stride_beyond_the_map_costs_no_memory(stride: int, layout: torch.memory_format) -> None:
    x = torch.randn(2, 20, 5, 6).to(memory_format=layout).requires_grad_()
    weight = torch.randn(20, 1, 3, 3, requires_grad=True)
    nasdet.release_scratch()
    results = []
    for backend in ("cpp", "reference"):
        y = depthwise_conv2d(x, weight, stride, backend=backend)
        results.append([y, *torch.autograd.grad(y.sum(), (x, weight))])
    assert 0 < nasdet.release_scratch() <= 2**22
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
