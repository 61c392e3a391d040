"""``grouped_dilation_conv2d`` in Triton: one convolution whose tiles have the taps of their slice of the channels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from . import _dilation_run as run
from ._dilation_plan import Part, Problem, kernel_taps, union_of_taps


@cache
def _parts(kernel: int, dilations: tuple[int, ...], splits: tuple[int, ...]) -> tuple[Part, ...]:
    """A tap's matrix is its place in the kernel, whatever the slice: every slice has rows of its own."""
    ends = list(accumulate(splits))
    pairs = zip(dilations[::2], dilations[1::2], strict=True)
    taps = [tuple((*offset, t) for t, offset in enumerate(kernel_taps(kernel, pair))) for pair in pairs]
    return tuple(zip([0, *ends[:-1]], ends, taps, strict=True))


@lru_cache(maxsize=run.PLANS)
def _plan(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    dilations: tuple[int, ...],
    splits: tuple[int, ...],
    stride_h: int,
    stride_w: int,
    groups: int,
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
) -> run.Plan:
    kernel = weight[-1]
    problem = Problem(
        images=x[0],
        in_channels=x[1],
        out_channels=weight[0],
        groups=groups,
        height=x[2],
        width=x[3],
        stride_h=stride_h,
        stride_w=stride_w,
        matrices=kernel**2,
        parts=_parts(kernel, dilations, splits),
    )
    one = union_of_taps(kernel, ((1, 1),))  # a matrix per element of the kernel
    return run.Plan(problem, 1, one, kind, dtype, device)


def plan_of(
    x: Tensor,
    weight: Tensor,
    dilations: Sequence[int],
    splits: Sequence[int],
    stride_h: int,
    stride_w: int,
    groups: int,
) -> run.Plan:
    """The plan of such a call, the same one for equal shapes."""
    shapes, lists = (x.shape, weight.shape), (tuple(dilations), tuple(splits))
    return _plan(*shapes, *lists, stride_h, stride_w, groups, run.kind_of(x), x.dtype, x.device)


def forward(
    x: Tensor,
    weight: Tensor,
    dilations: Sequence[int],
    splits: Sequence[int],
    stride_h: int,
    stride_w: int,
    groups: int,
    algorithm: int,
) -> Tensor:
    """The kernel of ``nasdet::grouped_dilation_conv2d_triton``."""
    run.check_direct(algorithm)
    plan = plan_of(x, weight, dilations, splits, stride_h, stride_w, groups)
    return run.forward(plan, x, weight.unsqueeze(0), None)


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    dilations: Sequence[int],
    splits: Sequence[int],
    stride_h: int,
    stride_w: int,
    groups: int,
    algorithm: int,
    need_x: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor]:
    """The kernel of ``nasdet::grouped_dilation_conv2d_backward_triton``: the gradients that are needed, else empty."""
    run.check_direct(algorithm)
    plan = plan_of(x, weight, dilations, splits, stride_h, stride_w, groups)
    dx, dweight, _ = run.backward(plan, grad, x, weight.unsqueeze(0), None, (need_x, need_weight, False))
    return dx, dweight.squeeze(0)
