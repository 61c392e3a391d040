"""``norm_act_mix`` in Triton: ``y = sum_p w_p relu(GN_p(x_p))`` and its gradients.

Forward: moments of every channel's pixels, in chunks -> mean and 1/std of every group -> the sum over the maps.
Backward recomputes what it needs from the maps: two sums of every channel, in chunks -> coefficients -> gradients of
the maps, in place if wished, and of the parameters. Shapes alone cut the sums, and they are added in one order: results
do not change from run to run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from . import _norm_act_mix as kernels
from ._launch import all_in_layout_of, in_layout_of, launches, on_device_of

TILE = 2048  # elements that a program loads at a time
STEPS = 8  # tiles in a chunk
WARPS = 4
MERGE_BLOCK, MERGE_WARPS = 256, 1  # of the kernels on statistics


@dataclass(frozen=True)
class Tiling:
    """How the maps are cut: tiles of ``block_c`` channels by ``block_p`` pixels, chunks of ``STEPS`` tiles."""

    channels_last: bool
    unit: int
    block_c: int
    block_p: int
    channel_blocks: int
    pixel_blocks: int
    chunks: int

    @property
    def chunk_pixels(self) -> int:
        return self.block_p * STEPS


def tiling_of(channels: int, pixels: int, channels_last: bool) -> Tiling:
    """A tile follows the dense dimension: whole rows of pixels (NCHW), or the channels with the least waste (NHWC)."""
    if channels_last:
        widest = min(triton.next_power_of_2(channels), 128)
        candidates = [width for width in (128, 64, 32) if width <= widest] or [widest]
        block_c = min(candidates, key=lambda width: triton.cdiv(channels, width) * width)
        block_p = min(triton.next_power_of_2(pixels), TILE // block_c)
    else:
        block_p = min(triton.next_power_of_2(pixels), TILE)
        block_c = min(triton.next_power_of_2(channels), TILE // block_p)
    return Tiling(
        channels_last=channels_last,
        unit=math.gcd(channels if channels_last else pixels, 16),
        block_c=block_c,
        block_p=block_p,
        channel_blocks=triton.cdiv(channels, block_c),
        pixel_blocks=triton.cdiv(pixels, block_p),
        chunks=triton.cdiv(pixels, block_p * STEPS),
    )


class Call:
    """What forward and backward share: the maps in one layout, contiguous parameters, the tiling."""

    def __init__(
        self, xs: Sequence[Tensor], weights: Tensor, gamma: Tensor, beta: Tensor, groups: int, normalized: Sequence[int]
    ):
        first = xs[0]
        channels_last = first.is_contiguous(memory_format=torch.channels_last) and not first.is_contiguous()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format
        self.maps = all_in_layout_of(xs, first.contiguous(memory_format=self.memory_format))
        self.weights, self.gamma, self.beta = weights.contiguous(), gamma.contiguous(), beta.contiguous()
        self.batch, self.channels = first.shape[0], first.shape[1]
        self.pixels = first.shape[2] * first.shape[3]
        self.groups, self.normalized = groups, normalized
        self.tiling = tiling_of(self.channels, self.pixels, channels_last) if first.numel() else None
        # The dense dimension is passed in units of `unit`.
        unit = self.tiling.unit if self.tiling else 1
        self.sizes = (self.channels // unit, self.pixels) if channels_last else (self.channels, self.pixels // unit)

    def empty_map(self, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty_like(self.maps[0], dtype=dtype, memory_format=self.memory_format)

    def empty_statistics(self) -> Tensor:
        return self.weights.new_empty(len(self.maps), self.batch, self.groups)

    def flags(self, group: slice) -> int:
        """The maps of a launch that are normalised, as bits."""
        return sum(1 << bit for bit, flag in enumerate(self.normalized[group]) if flag)


def tile_options(tiling: Tiling) -> dict[str, Any]:
    return {
        "CHANNELS_LAST": tiling.channels_last, "UNIT": tiling.unit,
        "BLOCK_C": tiling.block_c, "BLOCK_P": tiling.block_p, "num_warps": WARPS,
    }  # fmt: skip


def forward(
    xs: Sequence[Tensor],
    weights: Tensor,
    gn_weight: Tensor,
    gn_bias: Tensor,
    num_groups: int,
    eps: float,
    normalized: Sequence[int],
    overwrite_inputs: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel of ``nasdet::norm_act_mix_triton``: the output, and mean and 1/std ``[P, N, num_groups]``."""
    call = Call(xs, weights, gn_weight, gn_bias, num_groups, normalized)
    out, mean, rstd = call.empty_map(), call.empty_statistics(), call.empty_statistics()
    if call.tiling is None:
        return out, mean.zero_(), rstd.zero_()
    groups = list(launches(len(call.maps)))
    carry = out if len(groups) == 1 else call.empty_map(torch.float32)
    with on_device_of(out):
        for index, group in enumerate(groups):
            scale, shift = measure(call, call.tiling, group, eps, mean[group], rstd[group])
            tiles = call.batch * call.tiling.channel_blocks * call.tiling.pixel_blocks
            kernels.forward_kernel[(tiles,)](
                call.maps[group], call.weights[group], scale, shift, out, carry,
                call.batch, *call.sizes, call.tiling.pixel_blocks, call.tiling.channel_blocks,
                FIRST=index == 0, LAST=index + 1 == len(groups), **tile_options(call.tiling),
            )  # fmt: skip
    return out, mean, rstd


