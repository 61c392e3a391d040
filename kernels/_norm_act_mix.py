"""The kernels of ``norm_act_mix``; ``norm_act_mix.py`` launches them.

NCHW and NHWC share every kernel: a program works on tiles of ``BLOCK_C`` channels by ``BLOCK_P`` pixels of one image,
and ``CHANNELS_LAST`` only sets the strides. ``UNIT`` divides the dimension that is dense in memory, which is passed in
units of it: so the compiler knows that rows are aligned and loads 16 bytes at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sizes_of(channels, pixels, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr):
    """Channels and pixels from the arguments, one of which counts units."""
    if CHANNELS_LAST:
        return channels * UNIT, pixels
    else:
        return channels, pixels.to(tl.int64) * UNIT


@triton.jit
def tile_of(image, first_channel, first_pixel, channels, pixels, CHANNELS_LAST: tl.constexpr, BLOCK_C: tl.constexpr,
            BLOCK_P: tl.constexpr):  # fmt: skip
    """Offsets [BLOCK_C, BLOCK_P] of a tile into a map, and which of them are inside it."""
    c = first_channel + tl.arange(0, BLOCK_C)
    q = first_pixel + tl.arange(0, BLOCK_P)
    inside = (c < channels)[:, None] & (q < pixels)[None, :]
    start = image.to(tl.int64) * channels * pixels
    if CHANNELS_LAST:
        return start + c.to(tl.int64)[:, None] + q.to(tl.int64)[None, :] * channels, inside
    else:
        return start + c.to(tl.int64)[:, None] * pixels + q.to(tl.int64)[None, :], inside


@triton.jit
def map_of(xs, index):
    """The pointer to map ``index``: chosen by selects, since a tuple has no run-time index."""
    x = xs[0]
    for p in tl.static_range(1, len(xs)):
        x = tl.where(index == p, xs[p], x)
    return x


@triton.jit
def affine_of(mean, rstd, gamma, beta, p, image, c, end, normalized, batch, channels, groups):
    """What map p does to channels c < end: z = scale x + shift, xhat = r x + offset; without norm z = xhat = x."""
    row = (p * batch + image).to(tl.int64) * groups + c // (channels // groups)
    keep = c < end * ((normalized >> p) & 1)
    r = tl.load(rstd + row, mask=keep, other=1.0)
    m = tl.load(mean + row, mask=keep, other=0.0)
    scale = tl.load(gamma + p * channels + c, mask=keep, other=1.0) * r
    shift = tl.load(beta + p * channels + c, mask=keep, other=0.0) - m * scale
    return scale, shift, r, -m * r


@triton.jit(do_not_specialize=["normalized", "batch", "channels", "pixels", "chunks", "channel_blocks"])
def moments_kernel(
    xs,  # tuple of maps
    means,  # [maps, batch, channels, chunks] float32: mean of the chunk's pixels
    squares,  # [maps, batch, channels, chunks] float32: sum of their squared deviations from it
    normalized,  # bit p: map p is normalised; others are skipped
    batch,
    channels,  # in units if CHANNELS_LAST
    pixels,  # in units if not
    chunks,
    channel_blocks,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STEPS: tl.constexpr,
):
    channels, pixels = sizes_of(channels, pixels, CHANNELS_LAST, UNIT)
    program = tl.program_id(0)
    chunk = program % chunks
    first_channel = program // chunks % channel_blocks * BLOCK_C
    image = program // chunks // channel_blocks % batch
    p = program // chunks // channel_blocks // batch
    first = chunk.to(tl.int64) * (BLOCK_P * STEPS)
    steps = tl.minimum(STEPS, tl.cdiv(pixels - first, BLOCK_P))
    if (normalized >> p) & 1 != 0:
        # Each element of the tile keeps the moments of its own pixels (Welford 1962): no large mean costs digits, and
        # nothing crosses threads before the end.
        x_map = map_of(xs, p)
        mean = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        square = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
        seen = 0.0
        for step in range(0, steps):
            at, inside = tile_of(
                image, first_channel, first + step * BLOCK_P, channels, pixels, CHANNELS_LAST, BLOCK_C, BLOCK_P
            )
            seen += 1.0
            x = tl.load(x_map + at, mask=inside, other=0.0).to(tl.float32)
            delta = tl.where(inside, x - mean, 0.0)
            mean += delta * (1.0 / seen)
            square += delta * (x - mean)
        # Only the last step can have left an element out.
        last = first + (steps - 1) * BLOCK_P + tl.arange(0, BLOCK_P)
        count = tl.where(last < pixels, seen, seen - 1.0)[None, :]
        total = tl.minimum(pixels - first, BLOCK_P * STEPS).to(tl.float32)  # pixels
        center = tl.sum(mean * count, axis=1) / total
        spread = mean - center[:, None]
        square_sum = tl.sum(square + count * spread * spread, axis=1)
        c = first_channel + tl.arange(0, BLOCK_C)
        row = (p * batch + image).to(tl.int64) * channels + c
        tl.store(means + row * chunks + chunk, center, mask=c < channels)
        tl.store(squares + row * chunks + chunk, square_sum, mask=c < channels)


@triton.jit(do_not_specialize=["normalized", "batch", "channels", "pixels", "groups", "chunks", "chunk_pixels"])
def statistics_kernel(
    means,  # [maps, batch, channels, chunks] float32
    squares,  # [maps, batch, channels, chunks] float32
    gamma,  # [maps, channels] float32
    beta,  # [maps, channels] float32
    mean,  # [maps, batch, groups] float32: 0 for maps that are not normalised, as rstd
    rstd,  # [maps, batch, groups] float32
    scale,  # [maps, batch, channels] float32: z = scale x + shift
    shift,  # [maps, batch, channels] float32
    normalized,
    batch,
    channels,
    pixels,
    groups,
    chunks,
    chunk_pixels,
    eps,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    group = program % groups
    image = program // groups % batch
    p = program // groups // batch
    width = channels // groups
    row = (p * batch + image).to(tl.int64) * channels + group * width
    is_normalized = (normalized >> p) & 1 != 0
    m, r = 0.0, 0.0
    if is_normalized:
        count = width * chunks
        elements = width.to(tl.float32) * pixels.to(tl.float32)
        base = tl.load(means + row * chunks)  # deviations from it keep the digits that a large mean would cost
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, count, BLOCK):
            i = first + tl.arange(0, BLOCK)
            size = tl.minimum(pixels - (i % chunks).to(tl.int64) * chunk_pixels, chunk_pixels).to(tl.float32)
            part = tl.load(means + row * chunks + i, mask=i < count, other=0.0)
            total += tl.where(i < count, (part - base) * size, 0.0)
        m = base + tl.sum(total, axis=0) / elements
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, count, BLOCK):
            i = first + tl.arange(0, BLOCK)
            size = tl.minimum(pixels - (i % chunks).to(tl.int64) * chunk_pixels, chunk_pixels).to(tl.float32)
            part = tl.load(means + row * chunks + i, mask=i < count, other=0.0) - m
            total += tl.load(squares + row * chunks + i, mask=i < count, other=0.0)
            total += tl.where(i < count, part * part * size, 0.0)
        r = 1.0 / tl.sqrt(tl.sum(total, axis=0) / elements + eps)
    tl.store(mean + program, m)
    tl.store(rstd + program, r)
    for first in range(0, width, BLOCK):
        i = first + tl.arange(0, BLOCK)
        parameter = p.to(tl.int64) * channels + group * width + i
        keep = i < width * ((normalized >> p) & 1)
        a = tl.load(gamma + parameter, mask=keep, other=1.0) * tl.where(is_normalized, r, 1.0)
        b = tl.load(beta + parameter, mask=keep, other=0.0) - m * a
        tl.store(scale + row + i, a, mask=i < width)
        tl.store(shift + row + i, b, mask=i < width)


@triton.jit(do_not_specialize=["batch", "channels", "pixels", "pixel_blocks", "channel_blocks"])
def forward_kernel(
    xs,  # tuple of maps
    weights,  # [maps] float32
    scale,  # [maps, batch, channels] float32
    shift,  # [maps, batch, channels] float32
    out,
    carry,  # float32: the sum over the maps of earlier launches
    batch,
    channels,  # in units if CHANNELS_LAST
    pixels,  # in units if not
    pixel_blocks,
    channel_blocks,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    channels, pixels = sizes_of(channels, pixels, CHANNELS_LAST, UNIT)
    program = tl.program_id(0)
    pixel = (program % pixel_blocks).to(tl.int64) * BLOCK_P
    first_channel = program // pixel_blocks % channel_blocks * BLOCK_C
    image = program // pixel_blocks // channel_blocks
    at, inside = tile_of(image, first_channel, pixel, channels, pixels, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    c = first_channel + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    if not FIRST:
        total += tl.load(carry + at, mask=inside, other=0.0)
    for p in tl.static_range(len(xs)):
        row = (p * batch + image).to(tl.int64) * channels + c
        a = tl.load(scale + row, mask=c < channels, other=0.0)
        b = tl.load(shift + row, mask=c < channels, other=0.0)
        z = tl.load(xs[p] + at, mask=inside, other=0.0).to(tl.float32) * a[:, None] + b[:, None]
        total += tl.load(weights + p) * tl.where(z < 0.0, 0.0, z)  # a NaN stays one
    if LAST:
        tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(carry + at, total, mask=inside)


@triton.jit(do_not_specialize=["normalized", "batch", "channels", "pixels", "groups", "chunks", "channel_blocks"])
def sums_kernel(
    grad,
    xs,  # tuple of maps
    mean,  # [maps, batch, groups] float32, as rstd
    rstd,
    gamma,  # [maps, channels] float32
    beta,  # [maps, channels] float32
    part_a,  # [maps, batch, channels, chunks] float32: sum over the chunk's pixels of [z > 0] g
    part_b,  # [maps, batch, channels, chunks] float32: ... of [z > 0] g xhat (of [x > 0] g x without norm)
    normalized,
    batch,
    channels,  # in units if CHANNELS_LAST
    pixels,  # in units if not
    groups,
    chunks,
    channel_blocks,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    STEPS: tl.constexpr,
):
    channels, pixels = sizes_of(channels, pixels, CHANNELS_LAST, UNIT)
    program = tl.program_id(0)
    chunk = program % chunks
    first_channel = program // chunks % channel_blocks * BLOCK_C
    image = program // chunks // channel_blocks % batch
    p = program // chunks // channel_blocks // batch
    first = chunk.to(tl.int64) * (BLOCK_P * STEPS)
    steps = tl.minimum(STEPS, tl.cdiv(pixels - first, BLOCK_P))
    c = first_channel + tl.arange(0, BLOCK_C)
    scale, shift, r, offset = affine_of(
        mean, rstd, gamma, beta, p, image, c, channels, normalized, batch, channels, groups
    )
    x_map = map_of(xs, p)
    sum_a = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    sum_b = tl.zeros([BLOCK_C, BLOCK_P], tl.float32)
    for step in range(0, steps):
        at, inside = tile_of(
            image, first_channel, first + step * BLOCK_P, channels, pixels, CHANNELS_LAST, BLOCK_C, BLOCK_P
        )
        x = tl.load(x_map + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
        keep = x * scale[:, None] + shift[:, None] > 0.0
        sum_a += tl.where(keep, g, 0.0)
        sum_b += tl.where(keep, g * (x * r[:, None] + offset[:, None]), 0.0)
    row = (p * batch + image).to(tl.int64) * channels + c
    tl.store(part_a + row * chunks + chunk, tl.sum(sum_a, axis=1), mask=c < channels)
    tl.store(part_b + row * chunks + chunk, tl.sum(sum_b, axis=1), mask=c < channels)


@triton.jit(do_not_specialize=["normalized", "batch", "channels", "pixels", "groups", "chunks"])
def coefficients_kernel(
    part_a,  # [maps, batch, channels, chunks] float32
    part_b,  # [maps, batch, channels, chunks] float32
    weights,  # [maps] float32
    mean,  # [maps, batch, groups] float32
    rstd,  # [maps, batch, groups] float32
    gamma,  # [maps, channels] float32
    beta,  # [maps, channels] float32
    sums,  # [2, maps, batch, channels] float32: part_a and part_b over all chunks
    coefficients,  # [5, maps, batch, channels] float32: dx = [scale x + shift > 0] direct g - (slope x + constant)
    normalized,
    batch,
    channels,
    pixels,
    groups,
    chunks,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    program = tl.program_id(0)
    group = program % groups
    image, p = program // groups % batch, program // groups // batch
    width = channels // groups
    row = (p * batch + image).to(tl.int64) * channels + group * width
    plane = tl.num_programs(0).to(tl.int64) * width  # maps x batch x channels
    total_a = tl.zeros([BLOCK_C], tl.float32)
    total_b = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, width, BLOCK_C):
        i = first + tl.arange(0, BLOCK_C)
        a = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
        b = tl.zeros([BLOCK_C, BLOCK_K], tl.float32)
        for chunk in range(0, chunks, BLOCK_K):
            k = chunk + tl.arange(0, BLOCK_K)
            inside = (i < width)[:, None] & (k < chunks)[None, :]
            at = (row + i)[:, None] * chunks + k[None, :]
            a += tl.load(part_a + at, mask=inside, other=0.0)
            b += tl.load(part_b + at, mask=inside, other=0.0)
        sum_a, sum_b = tl.sum(a, axis=1), tl.sum(b, axis=1)
        tl.store(sums + row + i, sum_a, mask=i < width)
        tl.store(sums + plane + row + i, sum_b, mask=i < width)
        channel = tl.load(gamma + p.to(tl.int64) * channels + group * width + i, mask=i < width, other=0.0)
        total_a += channel * sum_a
        total_b += channel * sum_b
    weight = tl.load(weights + p)
    is_normalized = (normalized >> p) & 1 != 0
    factor = weight * tl.load(rstd + program) / (width.to(tl.float32) * pixels.to(tl.float32))
    c1 = tl.where(is_normalized, factor * tl.sum(total_a, axis=0), 0.0)
    c2 = tl.where(is_normalized, factor * tl.sum(total_b, axis=0), 0.0)
    for first in range(0, width, BLOCK_C):
        i = first + tl.arange(0, BLOCK_C)
        c, end = group * width + i, (group + 1) * width
        scale, shift, r, offset = affine_of(
            mean, rstd, gamma, beta, p, image, c, end, normalized, batch, channels, groups
        )
        tl.store(coefficients + row + i, scale, mask=i < width)
        tl.store(coefficients + plane + row + i, shift, mask=i < width)
        tl.store(coefficients + 2 * plane + row + i, weight * scale, mask=i < width)
        tl.store(coefficients + 3 * plane + row + i, c2 * r, mask=i < width)
        tl.store(coefficients + 4 * plane + row + i, c2 * offset + c1, mask=i < width)


@triton.jit(do_not_specialize=["normalized", "batch", "channels"])
def parameters_kernel(
    sums,  # [2, maps, batch, channels] float32
    weights,  # [maps] float32
    gamma,  # [maps, channels] float32
    beta,  # [maps, channels] float32
    dweights,  # [maps] float32
    dgamma,  # [maps, channels] float32
    dbeta,  # [maps, channels] float32
    normalized,
    batch,
    channels,
    BLOCK: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64)
    plane = tl.num_programs(0).to(tl.int64) * batch * channels
    weight = tl.load(weights + p)
    is_normalized = (normalized >> p) & 1 != 0
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, channels, BLOCK):
        c = first + tl.arange(0, BLOCK)
        a = tl.zeros([BLOCK], tl.float32)
        b = tl.zeros([BLOCK], tl.float32)
        for image in range(0, batch):
            row = (p * batch + image) * channels + c
            a += tl.load(sums + row, mask=c < channels, other=0.0)
            b += tl.load(sums + plane + row, mask=c < channels, other=0.0)
        keep = c < channels * ((normalized >> p) & 1)
        at = p * channels + c
        total += tl.load(gamma + at, mask=keep, other=1.0) * b + tl.load(beta + at, mask=keep, other=0.0) * a
        tl.store(dgamma + at, tl.where(is_normalized, weight * b, 0.0), mask=c < channels)
        tl.store(dbeta + at, tl.where(is_normalized, weight * a, 0.0), mask=c < channels)
    tl.store(dweights + p, tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["batch", "channels", "pixels", "pixel_blocks", "channel_blocks"])
def gradient_kernel(
    grad,
    xs,  # tuple of maps
    dxs,  # tuple of their gradients; may be the maps themselves
    coefficients,  # [5, maps, batch, channels] float32
    batch,
    channels,  # in units if CHANNELS_LAST
    pixels,  # in units if not
    pixel_blocks,
    channel_blocks,
    CHANNELS_LAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    channels, pixels = sizes_of(channels, pixels, CHANNELS_LAST, UNIT)
    program = tl.program_id(0)
    pixel = (program % pixel_blocks).to(tl.int64) * BLOCK_P
    first_channel = program // pixel_blocks % channel_blocks * BLOCK_C
    image = program // pixel_blocks // channel_blocks
    at, inside = tile_of(image, first_channel, pixel, channels, pixels, CHANNELS_LAST, BLOCK_C, BLOCK_P)
    c = first_channel + tl.arange(0, BLOCK_C)
    g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    plane = batch.to(tl.int64) * channels * len(xs)
    for p in tl.static_range(len(xs)):
        k = coefficients + (p * batch + image).to(tl.int64) * channels + c
        scale = tl.load(k, mask=c < channels, other=0.0)
        shift = tl.load(k + plane, mask=c < channels, other=0.0)
        direct = tl.load(k + 2 * plane, mask=c < channels, other=0.0)
        slope = tl.load(k + 3 * plane, mask=c < channels, other=0.0)
        constant = tl.load(k + 4 * plane, mask=c < channels, other=0.0)
        x = tl.load(xs[p] + at, mask=inside, other=0.0).to(tl.float32)
        kept = tl.where(x * scale[:, None] + shift[:, None] > 0.0, direct[:, None] * g, 0.0)
        dx = kept - (slope[:, None] * x + constant[:, None])
        tl.store(dxs[p] + at, dx.to(dxs[p].dtype.element_ty), mask=inside)
