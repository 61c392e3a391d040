"""``mixed_dilation_conv2d`` in Triton: the mixture folded into one kernel per tap, and one convolution of their union.

Backward is one convolution for the map and one sum over the pixels for all kernels and the mixture: no branch's output
exists, and the memory does not grow with the branches.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import _dilation_run as run
from ._dilation_plan import Problem, union_of_taps


def _call(
    x: Tensor, weight: Tensor, mix: Tensor, dilations: Sequence[int], stride_h: int, stride_w: int, groups: int
) -> tuple[run.Weights, Problem]:
    union = union_of_taps(weight.shape[-1], tuple(zip(dilations[::2], dilations[1::2], strict=True)))
    problem = Problem(
        images=x.shape[0],
        in_channels=x.shape[1],
        out_channels=weight.shape[1],
        groups=groups,
        height=x.shape[2],
        width=x.shape[3],
        stride_h=stride_h,
        stride_w=stride_w,
        matrices=len(union.taps),
        parts=((0, weight.shape[1], union.taps),),
    )
    return run.Weights.of(weight, mix, union.branches, union.matrices), problem


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
    return run.forward(x, *_call(x, weight, mix, dilations, stride_h, stride_w, groups))


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
    weights, problem = _call(x, weight, mix, dilations, stride_h, stride_w, groups)
    dx = run.map_gradient(grad, x, weights, problem) if need_x else x.new_empty(0)
    return dx, *run.weight_gradient(grad, x, weights, problem, need_weight, need_mix)
