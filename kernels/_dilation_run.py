"""Starts the kernels of the dilation convolutions: layouts, configurations, launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import triton
from torch import Tensor

from . import _dilation_conv as kernels
from ._dilation_plan import (
    MOST,
    Problem,
    Rows,
    Table,
    forward_table,
    gradient_table,
    joined,
    on_device,
    weight_table,
)
from ._launch import on_device_of
from ._tuning import Config, run_fastest

# Tiles of (pixels, output channels, input channels), warps, stages.
PRODUCTS = {
    "16-bit": (
        Config(128, 128, 64, 8, 3),
        Config(128, 256, 64, 8, 3),
        Config(256, 128, 64, 8, 3, least=90),
        Config(128, 128, 32, 8, 4),
        Config(128, 64, 64, 4, 3, least=90),
        Config(128, 64, 32, 4, 4, most=89),  # 64 at a time would spill there
        Config(64, 64, 64, 4, 4),
    ),
    "tf32": (Config(128, 128, 32, 8, 3), Config(128, 64, 32, 4, 3), Config(64, 64, 32, 4, 4)),
    "ieee": (Config(128, 64, 16, 8, 3), Config(64, 64, 16, 4, 3)),
}
# Tiles of (output channels, input channels, pixels) for the gradient of the weights.
WEIGHT_PRODUCTS = {
    "16-bit": (
        Config(128, 128, 64, 8, 3),
        Config(128, 256, 64, 8, 3),
        Config(128, 64, 64, 4, 3),
        Config(64, 64, 64, 4, 4),
    ),
    "tf32": (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 4)),
    "ieee": (Config(64, 64, 16, 4, 3),),
}
JOINED_WIDTH = {"16-bit": 64, "tf32": 32, "ieee": 16}  # channels of joined groups: as wide as the units' tiles
UNALIGNED_TERMS = 32  # of a sum at a time where channels are loaded one by one, which takes registers
MEASURED = 3  # configurations that are tried, best first by the estimate
LEAST = 16  # of a tile's side
PROCESSORS = 132  # that the estimate fills; not the device's own, so that shapes alone cut the sums
FOLD_TILE = (16, 64)
UNFOLD_BLOCK = 1024

STEP_COST, LOAD_COST = 300_000, 64  # of the estimate, in multiply-adds: a step, and an element of an operand


def kind_of(x: Tensor) -> str:
    """How the products are made: in 16 bits; of float32, in TF32 where torch's convolution may use it too."""
    if x.dtype in (torch.float16, torch.bfloat16):
        return "16-bit"
    return "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def check_direct(algorithm: int) -> None:
    names = {2: "frequency", 3: "winograd"}
    if algorithm in names:
        raise ValueError(f"algorithm must be 'direct' on this backend, got {names[algorithm]!r}")


def check_size(x: Tensor) -> None:
    """Positions are 32 bits wide, offsets 64."""
    images, _, height, width = x.shape
    if max(height, width) >= MOST or images * height * width >= 2**31 - 2**16:
        raise ValueError(f"x must have fewer than 2^31 pixels on this backend, got {tuple(x.shape)}")


def dense_nhwc(x: Tensor) -> Tensor:
    """``[N, H, W, C]``, dense: a view of a channels_last map, else a copy."""
    return x.permute(0, 2, 3, 1).contiguous()


def in_layout_of_map(nhwc: Tensor, x: Tensor) -> Tensor:
    """``nhwc`` as ``[N, C, H, W]``: channels_last where ``x`` is (and is not also contiguous), else contiguous."""
    result = nhwc.permute(0, 3, 1, 2)
    if not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return result
    return x.new_empty(result.shape).copy_(result)


