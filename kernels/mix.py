"""``mix`` in Triton: ``y = sum_p w_p x_p`` and its gradients, every map read once and every result written once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import all_in_layout_of, in_layout_of, launches, on_device_of

FORWARD_BLOCK, FORWARD_WARPS = 1024, 4
# One warp a program: its share of every <grad, x_p> then needs no barrier. Bytes of a map, for registers hold bytes.
BACKWARD_BYTES, BACKWARD_WARPS = 2048, 1
REDUCE_BLOCK, REDUCE_WARPS = 1024, 4


@triton.jit
def forward_kernel(
    xs,  # tuple of maps, [count] each
    weights,  # [len(xs)] float32
    out,  # [count]
    carry,  # [count] float32: the sum over the maps of earlier launches
    count,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.zeros([BLOCK], tl.float32)
    if not FIRST:
        total += tl.load(carry + at, mask=inside, other=0.0)
    for p in tl.static_range(len(xs)):
        weight = tl.load(weights + p)
        # A zero weight masks its map rather than branching around it: the loads of all maps stay in flight together.
        read = at < tl.where(weight != 0.0, count, 0)
        x = tl.load(xs[p] + at, mask=read, other=0.0).to(tl.float32)
        total += weight * x
    if LAST:
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(carry + at, total, mask=inside)


@triton.jit
def backward_kernel(
    grad,  # [count]
    xs,  # tuple of maps, [count] each
    dxs,  # tuple of their gradients, [count] each
    weights,  # [len(xs)] float32
    partial,  # [len(xs), programs] float32: this program's share of every <grad, x_p>
    count,
    NEED_XS: tl.constexpr,
    NEED_WEIGHTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    for p in tl.static_range(len(xs)):
        if NEED_XS:
            dx = tl.load(weights + p) * g
            tl.store(dxs[p] + at, dx.to(dxs[p].dtype.element_ty), mask=inside)
        if NEED_WEIGHTS:
            x = tl.load(xs[p] + at, mask=inside, other=0.0).to(tl.float32)
            tl.store(partial + p * programs + program, tl.sum(g * x, axis=0))


@triton.jit(do_not_specialize=["count"])
def reduce_kernel(
    partial,  # [maps, count] float32
    sums,  # [maps] float32
    count,
    BLOCK: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(partial + p * count + at, mask=at < count, other=0.0)
    tl.store(sums + p, tl.sum(total, axis=0))


def forward(xs: Sequence[Tensor], weights: Tensor) -> Tensor:
    """The kernel of ``nasdet::mix_triton``."""
    out = torch.empty_like(xs[0])
    count = out.numel()
    if count == 0:
        return out
    maps, weights = all_in_layout_of(xs, out), weights.contiguous()
    groups = list(launches(len(maps)))
    carry = out if len(groups) == 1 else torch.empty_like(out, dtype=torch.float32)
    with on_device_of(out):
        for index, group in enumerate(groups):
            forward_kernel[(triton.cdiv(count, FORWARD_BLOCK),)](
                maps[group], weights[group], out, carry, count,
                FIRST=index == 0, LAST=index + 1 == len(groups), BLOCK=FORWARD_BLOCK, num_warps=FORWARD_WARPS,
            )  # fmt: skip
    return out


def backward(
    grad: Tensor, xs: Sequence[Tensor], weights: Tensor, need_xs: bool, need_weights: bool
) -> tuple[list[Tensor], Tensor]:
    """The kernel of ``nasdet::mix_backward_triton``: every ``w_p grad``, and every ``<grad, x_p>``, if needed."""
    like = torch.empty_like(xs[0])
    dxs = [like if p == 0 else torch.empty_like(like) for p in range(len(xs))] if need_xs else []
    dweights = weights.new_empty(len(xs) if need_weights else 0)
    count = like.numel()
    if count == 0:
        return dxs, dweights.zero_()
    if not (need_xs or need_weights):
        return dxs, dweights
    # Without need_weights the maps are not read: any tensors do as the arguments.
    maps = all_in_layout_of(xs, like) if need_weights else tuple(dxs)
    grad, weights = in_layout_of(grad, like), weights.contiguous()
    block = BACKWARD_BYTES // like.element_size()
    programs = triton.cdiv(count, block)
    partial = weights.new_empty(len(xs), programs) if need_weights else weights
    with on_device_of(like):
        for group in launches(len(maps)):
            backward_kernel[(programs,)](
                grad, maps[group], tuple(dxs[group]) if need_xs else maps[group], weights[group], partial[group], count,
                NEED_XS=need_xs, NEED_WEIGHTS=need_weights, BLOCK=block, num_warps=BACKWARD_WARPS,
            )  # fmt: skip
        if need_weights:
            reduce_kernel[(len(xs),)](partial, dweights, programs, BLOCK=REDUCE_BLOCK, num_warps=REDUCE_WARPS)
    return dxs, dweights
