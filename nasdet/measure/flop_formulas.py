"""What the library's convolutions cost, for torch's counter of floating-point operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

import nasdet.ops  # noqa: F401  (defines the raw ops)

Shape = Sequence[int]


def register_flop_formulas() -> None:
    """Let ``torch.utils.flop_counter.FlopCounterMode`` count the library's convolutions, and their gradients.

    It knows only torch's own ops, and takes others for free: an accelerated model, or one of this library's modules,
    would count too little. The numbers are those of the convolutions that an op stands for, one for each dilation,
    whichever way they are computed: twice the multiply-accumulates of the output, and as many for the
    gradient of the map and for that of the weight. To be called before the counter is made; any number of times.
    Not done by ``import nasdet``, as the counter's module imports triton.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, operands in (("mixed_dilation_conv2d", 3), ("grouped_dilation_conv2d", 2), ("depthwise_conv2d", 2)):
        for suffix in ("", "_triton"):
            forward = getattr(torch.ops.nasdet, name + suffix, None)
            if forward is None or forward in flop_registry:
                continue
            register_flop_formula(forward)(_forward)
            register_flop_formula(getattr(torch.ops.nasdet, f"{name}_backward{suffix}"))(_backward(operands))


def _convolution(y: Shape, weight: Shape) -> int:
    """Of a map ``(N, Cout, H, W)`` by kernels ``([dilations,] Cout, Cin / groups, k, k)``."""
    dilations = math.prod(weight[:-4])
    return 2 * dilations * math.prod(y) * math.prod(weight[-3:])


def _forward(x: Shape, weight: Shape, *options: Any, out_shape: Shape) -> int:
    return _convolution(out_shape, weight)


def _backward(operands: int) -> Callable[..., int]:
    """The last arguments say which operands' gradients are wanted; that of the mixture is made from the weight's."""

    def formula(grad: Shape, x: Shape, weight: Shape, *options: Any, out_shape: Any) -> int:
        need_x, *need_weight = options[-operands:]
        return (bool(need_x) + any(need_weight)) * _convolution(grad, weight)

    return formula