@dataclass(frozen=True)
class Weights:
    """The kernels of an op's branches, and the matrices that their taps make up."""

    values: Tensor  # [branches, Cout, fan, k, k], the taps at one stride
    mix: Tensor | None  # [branches, Cout] float32
    branches: Rows
    matrices: Rows

    @classmethod
    def of(cls, values: Tensor, mix: Tensor | None, branches: Rows, matrices: Rows) -> Weights:
        if values.shape[-1] > 1 and values.stride(-2) != values.shape[-1] * values.stride(-1):
            values = values.contiguous()
        return cls(values, None if mix is None else mix.contiguous(), branches, matrices)

    @property
    def strides(self) -> tuple[int, int, int, int]:
        """Of branches, output channels, input channels and taps."""
        return self.values.stride(0), self.values.stride(1), self.values.stride(2), self.values.stride(4)

    @property
    def channels(self) -> tuple[int, int]:
        """Of the output, and of one output's input."""
        return self.values.shape[1], self.values.shape[2]


def folded(weights: Weights, problem: Problem, transposed: bool) -> tuple[Tensor, int, int]:
    """The matrices of a product, and the strides of matrices and rows; the kernels as they are where they will do."""
    out_channels, fan_in = weights.channels
    together = problem.fan_in // fan_in
    if weights.mix is None and not transposed and together == 1 and weights.strides[2] == 1:
        return weights.values, weights.strides[3], weights.strides[1]
    rows, terms = (problem.in_channels, problem.fan_out) if transposed else (out_channels, problem.fan_in)
    count, branches = len(weights.branches.values), weights.values.shape[0]
    out = weights.values.new_empty(count, rows, terms)
    block_o, block_c = FOLD_TILE
    grid = (count, triton.cdiv(out_channels, block_o), triton.cdiv(problem.fan_in, block_c))
    kernels.fold_kernel[grid](
        weights.values, weights.mix if weights.mix is not None else weights.values,
        on_device(weights.branches, out), out, *weights.strides,
        out_channels, fan_in, problem.fan_out // together, together, rows * terms,
        BRANCHES=branches, MIXED=weights.mix is not None, TRANSPOSED=transposed,
        BLOCK_O=block_o, BLOCK_C=block_c, num_warps=4,
    )  # fmt: skip
    return out, rows * terms, terms


def candidates(
    configs: Sequence[Config], table_for: Callable[[int, int], Table], sizes: tuple[int, int, int], like: Tensor
) -> list[Config]:
    """The configurations that fit, cut down to the sizes (pixels, rows, terms) of small products, best first."""
    pixels, rows, terms = (max(LEAST, triton.next_power_of_2(size)) for size in sizes)
    fitting = {}
    for config in fitting_on(processor_of(like), configs, like):
        config = config.cut(max(pixels, 64), rows, terms)
        fitting[config] = estimate(config, table_for(config.block_n, config.block_k))
    return sorted(fitting, key=fitting.__getitem__)[:MEASURED]


@cache
def _processor(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 101376)  # the least since 8.0
    return 10 * properties.major + properties.minor, shared


def processor_of(like: Tensor) -> tuple[int, int]:
    """Compute capability (90 for 9.0) and bytes of shared memory that a block may have."""
    return _processor(like.device) if like.is_cuda else (90, 232448)


def fitting_on(processor: tuple[int, int], configs: Sequence[Config], like: Tensor) -> list[Config]:
    capability, shared = processor
    return [
        config
        for config in configs
        if config.least <= capability <= config.most and config.shared_memory(like.element_size()) <= shared
    ]


def estimate(config: Config, table: Table) -> float:
    """What a product costs, to choose among tiles by: whole waves of tiles, their products, loads and steps."""
    tiles = len(table.tiles.values) * triton.cdiv(table.pixels, config.block_m)
    m, n = config.block_m, config.block_n
    step = config.block_k * (m * n + LOAD_COST * (m + n)) + STEP_COST
    return triton.cdiv(tiles, PROCESSORS) * max(table.longest, 1) * step


