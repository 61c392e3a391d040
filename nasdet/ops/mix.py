"""``mix``: the weighted sum of feature maps, read once each and written once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nasdet import _dispatch
from nasdet._cases import Case, Inputs
from nasdet._library import LIBRARY
from nasdet.ops._checks import checked_maps, checked_parameter


def mix(xs: Sequence[Tensor], weights: Tensor, *, backend: str | None = None) -> Tensor:
    """Weighted sum of feature maps, ``y = sum_p weights[p] * xs[p]`` (FAD, Zhong et al. 2020, Eq. 2; DARTS nodes).

    Args:
        xs: ``P >= 1`` tensors of one shape (any rank), on one device; float32, float64, float16 or bfloat16. Mixed
            dtypes are promoted to the widest, also under autocast. No stacking: maps stay where they are.
        weights: ``[P]``, any of these dtypes; used in float32 (float64 with float64 maps).
        backend: ``"cpp"``, ``"cuda"``, ``"triton"`` or ``"reference"``; the best that can run when None.

    Returns:
        ``y``, shape and dtype of the (promoted) maps, layout of ``xs[0]``; sums are kept in float32 (float64).

    Gradients for every map and for ``weights`` come from one pass over the maps. A map whose weight is exactly 0 is not
    read by the compiled backends, so a NaN in it does not reach ``y``.

    Raises:
        TypeError: ``xs`` is no sequence of floating-point tensors. ValueError: shapes or devices differ.
    """
    xs = checked_maps(xs)
    weights = checked_parameter("weights", weights, (len(xs),), xs[0])
    return _dispatch.choose("mix", backend, xs, weights).run(xs, weights)


def _reference(xs: list[Tensor], weights: Tensor) -> Tensor:
    total = weights[0] * xs[0].to(weights.dtype)
    for weight, x in zip(weights[1:], xs[1:], strict=True):
        total = total + weight * x.to(weights.dtype)
    return total.to(xs[0].dtype)


def _fake(xs: Sequence[Tensor], weights: Tensor) -> Tensor:
    return torch.empty_like(xs[0])


def _fake_backward(
    grad: Tensor, xs: Sequence[Tensor], weights: Tensor, need_xs: bool, need_weights: bool
) -> tuple[list[Tensor], Tensor]:
    dxs = [torch.empty_like(xs[0]) for _ in xs] if need_xs else []
    return dxs, weights.new_empty(weights.shape[0] if need_weights else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    xs, weights = inputs
    ctx.save_for_backward(weights, *xs)


def _no_double_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "nasdet::mix_backward is not differentiable: mix has no second derivative; use backend='reference'"
    )


def _define(suffix: str) -> None:
    """One op and its backward per launcher: ``nasdet::mix`` (C++ on CPU and CUDA) and ``nasdet::mix_triton``."""
    forward, backward = f"mix{suffix}", f"mix_backward{suffix}"
    LIBRARY.define(f"{forward}(Tensor[] xs, Tensor weights) -> Tensor")
    LIBRARY.define(
        f"{backward}(Tensor grad, Tensor[] xs, Tensor weights, bool need_xs, bool need_weights) -> (Tensor[], Tensor)"
    )
    torch.library.register_fake(f"nasdet::{forward}", _fake)
    torch.library.register_fake(f"nasdet::{backward}", _fake_backward)

    def backward_formula(ctx: Any, grad: Tensor) -> tuple[list[Tensor] | list[None], Tensor | None]:
        weights, *xs = ctx.saved_tensors
        need_xs, need_weights = any(ctx.needs_input_grad[0]), ctx.needs_input_grad[1]
        dxs, dweights = getattr(torch.ops.nasdet, backward)(grad, xs, weights, need_xs, need_weights)
        return dxs if need_xs else [None] * len(xs), dweights if need_weights else None

    torch.library.register_autograd(f"nasdet::{forward}", backward_formula, setup_context=_setup_context)
    torch.library.register_autograd(f"nasdet::{backward}", _no_double_backward)


_define("")
_define("_triton")


def _run_compiled(xs: list[Tensor], weights: Tensor) -> Tensor:
    return torch.ops.nasdet.mix(xs, weights)


def _run_triton(xs: list[Tensor], weights: Tensor) -> Tensor:
    from nasdet.ops._triton import ensure_registered

    ensure_registered("mix")
    return torch.ops.nasdet.mix_triton(xs, weights)


def _first_map(xs: list[Tensor], *_: Any) -> Tensor:
    return xs[0]


def _case(name: str, maps: int, *shape: int, layouts: Sequence[str] = ("contiguous",), large: bool = False) -> Case:
    def make(inputs: Inputs) -> tuple[tuple[list[Tensor], Tensor], dict[str, Any]]:
        xs = [inputs.randn(*shape, layout=layouts[p % len(layouts)]) for p in range(maps)]
        return (xs, inputs.weights(maps)), {}

    return Case(name, make, large=large)


def _zero_weight(inputs: Inputs) -> tuple[tuple[list[Tensor], Tensor], dict[str, Any]]:
    weights = inputs.weights(4)
    weights[1] = 0
    return ([inputs.randn(2, 8, 5, 7) for _ in range(4)], weights), {}


OP = _dispatch.register(
    _dispatch.Op(
        name="mix",
        call=mix,
        reference=_reference,
        backends=(
            _dispatch.compiled_backend("cpp", "mix", _run_compiled, _first_map),
            _dispatch.compiled_backend("cuda", "mix", _run_compiled, _first_map),
            _dispatch.triton_backend(_run_triton, _first_map),
            _dispatch.reference_backend(_reference),
        ),
        reduce_len=lambda xs, *_: len(xs),
        differentiable=(0, 1),
        cases=(
            _case("one-map", 1, 2, 3, 4, 5),
            _case("twelve-maps", 12, 2, 32, 13, 19),
            _case("odd-tail", 3, 1, 1, 1, 131),
            _case("channels-last", 5, 2, 24, 7, 9, layouts=("channels_last",)),
            _case("mixed-layouts", 4, 2, 16, 6, 5, layouts=("contiguous", "channels_last", "sliced", "transposed")),
            _case("expanded", 2, 3, 8, 4, 4, layouts=("expanded", "contiguous")),
            _case("vector", 3, 257),
            _case("empty", 3, 0, 8, 4, 4),
            Case("zero-weight", _zero_weight),
            _case("fpn-p3", 12, 2, 96, 100, 152, large=True),
            _case("fpn-p4", 12, 2, 256, 50, 76, large=True),
            _case("fpn-p3-nhwc", 12, 2, 96, 100, 152, layouts=("channels_last",), large=True),
        ),
    )
)
