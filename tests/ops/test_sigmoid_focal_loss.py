"""What is particular to ``sigmoid_focal_loss``: its formula, its extremes, its sums, its errors, its raw ops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nasdet.ops import sigmoid_focal_loss

BACKENDS = ("cpp", "reference")
HALVES = (torch.float16, torch.bfloat16)


def _scene(dtype: torch.dtype = torch.float32, soft: bool = False) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    targets = torch.rand(3, 41, 5, generator=generator)
    logits = 4 * torch.randn(3, 41, 5, generator=generator)
    return logits.to(dtype), (targets if soft else (targets < 0.2)).to(dtype)


def _by_definition(x: Tensor, t: Tensor, alpha: float, gamma: float) -> Tensor:
    """The definition, for float64 and moderate logits."""
    p = torch.sigmoid(x)
    p_t = p * t + (1 - p) * (1 - t)
    loss = F.binary_cross_entropy_with_logits(x, t, reduction="none") * (1 - p_t) ** gamma
    return loss if alpha < 0 else (alpha * t + (1 - alpha) * (1 - t)) * loss


@pytest.fixture(autouse=True)
def _need(request: pytest.FixtureRequest, require: Callable[[str, str | None], None]) -> None:
    from nasdet._dispatch import OPS

    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if parameters.get("backend", "cpp") == "cpp" and (reason := OPS["sigmoid_focal_loss"].backends[0].available()):
        require("cpp", reason)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("soft", [False, True], ids=["hard", "soft"])
@pytest.mark.parametrize(("alpha", "gamma"), [(0.25, 2.0), (-1, 2.0), (0.5, 0.0), (0.9, 0.5), (0.0, 1.0), (1.0, 3.7)])
def test_values_and_both_gradients_by_definition(alpha: float, gamma: float, soft: bool, backend: str) -> None:
    logits, targets = _scene(torch.float64, soft)
    logits, targets = logits.requires_grad_(), targets.requires_grad_()
    actual = sigmoid_focal_loss(logits, targets, alpha, gamma, backend=backend)
    expected = _by_definition(logits, targets, alpha, gamma)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-13)
    upstream = torch.linspace(-1, 2, actual.numel(), dtype=torch.float64).view_as(actual)
    for got, wanted in zip(
        torch.autograd.grad(actual, (logits, targets), upstream),
        torch.autograd.grad(expected, (logits, targets), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 1.0, 2.0, 5.0])
def test_extreme_logits_have_their_limits_and_finite_gradients(gamma: float, dtype: torch.dtype, backend: str) -> None:
    logits = torch.tensor([1e4, -1e4, 1e4, -1e4, 300.0, -300.0], dtype=dtype, requires_grad=True)
    targets = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0], dtype=dtype)
    loss = sigmoid_focal_loss(logits, targets, gamma=gamma, backend=backend)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    expected = torch.tensor([0.75e4, 0.25e4, 0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-2 if dtype in HALVES else 1e-6, atol=1e-30)
    # Far on the wrong side the loss is the linear cross-entropy, far on the right side nothing.
    slopes = torch.tensor([0.75, -0.25, 0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(gradient.double(), slopes, rtol=1e-2 if dtype in HALVES else 1e-6, atol=1e-30)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
@pytest.mark.parametrize("gamma", [1.0, 5.0, 6.0, 40.0])
def test_targets_of_certain_logits_have_finite_gradients(gamma: float, dtype: torch.dtype, backend: str) -> None:
    """The slope of (1 - p_t)^gamma overflows long before what it is multiplied by vanishes."""
    logits = torch.tensor([88.0, 100.0, 800.0, 1e4, -88.0, -100.0, -800.0, -1e4], dtype=dtype)
    targets = (logits > 0).to(dtype).requires_grad_()
    loss = sigmoid_focal_loss(logits, targets, gamma=gamma, backend=backend)
    (gradient,) = torch.autograd.grad(loss.sum(), targets)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-30)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_confident_and_right_keeps_its_digits(gamma: float, backend: str) -> None:
    logits = torch.tensor([8.0, 15.0, 17.0, 25.0], requires_grad=True)  # 1 - p would be 0 in float32 beyond 17
    loss = sigmoid_focal_loss(logits, torch.ones(4), 1.0, gamma, backend=backend)
    expected = [(1 + math.exp(x)) ** -gamma * math.log1p(math.exp(-x)) for x in logits.tolist()]
    assert loss.tolist() == pytest.approx(expected, rel=2e-6)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    slopes = [
        -((1 + math.exp(x)) ** -gamma) * (gamma / (1 + math.exp(-x)) * math.log1p(math.exp(-x)) + 1 / (1 + math.exp(x)))
        for x in logits.tolist()
    ]
    assert gradient.tolist() == pytest.approx(slopes, rel=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tiny_gamma_still_fades_what_is_certain(backend: str) -> None:
    logits, targets = torch.tensor([50.0, 2000.0, -6000.0]), torch.tensor([1.0, 1.0, 0.0], requires_grad=True)
    loss = sigmoid_focal_loss(logits, targets, -1, 0.002, backend=backend)
    (gradient,) = torch.autograd.grad(loss.sum(), targets)
    # (1 - p_t)^gamma is exp(-gamma |x|), and the cross-entropy falls by the logit.
    expected = [-math.exp(-0.002 * abs(x)) * (x + math.copysign(0.002, x)) for x in logits.tolist()]
    assert gradient.tolist() == pytest.approx(expected, rel=1e-5)


def test_classes_are_symmetric() -> None:
    logits, targets = _scene()
    mirrored = sigmoid_focal_loss(-logits, 1 - targets, 0.7, 1.5)
    torch.testing.assert_close(sigmoid_focal_loss(logits, targets, 0.3, 1.5), mirrored)


def test_without_focus_and_weights_it_is_cross_entropy() -> None:
    logits, targets = _scene(soft=True)
    logits.requires_grad_()
    loss = sigmoid_focal_loss(logits, targets, -1, 0)
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, targets, reduction="none"))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(gradient, torch.sigmoid(logits) - targets, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", [2.0, 0.5])
def test_nan_stays_where_it_is(gamma: float, backend: str) -> None:
    logits, targets = _scene()
    logits[1, 7, 2] = float("nan")
    logits.requires_grad_()
    loss = sigmoid_focal_loss(logits, targets, gamma=gamma, backend=backend)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    for result in (loss, gradient):
        assert result[1, 7, 2].isnan() and int(result.isnan().sum()) == 1
    assert sigmoid_focal_loss(logits, targets, gamma=gamma, reduction="sum", backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_reductions_agree(backend: str) -> None:
    logits, targets = _scene()
    each = sigmoid_focal_loss(logits, targets, backend=backend)
    total = sigmoid_focal_loss(logits, targets, reduction="sum", backend=backend)
    mean = sigmoid_focal_loss(logits, targets, reduction="mean", backend=backend)
    assert total.shape == mean.shape == () and total.dtype == mean.dtype == torch.float32
    assert total.item() == pytest.approx(each.double().sum().item(), rel=1e-6)
    assert mean.item() == pytest.approx(each.double().mean().item(), rel=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_elements(backend: str) -> None:
    logits = torch.zeros(0, 80, requires_grad=True)
    empty = torch.zeros(0, 80)
    assert sigmoid_focal_loss(logits, empty, backend=backend).shape == (0, 80)
    total = sigmoid_focal_loss(logits, empty, reduction="sum", backend=backend)
    assert total.item() == 0 and torch.autograd.grad(total, logits)[0].shape == (0, 80)
    assert sigmoid_focal_loss(logits, empty, reduction="mean", backend=backend).isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_dimensions(backend: str) -> None:
    loss = sigmoid_focal_loss(torch.tensor(0.0), torch.tensor(1.0), backend=backend)
    assert loss.shape == () and loss.item() == pytest.approx(0.25 * 0.25 * math.log(2))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_sums_of_16_bits_are_kept_wide(dtype: torch.dtype) -> None:
    """65,537 losses of 3 and one of 0.75 ln 2 / 4: a float16 sum would overflow, a bfloat16 sum stop at 512."""
    logits, targets = torch.full((65538,), 4.0, dtype=dtype), torch.zeros(65538, dtype=dtype)
    logits[-1] = 0
    one = 0.75 * (1 / (1 + math.exp(-4))) ** 2 * (4 + math.log1p(math.exp(-4)))
    mean = sigmoid_focal_loss(logits, targets, reduction="mean")
    assert mean.dtype == dtype and mean.item() == pytest.approx(one, rel=torch.finfo(dtype).eps)
    raw = torch.ops.nasdet.sigmoid_focal_loss(logits, targets, 0.25, 2.0, True)
    assert raw.dtype == torch.float32 and raw.item() == pytest.approx(65537 * one + 0.75 / 4 * math.log(2), rel=1e-6)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_layouts_give_the_same_losses(reduction: str) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 6, 5, 7, generator=generator)
    targets = (torch.rand(2, 6, 5, 7, generator=generator) < 0.3).float()
    expected = sigmoid_focal_loss(logits, targets, reduction=reduction)
    nhwc = logits.contiguous(memory_format=torch.channels_last)
    strided = torch.stack([logits, logits], dim=-1)[..., 0]
    holes = torch.as_strided(torch.arange(9.0), (2, 2), (3, 0))  # repeats elements, though its span is its size
    for variant in (nhwc, strided, logits.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)):
        actual = sigmoid_focal_loss(variant, targets, reduction=reduction)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)
    if reduction == "none":
        assert sigmoid_focal_loss(nhwc, targets).is_contiguous(memory_format=torch.channels_last)
    zeros = torch.zeros(2, 2)
    assert torch.equal(
        sigmoid_focal_loss(holes, zeros, reduction=reduction),
        sigmoid_focal_loss(holes.contiguous(), zeros, reduction=reduction),
    )


def test_mixed_dtypes_promote() -> None:
    logits, targets = _scene(torch.bfloat16)
    assert sigmoid_focal_loss(logits, targets).dtype == torch.bfloat16
    mixed = sigmoid_focal_loss(logits.requires_grad_(), targets.float())
    assert mixed.dtype == torch.float32 and torch.equal(mixed, sigmoid_focal_loss(logits.float(), targets.float()))
    mixed.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == torch.bfloat16


def test_autocast_takes_float32() -> None:
    logits, targets = _scene(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert sigmoid_focal_loss(logits, targets, reduction="sum").dtype == torch.float32
        assert sigmoid_focal_loss(logits.double(), targets.double()).dtype == torch.float64
    with torch.autocast("cpu", enabled=False):
        assert sigmoid_focal_loss(logits, targets, reduction="sum").dtype == torch.bfloat16


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_only_logits_and_targets_are_kept(reduction: str) -> None:
    logits, targets = _scene()
    logits.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        sigmoid_focal_loss(logits, targets, reduction=reduction, backend="cpp")
    assert {t.data_ptr() for t in kept if t.numel() > 1} == {logits.data_ptr(), targets.data_ptr()}


def test_only_gradients_that_are_needed() -> None:
    logits, targets = _scene()
    run = torch.ops.nasdet.sigmoid_focal_loss_backward
    both = run(logits, logits, targets, 0.25, 2.0, False, True, True)
    first = run(logits, logits, targets, 0.25, 2.0, False, True, False)
    second = run(logits, logits, targets, 0.25, 2.0, False, False, True)
    assert torch.equal(both[0], first[0]) and torch.equal(both[1], second[1])
    assert first[1].numel() == second[0].numel() == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param(lambda x, t: (x.tolist(), t), TypeError, "inputs must be a float32.*got list", id="no-tensor"),
        pytest.param(lambda x, t: (x, t.long()), TypeError, "targets must be a float32.*got torch.int64", id="int"),
        pytest.param(lambda x, t: (x, t.bool()), TypeError, "targets must be.*got torch.bool", id="bool"),
        pytest.param(
            lambda x, t: (x, t[:1]),
            ValueError,
            r"targets must have shape \(3, 41, 5\), got \(1, 41, 5\)",
            id="shape",
        ),
        pytest.param(lambda x, t: (x, t.to("meta")), ValueError, "targets must be on cpu, got meta", id="device"),
        pytest.param(lambda x, t: (x, t, 1.5), ValueError, r"alpha must be in .*, got 1.5", id="alpha"),
        pytest.param(lambda x, t: (x, t, -0.5), ValueError, r"alpha must be in .*, got -0.5", id="negative-alpha"),
        pytest.param(lambda x, t: (x, t, "x"), TypeError, "alpha must be a number, got 'x'", id="text-alpha"),
        pytest.param(lambda x, t: (x, t, True), TypeError, "alpha must be a number, got True", id="bool-alpha"),
        pytest.param(lambda x, t: (x, t, 0.5, None), TypeError, "gamma must be a number, got None", id="no-gamma"),
        pytest.param(lambda x, t: (x, t, 0.5, [1]), TypeError, r"gamma must be a number, got \[1\]", id="list-gamma"),
        pytest.param(lambda x, t: (x, t, math.nan), ValueError, r"alpha must be in .*, got nan", id="nan-alpha"),
        pytest.param(
            lambda x, t: (x, t, 0.5, -1.0), ValueError, "gamma must be finite and at least 0, got -1.0", id="gamma"
        ),
        pytest.param(lambda x, t: (x, t, 0.5, math.nan), ValueError, "gamma must be .*, got nan", id="nan-gamma"),
        pytest.param(
            lambda x, t: (x, t, 0.5, 2.0, "max"), ValueError, "reduction must be 'none', .*, got 'max'", id="reduction"
        ),
    ],
)
def test_errors_name_the_argument(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sigmoid_focal_loss(*arguments(*_scene()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"targets": torch.zeros(3)}, "targets must have the logits' shape", id="shape"),
        pytest.param(
            {"targets": torch.zeros(2, dtype=torch.float64)}, "targets must have the logits' dtype", id="dtype"
        ),
        pytest.param({"alpha": 2.0}, r"alpha must be in \[0, 1\] or -1, got 2", id="alpha"),
        pytest.param({"gamma": math.nan}, "gamma must be at least 0, got nan", id="gamma"),
        pytest.param({"grad": torch.zeros(3)}, "grad must have the logits' shape", id="grad"),
    ],
)
def test_raw_ops_check_their_arguments(change: dict[str, Any], message: str) -> None:
    given = {"grad": torch.zeros(2), "logits": torch.zeros(2), "targets": torch.zeros(2), "alpha": 0.25, "gamma": 2.0}
    grad, *rest = (given | change).values()
    if "grad" not in change:
        with pytest.raises(RuntimeError, match=message):
            torch.ops.nasdet.sigmoid_focal_loss(*rest, False)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.nasdet.sigmoid_focal_loss_backward(grad, *rest, False, True, True)


@pytest.mark.parametrize("reduce_sum", [False, True], ids=["none", "sum"])
def test_raw_ops_pass_opcheck(reduce_sum: bool) -> None:
    logits, targets = _scene(torch.bfloat16)
    raw = torch.ops.nasdet
    torch.library.opcheck(
        raw.sigmoid_focal_loss.default, (logits.requires_grad_(), targets.requires_grad_(), 0.25, 2.0, reduce_sum)
    )
    grad = torch.ones(()) if reduce_sum else torch.ones_like(logits)
    arguments = (grad, logits.detach(), targets.detach(), 0.25, 1.5, reduce_sum)
    for need in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(
            raw.sigmoid_focal_loss_backward.default, (*arguments, *need), test_utils="test_faketensor"
        )


def test_no_silent_second_derivative() -> None:
    logits, targets = _scene(torch.float64, soft=True)
    logits = logits[0, :3].clone().requires_grad_()
    targets = targets[0, :3]
    loss = sigmoid_focal_loss(logits, targets, reduction="sum", backend="cpp")
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()
    assert torch.autograd.gradgradcheck(lambda x: sigmoid_focal_loss(x, targets, backend="reference"), logits)


@pytest.mark.slow
def test_more_than_2_to_31_elements() -> None:
    logits = torch.zeros(2**31 + 100, dtype=torch.bfloat16)
    logits[-1], logits[2**31 + 3] = 1.0, 0.5
    loss = sigmoid_focal_loss(logits, logits, -1, 0)  # logits as targets: no second large tensor
    wanted = {-1: math.log1p(math.exp(-1)), 2**31 + 3: math.log1p(math.exp(0.5)) - 0.25, 5: math.log(2)}
    assert all(loss[index].item() == pytest.approx(value, rel=4e-3) for index, value in wanted.items())


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_gradient_of_more_than_2_to_31_elements(reduction: str) -> None:
    """Logits and targets are memory of zeros that is hardly touched; losses and gradients are 4.3 GB each."""
    logits, targets = (torch.zeros(2**31 + 100, dtype=torch.bfloat16) for _ in range(2))
    for values in (logits, targets):
        values[-1], values[2**31 + 3] = 1.0, 0.5
    loss = sigmoid_focal_loss(logits.requires_grad_(), targets, -1, 0, reduction, backend="cpp")
    upstream = torch.ones((), dtype=loss.dtype).expand(loss.shape)
    (gradient,) = torch.autograd.grad(loss, logits, upstream)
    assert gradient.shape == logits.shape
    wanted = {-1: 1 / (1 + math.exp(-1)) - 1, 2**31 + 3: 1 / (1 + math.exp(-0.5)) - 0.5, 5: 0.5, 2**31 + 4: 0.5}
    assert all(gradient[index].item() == pytest.approx(value, rel=4e-3) for index, value in wanted.items())
    assert bool((gradient[:-100:4099] == 0.5).all())
