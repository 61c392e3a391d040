"""``norm_act_mix``: group norm, ReLU and weighted sum of feature maps in one op."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nasdet import _dispatch
from nasdet._cases import Case, Inputs
from nasdet._checks import plain_int
from nasdet._library import LIBRARY
from nasdet.ops._checks import checked_maps, checked_number, checked_parameter
from nasdet.ops._dilation import empty_map, holds_data, in_layout_of


def norm_act_mix(
    xs: Sequence[Tensor],
    weights: Tensor,
    gn_weight: Tensor,
    gn_bias: Tensor,
    num_groups: int,
    *,
    eps: float = 1e-5,
    normalized: Sequence[bool] | None = None,
    overwrite_inputs: bool = False,
    backend: str | None = None,
) -> Tensor:
    """``y = sum_p weights[p] * relu(GN_p(xs[p]))``: the mixed node of RepShare (Zhong et al. 2020, Eq. 2) in one op.

    ``GN_p`` is group normalisation (Wu & He 2018) with biased variance over the group's channels and pixels. With one
    map and weight 1 it is a fused GroupNorm + ReLU. Neither the normalised nor the rectified maps are stored for
    backward.

    Args:
        xs: ``P >= 1`` maps ``[N, C, H, W]`` of one shape on one device; float32, float64, float16 or bfloat16 (mixed
            dtypes are promoted to the widest). NCHW and channels_last are native; other layouts are copied.
        weights: ``[P]``.
        gn_weight, gn_bias: ``[P, C]``, one row per map; the rows of maps that are not normalised are ignored.
        num_groups: groups of every ``GN_p``; divides ``C``.
        eps: added to the variance; finite, at least 0.
        normalized: per map, False to leave out ``GN_p`` (``relu(xs[p])``); all True when None.
        overwrite_inputs: let backward write each map's gradient over the map, which saves ``P`` maps of memory. For
            maps that nothing else reads afterwards, as fresh convolution outputs; autograd raises if something does.
            Ignored under ``torch.compile``, by the reference, and unless every map needs a gradient, is dense (NCHW or
            channels_last) and lies in memory of its own: not in another map's, the incoming gradient's or a leaf's.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"``; the best that can run when None.

    Returns:
        ``y``, shape, dtype and memory format of ``xs[0]``. Parameters and sums are used in float32 (float64).

    Raises:
        TypeError, ValueError: "name must be X, got Y".
    """
    xs = checked_maps(xs)
    if xs[0].dim() != 4:
        raise ValueError(f"xs must hold maps of shape (N, C, H, W), got {tuple(xs[0].shape)}")
    maps, channels = len(xs), xs[0].shape[1]
    groups = plain_int(num_groups)
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1 or channels % groups:
        raise ValueError(f"num_groups must be a positive divisor of the {channels} channels, got {num_groups}")
    weights = checked_parameter("weights", weights, (maps,), xs[0])
    gn_weight = checked_parameter("gn_weight", gn_weight, (maps, channels), xs[0])
    gn_bias = checked_parameter("gn_bias", gn_bias, (maps, channels), xs[0])
    eps = checked_number("eps", eps)
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be finite and at least 0, got {eps}")
    flags = _checked_flags(normalized, maps)
    overwrite = overwrite_inputs and not torch.compiler.is_compiling()
    arguments = (xs, weights, gn_weight, gn_bias, groups, eps, flags, overwrite)
    return _dispatch.choose("norm_act_mix", backend, *arguments).run(*arguments)


def _checked_flags(normalized: Sequence[bool] | None, maps: int) -> list[int]:
    if normalized is None:
        return [1] * maps
    if isinstance(normalized, (str, Tensor)) or not isinstance(normalized, Sequence):
        raise TypeError(f"normalized must be a sequence of bools or None, got {normalized!r}")
    if len(normalized) != maps:
        raise ValueError(f"normalized must have {maps} entries, got {len(normalized)}")
    return [int(bool(flag)) for flag in normalized]


def _reference(
    xs: list[Tensor],
    weights: Tensor,
    gn_weight: Tensor,
    gn_bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    normalized: Sequence[int] | None = None,
    overwrite_inputs: bool = False,
) -> Tensor:
    total = None
    for p, x in enumerate(xs):
        z = x.to(weights.dtype)
        if normalized is None or normalized[p]:
            z = torch.group_norm(z, num_groups, gn_weight[p], gn_bias[p], eps)
        term = weights[p] * torch.relu(z)
        total = term if total is None else total + term
    assert total is not None
    return in_layout_of(total.to(xs[0].dtype), xs[0])


def _fake(
    xs: Sequence[Tensor],
    weights: Tensor,
    gn_weight: Tensor,
    gn_bias: Tensor,
    num_groups: int,
    eps: float,
    normalized: Sequence[int],
    overwrite_inputs: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    statistics = (len(xs), xs[0].shape[0], num_groups)
    return empty_map(xs[0], xs[0].shape), weights.new_empty(statistics), weights.new_empty(statistics)


def _fake_backward(
    grad: Tensor, xs: Sequence[Tensor], weights: Tensor, gn_weight: Tensor, gn_bias: Tensor, *_: Any
) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    dxs = [empty_map(xs[0], xs[0].shape) for _ in xs]
    return dxs, *_fake_backward_inplace(grad, xs, weights, gn_weight, gn_bias)


def _fake_backward_inplace(
    grad: Tensor, xs: Sequence[Tensor], weights: Tensor, gn_weight: Tensor, gn_bias: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return weights.new_empty(weights.shape), gn_weight.new_empty(gn_weight.shape), gn_bias.new_empty(gn_bias.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    xs, weights, gn_weight, gn_bias, ctx.num_groups, _, ctx.normalized, overwrite = inputs
    ctx.overwrite = overwrite and all(x.requires_grad and not _is_of_leaf(x) for x in xs)
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(weights, gn_weight, gn_bias, mean, rstd, *xs)


def _is_of_leaf(x: Tensor) -> bool:
    """Whether ``x`` is a leaf with a gradient, such as a parameter, or a view of one."""
    owner = x if x._base is None else x._base
    return owner.is_leaf and owner.requires_grad


def _lie_apart(xs: Sequence[Tensor], grad: Tensor) -> bool:
    """Whether the maps are dense and share no memory with one another nor with ``grad``; False while traced."""
    if not all(holds_data(t) for t in (grad, *xs)):
        return False
    if not all(x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last) for x in xs):
        return False
    storage = grad.untyped_storage()
    spans = [(x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()) for x in xs]
    spans = sorted([*spans, (storage.data_ptr(), storage.data_ptr() + storage.nbytes())])
    return all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def _no_double_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("norm_act_mix has no second derivative in this backend; use backend='reference'")


_INPUTS = "Tensor weights, Tensor gn_weight, Tensor gn_bias"
_STATISTICS = "Tensor mean, Tensor rstd, int num_groups, int[] normalized"


def _define(suffix: str) -> None:
    """One op and its backward per launcher: ``nasdet::norm_act_mix`` (C++) and ``nasdet::norm_act_mix_triton``."""
    forward, backward = f"norm_act_mix{suffix}", f"norm_act_mix_backward{suffix}"
    LIBRARY.define(
        f"{forward}(Tensor[] xs, {_INPUTS}, int num_groups, float eps, int[] normalized, bool overwrite_inputs)"
        " -> (Tensor, Tensor, Tensor)"
    )
    LIBRARY.define(
        f"{backward}(Tensor grad, Tensor[] xs, {_INPUTS}, {_STATISTICS}) -> (Tensor[], Tensor, Tensor, Tensor)"
    )
    LIBRARY.define(f"{backward}_(Tensor grad, Tensor(a!)[] xs, {_INPUTS}, {_STATISTICS}) -> (Tensor, Tensor, Tensor)")
    torch.library.register_fake(f"nasdet::{forward}", _fake)
    torch.library.register_fake(f"nasdet::{backward}", _fake_backward)
    torch.library.register_fake(f"nasdet::{backward}_", _fake_backward_inplace)

    def backward_formula(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        weights, gn_weight, gn_bias, mean, rstd, *xs = ctx.saved_tensors
        arguments = (grad, xs, weights, gn_weight, gn_bias, mean, rstd, ctx.num_groups, ctx.normalized)
        if ctx.overwrite and not torch.is_grad_enabled() and _lie_apart(xs, grad):
            with torch.no_grad():
                targets = [x.detach() for x in xs]
                parameters = getattr(torch.ops.nasdet, f"{backward}_")(arguments[0], targets, *arguments[2:])
            # Whoever else saved these maps must not use them unnoticed: this makes autograd raise.
            torch.autograd.graph.increment_version(xs)
            dxs = targets
        else:
            dxs, *parameters = getattr(torch.ops.nasdet, backward)(*arguments)
        return (dxs, *parameters, None, None, None, None)

    torch.library.register_autograd(f"nasdet::{forward}", backward_formula, setup_context=_setup_context)
    torch.library.register_autograd(f"nasdet::{backward}", _no_double_backward)


_define("")
_define("_triton")


def _run_compiled(*arguments: Any) -> Tensor:
    return torch.ops.nasdet.norm_act_mix(*arguments)[0]


def _run_triton(*arguments: Any) -> Tensor:
    from nasdet.ops._triton import ensure_registered

    ensure_registered("norm_act_mix")
    return torch.ops.nasdet.norm_act_mix_triton(*arguments)[0]


def _first_map(xs: list[Tensor], *_: Any) -> Tensor:
    return xs[0]


def _case(
    name: str,
    maps: int,
    shape: tuple[int, int, int, int],
    groups: int,
    layouts: Sequence[str] = ("contiguous",),
    normalized: Sequence[bool] | None = None,
    shift: float = 0.0,
    transposed: bool = False,
    large: bool = False,
) -> Case:
    def make(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        xs = [inputs.randn(*shape, layout=layouts[p % len(layouts)], shift=shift) for p in range(maps)]
        gn_weight, gn_bias = inputs.affine(maps, shape[1])
        if transposed:
            gn_weight, gn_bias = gn_weight.t().contiguous().t(), gn_bias.t().contiguous().t()
        return (xs, inputs.weights(maps), gn_weight, gn_bias, groups), {"normalized": normalized}

    return Case(name, make, large=large, condition=max(1.0, abs(shift)))


_REPSHARE = (False, False, True, True, True, True) * 2  # H(p1), H(p2), p3 and the dilated maps, both streams

OP = _dispatch.register(
    _dispatch.Op(
        name="norm_act_mix",
        call=norm_act_mix,
        reference=_reference,
        backends=(
            _dispatch.compiled_backend("cpp", "norm_act_mix", _run_compiled, _first_map),
            _dispatch.compiled_backend("cuda", "norm_act_mix", _run_compiled, _first_map),
            _dispatch.triton_backend(_run_triton, _first_map),
            _dispatch.reference_backend(_reference),
        ),
        reduce_len=lambda xs, weights, gn_weight, gn_bias, groups: xs[0][0:1].numel() // groups,
        differentiable=(0, 1, 2, 3),
        cases=(
            _case("one-map", 1, (2, 32, 9, 7), 32),
            _case("repshare", 12, (2, 24, 7, 9), 8, normalized=_REPSHARE),
            _case("repshare-nhwc", 12, (2, 24, 7, 9), 8, layouts=("channels_last",), normalized=_REPSHARE),
            _case("one-group", 3, (1, 6, 5, 11), 1),
            _case("odd-channels-nhwc", 2, (2, 21, 6, 5), 3, layouts=("channels_last",)),
            _case("instance-norm", 2, (2, 10, 4, 17), 10, layouts=("contiguous", "channels_last")),
            _case("mixed-layouts", 3, (2, 16, 6, 5), 4, layouts=("channels_last", "sliced", "contiguous")),
            _case("large-mean", 2, (1, 8, 16, 16), 2, shift=50.0),
            _case("transposed-affine", 2, (1, 8, 4, 5), 2, transposed=True),
            _case("many-pixels-nhwc", 2, (1, 8, 40, 33), 4, layouts=("channels_last",)),
            _case("empty-batch", 2, (0, 8, 4, 4), 4),
            _case("fpn-p3", 12, (2, 96, 100, 152), 32, large=True),
            _case("fpn-p4", 12, (2, 256, 50, 76), 32, large=True),
            _case("fpn-p3-nhwc", 12, (2, 96, 100, 152), 32, layouts=("channels_last",), large=True),
        ),
    )
)
