"""Starts the kernels of the dilation convolutions: layouts, plans, launches.

A :class:`Plan` holds what a call needs beside its tensors. It is made for the first call of its shapes; for others of
them Python has little left to do, which matters where the device needs a tenth of a millisecond.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from . import _dilation_choice as choice
from . import _dilation_conv as kernels
from ._dilation_plan import (
    MOST,
    Piece,
    Problem,
    Table,
    Taps,
    canonical,
    cdiv,
    forward_pieces,
    gradient_pieces,
    joined,
    on_device,
    product_table,
    weight_pieces,
    weight_table,
)
from ._launch import on_device_of
from ._tuning import Choice, Config, run_fastest

JOINED_WIDTH = {"16-bit": 64, "tf32": 32, "ieee": 16}  # channels of joined groups: as wide as the units' tiles
PLANS = 4096  # that are kept; they hold no memory of the device
FOLD_TILE = (16, 64)
UNFOLD_BLOCK = 1024


def kind_of(x: Tensor) -> str:
    """How the products are made: in 16 bits; of float32, in TF32 where torch's convolution may use it too."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return "16-bit"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def check_direct(algorithm: int) -> None:
    names = {2: "frequency", 3: "winograd"}
    if algorithm in names:
        raise ValueError(f"algorithm must be 'direct' on this backend, got {names[algorithm]!r}")


def dense_nhwc(x: Tensor) -> Tensor:
    """``[N, H, W, C]``, dense: a view of a channels_last map, else a copy."""
    return x.permute(0, 2, 3, 1).contiguous()


def in_layout_of_map(nhwc: Tensor, x: Tensor) -> Tensor:
    """``nhwc`` as ``[N, C, H, W]``: channels_last where ``x`` is (and is not also contiguous), else contiguous."""
    result = nhwc.permute(0, 3, 1, 2)
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return result
    return x.new_empty(result.shape).copy_(result)


@dataclass(frozen=True, eq=False)
class Launch:
    """One configuration's launch: all that does not differ between calls of a plan."""

    grid: tuple[int]
    table: Table
    sizes: tuple[int, ...]
    options: dict[str, Any]


