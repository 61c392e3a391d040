"""``sigmoid_focal_loss`` in Triton: the loss, its sum and its gradients, each in one pass over logits and targets."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import in_layout_of, on_device_of

BLOCK, WARPS = 1024, 4
STEPS = 4  # blocks that a program of the sum adds before it stores
REDUCE_BLOCK, REDUCE_WARPS = 1024, 4
LOWEST = tl.constexpr(80.0)  # exp(-|x|) is taken from here on: never 0, so that no quotient is 0/0


@triton.jit
def _log1p(e):
    """log(1 + e) for 0 <= e <= 1, exact to a few ulp also where 1 + e rounds to 1; coefficients by Remez exchange."""
    series = -0.00324405089213 * e + 0.0198515717068
    series = series * e - 0.0569597262235
    series = series * e + 0.106036728958
    series = series * e - 0.153056023816
    series = series * e + 0.196759424417
    series = series * e - 0.249541342747
    series = series * e + 0.333299624872
    series = series * e - 0.499999024269
    return e + e * e * series


@triton.jit
def _terms(x, t):
    """Of z = |x| and u, the target of the class that x speaks for: all sums have terms of one sign."""
    z = tl.abs(x)
    u = tl.where(x < 0.0, 1.0 - t, t)
    rest = 1.0 - u
    e = tl.exp(-tl.where(z > LOWEST, LOWEST, z))  # NaN stays
    log1p_e = _log1p(e)
    unsure = rest + u * e  # (1 - p_t) (1 + e)
    return z, u, rest, e, log1p_e, 1.0 / (1.0 + e), unsure, rest * z + log1p_e


@triton.jit
def _modulation(z, rest, log1p_e, inverse, unsure, gamma, SQUARE: tl.constexpr):
    """(1 - p_t)^gamma."""
    if SQUARE:
        q = unsure * inverse
        return q * q
    return tl.exp(gamma * (tl.where(rest == 0.0, -z, tl.log(unsure)) - log1p_e))


@triton.jit
def _loss(x, t, alpha, alpha_slope, gamma, SQUARE: tl.constexpr):
    z, u, rest, e, log1p_e, inverse, unsure, entropy = _terms(x, t)
    return (alpha + t * alpha_slope) * _modulation(z, rest, log1p_e, inverse, unsure, gamma, SQUARE) * entropy


@triton.jit
def forward_kernel(
    logits,  # [count]
    targets,  # [count]
    out,  # [count]
    alpha,  # weight of target 0
    alpha_slope,  # weight of target 1 less that of target 0
    gamma,
    count,
    SQUARE: tl.constexpr,  # gamma is 2
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(targets + at, mask=inside, other=0.0).to(tl.float32)
    loss = _loss(x, t, alpha, alpha_slope, gamma, SQUARE)
    tl.store(out + at, loss.to(out.dtype.element_ty), mask=inside)


@triton.jit
def sum_kernel(
    logits,  # [count]
    targets,  # [count]
    partial,  # [programs] float64
    alpha,
    alpha_slope,
    gamma,
    count,
    SQUARE: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for step in tl.static_range(STEPS):
        at = (program * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        inside = at < count
        x = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
        t = tl.load(targets + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.where(inside, _loss(x, t, alpha, alpha_slope, gamma, SQUARE), 0.0)
    tl.store(partial + program, tl.sum(total, axis=0).to(tl.float64))


@triton.jit(do_not_specialize=["count"])
def reduce_kernel(
    partial,  # [count] float64
    out,  # [1] float32
    count,
    BLOCK: tl.constexpr,
):
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(partial + at, mask=at < count, other=0.0)
    tl.store(out, tl.sum(total, axis=0).to(tl.float32))


@triton.jit
def backward_kernel(
    grad,  # [count], or [1] float32 where the loss was summed
    logits,  # [count]
    targets,  # [count]
    dlogits,  # [count]
    dtargets,  # [count]
    alpha,
    alpha_slope,
    gamma,
    count,
    SQUARE: tl.constexpr,
    SUMMED: tl.constexpr,
    NEED_LOGITS: tl.constexpr,
    NEED_TARGETS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    x = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    t = tl.load(targets + at, mask=inside, other=0.0).to(tl.float32)
    if SUMMED:
        g = tl.load(grad)
    else:
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32)
    z, u, rest, e, log1p_e, inverse, unsure, entropy = _terms(x, t)
    modulation = _modulation(z, rest, log1p_e, inverse, unsure, gamma, SQUARE)
    weight = alpha + t * alpha_slope
    if NEED_LOGITS:
        slope = (rest - u * e) * inverse  # of the cross-entropy, by z
        step = e * inverse * (rest - u)  # d(1 - p_t)/dz (1 + e)
        if SQUARE:
            q = unsure * inverse
            by_z = weight * q * (2.0 * step * inverse * entropy + q * slope)
        else:
            by_z = weight * modulation * (gamma * step / unsure * entropy + slope)
        dx = g * tl.where(x < 0.0, -by_z, by_z)
        tl.store(dlogits + at, dx.to(dlogits.dtype.element_ty), mask=inside)
    if NEED_TARGETS:
        ratio = (1.0 - e) / unsure  # |d(1 - p_t)/dt| / (1 - p_t)
        by_q = gamma * (tl.where(x < 0.0, ratio, -ratio) * entropy)  # gamma * ratio may be infinite
        dt = g * modulation * (alpha_slope * entropy + weight * (by_q - x))
        tl.store(dtargets + at, dt.to(dtargets.dtype.element_ty), mask=inside)


def _options(alpha: float, gamma: float) -> tuple[float, float, float, bool]:
    """Weight of target 0, the other's difference to it, the exponent, and whether that is 2."""
    weights = (1.0, 0.0) if alpha < 0 else (1.0 - alpha, 2.0 * alpha - 1.0)
    return *weights, gamma, gamma == 2.0


