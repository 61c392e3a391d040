"""What is particular to ``mix``: its invariants, its errors, its raw ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nasdet.ops import mix


def _maps(count: int = 3, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 4, 5, 6, generator=generator).to(dtype) for _ in range(count)]


def test_one_hot_weights_pick_a_map() -> None:
    xs = _maps()
    assert torch.equal(mix(xs, torch.tensor([0.0, 1.0, 0.0])), xs[1])


def test_linear_in_the_weights() -> None:
    xs, a, b = _maps(), torch.tensor([0.5, -2.0, 0.25]), torch.tensor([1.0, 1.5, -0.5])
    torch.testing.assert_close(mix(xs, a + b), mix(xs, a) + mix(xs, b))


def test_a_map_with_zero_weight_is_not_read_but_gets_its_weight_gradient(require) -> None:
    from nasdet._dispatch import OPS

    if reason := OPS["mix"].backends[0].available():
        require("cpp", reason)
    xs, weights = _maps(2), torch.tensor([1.0, 0.0], requires_grad=True)
    poisoned = [xs[0], torch.full_like(xs[1], float("nan"))]
    assert torch.equal(mix(poisoned, weights.detach(), backend="cpp"), xs[0])
    (gradient,) = torch.autograd.grad(mix(xs, weights).sum(), weights)
    torch.testing.assert_close(gradient[1], xs[1].sum())


def test_nan_and_infinity_reach_the_sum() -> None:
    xs = _maps(2)
    xs[0][0, 0, 0, 0], xs[1][1, 1, 1, 1] = float("nan"), float("inf")
    y = mix(xs, torch.tensor([0.5, 0.5]))
    assert y[0, 0, 0, 0].isnan() and y[1, 1, 1, 1].isinf() and y.isfinite().sum() == y.numel() - 2


def test_output_takes_the_layout_of_the_first_map() -> None:
    xs = _maps()
    nhwc = xs[0].contiguous(memory_format=torch.channels_last)
    assert mix([nhwc, *xs], torch.ones(4)).is_contiguous(memory_format=torch.channels_last)
    assert mix([xs[0], nhwc], torch.ones(2)).is_contiguous()


def test_mixed_dtypes_promote_also_under_autocast() -> None:
    xs = [*_maps(1, torch.bfloat16), *_maps(1, torch.float32)]
    assert mix(xs, torch.ones(2)).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert mix(xs, torch.ones(2)).dtype == torch.float32
        assert mix(xs[:1], torch.ones(1)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param(
            lambda x: (x[0], torch.ones(3)), TypeError, "xs must be a sequence of tensors, got Tensor", id="no-list"
        ),
        pytest.param(lambda x: ([], torch.ones(0)), ValueError, "xs must hold at least one map, got none", id="none"),
        pytest.param(
            lambda x: ([x[0], x[1][:1]], torch.ones(2)),
            ValueError,
            r"xs\[1\] must have shape \(2, 4, 5, 6\), got \(1, 4, 5, 6\)",
            id="shape",
        ),
        pytest.param(
            lambda x: ([x[0], x[1].long()], torch.ones(2)),
            TypeError,
            r"xs\[1\] must be a float32.*got torch.int64",
            id="dtype",
        ),
        pytest.param(
            lambda x: (x, torch.ones(2)), ValueError, r"weights must have shape \(3,\), got \(2,\)", id="weights"
        ),
        pytest.param(
            lambda x: (x, torch.ones(3).int()), TypeError, "weights must be a floating-point tensor", id="int-weights"
        ),
        pytest.param(
            lambda x: ([x[0], x[1].to("meta")], torch.ones(2)),
            ValueError,
            r"xs\[1\] must be on cpu, got meta",
            id="device",
        ),
        pytest.param(
            lambda x: (x, torch.ones(3, device="meta")),
            ValueError,
            "weights must be on cpu, got meta",
            id="weights-device",
        ),
    ],
)
def test_errors_name_the_argument(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mix(*arguments(_maps()))


def test_raw_ops_pass_opcheck() -> None:
    xs = [x.requires_grad_() for x in _maps()]
    weights = torch.rand(3, requires_grad=True)
    torch.library.opcheck(torch.ops.nasdet.mix.default, (xs, weights))
    detached = [x.detach() for x in xs]
    torch.library.opcheck(
        torch.ops.nasdet.mix_backward.default,
        (detached[0], detached, weights.detach(), True, True),
        test_utils="test_faketensor",
    )


def test_no_silent_second_derivative() -> None:
    xs, weights = [x.requires_grad_() for x in _maps()], torch.rand(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(mix(xs, weights, backend="cpp").sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.slow
def test_more_than_2_to_31_elements() -> None:
    x = torch.zeros(2**31 + 100, dtype=torch.bfloat16)
    x[-1], x[2**31 + 3] = 3.0, 5.0
    y = mix([x], torch.tensor([2.0]))
    assert y[-1] == 6 and y[2**31 + 3] == 10 and y[0] == 0