def measure(call: Call, tiling: Tiling, group: slice, eps: float, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Writes mean and 1/std of a launch's maps; returns scale and shift ``[maps, N, C]`` of ``z = scale x + shift``."""
    maps, flags = call.maps[group], call.flags(group)
    rows = len(maps) * call.batch
    means = call.weights.new_empty(rows, call.channels, tiling.chunks)
    squares = torch.empty_like(means)
    scale = call.weights.new_empty(rows, call.channels)
    shift = torch.empty_like(scale)
    kernels.moments_kernel[(rows * tiling.channel_blocks * tiling.chunks,)](
        maps, means, squares, flags, call.batch, *call.sizes, tiling.chunks, tiling.channel_blocks,
        STEPS=STEPS, **tile_options(tiling),
    )  # fmt: skip
    kernels.statistics_kernel[(rows * call.groups,)](
        means, squares, call.gamma[group], call.beta[group], mean, rstd, scale, shift, flags,
        call.batch, call.channels, call.pixels, call.groups, tiling.chunks, tiling.chunk_pixels, eps,
        BLOCK=MERGE_BLOCK, num_warps=MERGE_WARPS,
    )  # fmt: skip
    return scale, shift


def backward(
    grad: Tensor,
    xs: Sequence[Tensor],
    weights: Tensor,
    gn_weight: Tensor,
    gn_bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    normalized: Sequence[int],
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """The kernel of ``nasdet::norm_act_mix_backward_triton``."""
    call = Call(xs, weights, gn_weight, gn_bias, num_groups, normalized)
    dxs = [call.empty_map() for _ in xs]
    return dxs, *gradients(call, grad, mean, rstd, dxs)


def backward_(
    grad: Tensor,
    xs: Sequence[Tensor],
    weights: Tensor,
    gn_weight: Tensor,
    gn_bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    num_groups: int,
    normalized: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel of ``nasdet::norm_act_mix_backward_triton_``: as ``backward``, each map's gradient written over it."""
    call = Call(xs, weights, gn_weight, gn_bias, num_groups, normalized)
    result = gradients(call, grad, mean, rstd, call.maps)
    for x, dx in zip(xs, call.maps, strict=True):
        if dx is not x:  # was another layout
            x.copy_(dx)
    return result


def gradients(
    call: Call, grad: Tensor, mean: Tensor, rstd: Tensor, dxs: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Writes the maps' gradients into ``dxs``; returns those of weights, gn_weight and gn_bias."""
    dweights, dgamma, dbeta = torch.empty_like(call.weights), torch.empty_like(call.gamma), torch.empty_like(call.beta)
    if call.tiling is None:
        return dweights.zero_(), dgamma.zero_(), dbeta.zero_()
    grad, mean, rstd = in_layout_of(grad, call.maps[0]), mean.contiguous(), rstd.contiguous()
    with on_device_of(grad):
        for group in launches(len(call.maps)):
            sums, coefficients = summarise(call, call.tiling, group, grad, mean[group], rstd[group])
            kernels.parameters_kernel[(len(call.maps[group]),)](
                sums, call.weights[group], call.gamma[group], call.beta[group],
                dweights[group], dgamma[group], dbeta[group], call.flags(group), call.batch, call.channels,
                BLOCK=MERGE_BLOCK, num_warps=MERGE_WARPS,
            )  # fmt: skip
            tiles = call.batch * call.tiling.channel_blocks * call.tiling.pixel_blocks
            kernels.gradient_kernel[(tiles,)](
                grad, call.maps[group], tuple(dxs[group]), coefficients,
                call.batch, *call.sizes, call.tiling.pixel_blocks, call.tiling.channel_blocks,
                **tile_options(call.tiling),
            )  # fmt: skip
    return dweights, dgamma, dbeta


def summarise(
    call: Call, tiling: Tiling, group: slice, grad: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor]:
    """Per channel of a launch's maps: two sums ``[2, maps, N, C]`` and coefficients of ``dx`` ``[5, maps, N, C]``."""
    maps, flags, gamma, beta = call.maps[group], call.flags(group), call.gamma[group], call.beta[group]
    rows = len(maps) * call.batch
    part_a = call.weights.new_empty(rows, call.channels, tiling.chunks)
    part_b = torch.empty_like(part_a)
    sums = call.weights.new_empty(2, rows, call.channels)
    coefficients = call.weights.new_empty(5, rows, call.channels)
    kernels.sums_kernel[(rows * tiling.channel_blocks * tiling.chunks,)](
        grad, maps, mean, rstd, gamma, beta, part_a, part_b, flags,
        call.batch, *call.sizes, call.groups, tiling.chunks, tiling.channel_blocks,
        STEPS=STEPS, **tile_options(tiling),
    )  # fmt: skip
    kernels.coefficients_kernel[(rows * call.groups,)](
        part_a, part_b, call.weights[group], mean, rstd, gamma, beta, sums, coefficients, flags,
        call.batch, call.channels, call.pixels, call.groups, tiling.chunks,
        BLOCK_C=8, BLOCK_K=MERGE_BLOCK // 8, num_warps=MERGE_WARPS,
    )  # fmt: skip
    return sums, coefficients
