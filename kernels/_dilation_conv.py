"""The Triton kernels of the dilation convolutions: products of matrices over lists of taps, maps in NHWC.

``fold_kernel`` lays the weights out for a product (and mixes them), ``product_kernel`` is the forward and the gradient
of the map, ``weight_gradient_kernel`` sums over the pixels, and ``unfold_kernel`` takes its result back to the weights.
Tables of tiles and steps come from :mod:`._dilation_plan`. Sums are cut by shapes alone and added in one order.
"""

from __future__ import annotations

import triton
import triton.language as tl

OUTSIDE = tl.constexpr(-(2**30))  # the row of a pixel beyond the last: no tap reaches the map from there


@triton.jit
def fold_kernel(
    weight,  # [branches, out_channels, fan_in, taps], with strides
    mix,  # [branches, out_channels] float32
    branches,  # [matrices, branches] int32: the tap of each branch that falls on this matrix, or -1
    out,  # [matrices, rows, block]
    stride_g, stride_o, stride_c, stride_t,
    out_channels,
    fan_in,  # of the convolution
    fan_out,
    joined,  # its groups in one block of the product
    matrix_stride,  # of out
    BRANCHES: tl.constexpr,
    MIXED: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # rows are input channels
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Weights of one tap for blocks of joined groups, zero between the groups; a row's terms of the sum are dense."""
    matrix = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)[:, None]
    place = tl.program_id(2) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]  # among the input channels of o's block
    inside = (o < out_channels) & (place < joined * fan_in)
    group = o // fan_out
    first = group // joined * joined  # group of the block
    c = place - (group - first) * fan_in
    own = inside & (c >= 0) & (c < fan_in)
    kernels = weight + o.to(tl.int64) * stride_o + c.to(tl.int64) * stride_c
    factors = mix + o
    total = tl.zeros([BLOCK_O, BLOCK_C], tl.float32)
    for g in range(BRANCHES):
        tap = tl.load(branches + matrix * BRANCHES + g)
        if tap >= 0:
            value = tl.load(kernels + tap.to(tl.int64) * stride_t, mask=own, other=0.0).to(tl.float32)
            if MIXED:
                value *= tl.load(factors, mask=o < out_channels, other=0.0)
            total += value
        kernels += stride_g
        factors += out_channels
    if TRANSPOSED:
        target = (first * fan_in + place).to(tl.int64) * (joined * fan_out) + (o - first * fan_out)
    else:
        target = o.to(tl.int64) * (joined * fan_in) + place
    tl.store(out + matrix * matrix_stride + target, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["tile_count", "images", "source_height", "source_width", "out_height", "out_width"])
def product_kernel(
    source,  # [images, source_height, source_width, source_channels]
    weight,  # [matrices, out_channels, terms], the terms dense
    out,  # [images, out_height, out_width, out_channels]
    tiles,  # [tile_count, 7 + len(SUMS)] int32
    steps,  # [steps + 1, 5] int32
    tile_count, images, source_height, source_width, source_channels,
    out_height, out_width, out_channels,
    matrix_stride, row_stride,
    in_step_h, in_step_w, out_step_h, out_step_w,  # from one pixel of a plane to the next, in the source and the result
    ROWS_ALIGN: tl.constexpr, SUM_ALIGN: tl.constexpr,
    ROWS_FULL: tl.constexpr, SUM_FULL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WIDTHS: tl.constexpr,  # of the tiles, in rows: a tile has the least that holds its rows
    SUMS: tl.constexpr,  # of the steps, in channels: a tile's sum has all steps of one width, then those of the next
):  # fmt: skip
    """``out[pixel, row] = sum of source[pixel + tap, channel] weight[tap, row, channel]`` over steps and channels."""
    tile = tiles + tl.program_id(0) % tile_count * (7 + len(SUMS))
    if len(WIDTHS) == 1:
        _product_tile(
            source, weight, out, tile, steps, tile_count, images, source_height, source_width, source_channels,
            out_height, out_width, out_channels, matrix_stride, row_stride,
            in_step_h, in_step_w, out_step_h, out_step_w,
            ROWS_ALIGN, SUM_ALIGN, ROWS_FULL, SUM_FULL, PRECISION, BLOCK_M, WIDTHS[0], SUMS,
        )  # fmt: skip
    else:
        width = tl.load(tile + 2)
        for i in tl.static_range(len(WIDTHS)):
            if width == WIDTHS[i]:
                _product_tile(
                    source, weight, out, tile, steps, tile_count, images, source_height, source_width, source_channels,
                    out_height, out_width, out_channels, matrix_stride, row_stride,
                    in_step_h, in_step_w, out_step_h, out_step_w,
                    ROWS_ALIGN, SUM_ALIGN, ROWS_FULL, SUM_FULL, PRECISION, BLOCK_M, WIDTHS[i], SUMS,
                )  # fmt: skip


