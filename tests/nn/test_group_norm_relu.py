"""GroupNormReLU stands in for GroupNorm + ReLU: same parameters, values and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nasdet.nn import GroupNormReLU, group_norm_relu


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_equals_the_two_modules(layout: torch.memory_format) -> None:
    fused, plain = GroupNormReLU(4, 12), nn.GroupNorm(4, 12)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.normal_()
    plain.load_state_dict(fused.state_dict())
    x = torch.randn(2, 12, 5, 7).to(memory_format=layout)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = fused(a), torch.relu(plain(b))
    torch.testing.assert_close(y, expected)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream)
    torch.testing.assert_close(a.grad, b.grad)
    for mine, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_one_value_per_group_gives_relu_of_the_bias() -> None:
    norm = GroupNormReLU(3, 3)
    with torch.no_grad():
        norm.bias.copy_(torch.tensor([-1.0, 0.0, 2.0]))
    assert norm(torch.full((1, 3, 1, 1), 9.0)).flatten().tolist() == [0.0, 0.0, 2.0]


def test_torch_fx_takes_one_call() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 1), GroupNormReLU(2, 8)), torch.randn(1, 3, 4, 5)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


def test_a_norm_without_bias() -> None:
    norm, x = nn.GroupNorm(2, 8), torch.randn(1, 8, 3, 3)
    expected = norm(x).relu()
    norm.register_parameter("bias", None)
    torch.testing.assert_close(group_norm_relu(x, norm), expected)


def test_is_made_where_and_as_asked_for() -> None:
    made = GroupNormReLU(2, 8, device="meta", dtype=torch.float64)
    assert all(value.is_meta and value.dtype == torch.float64 for value in made.parameters())


def test_a_norm_without_affine_part_is_refused() -> None:
    with pytest.raises(ValueError, match="norm must be affine"):
        group_norm_relu(torch.ones(1, 4, 2, 2), nn.GroupNorm(2, 4, affine=False))