def forward(x: Tensor, weights: Weights, problem: Problem) -> Tensor:
    """The convolution ``[N, Cout, OH, OW]`` of a map ``[N, Cin, H, W]``."""
    check_size(x)
    y = x.new_empty(problem.images, problem.out_height, problem.out_width, problem.out_channels)
    if y.numel():
        with on_device_of(x):
            problem = joined(problem, JOINED_WIDTH[kind_of(x)])
            strides = (problem.stride_h, problem.stride_w, 1, 1)
            product(dense_nhwc(x), y, folded(weights, problem, False), problem, forward_table, strides)
    return in_layout_of_map(y, x)


def map_gradient(grad: Tensor, x: Tensor, weights: Weights, problem: Problem) -> Tensor:
    dx = x.new_empty(problem.images, problem.height, problem.width, problem.in_channels)
    if dx.numel():
        with on_device_of(x):
            problem = joined(problem, JOINED_WIDTH[kind_of(x)])
            strides = (1, 1, problem.stride_h, problem.stride_w)
            product(dense_nhwc(grad), dx, folded(weights, problem, True), problem, gradient_table, strides)
    return in_layout_of_map(dx, x)


def product(
    source: Tensor,
    out: Tensor,
    weights: tuple[Tensor, int, int],
    problem: Problem,
    table_of: Callable[[Problem, int, int], Table],
    strides: tuple[int, int, int, int],
) -> None:
    kind, table_for = kind_of(source), partial(table_of, problem)
    values, matrix_stride, row_stride = weights

    def launch(config: Config) -> None:
        table = table_for(config.block_n, config.block_k)
        tiles = len(table.tiles.values)
        kernels.product_kernel[(tiles * triton.cdiv(table.pixels, config.block_m),)](
            source, values, out, on_device(table.tiles, out), on_device(table.steps, out),
            tiles, problem.images, *source.shape[1:], *out.shape[1:], matrix_stride, row_stride, *strides,
            **alignment_of(table), **tile_of(config, kind),
        )  # fmt: skip

    sizes = problem.out_pixels, widest_part(problem), problem.fan_in
    if table_of is gradient_table:
        sizes = problem.images * problem.height * problem.width, problem.fan_in, widest_part(problem)
    if source.shape[3] % 16 or row_stride % 16:
        sizes = (*sizes[:2], min(sizes[2], UNALIGNED_TERMS))
    run_fastest(
        (table_of.__name__, *traits(problem, source)), candidates(PRODUCTS[kind], table_for, sizes, out), out, launch
    )


def widest_part(problem: Problem) -> int:
    return min(problem.fan_out, max(last - first for first, last, _ in problem.parts))


def alignment_of(table: Table) -> dict[str, Any]:
    return {
        "ROWS_ALIGN": table.rows_align, "SUM_ALIGN": table.sum_align,
        "ROWS_FULL": table.rows_full, "SUM_FULL": table.sum_full,
    }  # fmt: skip


def tile_of(config: Config, kind: str) -> dict[str, Any]:
    return {
        "PRECISION": "tf32" if kind == "tf32" else "ieee",
        "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": config.block_k,
        "num_warps": config.warps, "num_stages": config.stages,
    }  # fmt: skip


def traits(problem: Problem, x: Tensor) -> tuple[Any, ...]:
    """What the fastest configuration may depend on: all of the shapes but for small changes of the maps' sizes."""
    return (
        x.dtype, kind_of(x), problem.out_pixels.bit_length(), problem.in_channels, problem.groups,
        problem.stride_h, problem.stride_w, problem.parts,
    )  # fmt: skip