@triton.jit
def _product_tile(
    source, weight, out, tile, steps, tile_count, images, source_height, source_width, source_channels,
    out_height, out_width, out_channels, matrix_stride, row_stride, in_step_h, in_step_w, out_step_h, out_step_w,
    ROWS_ALIGN: tl.constexpr, SUM_ALIGN: tl.constexpr,
    ROWS_FULL: tl.constexpr, SUM_FULL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    n_first = tl.multiple_of(tl.load(tile), ROWS_ALIGN)
    n_last = tl.multiple_of(tl.load(tile + 1), ROWS_ALIGN)
    base = tl.multiple_of(tl.load(tile + 3), SUM_ALIGN)
    top, left, begin = tl.load(tile + 4), tl.load(tile + 5), tl.load(tile + 6)
    height, width = tl.cdiv(out_height - top, out_step_h), tl.cdiv(out_width - left, out_step_w)
    pixel = tl.program_id(0) // tile_count * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = pixel < images * height * width
    column, line = pixel % width, pixel // width
    row, image = line % height, line // height
    y = tl.where(inside, row * in_step_h, OUTSIDE)
    x = column * in_step_w
    # Offsets are 64 bits wide once per pixel and once per step.
    here = (image.to(tl.int64) * source_height + row * in_step_h) * source_width + x
    n = n_first + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # The next step's numbers are read a step ahead: as addresses read in the same step they would count as a stage of
    # the software pipeline, and the operands would get fewer.
    entry = steps + begin * 5
    dy, dx, matrix = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    k_first, k_last = tl.multiple_of(tl.load(entry + 3), SUM_ALIGN), tl.multiple_of(tl.load(entry + 4), SUM_ALIGN)
    for i in tl.static_range(len(SUMS)):
        end = tl.load(tile + 7 + i)
        k = tl.arange(0, SUMS[i])
        pixels = source + (here * source_channels + base)[:, None] + k[None, :]
        rows = weight + (n.to(tl.int64) * row_stride)[None, :] + k[:, None]
        for _ in range(begin, end):
            seen = ((y + dy).to(tl.uint32) < source_height) & ((x + dx).to(tl.uint32) < source_width)
            move = (dy.to(tl.int64) * source_width + dx) * source_channels + k_first
            turn = matrix.to(tl.int64) * matrix_stride + k_first
            mask_a = seen[:, None]
            mask_b = (n < n_last)[None, :]
            if not SUM_FULL:
                mask_k = k < k_last - k_first
                mask_a = mask_a & mask_k[None, :]
                mask_b = mask_b & mask_k[:, None]
            a = tl.load(pixels + move, mask=mask_a, other=0.0)
            if ROWS_FULL and SUM_FULL:
                b = tl.load(rows + turn)
            else:
                b = tl.load(rows + turn, mask=mask_b, other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
            entry += 5
            dy, dx, matrix = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
            k_first = tl.multiple_of(tl.load(entry + 3), SUM_ALIGN)
            k_last = tl.multiple_of(tl.load(entry + 4), SUM_ALIGN)
        begin = end
    target = (image.to(tl.int64) * out_height + top + row * out_step_h) * out_width + left + column * out_step_w
    at = out + (target * out_channels)[:, None] + n[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=inside[:, None] & (n < n_last)[None, :])


@triton.jit
def _divided(n, magic, shift):
    """``n // divisor`` in a few instructions, for n < 2^31, by the divisor's ``_dilation_run.magic``."""
    return (tl.umulhi(n.to(tl.uint32) << 1, magic.to(tl.uint32)) >> shift.to(tl.uint32)).to(tl.int32)


@triton.jit(
    do_not_specialize=[
        "tile_count", "pixels", "chunk", "height", "width", "out_height", "out_width",
        "magic_width", "shift_width", "magic_height", "shift_height",
    ]
)  # fmt: skip
def weight_gradient_kernel(
    grad,  # [images, out_height, out_width, out_channels]
    source,  # [images, height, width, in_channels]
    partial,  # [chunks, matrices, out_channels, terms] float32
    tiles,  # [tile_count, 10] int32
    tile_count,
    pixels,  # of grad
    chunk,  # pixels that a program sums over
    height, width, in_channels,
    out_height, out_width, out_channels,
    terms, partial_stride,
    stride_h, stride_w,
    magic_width, shift_width,  # n // out_width is the upper half of 2 n times magic, shifted
    magic_height, shift_height,
    ROWS_ALIGN: tl.constexpr, SUM_ALIGN: tl.constexpr,
    ROWS_FULL: tl.constexpr, SUM_FULL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,  # input channels
    BLOCK_K: tl.constexpr,  # pixels
    WIDTHS: tl.constexpr,  # of the tiles, in output channels: a part may be narrower than a matrix unit's rows
):  # fmt: skip
    """``partial[chunk, tap, o, c] = sum over the chunk's pixels of grad[pixel, o] source[pixel + tap, c]``."""
    tile = tiles + tl.program_id(0) % tile_count * 10
    if len(WIDTHS) == 1:
        _weight_tile(
            grad, source, partial, tile, tile_count, pixels, chunk, height, width, in_channels,
            out_height, out_width, out_channels, terms, partial_stride, stride_h, stride_w,
            magic_width, shift_width, magic_height, shift_height,
            ROWS_ALIGN, SUM_ALIGN, ROWS_FULL, SUM_FULL, PRECISION, BLOCK_M, WIDTHS[0], BLOCK_K,
        )  # fmt: skip
    else:
        own = tl.load(tile + 6)
        for i in tl.static_range(len(WIDTHS)):
            if own == WIDTHS[i]:
                _weight_tile(
                    grad, source, partial, tile, tile_count, pixels, chunk, height, width, in_channels,
                    out_height, out_width, out_channels, terms, partial_stride, stride_h, stride_w,
                    magic_width, shift_width, magic_height, shift_height,
                    ROWS_ALIGN, SUM_ALIGN, ROWS_FULL, SUM_FULL, PRECISION, BLOCK_M, WIDTHS[i], BLOCK_K,
                )  # fmt: skip


@triton.jit
def _weight_tile(
    grad, source, partial, tile, tile_count, pixels, chunk, height, width, in_channels,
    out_height, out_width, out_channels, terms, partial_stride, stride_h, stride_w,
    magic_width, shift_width, magic_height, shift_height,
    ROWS_ALIGN: tl.constexpr, SUM_ALIGN: tl.constexpr,
    ROWS_FULL: tl.constexpr, SUM_FULL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    dy, dx, matrix, alive = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    o_first = tl.multiple_of(tl.load(tile + 4), ROWS_ALIGN)
    o_last = tl.multiple_of(tl.load(tile + 5), ROWS_ALIGN)
    base = tl.multiple_of(tl.load(tile + 7), SUM_ALIGN)
    c_first = tl.multiple_of(tl.load(tile + 8), SUM_ALIGN)
    c_last = tl.multiple_of(tl.load(tile + 9), SUM_ALIGN)
    part = tl.program_id(0) // tile_count
    first = part * chunk
    last = tl.where(alive > 0, tl.minimum(first + chunk, pixels), first)  # a tap that sees no pixel has zeros
    c = c_first + tl.arange(0, BLOCK_M)
    o = o_first + tl.arange(0, BLOCK_N)
    values = source + (base + c)[:, None]
    upstream = grad + o[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_K):
        pixel = start + tl.arange(0, BLOCK_K)
        inside = pixel < last
        line = _divided(pixel, magic_width, shift_width)
        image = _divided(line, magic_height, shift_height)
        y = (line - image * out_height) * stride_h + dy
        x = (pixel - line * out_width) * stride_w + dx
        seen = inside & (y.to(tl.uint32) < height) & (x.to(tl.uint32) < width)
        place = (image * height + y).to(tl.int64) * width + x
        mask_v, mask_g = seen[None, :], inside[:, None]
        if not SUM_FULL:
            mask_v = mask_v & (c < c_last)[:, None]
        if not ROWS_FULL:
            mask_g = mask_g & (o < o_last)[None, :]
        v = tl.load(values + (place * in_channels)[None, :], mask=mask_v, other=0.0)
        g = tl.load(upstream + (pixel.to(tl.int64) * out_channels)[:, None], mask=mask_g, other=0.0)
        total = tl.dot(v, g, total, input_precision=PRECISION)
    target = (matrix.to(tl.int64) * out_channels + o) * terms
    at = partial + part.to(tl.int64) * partial_stride + target[None, :] + c[:, None]
    tl.store(at, total, mask=(o < o_last)[None, :] & (c < c_last)[:, None])


@triton.jit(do_not_specialize=["chunks"])
def unfold_kernel(
    partial,  # [chunks, matrices, out_channels, terms] float32
    weight,  # [branches, out_channels, fan_in, taps], with strides
    mix,  # [branches, out_channels] float32
    matrices,  # [branches, taps] int32
    dweight,  # [branches, out_channels, fan_in, taps], dense
    dmix,  # [branches, out_channels] float32
    chunks,
    partial_stride,
    stride_g, stride_o, stride_c, stride_t,
    out_channels,
    fan_in,
    fan_out,
    joined,
    TAPS: tl.constexpr,
    MIXED: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    NEED_MIX: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one branch and output channel: the gradient of its kernel, and of its factor in the mixture."""
    program = tl.program_id(0).to(tl.int64)
    g, o = program // out_channels, program % out_channels
    begin = o // fan_out % joined * fan_in  # of its group among the terms
    factor = 1.0
    if MIXED:
        factor = tl.load(mix + program)
    inner = tl.zeros([BLOCK], tl.float32)
    for first in range(0, fan_in * TAPS, BLOCK):
        at = first + tl.arange(0, BLOCK)
        inside = at < fan_in * TAPS
        c, tap = at // TAPS, at % TAPS
        matrix = tl.load(matrices + g * TAPS + tap, mask=inside, other=0)
        place = (matrix.to(tl.int64) * out_channels + o) * (joined * fan_in) + begin + c
        sums = partial + place
        gradient = tl.zeros([BLOCK], tl.float32)
        for _ in range(chunks):
            gradient += tl.load(sums, mask=inside, other=0.0)
            sums += partial_stride
        if NEED_MIX:
            kernel = weight + g * stride_g + o * stride_o + c.to(tl.int64) * stride_c + tap.to(tl.int64) * stride_t
            inner += tl.load(kernel, mask=inside, other=0.0).to(tl.float32) * gradient
        if NEED_WEIGHT:
            result = (gradient * factor).to(dweight.dtype.element_ty)
            tl.store(dweight + program * (fan_in * TAPS) + at, result, mask=inside)
    if NEED_MIX:
        tl.store(dmix + program, tl.sum(inner, axis=0))
