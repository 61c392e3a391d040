"""``scale``: a feature map times a number. The worked example of a new operator."""

from __future__ import annotations

from torch import Tensor

from nasdet import _dispatch
from nasdet._cases import Case
from nasdet.ops._checks import checked_maps, checked_parameter


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


def _case(name: str, *shape: int) -> Case:
    return Case(name, lambda inputs: ((inputs.randn(*shape), inputs.weights(2)[:1]), {}))


def _one_term(x: Tensor, factor: Tensor) -> int:
    return 1


OP = _dispatch.register(
    _dispatch.Op(
        name="scale",
        call=scale,
        reference=_reference,
        backends=(_dispatch.reference_backend(_reference),),
        reduce_len=_one_term,
        differentiable=(0, 1),
        cases=(_case("map", 2, 3, 4, 5), _case("empty", 0, 3)),
    )
)