def weight_gradient(
    grad: Tensor, x: Tensor, weights: Weights, problem: Problem, need_weight: bool, need_mix: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of the kernels and of the mixture, each empty where it is not needed."""
    values, mix = weights.values, weights.mix
    dweight = values.new_empty(values.shape if need_weight else 0)
    dmix = (values if mix is None else mix).new_empty(values.shape[:2] if need_mix else 0, dtype=torch.float32)
    if not (need_weight or need_mix):
        return dweight, dmix
    if problem.out_pixels == 0:
        return dweight.zero_(), dmix.zero_()
    with on_device_of(x):
        problem = joined(problem, JOINED_WIDTH[kind_of(x)])
        sums = sums_over_pixels(dense_nhwc(grad), dense_nhwc(x), problem)
        out_channels, fan_in = weights.channels
        together = problem.fan_in // fan_in
        taps = values.shape[-1] ** 2
        kernels.unfold_kernel[(values.shape[0] * out_channels,)](
            sums, values, sums if mix is None else mix, on_device(weights.matrices, sums),
            dweight if need_weight else values, dmix if need_mix else sums,
            sums.shape[0], sums.stride(0), *weights.strides,
            out_channels, fan_in, problem.fan_out // together, together,
            TAPS=taps, MIXED=mix is not None, NEED_WEIGHT=need_weight, NEED_MIX=need_mix,
            BLOCK=min(UNFOLD_BLOCK, triton.next_power_of_2(fan_in * taps)), num_warps=4,
        )  # fmt: skip
    return dweight, dmix


def chunks_of(problem: Problem) -> tuple[int, int]:
    """How many chunks the pixels are cut into, and how long: enough that few tiles fill a device, by shapes alone."""
    tiles = len(weight_table(problem, 128, 128).tiles.values)
    wanted = min(triton.cdiv(2 * PROCESSORS, tiles), triton.cdiv(problem.out_pixels, 512))
    chunk = triton.cdiv(triton.cdiv(problem.out_pixels, wanted), 64) * 64
    return triton.cdiv(problem.out_pixels, chunk), chunk


def sums_over_pixels(grad: Tensor, x: Tensor, problem: Problem) -> Tensor:
    """``[chunks, matrices, Cout, terms]``: each chunk's share of the gradient of every matrix."""
    kind, table_for = kind_of(x), partial(weight_table, problem)
    count, chunk = chunks_of(problem)
    shape = (count, problem.matrices, problem.out_channels, problem.fan_in)
    sums = x.new_empty(shape, dtype=torch.float32)

    def launch(config: Config) -> None:
        table = table_for(config.block_m, config.block_n)
        tiles = len(table.tiles.values)
        kernels.weight_gradient_kernel[(tiles * count,)](
            grad, x, sums, on_device(table.tiles, sums), tiles, problem.out_pixels, chunk,
            problem.height, problem.width, problem.in_channels,
            problem.out_height, problem.out_width, problem.out_channels, problem.fan_in, sums.stride(0),
            problem.stride_h, problem.stride_w, *magic(problem.out_width), *magic(problem.out_height),
            **alignment_of(table), **tile_of(config, kind),
        )  # fmt: skip

    run_fastest(("weights", *traits(problem, x)), weight_candidates(kind, problem, x), x, launch)
    return sums


def weight_candidates(kind: str, problem: Problem, like: Tensor) -> list[Config]:
    """By the tiles' waves and products, as :func:`candidates`; here the long sums are over pixels."""
    rows, columns = (max(LEAST, triton.next_power_of_2(size)) for size in (widest_part(problem), problem.fan_in))
    fitting = {}
    most_pixels = UNALIGNED_TERMS if problem.in_channels % 16 or problem.out_channels % 16 else 64
    count, chunk = chunks_of(problem)
    for config in fitting_on(processor_of(like), WEIGHT_PRODUCTS[kind], like):
        config = config.cut(max(rows, 64), columns, most_pixels)
        m, n = config.block_m, config.block_n
        tiles = len(weight_table(problem, m, n).tiles.values) * count
        step = config.block_k * (m * n + LOAD_COST * (m + n)) + STEP_COST
        fitting[config] = triton.cdiv(tiles, PROCESSORS) * triton.cdiv(chunk, config.block_k) * step
    return sorted(fitting, key=fitting.__getitem__)[:MEASURED]


def magic(divisor: int) -> tuple[int, int]:
    """(m, s) with ``n // divisor == (2 n m >> 32) >> s`` for every n < 2^31."""
    shift = (divisor - 1).bit_length()
    return -(-(2 ** (31 + shift)) // divisor), shift
