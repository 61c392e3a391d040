"""Fuzz of the ops on maps and logits: ``mix``, ``norm_act_mix``, ``sigmoid_focal_loss``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from drawing import DTYPES, EPS32, Draw, compare
from torch import Tensor

from nasdet.ops import mix, norm_act_mix, sigmoid_focal_loss
from nasdet.ops.sigmoid_focal_loss import OP as FOCAL
from nasdet.testing import tolerance

VANISHING = 1e-30  # exp(-|x|) is kept from reaching 0: so small a loss need not have its own digits


def _shape(draw: Draw, most: int = 5) -> list[int]:
    if draw.chance(0.02):
        return [draw.random.randint(16000, 50000)]  # more than one task
    return [draw.size(40) for _ in range(draw.random.randint(1, most))]


def _capped(shape: list[int], elements: int = 60000) -> list[int]:
    while math.prod(shape) > elements:
        shape[shape.index(max(shape))] //= 2
    return shape


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def fuzz_mix(draw: Draw) -> None:
    maps, dtype, shape = draw.random.randint(1, 20 if draw.chance(0.1) else 5), draw.choice(DTYPES), _shape(draw)
    shape = _capped(shape, 60000 // maps)
    dtypes = [draw.choice(DTYPES) if draw.chance(0.1) else dtype for _ in range(maps)]
    scale = 10.0 ** draw.random.randint(-2, 2)
    draw.note(maps=maps, shape=shape, dtypes=dtypes, scale=scale)
    xs = [draw.laid_out(draw.normal(*shape, scale=scale).to(d), expandable=True) for d in dtypes]
    promoted = xs[0].dtype
    for d in dtypes[1:]:
        promoted = torch.promote_types(promoted, d)
    weights = draw.normal(maps)
    weights[draw.uniform(maps) < 0.2] = 0
    # Not float16: a weight's gradient, a sum over all elements, may be too large for it.
    weights = draw.laid_out(weights.to(torch.bfloat16 if draw.chance(0.1) else _wide(promoted)))
    total = float(sum(abs(w) for w in weights.tolist())) * max((_top(x) for x in xs), default=0.0)
    reach = max(total, max((_top(x) for x in xs), default=0.0))

    def gradient_bound(d: torch.dtype, largest: float, upstream: Tensor) -> float:
        # A map's gradient is one product, a weight's a sum over all elements, which may be much larger than itself.
        terms = reach * _top(upstream) * math.sqrt(max(upstream.numel(), 1)) if largest else 0.0
        single = max(largest, _top(upstream) * max(1.0, _top(weights)))
        return tolerance(d, upstream.numel(), single) + 8 * torch.finfo(_wide(promoted)).eps * terms

    compare(
        draw,
        lambda *leaves: mix(leaves[:-1], leaves[-1], backend=draw.backend),
        lambda *leaves: mix(leaves[:-1], leaves[-1], backend="reference"),
        [*xs, weights],
        lambda largest: tolerance(promoted, maps, max(largest, total)),
        gradient_bound,
    )


def _top(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0


def fuzz_norm_act_mix(draw: Draw) -> None:
    groups = draw.random.randint(1, 4)
    channels = groups * draw.random.randint(1, 9 if draw.chance(0.2) else 4)
    maps = draw.random.randint(1, 4)
    batch, height, width = draw.random.randint(0 if draw.chance(0.03) else 1, 3), draw.size(40), draw.size(40)
    if not height or not width:
        batch, height, width = 0, max(height, 1), max(width, 1)  # the mean over no pixels has no value
    shape = _capped([batch, channels, height, width], 20000) if channels < 200 else [batch, channels, height, width]
    shape[1] = channels
    dtype, shift = draw.choice(DTYPES), draw.choice((0.0, 0.0, 3.0, 30.0))
    normalized = [draw.chance(0.7) for _ in range(maps)]
    overwrite = draw.chance(0.3)
    draw.note(shape=shape, maps=maps, groups=groups, dtype=dtype, shift=shift, normalized=normalized, over=overwrite)
    xs = [draw.laid_out((draw.normal(*shape) + shift).to(dtype), expandable=draw.chance(0.2)) for _ in range(maps)]
    gamma, beta = (1 + 0.3 * draw.normal(maps, channels)), 0.5 * draw.normal(maps, channels)
    weights = draw.normal(maps).to(_wide(dtype))
    gamma, beta = gamma.to(_wide(dtype)), beta.to(_wide(dtype))
    condition, certain = _margins(xs, gamma, beta, groups, normalized)
    elements = max(math.prod(shape), 1)
    # A weight's gradient adds up terms of the size of the map, which may cancel.
    reach = max((_top(x) for x, norm in zip(xs, normalized, strict=True) if not norm), default=1.0)

    def call(leaves: Sequence[Tensor], **options: Any) -> Tensor:
        maps_ = [leaf * 1 for leaf in leaves[:-3]] if overwrite else list(leaves[:-3])  # a leaf may not be overwritten
        return norm_act_mix(maps_, *leaves[-3:], groups, normalized=normalized, **options)

    def exact(*leaves: Tensor) -> Tensor:
        # PyTorch's group norm loses digits to a large mean, in float64 too; taking it away first changes nothing else.
        centred = [_centred(x, groups) if norm else x for x, norm in zip(leaves[:-3], normalized, strict=True)]
        return call((*centred, *leaves[-3:]), backend="reference")

    compare(
        draw,
        lambda *leaves: call(leaves, overwrite_inputs=overwrite, backend=draw.backend),
        exact,
        [*xs, weights, gamma, beta],
        lambda largest: tolerance(dtype, elements // max(groups, 1), max(largest, 1.0) * condition),
        lambda d, largest, upstream: tolerance(
            d, elements, max(largest, _top(upstream) * max(reach, 1.0)) * condition**2
        ),
        certain,
    )


def _centred(x: Tensor, groups: int) -> Tensor:
    if not x.numel():
        return x
    grouped = x.reshape(x.shape[0], groups, -1)
    return (grouped - grouped.detach().mean(-1, keepdim=True)).reshape(x.shape)


def _margins(
    xs: list[Tensor], gamma: Tensor, beta: Tensor, groups: int, normalized: list[bool]
) -> tuple[float, Tensor | None]:
    """How much normalising magnifies a rounding, and where no rectifier is within a rounding of its kink."""
    if not xs[0].numel():
        return 1.0, None
    condition, certain = 1.0, torch.ones(xs[0].shape, dtype=torch.bool)
    for x, scale, bias, norm in zip(xs, gamma.double(), beta.double(), normalized, strict=True):
        if not norm:
            continue
        flat = x.double().reshape(x.shape[0], groups, -1)
        deviation = (flat.var(-1, unbiased=False) + 1e-5).rsqrt()
        condition = max(condition, float((flat.abs().amax(-1) * deviation).max()), float(deviation.max()))
        z = torch.group_norm(x.double(), groups, scale, bias, 1e-5)
        certain &= z.abs() > 64 * EPS32 * (1 + float(z.abs().max())) * condition
    return condition, certain


def fuzz_sigmoid_focal_loss(draw: Draw) -> None:
    shape = _capped(_shape(draw, most=4))
    if draw.chance(0.05):
        shape = []
    dtype = draw.choice(DTYPES)
    alpha = draw.choice((0.25, 0.25, -1, 0, 1, draw.random.random()))
    gamma = draw.choice((2.0, 2.0, 0.0, 0.5, 1, 1.5, 3, 5, 4 * draw.random.random()))
    reduction = draw.choice(("none", "none", "sum", "mean"))
    if reduction == "mean" and math.prod(shape) == 0:
        reduction = "sum"  # the mean of nothing is NaN on both sides
    scale, soft = draw.choice((0.1, 1.0, 4.0, 4.0, 30.0, 3000.0)), draw.chance(0.3)
    target_dtype = draw.choice(DTYPES) if draw.chance(0.1) else dtype
    promoted = torch.promote_types(dtype, target_dtype)
    if torch.float16 in (dtype, target_dtype):
        scale = min(scale, 100.0)  # a target's gradient is several times the logit, and must fit
    if reduction == "sum" and promoted == torch.float16:
        scale = min(scale, 4.0 if math.prod(shape) <= 1000 else 0.1)  # the sum must fit into float16
    draw.note(shape=shape, dtype=dtype, targets=target_dtype, alpha=alpha, gamma=gamma, reduction=reduction)
    draw.note(scale=scale, soft=soft)
    logits = draw.laid_out(draw.normal(*shape, scale=scale).to(dtype), expandable=True)
    targets = draw.uniform(*shape)
    targets = draw.laid_out((targets if soft else targets < 0.2).to(target_dtype), expandable=True)
    count = max(logits.numel(), 1)
    top = max(1.0, _top(logits))
    condition = 1 + gamma * min(top, 87.0)  # a power magnifies the rounding of its logarithm

    def bound(largest: float) -> float:
        return tolerance(promoted, 4, largest) + tolerance(_wide(promoted), 1, largest * condition) + VANISHING

    compare(
        draw,
        lambda x, t: sigmoid_focal_loss(x, t, alpha, gamma, reduction, backend=draw.backend),
        lambda x, t: FOCAL.reference(x, t, alpha, gamma, reduction),
        [logits, targets],
        bound,
        # The gradient of a target is of the size of the logits, and is rounded to 16 bits where those are.
        lambda d, largest, upstream: (
            tolerance(d, count, max(largest, _top(upstream) * (top if largest else 0.0))) + bound(largest)
        ),
    )
