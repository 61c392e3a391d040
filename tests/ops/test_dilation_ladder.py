"""What holds of both multi-dilation convolutions, for each of the C++ algorithms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nasdet.ops import grouped_dilation_conv2d, mixed_dilation_conv2d

pytestmark = pytest.mark.needs("cpp")
DILATIONS = (1, 2, (1, 3))
ACCURACY = {"direct": 1e-6, "frequency": 1e-6, "winograd": 3e-6}


def error(found: Tensor, expected: Tensor) -> float:
    """Relative, in the L2 norm."""
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize("algorithm", ["direct", "frequency"])
def test_one_hot_mixtures_are_the_grouped_form(algorithm: str) -> None:
    x, weight = torch.randn(2, 24, 11, 13), torch.randn(3, 24, 24, 3, 3)
    splits = (12, 4, 8)
    place = torch.repeat_interleave(torch.arange(3), torch.tensor(splits))
    mix = torch.nn.functional.one_hot(place, 3).T.float()
    own = weight[place, torch.arange(24)]
    grouped = grouped_dilation_conv2d(x, own, DILATIONS, splits, algorithm=algorithm)
    assert error(mixed_dilation_conv2d(x, weight, mix, DILATIONS, algorithm=algorithm), grouped.double()) < 1e-6


@pytest.mark.parametrize(
    ("algorithm", "dilations"), [("direct", DILATIONS), ("frequency", DILATIONS), ("winograd", (2,))]
)
def test_linear_in_mix(algorithm: str, dilations: tuple[int, ...]) -> None:
    count = len(dilations)
    x, weight = torch.randn(1, 20, 9, 8), torch.randn(count, 20, 20, 3, 3)
    one, two = torch.rand(count, 20), torch.rand(count, 20)

    def convolved(mix: Tensor) -> Tensor:
        return mixed_dilation_conv2d(x, weight, mix, dilations, algorithm=algorithm).double()

    assert error(convolved(2 * one - 3 * two), 2 * convolved(one) - 3 * convolved(two)) < 2 * ACCURACY[algorithm]


@pytest.mark.parametrize("channels", [1, 3, 17, 100, 513])
@pytest.mark.parametrize("algorithm", ACCURACY)
def test_any_number_of_channels(algorithm: str, channels: int) -> None:
    dilations = DILATIONS[:channels]
    splits = (channels - len(dilations) + 1, *(1 for _ in dilations[1:]))
    x, weight = torch.randn(1, channels, 6, 7), torch.randn(channels, channels, 3, 3)
    upstream = torch.randn_like(x)

    def results(dtype: torch.dtype, **how: str) -> tuple[Tensor, ...]:
        own, kernel = x.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_()
        y = grouped_dilation_conv2d(own, kernel, dilations, splits, **how)  # type: ignore[arg-type]  # either option
        return y.detach(), *torch.autograd.grad(y, (own, kernel), upstream.to(dtype))

    found, exact = results(torch.float32, algorithm=algorithm), results(torch.float64, backend="reference")
    for name, one, other in zip(("y", "dx", "dweight"), found, exact, strict=True):
        assert error(one, other) < ACCURACY[algorithm], name
