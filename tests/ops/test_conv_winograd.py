"""Winograd's convolution behind ``grouped_dilation_conv2d`` and ``mixed_dilation_conv2d``, forced, in float32."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import nasdet
from nasdet import _library
from nasdet.ops import grouped_dilation_conv2d, mixed_dilation_conv2d

pytestmark = pytest.mark.needs("cpp")
FORCED: dict[str, Any] = {"backend": "cpp", "algorithm": "winograd"}
REFERENCE: dict[str, Any] = {"backend": "reference"}
ERROR = 3e-6  # relative L2, promised up to 512 channels
SET_C = (1, 2, 3, 4, 5, (1, 3), (3, 1), (1, 5), (5, 1))


class Shape(NamedTuple):
    n: int
    cin: int
    h: int
    w: int
    dilations: tuple[int | tuple[int, int], ...]
    splits: tuple[int, ...]


SHAPES = {
    "one-pixel": Shape(1, 1, 1, 1, (1,), (1,)),
    "one-pixel-of-many-channels": Shape(2, 100, 1, 1, (1, 3), (17, 3)),
    "two-rows": Shape(1, 17, 2, 3, (1, 2), (3, 1)),
    "one-column": Shape(1, 5, 23, 1, ((1, 2), (2, 1)), (5, 9)),
    "whole-tiles": Shape(1, 16, 8, 12, (1,), (16,)),
    "cut-tiles": Shape(2, 32, 9, 14, (1,), (48,)),
    "phases-of-two-sizes": Shape(1, 16, 13, 11, (2, 3), (16, 16)),
    "dilation-of-the-map": Shape(1, 8, 5, 6, (5, 6), (8, 8)),
    "dilation-beyond-the-map": Shape(1, 3, 4, 5, (7, (1, 1000), (2**29, 1)), (4, 5, 6)),
    "slices-within-a-vector": Shape(1, 24, 10, 9, (1, 2, (1, 3)), (1, 3, 17)),
    "more-inputs": Shape(1, 100, 7, 9, (1, (3, 1)), (7, 10)),
    "more-outputs": Shape(2, 3, 7, 9, (1, 2), (100, 33)),
    "every-panel-width": Shape(1, 20, 6, 7, (1, 2, 3, (1, 2), (2, 1)), (16, 32, 48, 64, 80)),
    "set-c": Shape(1, 64, 25, 38, SET_C, (16, 8, 8, 8, 8, 4, 4, 4, 4)),
    "one-dilation-in-two-places": Shape(1, 16, 11, 10, (2, 1, 2), (16, 10, 7)),
    "pieces-of-the-weights": Shape(1, 512, 6, 7, (1, 2), (400, 112)),
    "columns-in-several-goes": Shape(1, 520, 46, 50, (1,), (150,)),
    "wide-columns": Shape(1, 100, 31, 43, (2,), (210,)),
    "wide-columns-in-several-goes": Shape(1, 370, 52, 58, (1,), (200,)),
    "pieces-of-the-tiles": Shape(2, 200, 50, 46, (1,), (104,)),
    "all-wide": Shape(1, 100, 25, 38, (2, (1, 3)), (97, 130)),
    "wide-and-narrow": Shape(1, 100, 13, 19, (3, 1, 2), (20, 97, 17)),
    "wide-weights": Shape(1, 330, 9, 10, (1,), (296,)),
    "narrow-columns": Shape(1, 150, 25, 21, ((1, 2), 3), (50, 17)),
    "maps-past-the-caches": Shape(1, 32, 97, 99, (1,), (32,)),
    "unaligned-slices-past-the-caches": Shape(1, 32, 97, 99, (1, 2, (1, 3)), (17, 15, 32)),
}


def operands(s: Shape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(s.n, s.cin, s.h, s.w, dtype=dtype).to(memory_format=torch.channels_last)
    return x, torch.randn(sum(s.splits), s.cin, 3, 3, dtype=dtype)


def results(s: Shape, x: Tensor, weight: Tensor, grad: Tensor, **how: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The output and both gradients."""
    x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
    y = grouped_dilation_conv2d(x, weight, s.dilations, s.splits, **how)
    dx, dweight = torch.autograd.grad(y, (x, weight), grad.to(y.dtype))
    return y.detach(), dx, dweight


