"""The frequency-domain algorithm of the multi-dilation convolutions: values, gradients, what must not change them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import nasdet
from nasdet import _library
from nasdet.ops import grouped_dilation_conv2d, mixed_dilation_conv2d

Dilation = int | tuple[int, int]

pytestmark = [
    pytest.mark.needs("cpp"),
    pytest.mark.skipif(_library.cpu_isa() in (None, "baseline"), reason="the algorithm needs AVX2"),
]

SET_C: tuple[Dilation, ...] = (1, 2, 3, (1, 3), (3, 1))
STAGE_5: tuple[Dilation, ...] = (1, 2, 3, 4, 5, (1, 3), (3, 1), (1, 5), (5, 1))
FORCED: dict[str, Any] = {"algorithm": "frequency", "backend": "cpp"}
BOUND = 1e-6  # of the relative L2 error; a few times what float32 leaves, and one wrong tap or border is far beyond


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Results start as NaN, so that an element which is not written cannot pass."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


def operands(x: Sequence[int], out: int, dilations: Sequence[Dilation]) -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.randn(len(dilations), out, x[1], 3, 3) * (9 * x[1]) ** -0.5
    return torch.randn(*x).contiguous(memory_format=torch.channels_last), weight, torch.randn(len(dilations), out)


def expected(x: Tensor, weight: Tensor, mix: Tensor, dilations: Sequence[Dilation]) -> Tensor:
    terms = [F.conv2d(x, w, padding=d, dilation=d) for w, d in zip(weight, dilations, strict=True)]
    return torch.stack([m[:, None, None] * term for m, term in zip(mix, terms, strict=True)]).sum(0)


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


def with_gradients(function: Any, values: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [value.detach().clone().requires_grad_() for value in values]
    y = function(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(y.dtype))]


SHAPES = [
    pytest.param((1, 16, 20, 20), 16, SET_C, id="one-vector"),
    pytest.param((2, 17, 33, 18), 3, SET_C, id="17-to-3"),
    pytest.param((1, 3, 5, 70), 17, SET_C, id="3-to-17-wide-map"),
    pytest.param((1, 100, 25, 38), 70, STAGE_5, id="100-to-70-stage-5"),
    pytest.param((3, 64, 13, 9), 130, STAGE_5, id="64-to-130-batch-3"),
    pytest.param((1, 1, 1, 1), 1, SET_C, id="one-of-everything"),
    pytest.param((2, 5, 2, 3), 4, STAGE_5, id="map-smaller-than-a-tap-grid"),
    pytest.param((1, 20, 61, 41), 24, (1,), id="plain"),
    pytest.param((1, 20, 30, 41), 24, ((1, 5), 4), id="uneven-radii"),
    pytest.param((1, 16, 40, 37), 33, (6, (3, 8)), id="radius-8"),
    pytest.param((2, 8, 40, 37), 16, (14, (3, 9)), id="radius-14"),
    pytest.param((5, 40, 19, 23), 48, SET_C, id="batch-5"),
    pytest.param((1, 16, 97, 99), 48, (1, (1, 3)), id="maps-past-the-caches"),
]


@pytest.mark.parametrize(("shape", "out", "dilations"), SHAPES)
def test_values_and_gradients(shape: tuple[int, ...], out: int, dilations: tuple[Dilation, ...]) -> None:
    values = operands(shape, out, dilations)
    upstream = torch.randn(shape[0], out, *shape[2:])
    ours = with_gradients(lambda *v: mixed_dilation_conv2d(*v, dilations, **FORCED), values, upstream)
    wide = [value.double() for value in values]
    theirs = with_gradients(lambda *v: expected(*v, dilations), wide, upstream)
    for name, found, right in zip(("y", "x", "weight", "mix"), ours, theirs, strict=True):
        assert error(found, right) < BOUND, name


@pytest.mark.parametrize(("channels", "splits"), [(16, (48, 32, 16, 16, 16)), (19, (5, 20, 1, 33, 7))])
def test_slices_of_the_channels(channels: int, splits: tuple[int, ...]) -> None:
    """Also slices that begin and end within a vector of channels."""
    x = torch.randn(2, channels, 21, 30).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(sum(splits), channels, 3, 3)
    upstream = torch.randn(2, sum(splits), 21, 30)

    def by_hand(x: Tensor, weight: Tensor) -> Tensor:
        parts = zip(SET_C, weight.split(splits), strict=True)
        return torch.cat([F.conv2d(x, w, padding=d, dilation=d) for d, w in parts], dim=1)

    ours = with_gradients(lambda *v: grouped_dilation_conv2d(*v, SET_C, splits, **FORCED), (x, weight), upstream)
    theirs = with_gradients(by_hand, (x.double(), weight.double()), upstream)
    for name, found, right in zip(("y", "x", "weight"), ours, theirs, strict=True):
        assert error(found, right) < BOUND, name


def test_no_less_accurate_than_direct_summation() -> None:
    values = operands((1, 128, 30, 40), 128, SET_C)
    right = expected(*(value.double() for value in values), SET_C)
    assert error(mixed_dilation_conv2d(*values, SET_C, **FORCED), right) <= error(expected(*values, SET_C), right)


def test_an_impulse_shows_every_tap_where_it_belongs() -> None:
    """An impulse at a place that tiles share, against taps read off the weights."""
    x = torch.zeros(1, 1, 40, 40).contiguous(memory_format=torch.channels_last)
    x[0, 0, 18, 21] = 1
    weight, mix = torch.randn(2, 1, 1, 3, 3), torch.tensor([[2.0], [-0.5]])
    y = mixed_dilation_conv2d(x, weight, mix, (2, (1, 3)), **FORCED)
    right = torch.zeros(40, 40)
    for kernel, factor, (down, across) in zip(weight[:, 0, 0], (2.0, -0.5), ((2, 2), (1, 3)), strict=True):
        for i in range(3):
            for j in range(3):
                right[18 - (i - 1) * down, 21 - (j - 1) * across] += factor * kernel[i, j]
    torch.testing.assert_close(y[0, 0], right, rtol=0, atol=1e-6)


def test_equal_dilations_are_one_convolution() -> None:
    x, weight, mix = operands((1, 24, 31, 29), 40, (1, 1, 1))
    y = mixed_dilation_conv2d(x, weight, mix, (1, 1, 1), **FORCED)
    kernel = (mix[:, :, None, None, None].double() * weight.double()).sum(0)
    assert error(y, F.conv2d(x.double(), kernel, padding=1)) < BOUND


@pytest.mark.parametrize("wanted", [(True, False, False), (False, True, False), (False, False, True)])
def test_one_gradient_alone_is_the_same(wanted: tuple[bool, bool, bool]) -> None:
    values = operands((2, 18, 17, 22), 35, SET_C)
    upstream = torch.randn(2, 35, 17, 22)
    everything = with_gradients(lambda *v: mixed_dilation_conv2d(*v, SET_C, **FORCED), values, upstream)[1:]
    leaves = [value.detach().clone().requires_grad_(want) for value, want in zip(values, wanted, strict=True)]
    mixed_dilation_conv2d(*leaves, SET_C, **FORCED).backward(upstream)
    for leaf, want, right in zip(leaves, wanted, everything, strict=True):
        assert torch.equal(leaf.grad, right) if want else leaf.grad is None


@pytest.mark.parametrize("threads", [2, 16])
def test_the_same_bits_on_any_number_of_threads(threads: int) -> None:
    values = operands((2, 70, 45, 38), 100, STAGE_5)
    upstream = torch.randn(2, 100, 45, 38)

    def run(count: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return with_gradients(lambda *v: mixed_dilation_conv2d(*v, STAGE_5, **FORCED), values, upstream)
        finally:
            torch.set_num_threads(before)

    for one, many in zip(run(1), run(threads), strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize(
    ("shape", "out", "mebibytes"),
    [((2, 70, 45, 38), 100, 2), ((1, 64, 120, 90), 40, 4), ((3, 130, 30, 31), 150, 1), ((1, 40, 60, 400), 33, 1)],
)
def test_sums_in_several_goes(shape: tuple[int, ...], out: int, mebibytes: int) -> None:
    """With little scratch some rows of tiles are in hand at a time; still the same bits on any number of threads."""
    values = operands(shape, out, STAGE_5)
    upstream = torch.randn(shape[0], out, *shape[2:])
    limit, threads, results = nasdet.scratch_limit(), torch.get_num_threads(), []
    nasdet.scratch_limit(mebibytes << 20)
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(with_gradients(lambda *v: mixed_dilation_conv2d(*v, STAGE_5, **FORCED), values, upstream))
    finally:
        nasdet.scratch_limit(limit)
        torch.set_num_threads(threads)
    wide = [value.double() for value in values]
    theirs = with_gradients(lambda *v: expected(*v, STAGE_5), wide, upstream)
    for name, one, three, right in zip(("y", "x", "weight", "mix"), *results, theirs, strict=True):
        assert torch.equal(one, three), name
        assert error(one, right) < BOUND, name


def test_nothing_is_read_beyond_a_view() -> None:
    """NaN around a map, in rows, columns and channels, must not reach the result."""
    around = torch.full((1, 9, 11, 24), float("nan")).permute(0, 3, 1, 2)
    inner = around[:, 3:20, 1:8, 2:9]
    inner.copy_(torch.randn(1, 17, 7, 7))
    weight, mix = torch.randn(5, 8, 17, 3, 3), torch.randn(5, 8)
    y = mixed_dilation_conv2d(inner, weight, mix, SET_C, **FORCED)
    assert error(y, expected(inner.double(), weight.double(), mix.double(), SET_C)) < BOUND


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stride": 2}, "stride 1 only"),
        ({"groups": 2}, "one group only"),
        ({"kernel": 5}, "3x3 kernels only"),
        ({"kernel": 1}, "3x3 kernels only"),
        ({"dtype": torch.bfloat16}, "float32 only"),
        ({"dtype": torch.float64}, "float32 only"),
        ({"dilation": 15}, "dilations of up to 14 only"),
        ({"dilation": (1, 1000)}, "dilations of up to 14 only"),
    ],
    ids=lambda value: "-".join(f"{k}-{v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_says_why_it_cannot_run(change: dict[str, Any], message: str) -> None:
    groups, kernel, dtype = change.get("groups", 1), change.get("kernel", 3), change.get("dtype", torch.float32)
    x, weight = torch.randn(1, 4, 8, 8, dtype=dtype), torch.randn(1, 4, 4 // groups, kernel, kernel, dtype=dtype)
    mix = torch.ones(1, 4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    with pytest.raises(ValueError, match=f"frequency.*{message}"):
        mixed_dilation_conv2d(x, weight, mix, [change.get("dilation", 1)], change.get("stride", 1), groups, **FORCED)


# Run apart, with another instruction set; prints the errors of y and of the three gradients.
_APART = """
import json, sys, torch
from torch.nn import functional as F
from nasdet.ops import mixed_dilation_conv2d
torch.manual_seed(0)
torch.set_num_threads(2)
dilations = (1, 2, (1, 3), (5, 1))
found = []
for shape, out in (((2, 37, 22, 31), 50), ((1, 8, 9, 40), 9)):
    x, weight, mix = torch.randn(*shape), torch.randn(4, out, shape[1], 3, 3), torch.randn(4, out)
    narrow = [v.requires_grad_() for v in (x, weight, mix)]
    wide = [v.detach().double().requires_grad_() for v in narrow]
    ours = mixed_dilation_conv2d(*narrow, dilations, algorithm="frequency", backend="cpp")
    branches = zip(wide[2], wide[1], dilations)
    theirs = sum(m[:, None, None] * F.conv2d(wide[0], w, padding=d, dilation=d) for m, w, d in branches)
    upstream = torch.randn_like(ours)
    gradients = torch.autograd.grad(ours, narrow, upstream), torch.autograd.grad(theirs, wide, upstream.double())
    pairs = [(ours, theirs), *zip(*gradients)]
    found += [float((a - b).norm() / b.norm()) for a, b in pairs]
print(json.dumps(found))
"""


def run_apart(level: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"NASDET_CPU_CAPABILITY": level}
    return subprocess.run([sys.executable, "-c", _APART], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("level", ["avx2", "avx512"])
def test_every_instruction_set(level: str) -> None:
    if level == "avx512" and _library.cpu_isa() == "avx2":
        pytest.skip("this CPU has no AVX-512")
    result = run_apart(level)
    assert result.returncode == 0, result.stderr[-2000:]
    assert max(json.loads(result.stdout)) < BOUND


def test_refuses_without_avx2() -> None:
    result = run_apart("baseline")
    assert result.returncode != 0 and "needs AVX2" in result.stderr