class Plan:
    """A convolution of maps of given shapes and dtype on one device."""

    def __init__(
        self, problem: Problem, branches: int, taps: Taps, kind: str, dtype: torch.dtype, device: torch.device
    ):
        """``branches``: kernels that are mixed; ``taps``: theirs."""
        images, height, width = problem.images, problem.height, problem.width
        if max(height, width) >= MOST or images * height * width >= 2**31 - 2**16:  # positions are 32 bits wide
            got = (images, problem.in_channels, height, width)
            raise ValueError(f"x must have fewer than 2^31 pixels on this backend, got {got}")
        self.fan_in, self.fan_out = problem.fan_in, problem.fan_out  # of the convolution's own groups
        self.problem = problem = joined(problem, JOINED_WIDTH[kind])
        self.small = canonical(problem)
        self.branches, self.taps, self.kind, self.dtype, self.device = branches, taps, kind, dtype, device
        self.together = problem.fan_in // self.fan_in
        self.result = (problem.images, problem.out_height, problem.out_width, problem.out_channels)
        self.map = (images, height, width, problem.in_channels)
        self.aligned = not (problem.fan_in | problem.fan_out | problem.in_channels | problem.out_channels) % 16

    @cached_property
    def forward(self) -> Choice[Launch]:
        strides = (self.problem.stride_h, self.problem.stride_w, 1, 1)
        return self._product("forward", forward_pieces(self.small), self.map, self.result, strides)

    @cached_property
    def gradient(self) -> Choice[Launch]:
        """Of the map."""
        strides = (1, 1, self.problem.stride_h, self.problem.stride_w)
        return self._product("gradient", gradient_pieces(self.small), self.result, self.map, strides)

    def _product(
        self,
        name: str,
        pieces: tuple[Piece, ...],
        source: tuple[int, ...],
        out: tuple[int, ...],
        strides: tuple[int, int, int, int],
    ) -> Choice[Launch]:
        images, height, width, _ = out
        pixels = images * cdiv(height, strides[2]) * cdiv(width, strides[3])

        def prepare(config: Config) -> Launch:
            table = product_table(pieces, config.block_n, config.block_k)
            tiles = len(table.tiles.values)
            options = {**self._options(config, table), "SUMS": table.sums}
            sizes = (tiles, images, *source[1:], *out[1:])
            return Launch((tiles * cdiv(pixels, config.block_m),), table, sizes, options)

        find = partial(choice.candidates, self.kind, self.dtype, self.device, pieces, pixels, self.aligned)
        return Choice(self._traits(name), find, prepare)

    @cached_property
    def chunks(self) -> tuple[int, int]:
        return choice.chunks_of(self.problem, weight_pieces(self.small))

    @cached_property
    def sums(self) -> tuple[int, int, int, int]:
        """The shape of each chunk's share of the gradient of every matrix."""
        return self.chunks[0], self.problem.matrices, self.problem.out_channels, self.problem.fan_in

    @cached_property
    def weights(self) -> Choice[Launch]:
        """The gradient of the matrices."""
        problem, (count, length) = self.problem, self.chunks

        def prepare(config: Config) -> Launch:
            table = weight_table(self.small, config.block_m, config.block_n)
            tiles = len(table.tiles.values)
            options = {**self._options(config, table), "BLOCK_K": config.block_k}
            sizes = (
                tiles, problem.out_pixels, length, *self.map[1:], *self.result[1:],
                problem.fan_in, problem.matrices * problem.out_channels * problem.fan_in,
                problem.stride_h, problem.stride_w, *magic(problem.out_width), *magic(problem.out_height),
            )  # fmt: skip
            return Launch((tiles * count,), table, sizes, options)

        own = (self.kind, self.dtype, self.device, weight_pieces(self.small), self.chunks, self.aligned)
        return Choice(self._traits("weights"), partial(choice.weight_candidates, *own), prepare)

    def _traits(self, name: str) -> tuple[Any, ...]:
        """What the fastest configuration may depend on: all of the shapes but for small changes of the maps' sizes."""
        problem = self.problem
        return (
            name, self.dtype, self.kind, problem.out_pixels.bit_length(), problem.in_channels, problem.groups,
            problem.stride_h, problem.stride_w, problem.parts,
        )  # fmt: skip

    def _options(self, config: Config, table: Table) -> dict[str, Any]:
        return {
            "ROWS_ALIGN": table.rows_align, "SUM_ALIGN": table.sum_align,
            "ROWS_FULL": table.rows_full, "SUM_FULL": table.sum_full,
            "PRECISION": "tf32" if self.kind == "tf32" else "ieee",
            "BLOCK_M": config.block_m, "WIDTHS": table.widths,
            "num_warps": config.warps, "num_stages": config.stages,
        }  # fmt: skip


def magic(divisor: int) -> tuple[int, int]:
    """(m, s) with ``n // divisor == (2 n m >> 32) >> s`` for every n < 2^31."""
    shift = (divisor - 1).bit_length()
    return cdiv(2 ** (31 + shift), divisor), shift


def with_taps_at_one_stride(values: Tensor) -> Tensor:
    """Kernels ``[branches, Cout, fan, k, k]`` as the others expect them."""
    kernel, strides = values.shape[-1], values.stride()
    return values.contiguous() if kernel > 1 and strides[3] != kernel * strides[4] else values


