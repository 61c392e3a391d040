"""``grouped_dilation_conv2d`` in Triton: one convolution whose tiles have the taps of their slice of the channels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

from torch import Tensor

from . import _dilation_run as run
from ._dilation_plan import Part, Problem, Taps, kernel_taps, union_of_taps


@cache
def _parts(kernel: int, dilations: tuple[int, ...], splits: tuple[int, ...]) -> tuple[Part, ...]:
    """A tap's matrix is its place in the kernel, whatever the slice: every slice has rows of its own."""
    ends = list(accumulate(splits))
    pairs = zip(dilations[::2], dilations[1::2], strict=True)
    taps = [tuple((*offset, t) for t, offset in enumerate(kernel_taps(kernel, pair))) for pair in pairs]
    return tuple(zip([0, *ends[:-1]], ends, taps, strict=True))


def _call(
    x: Tensor,
    weight: Tensor,
    dilations: Sequence[int],
    splits: Sequence[int],
    stride_h: int,
    stride_w: int,
    groups: int,
) -> tuple[run.Weights, Problem]:
    kernel = weight.shape[-1]
    problem = Problem(
        images=x.shape[0],
        in_channels=x.shape[1],
        out_channels=weight.shape[0],
        groups=groups,
        height=x.shape[2],
        width=x.shape[3],
        stride_h=stride_h,
        stride_w=stride_w,
        matrices=kernel**2,
        parts=_parts(kernel, tuple(dilations), tuple(splits)),
    )
    one: Taps = union_of_taps(kernel, ((1, 1),))  # a matrix per element of the kernel
    return run.Weights.of(weight.unsqueeze(0), None, one.branches, one.matrices), problem


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
    return run.forward(x, *_call(x, weight, dilations, splits, stride_h, stride_w, groups))


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
    weights, problem = _call(x, weight, dilations, splits, stride_h, stride_w, groups)
    dx = run.map_gradient(grad, x, weights, problem) if need_x else x.new_empty(0)
    dweight, _ = run.weight_gradient(grad, x, weights, problem, need_weight, False)
    return dx, dweight.squeeze(0)
