"""Maps of more than 2^31 elements on a CUDA device; and on the CPU, small, the checks that are made of them there."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any
from unittest import mock

import far
import op_checks
import pytest
import torch
from pairs import rows_of
from torch import Tensor

from nasdet._dispatch import OPS, Backend, Op

DEVICE = "cuda"
LAYOUTS = ("contiguous", "channels_last")
CONVOLUTIONS = ("mixed_dilation_conv2d", "grouped_dilation_conv2d")
SMALL = (2, 12, 17, 15)
FAR = (2, 1032, 1024, 1024)  # 2.2e9 elements, 4.3 GB; channels that no tile divides


@pytest.fixture
def need(require: Callable[[str, str | None], None]) -> Callable[[Backend, float], None]:
    """``need(backend, gigabytes)``: the backend, and so much memory to spare on the device."""

    def check(backend: Backend, gigabytes: float) -> None:
        require(backend.name, backend.available())
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0] / 2**30
        reason = None if free >= gigabytes else f"needs {gigabytes} GiB of device memory, {free:.0f} are free"
        if reason and int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")) > 1:
            pytest.skip(f"{reason}: others use it, run `-m whole_gpu` alone")
        require("cuda", reason)

    return check


def whole_gpu(*names: str) -> Any:
    """A test of these ops' kernels that has the device to itself."""

    def mark(test: Any) -> Any:
        for marker in (pytest.mark.parametrize(("op", "backend"), rows_of(*names)), pytest.mark.whole_gpu):
            test = marker(test)
        return pytest.mark.gpu(test)

    return mark


@whole_gpu(*CONVOLUTIONS)
def test_dilated_convolutions(need: Callable[..., None], op: Op, backend: Backend) -> None:
    need(backend, 26)
    far.check_dilated(op, FAR, DEVICE, backend.name)


@pytest.mark.parametrize("layout", LAYOUTS)
@whole_gpu("depthwise_conv2d")
def test_depthwise_convolutions(need: Callable[..., None], op: Op, backend: Backend, layout: str) -> None:
    need(backend, 26)
    far.check_depthwise(op, FAR, layout, DEVICE, backend.name)


@whole_gpu("sigmoid_focal_loss")
def test_focal_loss(need: Callable[..., None], op: Op, backend: Backend) -> None:
    need(backend, 32)
    far.check_focal_loss(op, 2**31 + 1029, DEVICE, backend.name)


@pytest.mark.parametrize("layout", LAYOUTS)
@whole_gpu("multilevel_roi_align")
def test_roi_align(need: Callable[..., None], op: Op, backend: Backend, layout: str) -> None:
    need(backend, 32)
    far.check_roi_align(op, 2900, 256, layout, DEVICE, backend.name)