def error(got: Tensor, expected: Tensor) -> float:
    return float((got.double() - expected).norm() / expected.norm())


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Fresh tensors hold NaN."""
    torch.use_deterministic_algorithms(True)
    assert bool(torch.empty(1000).isnan().all())
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("s", SHAPES.values(), ids=list(SHAPES))
def test_values_and_gradients(s: Shape) -> None:
    x, weight = operands(s)
    grad = torch.randn(s.n, weight.shape[0], s.h, s.w)
    exact = results(s, x.double(), weight.double(), grad.double(), **REFERENCE)
    for name, got, expected in zip(("y", "dx", "dweight"), results(s, x, weight, grad, **FORCED), exact, strict=True):
        assert got.shape == expected.shape and bool(got.isfinite().all()), name
        assert error(got, expected) <= ERROR, name


def test_the_map_ends_alike_for_the_last_of_many_channels() -> None:
    s = Shape(1, 2070, 5, 6, (1,), (3,))
    x, weight = operands(s)
    weight[:, :2030] = 0  # so many terms would round to more than is promised
    grad = torch.randn(s.n, 3, s.h, s.w)
    exact = results(s, x.double(), weight.double(), grad.double(), **REFERENCE)
    for name, got, expected in zip(("y", "dx", "dweight"), results(s, x, weight, grad, **FORCED), exact, strict=True):
        assert error(got, expected) <= ERROR, name


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("h", range(1, 9))
def test_last_tiles_of_every_size(h: int) -> None:
    """1 to 4 rows and columns of outputs, after whole tiles and alone."""
    for w in range(1, 9):
        s = Shape(2, 20, h, w, (1, (1, 2)), (20, 16))
        x, weight = operands(s)
        grad = torch.randn(s.n, 36, h, w)
        exact = results(s, x.double(), weight.double(), grad.double(), **REFERENCE)
        for name, got, right in zip(("y", "dx", "dweight"), results(s, x, weight, grad, **FORCED), exact, strict=True):
            assert error(got, right) <= ERROR, (name, w)


@pytest.mark.parametrize("dilation", [1, 2, 3, (1, 3), (5, 1), (2, 7)], ids=str)
def test_one_slice_is_conv2d(dilation: Any) -> None:
    x, weight = torch.randn(2, 40, 19, 22), torch.randn(24, 40, 3, 3)
    y = grouped_dilation_conv2d(x, weight, [dilation], [24], **FORCED)
    expected = F.conv2d(x.double(), weight.double(), None, 1, dilation, dilation)
    assert y.is_contiguous() and error(y, expected) <= ERROR


def test_slices_do_not_know_each_other() -> None:
    """Bit for bit: the sums of a channel do not depend on what is computed beside it."""
    s = SHAPES["set-c"]
    x, weight = operands(s)
    y = grouped_dilation_conv2d(x, weight, s.dilations, s.splits, **FORCED)
    first = 0
    for dilation, size in zip(s.dilations, s.splits, strict=True):
        alone = grouped_dilation_conv2d(x, weight[first : first + size], [dilation], [size], **FORCED)
        assert torch.equal(y[:, first : first + size], alone)
        first += size


def test_images_do_not_know_each_other() -> None:
    s = Shape(3, 20, 9, 14, (1, 2), (20, 12))
    x, weight = operands(s)
    y = grouped_dilation_conv2d(x, weight, s.dilations, s.splits, **FORCED)
    for image, alone in zip(x, y, strict=True):
        assert torch.equal(
            grouped_dilation_conv2d(image[None].contiguous(), weight, s.dilations, s.splits, **FORCED)[0], alone
        )


def test_an_impulse_gives_the_kernel_back() -> None:
    weight = torch.randn(5, 1, 3, 3)
    x = torch.zeros(1, 1, 17, 17)
    x[0, 0, 8, 9] = 1
    for down, across in ((1, 1), (2, 3), (4, 1)):
        y = grouped_dilation_conv2d(x, weight, [(down, across)], [5], **FORCED)
        around = y[0, :, 8 - down : 9 + down : down, 9 - across : 10 + across : across]
        torch.testing.assert_close(around, weight[:, 0].flip(1, 2), rtol=1e-5, atol=1e-6)
        assert float(y.double().square().sum() - around.double().square().sum()) < 1e-10


def test_gradients_are_the_adjoint() -> None:
    """<conv(x, w), g> = <x, dx> = <w, dw>."""
    s = Shape(2, 50, 21, 18, (1, 3, (1, 2)), (30, 20, 11))
    x, weight = operands(s)
    grad = torch.randn(s.n, 61, s.h, s.w)
    y, dx, dweight = (t.double() for t in results(s, x, weight, grad, **FORCED))
    product, scale = (y * grad).sum(), y.norm() * grad.norm()
    assert abs(product - (x * dx).sum()) <= ERROR * scale
    assert abs(product - (weight * dweight).sum()) <= ERROR * scale


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_one_gradient_alone_is_the_same(wanted: str) -> None:
    s = SHAPES["slices-within-a-vector"]
    x, weight = operands(s)
    grad = torch.randn(s.n, 21, s.h, s.w)
    _, dx, dweight = results(s, x, weight, grad, **FORCED)
    leaf = (x if wanted == "x" else weight).requires_grad_()
    y = grouped_dilation_conv2d(x, weight, s.dilations, s.splits, **FORCED)
    assert torch.equal(torch.autograd.grad(y, leaf, grad)[0], dx if wanted == "x" else dweight)


@pytest.mark.parametrize("dilation", [1, (2, 3)], ids=str)
@pytest.mark.parametrize("channels", [(20, 30), (3, 17)], ids=str)
def test_a_mixture_of_one_branch(channels: tuple[int, int], dilation: Any) -> None:
    """Scales the kernels, and has a gradient for the factors."""
    cin, cout = channels
    operands = torch.randn(2, cin, 9, 13), torch.randn(1, cout, cin, 3, 3), torch.rand(1, cout) + 0.5
    found: list[tuple[Tensor, ...]] = []
    cases: tuple[tuple[torch.dtype, dict[str, Any]], ...] = ((torch.float32, FORCED), (torch.float64, REFERENCE))
    for dtype, how in cases:
        x, weight, mix = (t.to(dtype).requires_grad_() for t in operands)
        y = mixed_dilation_conv2d(x, weight, mix, [dilation], **how)
        found.append((y.detach(), *torch.autograd.grad(y.square().sum(), (x, weight, mix))))
    for name, got, expected in zip(("y", "dx", "dweight", "dmix"), *found, strict=True):
        assert error(got, expected) <= ERROR, name


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("cin", [1, 3, 17, 32])
def test_reads_nothing_beside_the_maps(cin: int) -> None:
    """x, weight and grad lie in the middle of NaN."""

    def among_nan(values: Tensor) -> Tensor:
        around = torch.full((values.numel() + 256,), float("nan"))
        around[128:-128] = values.flatten()
        return around[128:-128].view(values.shape)

    x = among_nan(torch.randn(1, 7, 6, cin)).permute(0, 3, 1, 2)
    weight, grad = among_nan(torch.randn(19, cin, 3, 3)), among_nan(torch.randn(1, 7, 6, 19)).permute(0, 3, 1, 2)
    for got in results(Shape(1, cin, 7, 6, (1, 2), (2, 17)), x, weight, grad, **FORCED):
        assert bool(got.isfinite().all())


@pytest.mark.parametrize(
    "case",
    ["set-c", "all-wide", "wide-and-narrow", "pieces-of-the-weights", "pieces-of-the-tiles", "slices-within-a-vector"],
)
def test_any_number_of_threads_gives_the_same_bits(case: str) -> None:
    s = SHAPES[case]
    x, weight = operands(s)
    grad = torch.randn(s.n, weight.shape[0], s.h, s.w)
    one = results(s, x, weight, grad, **FORCED)
    try:
        for threads in (2, 16):
            torch.set_num_threads(threads)
            for got, expected in zip(results(s, x, weight, grad, **FORCED), one, strict=True):
                assert torch.equal(got, expected)
    finally:
        torch.set_num_threads(1)


def test_an_empty_batch() -> None:
    s = Shape(0, 4, 5, 6, (1,), (3,))
    x, weight = operands(s)
    y, dx, dweight = results(s, x, weight, torch.zeros(0, 3, 5, 6), **FORCED)
    assert y.shape == (0, 3, 5, 6) and dx.shape == x.shape and torch.equal(dweight, torch.zeros_like(weight))


@pytest.mark.parametrize(
    ("reason", "changed"),
    [
        ("stride", {"stride": 2}),
        ("stride", {"stride": (1, 2)}),
        ("groups", {"groups": 2}),
        ("float32", {"dtype": torch.float64}),
        ("float32", {"dtype": torch.bfloat16}),
        ("3x3", {"kernel": 5}),
        ("3x3", {"kernel": 1}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_says_why_not(reason: str, changed: dict[str, Any]) -> None:
    dtype, kernel, groups = changed.pop("dtype", torch.float32), changed.pop("kernel", 3), changed.get("groups", 1)
    x, weight = torch.randn(1, 8, 9, 9, dtype=dtype), torch.randn(8, 8 // groups, kernel, kernel, dtype=dtype)
    with pytest.raises(ValueError, match=f"got 'winograd': .*{reason}"):
        grouped_dilation_conv2d(x, weight, [1], [8], **changed, **FORCED)


def test_says_why_not_for_branches_that_overlap() -> None:
    x, weight, mix = torch.randn(1, 4, 9, 9), torch.randn(2, 6, 4, 3, 3), torch.rand(2, 6)
    with pytest.raises(ValueError, match="one dilation each"):
        mixed_dilation_conv2d(x, weight, mix, [1, 2], **FORCED)


def test_a_small_scratch_limit_changes_little() -> None:
    s = Shape(1, 96, 30, 41, (1, 2), (80, 48))
    x, weight = operands(s)
    grad = torch.randn(s.n, 128, s.h, s.w)
    usual = results(s, x, weight, grad, **FORCED)
    exact = results(s, x.double(), weight.double(), grad.double(), **REFERENCE)
    before = nasdet.scratch_limit()
    nasdet.scratch_limit(1 << 20)
    try:
        small = results(s, x, weight, grad, **FORCED)
    finally:
        nasdet.scratch_limit(before)
    assert torch.equal(small[0], usual[0]) and torch.equal(small[1], usual[1])  # pieces cut no sum here
    for got, expected in zip(small, exact, strict=True):
        assert error(got, expected) <= ERROR


@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_other_instruction_sets(level: str, require: Any) -> None:
    order = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
    best = _library.cpu_isa() or "baseline"
    if order.index(level) > order.index(best):
        require(level, f"this CPU's best instruction set is {best}")
    if level == best:
        pytest.skip("the other tests run this one")
    environment = os.environ | {"NASDET_CPU_CAPABILITY": level}
    if level == "baseline":
        code = (
            "import torch; from nasdet.ops import grouped_dilation_conv2d as f; "
            "f(torch.ones(1, 1, 3, 3), torch.ones(1, 1, 3, 3), [1], [1], backend='cpp', algorithm='winograd')"
        )
        ran = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert ran.returncode != 0 and "it needs AVX2" in ran.stderr
        return
    command = [*(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__)]
    command += ["-k", "values_and_gradients or last_tiles or threads or nothing_beside or mixture_of_one"]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:]
    assert " passed" in ran.stdout


@pytest.mark.skipif(os.environ.get("NASDET_CPU_CAPABILITY") == "amx_emulated", reason="this is the process")
def test_with_emulated_tiles() -> None:
    chosen = "values_and_gradients or last_tiles or conv2d or nothing_beside or mixture_of_one or small_scratch"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    command += ["-k", f"{chosen} or threads and slices"]
    environment = os.environ | {"NASDET_CPU_CAPABILITY": "amx_emulated"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout[-3000:] + ran.stderr[-1000:]
