"""``mixed_dilation_conv2d`` in Triton: the mixture folded into one kernel per tap, and one convolution of their union.

Backward is one convolution for the map and one sum over the pixels for all kernels and the mixture: no branch's output
exists, and the memory does not grow with the branches.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from . import _dilation_run as run
from ._dilation_plan import Problem, union_of_taps


@lru_cache(maxsize=run.PLANS)
def _plan(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    dilations: tuple[int, ...],
    stride_h: int,
    stride_w: int,
    groups: int,
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
) -> run.Plan:
    union = union_of_taps(weight[-1], tuple(zip(dilations[::2], dilations[1::2], strict=True)))
    problem = Problem(
        images=x[0],
        in_channels=x[1],
        out_channels=weight[1],
        groups=groups,
        height=x[2],
        width=x[3],
        stride_h=stride_h,
        stride_w=stride_w,
        matrices=len(union.taps),
        parts=((0, weight[1], union.taps),),
    )
    return run.Plan(problem, weight[0], union, kind, dtype, device)


def plan_of(x: Tensor, weight: Tensor, dilations: Sequence[int], stride_h: int, stride_w: int, groups: int) -> run.Plan:
    """The plan of such a call, the same one for equal shapes."""
    kind = run.kind_of(x)
    return _plan(x.shape, weight.shape, tuple(dilations), stride_h, stride_w, groups, kind, x.dtype, x.device)


def forward(
    x: Tensor,
    weight: Tensor,
    mix: Tensor,
    dilations: Sequence[int],
    stride_h: int,
    stride_w: int,
    groups: int,
    algorithm: int,
) -> Tensor:
    """The kernel of ``nasdet::mixed_dilation_conv2d_triton``."""
    run.check_direct(algorithm)
    plan = plan_of(x, weight, dilations, stride_h, stride_w, groups)
    return run.forward(plan, x, weight, mix.contiguous())


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    mix: Tensor,
    dilations: Sequence[int],
    stride_h: int,
    stride_w: int,
    groups: int,
    algorithm: int,
    need_x: bool,
    need_weight: bool,
    need_mix: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel of ``nasdet::mixed_dilation_conv2d_backward_triton``: the gradients that are needed, else empty."""
    run.check_direct(algorithm)
    plan = plan_of(x, weight, dilations, stride_h, stride_w, groups)
    return run.backward(plan, grad, x, weight, mix.contiguous(), (need_x, need_weight, need_mix))
