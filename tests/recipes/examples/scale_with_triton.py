"""``scale`` once more, with a Triton backend: what a backend adds to an operator's file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nasdet import _dispatch
from nasdet._cases import Case
from nasdet._library import LIBRARY
from nasdet.ops._checks import checked_maps, checked_parameter
from nasdet.ops._triton import ensure_registered


def scale(x: Tensor, factor: Tensor, *, backend: str | None = None) -> Tensor:
    """A map times one number, ``y = factor[0] * x``.

    Args:
        x: any shape; float32, float64, float16 or bfloat16.
        factor: ``[1]``, used in float32 (float64 with a float64 map).
        backend: the best that can run when None.

    Returns:
        ``y``, shape and dtype of ``x``.

    Raises:
        TypeError: no floating-point tensor. ValueError: shape or device of ``factor``.
    """
    (x,) = checked_maps([x])
    factor = checked_parameter("factor", factor, (1,), x)
    return _dispatch.choose("scale", backend, x, factor).run(x, factor)


def _reference(x: Tensor, factor: Tensor) -> Tensor:
    return (factor * x.to(factor.dtype)).to(x.dtype)


LIBRARY.define("scale_triton(Tensor x, Tensor factor) -> Tensor")
LIBRARY.define("scale_backward_triton(Tensor grad, Tensor x, Tensor factor) -> (Tensor, Tensor)")


def _fake(x: Tensor, factor: Tensor) -> Tensor:
    return torch.empty_like(x)


def _fake_backward(grad: Tensor, x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(factor)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return torch.ops.nasdet.scale_backward_triton(grad, *ctx.saved_tensors)


torch.library.register_fake("nasdet::scale_triton", _fake)
torch.library.register_fake("nasdet::scale_backward_triton", _fake_backward)
torch.library.register_autograd("nasdet::scale_triton", _backward, setup_context=_save)


def _run_triton(x: Tensor, factor: Tensor) -> Tensor:
    ensure_registered("scale")
    return torch.ops.nasdet.scale_triton(x, factor)


def _map(x: Tensor, factor: Tensor) -> Tensor:
    return x


def _case(name: str, *shape: int) -> Case:
    return Case(name, lambda inputs: ((inputs.randn(*shape), inputs.weights(2)[:1]), {}))


def _one_term(x: Tensor, factor: Tensor) -> int:
    return 1


OP = _dispatch.register(
    _dispatch.Op(
        name="scale",
        call=scale,
        reference=_reference,
        backends=(_dispatch.triton_backend(_run_triton, _map), _dispatch.reference_backend(_reference)),
        reduce_len=_one_term,
        differentiable=(0, 1),
        cases=(_case("map", 2, 3, 4, 5), _case("empty", 0, 3)),
    )
)
