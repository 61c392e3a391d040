"""The comparison helpers catch what they claim to catch: one planted bug of each kind."""

from __future__ import annotations

import pytest
import torch

from nasdet import testing as gradients


def _expected() -> torch.Tensor:
    return torch.randn(6, 50, generator=torch.Generator().manual_seed(3))


def test_equal_tensors_pass() -> None:
    gradients.assert_gradient_matches(_expected(), _expected(), 1e-6, "x")


@pytest.mark.parametrize(
    "plant",
    [
        pytest.param(lambda t: t.index_put((torch.tensor(2), torch.tensor(7)), torch.tensor(9.0)), id="one-element"),
        pytest.param(lambda t: -t, id="sign"),
        pytest.param(lambda t: t * 1.01, id="scale"),
        pytest.param(lambda t: torch.cat([t[:3], torch.zeros(1, 50), t[4:]]), id="silent-row"),
        pytest.param(lambda t: t.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(float("nan"))), id="nan"),
        pytest.param(lambda t: t[:, :49], id="shape"),
    ],
)
def test_planted_bugs_are_caught(plant) -> None:
    with pytest.raises(AssertionError):
        gradients.assert_gradient_matches(plant(_expected()), _expected(), 1e-4, "x")


def test_tolerance_grows_with_length_and_dtype() -> None:
    tolerance = gradients.tolerance
    assert (
        tolerance(torch.float32, 100, 1.0) < tolerance(torch.float32, 10_000, 1.0) < tolerance(torch.bfloat16, 100, 1.0)
    )
    assert tolerance(torch.float64, 10_000, 1.0) < 1e-12
    assert tolerance(torch.float32, 10, 8.0) == pytest.approx(8 * tolerance(torch.float32, 10, 1.0))