@whole_gpu("mix")
def test_mix(need: Callable[..., None], op: Op, backend: Backend) -> None:
    need(backend, 36)
    count = 2**31 + 1029
    xs = [torch.empty(count, dtype=torch.bfloat16, device=DEVICE) for _ in range(2)]
    for p, x in enumerate(xs):
        for chunk in far.chunks(count):
            x[chunk].copy_((torch.arange(chunk.start, chunk.stop, device=DEVICE) // (p + 1)) % 5 - 2)
    weights = torch.tensor([0.5, 2.0], device=DEVICE)
    args, leaves = op_checks.with_leaves(op, (xs, weights))
    y = op.call(*args, backend=backend.name)
    for c in far.chunks(count):
        assert torch.equal(y[c], (0.5 * xs[0][c].float() + 2 * xs[1][c].float()).bfloat16())
    # As the gradient: 1 in the last thousand elements alone, so that every sum is small and exact.
    grad = torch.zeros_like(y)
    grad[-1000:] = 1
    dx0, dx1, dweights = torch.autograd.grad(y, leaves, grad)
    assert all(torch.equal(dx0[c], 0.5 * grad[c]) and torch.equal(dx1[c], 2 * grad[c]) for c in far.chunks(count))
    assert dweights.tolist() == [x[-1000:].double().sum().item() for x in xs]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@whole_gpu("norm_act_mix")
def test_norm_act_mix(need: Callable[..., None], op: Op, backend: Backend, memory_format: torch.memory_format) -> None:
    """Every channel is half +1, half -1: its mean is 0 and its variance 1, whatever the size."""
    need(backend, 16)
    x = torch.empty(1, 2, 2**15 + 2, 2**15, dtype=torch.bfloat16, device=DEVICE, memory_format=memory_format)
    x[..., 0::2] = 1
    x[..., 1::2] = -1
    ones, zeros = torch.ones(1, 2, device=DEVICE), torch.zeros(1, 2, device=DEVICE)
    y = op.call([x], torch.ones(1, device=DEVICE), ones, zeros, 2, backend=backend.name)
    assert y.is_contiguous(memory_format=memory_format)
    for row in range(0, x.shape[2], 4096):
        part = y[:, :, row : row + 4096]
        assert bool((part[..., 0::2] == 1).all()) and bool((part[..., 1::2] == 0).all())


def check_small(name: str, layout: str = "channels_last") -> None:
    """What runs on a device above, in a size for the CPU."""
    op = OPS[name]
    if name in CONVOLUTIONS:
        far.check_dilated(op, SMALL, "cpu", None)
    elif name == "depthwise_conv2d":
        far.check_depthwise(op, SMALL, layout, "cpu", None)
    elif name == "sigmoid_focal_loss":
        far.check_focal_loss(op, 20029, "cpu", None)
    else:
        far.check_roi_align(op, 150, 5, layout, "cpu", None)


CHECKED = [
    *((name, "channels_last") for name in (*CONVOLUTIONS, "sigmoid_focal_loss")),
    *((name, layout) for name in ("depthwise_conv2d", "multilevel_roi_align") for layout in LAYOUTS),
]


@pytest.mark.parametrize(("name", "layout"), CHECKED)
def test_the_checks_hold_of_right_results(name: str, layout: str) -> None:
    with mock.patch.object(far, "CHUNK", 1000):
        check_small(name, layout)


def wrapped(op: Op, how: Callable[[list[Tensor]], list[Tensor]]) -> Callable[..., Tensor]:
    """The op, with ``how`` done to its inputs as a kernel would whose offsets are too narrow."""

    def call(x: Any, *rest: Any, backend: str | None = None, **options: Any) -> Any:
        values = x if isinstance(x, list) else [x]
        values = values if backend == "reference" else how(values)
        return op.call(values if isinstance(x, list) else values[0], *rest, backend=backend, **options)

    return call


class _Aliased(torch.autograd.Function):
    """The last elements are read, or their gradients are written, where others lie."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, reading: bool) -> Tensor:
        ctx.reading = reading
        return _alias(x) if reading else x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return (grads[0] if ctx.reading else _alias(grads[0])), None


def _alias(x: Tensor) -> Tensor:
    flat = x.permute(0, 2, 3, 1) if x.dim() == 4 else x
    flat = flat.reshape(-1).clone()
    flat[-len(flat) // 8 :] = flat[: len(flat) - len(flat) * 7 // 8]
    if x.dim() != 4:
        return flat
    images, channels, height, width = x.shape
    result = flat.view(images, height, width, channels).permute(0, 3, 1, 2)
    return result.contiguous() if x.is_contiguous() else result


@pytest.mark.parametrize("reading", [True, False], ids=["reads", "writes"])
@pytest.mark.parametrize(("name", "layout"), CHECKED)
def test_the_checks_notice_offsets_that_wrap(name: str, layout: str, reading: bool) -> None:
    op = OPS[name]
    broken = wrapped(op, lambda xs: [_Aliased.apply(x, reading) for x in xs])
    replaced = dataclasses.replace(op, call=broken)
    with mock.patch.dict(OPS, {name: replaced}), pytest.raises(AssertionError, match="error|gradient"):
        check_small(name, layout)
