"""The arguments of an op's benchmark case, and calls of a contestant on them: inference, training, all results."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nasdet._cases import Case, Inputs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TF32 = "tf32"  # float32 maps, of which a CUDA device's products may drop bits
PHASES = ("forward", "forward+backward")
FORWARD, TRAINING = PHASES

Call = Callable[..., Any]


class _Source(torch.autograd.Function):
    """A map as the layer before would hand it over: fresh, part of the graph, its gradient used up by its producer.

    It returns a standing buffer and drops the gradient, so that what is measured is the op's own cost, not a
    convolution's, and no gradient outlives its use as those of leaves do.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, buffer: Tensor, sink: list[Tensor | None] | None, index: int) -> Tensor:
        ctx.sink, ctx.index = sink, index
        return buffer

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[None, None, None, None]:
        if ctx.sink is not None:
            ctx.sink[ctx.index] = grads[0].clone()
        return None, None, None, None


class Setting:
    """The arguments of one case. Those at the positions ``differentiable`` get gradients: a list of maps as the output
    of a layer before, a tensor as a parameter.
    """

    def __init__(self, case: Case, dtype: str, device: str, differentiable: Sequence[int]) -> None:
        self.case, self.dtype = case.id, torch.float32 if dtype == TF32 else DTYPES[dtype]
        arguments, self.options = case.make(Inputs(self.dtype, device))
        self.differentiable = tuple(differentiable)
        self.pristine = [list(a) if isinstance(a, (list, tuple)) else a for a in arguments]
        self.anchor = torch.ones((), device=device, requires_grad=True)
        self._copy_arguments()

    def _copy_arguments(self) -> None:
        self.arguments = [_each(a, torch.Tensor.clone) for a in self.pristine]
        self.parameters = [
            self.arguments[p].requires_grad_() for p in self.differentiable if isinstance(self.arguments[p], Tensor)
        ]
        self._grads: dict[Any, Tensor] = {}

    @property
    def maps(self) -> list[Tensor]:
        """The maps that get gradients."""
        return [x for p in self.differentiable if isinstance(self.arguments[p], list) for x in self.arguments[p]]

    def in_float64(self) -> Setting:
        """The same values, exactly, for the reference."""
        twin = copy.copy(self)
        twin.pristine = [_each(a, lambda x: x.double() if x.is_floating_point() else x) for a in self.pristine]
        twin._copy_arguments()
        return twin

    def restore(self) -> None:
        """Give every tensor its first values again: a contestant may have overwritten them."""
        with torch.no_grad():
            for argument, value in zip(self.arguments, self.pristine, strict=True):
                for x, first in zip(_tensors(argument), _tensors(value), strict=True):
                    x.copy_(first)

    def forward(self, call: Call) -> Any:
        """Inference: no graph."""
        with torch.no_grad():
            return call(*self.arguments, **self.options)

    def graph(self, call: Call, sink: list[Tensor | None] | None = None) -> Tensor:
        """The forward pass of training, its graph kept."""
        arguments, index = list(self.arguments), 0
        for p in self.differentiable:
            if isinstance(arguments[p], list):
                arguments[p] = [_Source.apply(self.anchor, x, sink, index + i) for i, x in enumerate(arguments[p])]
                index += len(arguments[p])
        y: Tensor = call(*arguments, **self.options)
        return y

    def train(self, call: Call, sink: list[Tensor | None] | None = None) -> Tensor:
        """Forward and backward; the parameters' gradients are left in ``.grad``."""
        for parameter in self.parameters:
            parameter.grad = None
        y = self.graph(call, sink)
        y.backward(self._incoming(y))
        return y.detach()

    def _incoming(self, y: Tensor) -> Tensor:
        """The gradient of ``y``: the same values for everyone, in the layout of ``y``, as the next layer returns it."""
        key = (y.shape, y.stride())
        if key not in self._grads:
            values = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
            self._grads[key] = torch.empty_like(y, requires_grad=False).copy_(values.to(self.dtype))
        return self._grads[key]

    def results(self, call: Call, phase: str) -> list[Tensor]:
        """All that a call computes, to compare: the outputs, and in training every gradient."""
        self.restore()
        if phase == FORWARD:
            return _tensors(self.forward(call))
        sink: list[Tensor | None] = [None] * len(self.maps)
        y = self.train(call, sink)
        grads = [*sink, *(parameter.grad for parameter in self.parameters)]
        missing = [index for index, grad in enumerate(grads) if grad is None]
        assert not missing, f"no gradient for arguments {missing}"
        return [y, *(grad.clone() for grad in grads if grad is not None)]


def _tensors(value: Any) -> list[Tensor]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [x for x in values if isinstance(x, Tensor)]


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with its tensors changed: itself, or those of a list."""
    if isinstance(value, list):
        return [change(x) if isinstance(x, Tensor) else x for x in value]
    return change(value) if isinstance(value, Tensor) else value
