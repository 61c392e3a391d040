"""The direct algorithm for bfloat16 on matrix tiles: those of the CPU, or emulated ones in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nasdet
from nasdet import _library
from nasdet.ops import grouped_dilation_conv2d, mixed_dilation_conv2d
from nasdet.testing import assert_close, tolerance

pytestmark = pytest.mark.needs("cpp")
NONE, EMULATED, HARDWARE = 0, 1, 2
TILES = NONE if _library.why_not("cpu") else int(torch.ops.nasdet._cpu_tiles())
tiled = pytest.mark.skipif(TILES == NONE, reason="this process has no matrix tiles")
DILATIONS = (1, 2, 3, (1, 3), (3, 1))


def operands(n: int = 2, inputs: int = 40, outputs: int = 33, size: tuple[int, int] = (9, 13), groups: int = 1) -> Any:
    torch.manual_seed(0)
    x = torch.randn(n, inputs, *size).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = (torch.randn(len(DILATIONS), outputs, inputs // groups, 3, 3) * (9 * inputs) ** -0.5).bfloat16()
    return x, weight, torch.rand(len(DILATIONS), outputs)


def run(x: Tensor, weight: Tensor, mix: Tensor, stride: Any = 1, dilations: Any = DILATIONS, groups: int = 1) -> Tensor:
    return mixed_dilation_conv2d(x, weight, mix, dilations, stride, groups, algorithm="direct", backend="cpp")


def with_gradients(x: Tensor, weight: Tensor, mix: Tensor, stride: Any = 1, groups: int = 1) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (x, weight, mix)]
    y = run(*leaves, stride, groups=groups)
    return y.detach(), *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).view(y.shape).to(y.dtype))


def assert_near_float64(op: Any, values: Sequence[Tensor], options: Sequence[Any]) -> None:
    """The values and all gradients of the C++ backend against those of the reference in float64."""
    leaves = [t.detach().requires_grad_() for t in values]
    exact = [t.detach().double().requires_grad_() for t in values]
    y = op(*leaves, *options, algorithm="direct", backend="cpp")
    want = op(*exact, *options, backend="reference")
    upstream = torch.randn(y.shape).bfloat16()
    found = (y, *torch.autograd.grad(y, leaves, upstream))
    wanted = (want, *torch.autograd.grad(want, exact, upstream.double()))
    for got, expected in zip(found, wanted, strict=True):
        assert (got - expected).norm().item() < 4e-3 * expected.norm().item()


def test_the_cap_turns_tiles_off_and_asks_for_emulated_ones() -> None:
    code = "import torch, nasdet.ops; print(torch.ops.nasdet._cpu_tiles())"
    for level, expected in (("avx512_bf16", NONE), ("avx2", NONE), ("amx_emulated", EMULATED)):
        environment = os.environ | {"NASDET_CPU_CAPABILITY": level}
        result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert result.stdout.strip() == str(expected), result.stderr
    assert (TILES == HARDWARE) == (_library.cpu_isa() == "amx")


@pytest.mark.skipif(TILES == EMULATED, reason="this is the process")
def test_with_emulated_tiles() -> None:
    files = [__file__, str(Path(__file__).with_name("test_conv_direct.py"))]
    chosen = "conv_amx or against_float64 and bf16"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen]
    environment = os.environ | {"NASDET_CPU_CAPABILITY": "amx_emulated"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and " passed" in result.stdout, result.stdout[-3000:] + result.stderr[-1000:]


@tiled
@pytest.mark.parametrize("stride", [1, 2, (1, 2), (3, 2)], ids=str)
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (9, 13), (16, 31), (5, 70)], ids=str)
@pytest.mark.parametrize("channels", [(8, 8), (17, 33), (32, 64), (40, 9), (70, 97)], ids=str)
def test_against_float64(channels: tuple[int, int], size: tuple[int, int], stride: Any) -> None:
    values = operands(2, *channels, size)
    exact = [t.double().requires_grad_() for t in values]
    y = mixed_dilation_conv2d(*exact, DILATIONS, stride, backend="reference")
    upstream = torch.linspace(-1, 1, y.numel()).view(y.shape).bfloat16()
    expected = (y, *torch.autograd.grad(y, exact, upstream.double()))
    for name, got, want in zip(("y", "x", "weight", "mix"), with_gradients(*values, stride), expected, strict=True):
        terms = 45 * channels[0] if name == "y" else max(y.numel(), 45 * channels[1])
        assert_close(got, want.detach(), tolerance(got.dtype, terms, max(1.0, want.abs().max().item())), name)
        assert (got - want).norm().item() <= want.norm().item() * (4e-3 if name != "mix" else 1e-4)


@tiled
def test_dilations_larger_than_the_map_and_no_images() -> None:
    x, weight, mix = operands(size=(4, 5))
    dilations = (1, 9, (1, 4), (40, 2), (3, 70))
    exact = mixed_dilation_conv2d(x.double(), weight.double(), mix.double(), dilations, backend="reference")
    y = run(x, weight, mix, 1, dilations)
    assert_close(y, exact, tolerance(y.dtype, 45 * 40, float(exact.abs().max())), "y")
    for got, like in zip(with_gradients(x[:0], weight, mix)[1:], (x[:0], weight, mix), strict=True):
        assert got.shape == like.shape and not got.any()


@tiled
def test_slices_of_odd_widths() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 24, 9, 7).bfloat16(), (torch.randn(61, 24, 3, 3) / 15).bfloat16()
    assert_near_float64(grouped_dilation_conv2d, (x, weight), ((1, (2, 1), 3, 2), (3, 33, 16, 9), 1, 1))


@tiled
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_where_it_belongs(bad: float) -> None:
    """Zeros fill channels up and stand between rows: nothing may spread through them."""
    x, weight, mix = operands(2, 17, 19, (9, 13))
    clean = with_gradients(x, weight, mix)
    x[1, 5, 0, 12] = bad
    marks = torch.zeros(2, 1, 9, 13)
    marks[1, 0, 0, 12] = 1
    ones = torch.ones(len(DILATIONS), 1, 1, 3, 3)
    reached = mixed_dilation_conv2d(marks, ones, torch.ones(len(DILATIONS), 1), DILATIONS, backend="reference") > 0
    y, dx, dweight, dmix = with_gradients(x, weight, mix)
    assert torch.equal(~y.isfinite(), reached.expand_as(y))
    assert torch.equal(y[y.isfinite()], clean[0][y.isfinite()]) and torch.equal(dx, clean[1])
    others = [c for c in range(17) if c != 5]
    assert dweight[:, :, others].isfinite().all() and dmix.isnan().any()
    torch.testing.assert_close(dweight[:, :, others], clean[2][:, :, others], rtol=1e-2, atol=1e-2)
    # The last column's pixel is read by no tap to the right of an output: those gradients are finite.
    assert dweight[:, :, 5, :, 0].isfinite().all()
    x, weight, mix = operands(2, 17, 19, (9, 13))
    weight[0, 7, 3, 1, 1] = bad
    y = run(x, weight, mix)
    assert torch.equal(y.isfinite().all(dim=(0, 2, 3)), torch.arange(19) != 7)


@tiled
def test_groups_that_share_tiles_share_no_infinity() -> None:
    torch.manual_seed(0)
    x, weight, mix = torch.randn(2, 48, 6, 7).bfloat16(), torch.randn(3, 30, 8, 3, 3).bfloat16(), torch.rand(3, 30)
    upstream = torch.randn(2, 30, 6, 7).bfloat16()
    x[0, 9], upstream[1, 21] = float("inf"), float("nan")
    leaves = [t.requires_grad_() for t in (x, weight, mix)]
    y = mixed_dilation_conv2d(*leaves, (1, 2, (1, 3)), 1, 6, algorithm="direct", backend="cpp")
    dx, dweight, dmix = torch.autograd.grad(y, leaves, upstream)
    own_outputs, own_inputs = torch.arange(30) // 5 == 1, torch.arange(48) // 8 == 4
    assert torch.equal(~y.isfinite().all(dim=(0, 2, 3)), own_outputs)
    assert torch.equal(~dx.isfinite().all(dim=(0, 2, 3)), own_inputs)
    touched = own_outputs | (torch.arange(30) == 21)
    assert torch.equal(~dweight.isfinite().all(dim=(0, 2, 3, 4)), touched)
    assert torch.equal(~dmix.isfinite().all(dim=0), touched)


@tiled
@pytest.mark.parametrize(
    ("fan", "width", "groups"), [(4, 4, 12), (8, 8, 7), (6, 10, 5), (12, 4, 3), (32, 16, 3), (40, 36, 2), (5, 64, 3)]
)
@pytest.mark.parametrize("stride", [1, 2])
def test_groups_against_float64(fan: int, width: int, groups: int, stride: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, fan * groups, 9, 11).bfloat16(), torch.randn(3, width * groups, fan, 3, 3).bfloat16() / 9
    values = (x, weight, torch.rand(3, width * groups))
    assert_near_float64(mixed_dilation_conv2d, values, ((1, 2, (3, 1)), stride, groups))


@tiled
def test_threads_and_scratch_change_no_bit() -> None:
    values, grouped_values = operands(3, 70, 97, (21, 17)), operands(2, 96, 72, (21, 17), groups=12)
    before, limit, results = torch.get_num_threads(), nasdet.scratch_limit(), []
    try:
        for threads, bytes_ in ((1, limit), (3, limit), (16, limit), (1, 1), (3, 300_000), (2, 3_000_000)):
            torch.set_num_threads(threads)
            nasdet.scratch_limit(bytes_)
            one_group = [*with_gradients(*values), *with_gradients(*values, (2, 1))]
            results.append([*one_group, *with_gradients(*grouped_values, groups=12)])
    finally:
        torch.set_num_threads(before)
        nasdet.scratch_limit(limit)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@tiled
def test_fresh_threads_and_forked_children() -> None:
    values = operands()
    expected, found = with_gradients(*values), []

    def same() -> bool:
        return all(torch.equal(a, b) for a, b in zip(expected, with_gradients(*values), strict=True))

    workers = [threading.Thread(target=lambda: found.append(same())) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert found == [True] * 4
    code = (
        "import os, torch\n"
        "from nasdet.ops import mixed_dilation_conv2d as mixed\n"
        "torch.set_num_threads(1)\n"
        "x, w, m = torch.ones(1, 32, 8, 8).bfloat16(), torch.ones(2, 32, 32, 3, 3).bfloat16(), torch.ones(2, 32)\n"
        "run = lambda: mixed(x, w, m, (1, 2), algorithm='direct', backend='cpp')\n"
        "y = run()\n"
        "child = os.fork()\n"
        "if child == 0: os._exit(0 if torch.equal(run(), y) else 1)\n"
        "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
