"""``scale`` in Triton."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import on_device_of

BLOCK = 256


@triton.jit
def scale_kernel(
    x,  # [count]
    factor,  # [1] float32
    out,  # [count]
    count,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < count, other=0.0).to(tl.float32) * tl.load(factor)
    tl.store(out + at, value.to(out.dtype.element_ty), mask=at < count)


def forward(x: Tensor, factor: Tensor) -> Tensor:
    """``factor[0] * x``."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel():
        with on_device_of(x):
            scale_kernel[(triton.cdiv(x.numel(), BLOCK),)](x, factor, out, x.numel(), BLOCK=BLOCK)
    return out


def backward(grad: Tensor, x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the map and of the factor."""
    return forward(grad, factor), (grad.to(factor.dtype) * x.to(factor.dtype)).sum().reshape(1)
