"""``sigmoid_focal_loss``: the loss of dense detectors in one pass over the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nasdet import _dispatch
from nasdet._cases import Case, Inputs
from nasdet._library import LIBRARY
from nasdet.ops._checks import FLOATS, checked_number

REDUCTIONS = ("none", "mean", "sum")


def sigmoid_focal_loss(
    inputs: Tensor,
    targets: Tensor,
    alpha: float = 0.25,
    gamma: float = 2.0,
    reduction: str = "none",
    *,
    backend: str | None = None,
) -> Tensor:
    """Focal loss ``-alpha_t (1 - p_t)^gamma log(p_t)`` of independent classes (Lin et al. 2017, Eq. 5).

    With ``p = sigmoid(x)`` and a target ``t``, the three factors are ``alpha_t = alpha t + (1 - alpha) (1 - t)``,
    ``p_t = p t + (1 - p) (1 - t)`` and the binary cross-entropy of ``x`` and ``t``: torchvision's definition, also for
    soft targets. They are computed from ``exp(-|x|)``, so nothing overflows or cancels at any finite logit, and the
    gradients stay finite as ``p_t -> 1`` also for ``gamma < 1``, where plain automatic differentiation gives NaN.

    Args:
        inputs: logits of any shape; float32, float64, float16 or bfloat16.
        targets: 0 for the negative and 1 for the positive class, or values between, which are not checked; the shape
            of ``inputs``, a floating-point dtype, the same device. Mixed dtypes are promoted to the widest; under
            autocast both are taken in float32.
        alpha: weight of the positive class in [0, 1], or -1 for no weights.
        gamma: focusing exponent, at least 0; 2 is fastest.
        reduction: ``"none"``, ``"mean"`` (over all elements; NaN if there are none) or ``"sum"``.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"``; the best that can run when None.

    Returns:
        The losses, in the shape, layout and (promoted) dtype of ``inputs``, or a scalar of that dtype. Arithmetic is in
        float32 (float64 for float64); sums are kept in float64 and depend neither on threads nor on the run.

    Only logits and targets are kept for backward, which has gradients for both, in one more pass. There is no second
    derivative but in the reference.

    Raises:
        TypeError: ``inputs`` or ``targets`` is no floating-point tensor, or ``alpha`` or ``gamma`` no number.
        ValueError: shapes or devices differ, or ``alpha``, ``gamma`` or ``reduction`` is none of the above.
    """
    inputs, targets = _checked(inputs, targets)
    alpha, gamma = checked_number("alpha", alpha), checked_number("gamma", gamma)
    if not (0 <= alpha <= 1 or alpha == -1):
        raise ValueError(f"alpha must be in [0, 1], or -1 for no weights, got {alpha}")
    if not 0 <= gamma < float("inf"):
        raise ValueError(f"gamma must be finite and at least 0, got {gamma}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    arguments = (inputs, targets, alpha, gamma, reduction)
    return _dispatch.choose("sigmoid_focal_loss", backend, *arguments).run(*arguments)


def _checked(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The two tensors in one dtype."""
    for name, value in (("inputs", inputs), ("targets", targets)):
        if not isinstance(value, Tensor) or value.dtype not in FLOATS:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a float32, float64, float16 or bfloat16 tensor, got {got}")
    if targets.shape != inputs.shape:
        raise ValueError(f"targets must have shape {tuple(inputs.shape)}, got {tuple(targets.shape)}")
    if targets.device != inputs.device:
        raise ValueError(f"targets must be on {inputs.device}, got {targets.device}")
    kind = inputs.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
        widest = torch.promote_types(torch.promote_types(inputs.dtype, targets.dtype), torch.float32)
    elif inputs.dtype == targets.dtype:
        return inputs, targets
    else:
        widest = torch.promote_types(inputs.dtype, targets.dtype)
    return inputs.to(widest), targets.to(widest)


def _reference(inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: str = "none") -> Tensor:
    arithmetic = torch.float64 if inputs.dtype == torch.float64 else torch.float32
    x, t = inputs.to(arithmetic), targets.to(arithmetic)
    # In z = |x| and the target u of the class that x speaks for, all terms have one sign; e is kept from reaching 0.
    negative = x < 0
    z, u = torch.where(negative, -x, x), torch.where(negative, 1 - t, t)
    bounded = z.clamp(max=700.0 if arithmetic == torch.float64 else 80.0)
    e = torch.exp(-bounded)
    unsure = 1 - u + u * e  # (1 - p_t) (1 + e)
    entropy = (1 - u) * z + torch.log1p(e)
    if gamma == 2:
        loss = (unsure / (1 + e)).square() * entropy
    else:  # where u is 1 the logarithm is -z, also beyond the bound
        log_unsure = unsure.log() - torch.where(u == 1, z - bounded, 0)
        loss = torch.exp(gamma * (log_unsure - torch.log1p(e))) * entropy
    if alpha >= 0:
        loss = (alpha * t + (1 - alpha) * (1 - t)) * loss
    if reduction != "none":
        loss = loss.sum() if reduction == "sum" else loss.mean()
    return loss.to(inputs.dtype)