def _dense(x: Tensor) -> bool:
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def forward(logits: Tensor, targets: Tensor, alpha: float, gamma: float, reduce_sum: bool) -> Tensor:
    """The kernel of ``nasdet::sigmoid_focal_loss_triton``."""
    like = logits if reduce_sum and _dense(logits) else torch.empty_like(logits)
    count = like.numel()
    *options, square = _options(alpha, gamma)
    out = logits.new_empty((), dtype=torch.float32) if reduce_sum else like
    if count == 0:
        return out.zero_()
    logits, targets = in_layout_of(logits, like), in_layout_of(targets, like)
    with on_device_of(like):
        if not reduce_sum:
            grid = (triton.cdiv(count, BLOCK),)
            forward_kernel[grid](logits, targets, out, *options, count, SQUARE=square, BLOCK=BLOCK, num_warps=WARPS)
            return out
        programs = triton.cdiv(count, BLOCK * STEPS)
        partial = logits.new_empty(programs, dtype=torch.float64)
        sum_kernel[(programs,)](
            logits, targets, partial, *options, count, SQUARE=square, STEPS=STEPS, BLOCK=BLOCK, num_warps=WARPS
        )
        reduce_kernel[(1,)](partial, out, programs, BLOCK=REDUCE_BLOCK, num_warps=REDUCE_WARPS)
    return out


def backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    alpha: float,
    gamma: float,
    reduce_sum: bool,
    need_logits: bool,
    need_targets: bool,
) -> tuple[Tensor, Tensor]:
    """The kernel of ``nasdet::sigmoid_focal_loss_backward_triton``: the gradients that are needed, else empty."""
    like = torch.empty_like(logits)
    dlogits = like if need_logits else logits.new_empty(0)
    dtargets = (torch.empty_like(like) if need_logits else like) if need_targets else logits.new_empty(0)
    count = like.numel()
    if count == 0 or not (need_logits or need_targets):
        return dlogits, dtargets
    *options, square = _options(alpha, gamma)
    logits, targets = in_layout_of(logits, like), in_layout_of(targets, like)
    grad = grad if reduce_sum else in_layout_of(grad, like)
    with on_device_of(like):
        backward_kernel[(triton.cdiv(count, BLOCK),)](
            grad, logits, targets, dlogits if need_logits else like, dtargets if need_targets else like,
            *options, count, SQUARE=square, SUMMED=reduce_sum, NEED_LOGITS=need_logits, NEED_TARGETS=need_targets,
            BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
    return dlogits, dtargets
