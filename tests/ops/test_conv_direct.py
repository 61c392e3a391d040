"""The direct algorithm of the multi-dilation convolutions: every form of its kernels, on every instruction set."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from nasdet import _library
from nasdet.ops import grouped_dilation_conv2d, mixed_dilation_conv2d
from nasdet.testing import assert_close, tolerance

pytestmark = pytest.mark.needs("cpp")
LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16, "fp16": torch.float16}

# in, out, groups, splits of the output channels
CHANNELS = {
    "one-panel": (64, 64, 1, (64,)),
    "panels-of-every-width": (24, 64 + 48 + 32 + 16 + 7, 1, (64, 48, 32, 16, 7)),
    "more-than-a-span": (130, 70, 1, (40, 30)),
    "more-than-a-chain": (520, 10, 1, (6, 4)),
    "odd": (17, 33, 1, (1, 32)),
    "4-a-group": (32, 32, 8, (12, 20)),
    "8-a-group": (64, 64, 8, (24, 40)),
    "6-a-group": (24, 18, 3, (6, 12)),
    "10-a-group": (20, 20, 2, (10, 10)),
    "16-a-group": (48, 48, 3, (16, 32)),
    "20-a-group": (40, 40, 2, (20, 20)),
    "uneven-groups": (15, 25, 5, (10, 15)),
    "many-to-one": (36, 4, 4, (2, 2)),
    "one-to-many": (4, 36, 4, (18, 18)),
    "depthwise": (70, 70, 70, (3, 67)),
    "wide-groups-of-narrow-output": (260, 2, 2, (1, 1)),
}


def grouped(x: Tensor, weight: Tensor, splits: Sequence[int], stride: Any, groups: int, **options: Any) -> Tensor:
    dilations = ((1, 2), 3, 1, 2, 1)[: len(splits)]
    return grouped_dilation_conv2d(x, weight, dilations, splits, stride, groups, **options)


def mixed(x: Tensor, weight: Tensor, mix: Tensor, stride: Any, groups: int, **options: Any) -> Tensor:
    return mixed_dilation_conv2d(x, weight, mix, ((1, 2), 3, 1), stride, groups, **options)


def check(run: Callable[..., Tensor], values: Sequence[Tensor], terms: int) -> None:
    """``run(*values, backend=...)`` and all gradients against the reference in float64."""
    leaves = [value.detach().requires_grad_() for value in values]
    exact_leaves = [value.detach().double().requires_grad_() for value in values]
    y = run(*leaves, backend="cpp", algorithm="direct")
    exact = run(*exact_leaves, backend="reference")
    assert_close(y, exact, tolerance(y.dtype, terms, exact.abs().max().item()), "y")
    upstream = torch.randn(y.shape).to(y.dtype)
    gradients = torch.autograd.grad(y, leaves, upstream)
    for index, (got, want) in enumerate(
        zip(gradients, torch.autograd.grad(exact, exact_leaves, upstream.double()), strict=True)
    ):
        bound = tolerance(got.dtype, y.numel(), max(want.abs().max().item(), upstream.abs().max().item()))
        assert_close(got, want, bound, f"gradient {index}")
        assert want.abs().max() > 0


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("stride", [1, (2, 3)], ids=["stride-1", "stride-2-3"])
@pytest.mark.parametrize("channels", CHANNELS.values(), ids=CHANNELS.keys())
def test_every_form_against_float64(channels: Any, stride: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs, outputs, groups, splits = channels
    fan = inputs // groups
    x, weight = torch.randn(2, inputs, 5, 7), torch.randn(3, outputs, fan, 3, 3) * (9 * fan) ** -0.5
    weight = weight.to(dtype)
    x, mix = x.to(dtype), torch.rand(3, outputs, dtype=torch.float64 if dtype == torch.float64 else torch.float32)

    def run_grouped(x: Tensor, weight: Tensor, **options: Any) -> Tensor:
        return grouped(x, weight, splits, stride, groups, **options)

    def run_mixed(x: Tensor, weight: Tensor, mix: Tensor, **options: Any) -> Tensor:
        return mixed(x, weight, mix, stride, groups, **options)

    check(run_grouped, (x, weight[0]), 9 * fan)
    check(run_mixed, (x, weight, mix), 27 * fan)


@pytest.mark.parametrize("level", LEVELS)
def test_every_form_on_every_instruction_set(level: str, require: Callable[..., None]) -> None:
    best = _library.cpu_isa() or ""
    if LEVELS.index(level) >= LEVELS.index(best):
        pytest.skip("this process runs it" if level == best else f"this CPU's best instruction set is {best}")
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__),
        *("-k", "against_float64 and stride-2"),
    ]
    environment = os.environ | {"NASDET_CPU_CAPABILITY": level, "NASDET_EXPECT_ISA": level}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:] + result.stderr[-1000:]


@pytest.mark.parametrize("kernel", [1, 3, 5, 11])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 9)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, (7, 1)], ids=str)
def test_maps_smaller_than_the_kernel(kernel: int, size: tuple[int, int], stride: Any) -> None:
    x = torch.randn(3, 6, *size, dtype=torch.float64)
    weight = torch.randn(2, 5, 6, kernel, kernel, dtype=torch.float64)
    mix = torch.rand(2, 5, dtype=torch.float64)
    dilations = (1, (40, 2))

    def run(x: Tensor, weight: Tensor, mix: Tensor, **options: Any) -> Tensor:
        return mixed_dilation_conv2d(x, weight, mix, dilations, stride, **options)

    check(run, (x, weight, mix), 12 * kernel**2)


@pytest.mark.parametrize("channels", [1, 3, 17, 100, 513])
def test_equal_dilations_are_conv2d(channels: int) -> None:
    x, weight = torch.randn(1, channels, 6, 7), torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5
    expected = F.conv2d(x.double(), weight.double(), padding=1)
    splits = (channels,) if channels == 1 else (1, channels - 1)
    y = grouped_dilation_conv2d(x, weight, [1] * len(splits), splits, algorithm="direct", backend="cpp")
    assert ((y - expected).norm() / expected.norm()) < 4e-7
    stack, mix = weight.expand(2, -1, -1, -1, -1), torch.tensor([[0.25], [0.75]])
    y = mixed_dilation_conv2d(x, stack, mix, (1, 1), algorithm="direct", backend="cpp")
    assert ((y - expected).norm() / expected.norm()) < 4e-7


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "transposed", "narrowed channels_last"])
def test_views_of_every_layout(layout: str) -> None:
    whole = torch.randn(2, 24, 12, 12)
    x = {
        "contiguous": whole[:, :12].contiguous(),
        "channels_last": whole[:, :12].contiguous(memory_format=torch.channels_last),
        "sliced": whole[:, ::2, 1:, ::2],
        "transposed": whole[:, :12].transpose(2, 3),
        "narrowed channels_last": whole.contiguous(memory_format=torch.channels_last)[:, 3:15, 2:9],
    }[layout]
    weight = torch.randn(10, 12, 3, 3).transpose(2, 3)
    y = grouped(x, weight, (6, 4), 1, 1, algorithm="direct", backend="cpp")
    assert torch.equal(y, grouped(x.contiguous(), weight.contiguous(), (6, 4), 1, 1, algorithm="direct", backend="cpp"))


def test_sixteen_threads_change_no_bit() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 40, 33, 21).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, mix = torch.randn(3, 70, 40, 3, 3, requires_grad=True), torch.rand(3, 70, requires_grad=True)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 16):
        torch.set_num_threads(threads)
        y = mixed(x, weight, mix, 1, 1, algorithm="direct", backend="cpp")
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight, mix))))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("limit", [1, 300_000])
def test_little_scratch_changes_no_bit(limit: int) -> None:
    """Panels and sums that do not fit are done one after another."""
    import nasdet

    x = torch.randn(1, 70, 9, 9, requires_grad=True)
    weight, mix = torch.randn(3, 150, 70, 3, 3, requires_grad=True), torch.rand(3, 150, requires_grad=True)
    before, results = nasdet.scratch_limit(), []
    try:
        for bytes_ in (before, limit):
            nasdet.scratch_limit(bytes_)
            y = mixed(x, weight, mix, 1, 1, algorithm="direct", backend="cpp")
            results.append((y, *torch.autograd.grad(y.square().sum(), (x, weight, mix))))
    finally:
        nasdet.scratch_limit(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_rounding_is_that_of_short_sums() -> None:
    """Sums of 33 taps by 128 channels are broken into chains: one chain's error would be above 1e-6."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 128, 20, 20), torch.randn(5, 64, 128, 3, 3) * (9 * 128) ** -0.5
    mix, dilations = torch.rand(5, 64), (1, 2, 3, (1, 3), (3, 1))
    y = mixed_dilation_conv2d(x, weight, mix, dilations, algorithm="direct", backend="cpp")
    exact = mixed_dilation_conv2d(x.double(), weight.double(), mix.double(), dilations, backend="reference")
    assert ((y - exact).norm() / exact.norm()) < 6e-7