def _arithmetic(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _fake(logits: Tensor, targets: Tensor, alpha: float, gamma: float, reduce_sum: bool) -> Tensor:
    return logits.new_empty((), dtype=_arithmetic(logits)) if reduce_sum else torch.empty_like(logits)


def _fake_backward(
    grad: Tensor,
    logits: Tensor,
    targets: Tensor,
    alpha: float,
    gamma: float,
    reduce_sum: bool,
    need_logits: bool,
    need_targets: bool,
) -> tuple[Tensor, Tensor]:
    dlogits, dtargets = (
        torch.empty_like(logits) if need else logits.new_empty(0) for need in (need_logits, need_targets)
    )
    return dlogits, dtargets


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, targets, *ctx.options = inputs
    ctx.save_for_backward(logits, targets)


def _no_double_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("sigmoid_focal_loss has no second derivative in this backend; use backend='reference'")


def _define(suffix: str) -> None:
    """One op and its backward per launcher: ``nasdet::sigmoid_focal_loss`` (C++) and the same with ``_triton``.

    With ``reduce_sum`` the result is a scalar in float32 (float64 for float64 logits), whatever the logits' dtype.
    """
    forward, backward = f"sigmoid_focal_loss{suffix}", f"sigmoid_focal_loss_backward{suffix}"
    options = "Tensor logits, Tensor targets, float alpha, float gamma, bool reduce_sum"
    LIBRARY.define(f"{forward}({options}) -> Tensor")
    LIBRARY.define(f"{backward}(Tensor grad, {options}, bool need_logits, bool need_targets) -> (Tensor, Tensor)")
    torch.library.register_fake(f"nasdet::{forward}", _fake)
    torch.library.register_fake(f"nasdet::{backward}", _fake_backward)

    def backward_formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        need_logits, need_targets, *_ = ctx.needs_input_grad
        raw = getattr(torch.ops.nasdet, backward)
        dlogits, dtargets = raw(grad, *ctx.saved_tensors, *ctx.options, need_logits, need_targets)
        return dlogits if need_logits else None, dtargets if need_targets else None, None, None, None

    torch.library.register_autograd(f"nasdet::{forward}", backward_formula, setup_context=_setup_context)
    torch.library.register_autograd(f"nasdet::{backward}", _no_double_backward)


_define("")
_define("_triton")


def _reduced(op: Any, logits: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: str) -> Tensor:
    if reduction == "none":
        return op(logits, targets, alpha, gamma, False)
    total = op(logits, targets, alpha, gamma, True)
    if reduction == "mean":
        total = total / logits.numel()
    return total if total.dtype == logits.dtype else total.to(logits.dtype)


def _run_compiled(*arguments: Any) -> Tensor:
    return _reduced(torch.ops.nasdet.sigmoid_focal_loss, *arguments)


def _run_triton(*arguments: Any) -> Tensor:
    from nasdet.ops._triton import ensure_registered

    ensure_registered("sigmoid_focal_loss")
    return _reduced(torch.ops.nasdet.sigmoid_focal_loss_triton, *arguments)


def _logits(logits: Tensor, *_: Any) -> Tensor:
    return logits


def _case(
    name: str,
    *shape: int,
    options: tuple[float, float, str] = (0.25, 2.0, "none"),
    layouts: Sequence[str] = ("contiguous", "contiguous"),
    soft: bool = False,
    scale: float = 3.0,
    large: bool = False,
) -> Case:
    def make(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        logits = inputs.randn(*shape, layout=layouts[0], scale=scale)
        targets = inputs.randn(*shape, layout=layouts[1])
        targets.copy_(targets.sigmoid() if soft else targets > 1.2)
        return (logits, targets, *options), {}

    return Case(name, make, large=large)


OP = _dispatch.register(
    _dispatch.Op(
        name="sigmoid_focal_loss",
        call=sigmoid_focal_loss,
        reference=_reference,
        backends=(
            _dispatch.compiled_backend("cpp", "sigmoid_focal_loss", _run_compiled, _logits),
            _dispatch.triton_backend(_run_triton, _logits),
            _dispatch.reference_backend(_reference),
        ),
        reduce_len=lambda logits, targets, alpha, gamma, reduction: 4 if reduction == "none" else logits.numel(),
        differentiable=(0, 1),
        cases=(
            _case("anchors", 2, 63, 80),
            _case("sum", 3, 57, 11, options=(0.25, 2.0, "sum")),
            _case("mean", 3, 57, 11, options=(0.25, 2.0, "mean")),
            _case("one-logit", 1),
            _case("odd-tail", 1, 131),
            _case("no-alpha", 5, 7, 9, options=(-1.0, 2.0, "none")),
            _case("gamma-0", 4, 33, options=(0.25, 0.0, "none")),
            _case("gamma-half", 4, 33, options=(0.5, 0.5, "none")),
            _case("gamma-1.5-sum", 4, 333, options=(0.9, 1.5, "sum")),
            _case("gamma-3", 4, 33, options=(0.0, 3.0, "none")),
            _case("soft-targets", 7, 45, soft=True),
            _case("soft-targets-gamma-1.5", 7, 45, options=(1.0, 1.5, "none"), soft=True),
            _case("large-logits", 9, 77, scale=40.0),
            _case("channels-last", 2, 24, 7, 9, layouts=("channels_last", "contiguous")),
            _case("sliced", 2, 16, 6, 5, layouts=("sliced", "transposed")),
            _case("expanded", 3, 8, 4, 4, layouts=("expanded", "contiguous")),
            _case("expanded-sum", 3, 8, 4, 4, options=(0.25, 2.0, "sum"), layouts=("expanded", "channels_last")),
            _case("several-chunks", 3, 16389, options=(0.25, 2.0, "sum")),
            _case("empty", 0, 80),
            _case("empty-sum", 0, 80, options=(0.25, 2.0, "sum")),
            _case("retinanet", 2, 76725, 80, large=True),
            _case("retinanet-sum", 2, 76725, 80, options=(0.25, 2.0, "sum"), large=True),
            _case("retinanet-gamma-1.5", 2, 76725, 80, options=(0.25, 1.5, "none"), large=True),
        ),
    )
)