def folded(plan: Plan, values: Tensor, mix: Tensor | None, transposed: bool) -> tuple[Tensor, int, int]:
    """The matrices of a product, and the strides of matrices and rows; the kernels as they are where they will do."""
    problem, (stride_g, stride_o, stride_c, _, stride_t) = plan.problem, values.stride()
    dense = stride_c == 1 and not (stride_o | stride_t) % 16  # loaded 16 bytes and more at a time
    if mix is None and not transposed and plan.together == 1 and dense:
        return values, stride_t, stride_o
    rows, terms = (problem.in_channels, problem.fan_out) if transposed else (problem.out_channels, problem.fan_in)
    out = values.new_empty(problem.matrices, rows, terms)
    block_o, block_c = FOLD_TILE
    grid = (problem.matrices, cdiv(problem.out_channels, block_o), cdiv(problem.fan_in, block_c))
    kernels.fold_kernel[grid](
        values, values if mix is None else mix, on_device(plan.taps.branches, out), out,
        stride_g, stride_o, stride_c, stride_t,
        problem.out_channels, plan.fan_in, plan.fan_out, plan.together, rows * terms,
        BRANCHES=plan.branches, MIXED=mix is not None, TRANSPOSED=transposed,
        BLOCK_O=block_o, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return out, rows * terms, terms


def product(
    chosen: Choice[Launch], source: Tensor, out: Tensor, weights: tuple[Tensor, int, int], strides: tuple[int, ...]
) -> None:
    values, matrix_stride, row_stride = weights

    def launch(own: Launch) -> None:
        kernels.product_kernel[own.grid](
            source, values, out, on_device(own.table.tiles, out), on_device(own.table.steps, out),
            *own.sizes, matrix_stride, row_stride, *strides, **own.options,
        )  # fmt: skip

    run_fastest(chosen, out, launch)


def forward(plan: Plan, x: Tensor, values: Tensor, mix: Tensor | None) -> Tensor:
    """The convolution ``[N, Cout, OH, OW]`` of a map ``[N, Cin, H, W]``."""
    y = x.new_empty(plan.result)
    if y.numel():
        with on_device_of(x):
            matrices = folded(plan, with_taps_at_one_stride(values), mix, False)
            strides = (plan.problem.stride_h, plan.problem.stride_w, 1, 1)
            product(plan.forward, dense_nhwc(x), y, matrices, strides)
    return in_layout_of_map(y, x)


def backward(
    plan: Plan, grad: Tensor, x: Tensor, values: Tensor, mix: Tensor | None, needed: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the map, the kernels and the mixture, each empty where it is not needed."""
    need_x, need_weight, need_mix = needed
    dx = x.new_empty(plan.map if need_x else 0)
    dweight = values.new_empty(values.shape if need_weight else 0)
    dmix = values.new_empty(values.shape[:2] if need_mix else 0, dtype=torch.float32)
    if grad.numel() == 0:
        return in_layout_of_map(dx, x) if need_x else dx, dweight.zero_(), dmix.zero_()
    with on_device_of(x):
        values, upstream = with_taps_at_one_stride(values), dense_nhwc(grad)
        if need_x:
            strides = (1, 1, plan.problem.stride_h, plan.problem.stride_w)
            product(plan.gradient, upstream, dx, folded(plan, values, mix, True), strides)
            dx = in_layout_of_map(dx, x)
        if need_weight or need_mix:
            sums = sums_over_pixels(plan, upstream, dense_nhwc(x))
            unfold(plan, sums, values, mix, dweight if need_weight else None, dmix if need_mix else None)
    return dx, dweight, dmix


def sums_over_pixels(plan: Plan, grad: Tensor, x: Tensor) -> Tensor:
    """``[chunks, matrices, Cout, terms]``: each chunk's share of the gradient of every matrix."""
    sums = x.new_empty(plan.sums, dtype=torch.float32)

    def launch(own: Launch) -> None:
        kernels.weight_gradient_kernel[own.grid](
            grad, x, sums, on_device(own.table.tiles, sums), *own.sizes, **own.options
        )

    run_fastest(plan.weights, x, launch)
    return sums


def unfold(
    plan: Plan, sums: Tensor, values: Tensor, mix: Tensor | None, dweight: Tensor | None, dmix: Tensor | None
) -> None:
    problem, kernel = plan.problem, values.shape[-1]
    stride_g, stride_o, stride_c, _, stride_t = values.stride()
    kernels.unfold_kernel[(plan.branches * problem.out_channels,)](
        sums, values, sums if mix is None else mix, on_device(plan.taps.matrices, sums),
        values if dweight is None else dweight, sums if dmix is None else dmix,
        plan.sums[0], problem.matrices * problem.out_channels * problem.fan_in,
        stride_g, stride_o, stride_c, stride_t,
        problem.out_channels, plan.fan_in, plan.fan_out, plan.together,
        TAPS=kernel**2, MIXED=mix is not None, NEED_WEIGHT=dweight is not None, NEED_MIX=dmix is not None,
        BLOCK=min(UNFOLD_BLOCK, choice.side(plan.fan_in * kernel**2)), num_warps=4,
    )  # fmt: skip
