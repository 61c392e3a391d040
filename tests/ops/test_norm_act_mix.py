"""What is particular to ``norm_act_mix``: its invariants, the in-place gradient, its errors."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nasdet.ops import norm_act_mix


def _inputs(maps: int = 2, channels: int = 8) -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(2, channels, 5, 6, generator=generator) for _ in range(maps)]
    weights = torch.rand(maps, generator=generator)
    return (
        xs,
        weights,
        torch.rand(maps, channels, generator=generator) + 0.5,
        torch.randn(maps, channels, generator=generator),
    )


def test_one_map_of_weight_one_is_group_norm_and_relu() -> None:
    xs, _, gamma, beta = _inputs(1)
    expected = F.relu(F.group_norm(xs[0], 4, gamma[0], beta[0]))
    torch.testing.assert_close(norm_act_mix(xs, torch.ones(1), gamma, beta, 4), expected)


def test_invariant_to_scale_and_shift_of_a_group() -> None:
    xs, weights, gamma, beta = _inputs()
    moved = [x * 3.0 + 7.0 for x in xs]
    torch.testing.assert_close(
        norm_act_mix(xs, weights, gamma, beta, 2, eps=0.0),
        norm_act_mix(moved, weights, gamma, beta, 2, eps=0.0),
        rtol=1e-4,
        atol=1e-4,
    )


def test_gradient_of_a_normalised_map_is_orthogonal_to_shift_and_scale() -> None:
    xs, weights, gamma, beta = _inputs(1)
    x = xs[0].double().requires_grad_()
    y = norm_act_mix([x], weights.double(), gamma.double(), beta.double(), 2, eps=0.0)
    (gradient,) = torch.autograd.grad((y * torch.randn_like(y)).sum(), x)
    groups, grads = x.detach().reshape(2, 2, -1), gradient.reshape(2, 2, -1)
    torch.testing.assert_close(grads.sum(-1), torch.zeros(2, 2, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close((grads * groups).sum(-1), torch.zeros(2, 2, dtype=torch.float64), atol=1e-9, rtol=0)


def test_a_constant_map_gives_relu_of_the_bias() -> None:
    _, weights, gamma, beta = _inputs(1)
    y = norm_act_mix([torch.full((1, 8, 3, 3), 4.0)], weights, gamma, beta, 4)
    torch.testing.assert_close(y, (weights[0] * F.relu(beta[0]))[None, :, None, None].expand_as(y).contiguous())


def test_maps_left_out_of_the_norm_ignore_their_rows() -> None:
    xs, weights, gamma, beta = _inputs()
    gamma[0] = float("nan")
    y = norm_act_mix(xs, weights, gamma, beta, 4, normalized=[False, True])
    expected = weights[0] * F.relu(xs[0]) + weights[1] * F.relu(F.group_norm(xs[1], 4, gamma[1], beta[1]))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_overwriting_gives_the_same_gradients_in_the_maps_memory(layout: torch.memory_format) -> None:
    xs, weights, gamma, beta = _inputs(3)
    leaves = [x.to(memory_format=layout).requires_grad_() for x in xs]
    parameters = [t.requires_grad_() for t in (weights, gamma, beta)]
    plain = torch.autograd.grad(norm_act_mix(leaves, *parameters, 4).square().sum(), [*leaves, *parameters])

    fresh = [x * 1 for x in leaves]
    kept: list[Tensor] = []
    for x in fresh:
        x.register_hook(kept.append)
    y = norm_act_mix(fresh, *parameters, 4, overwrite_inputs=True, backend="cpp")
    overwritten = torch.autograd.grad(y.square().sum(), [*leaves, *parameters])
    for a, b in zip(plain, overwritten, strict=True):
        assert torch.equal(a, b)
    assert {k.data_ptr() for k in kept} == {x.data_ptr() for x in fresh}


def test_overwriting_a_map_that_another_node_saved_raises() -> None:
    xs, weights, gamma, beta = _inputs(1)
    x = xs[0].requires_grad_() * 1
    other = x.square()  # saves x
    y = norm_act_mix([x], weights, gamma, beta, 4, overwrite_inputs=True, backend="cpp")
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (y.sum() + other.sum()).backward()


def _twice(x: Tensor) -> list[Tensor]:
    return [x, x]


MAPS_THAT_STAY = [
    pytest.param(_twice, id="one-map-twice"),
    pytest.param(lambda x: [x, x.view(x.shape)], id="view"),
    pytest.param(lambda x: [x[:2], x[1:]], id="overlapping-slices"),
    pytest.param(lambda x: [x[:, ::2], x[:, 1::2]], id="sliced"),
    pytest.param(lambda x: [x[:1].expand(3, -1, -1, -1), x], id="expanded"),
    pytest.param(lambda x: [x, x.detach() + 1], id="no-gradient"),
]


def _gradients(make: Any, leaf: Tensor, compiled: bool = False, **options: Any) -> tuple[Tensor, list[Tensor]]:
    """The leaf's gradient, and the maps that ``make`` gave of a copy of the leaf."""
    maps = make(leaf * 1)
    channels = maps[0].shape[1]
    weights, gamma, beta = torch.tensor([0.5, 1.5]), torch.ones(2, channels), torch.zeros(2, channels)

    def total(*xs: Tensor) -> Tensor:
        y = norm_act_mix(xs, weights, gamma, beta, 2, **options)
        return (y * torch.arange(y.numel()).reshape(y.shape)).sum()

    loss = torch.compile(total, backend="aot_eager", fullgraph=True)(*maps) if compiled else total(*maps)
    return torch.autograd.grad(loss, leaf)[0], maps


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("make", MAPS_THAT_STAY)
def test_maps_without_memory_of_their_own_are_not_overwritten(make: Any) -> None:
    leaf = _inputs(1)[0][0].repeat(2, 1, 1, 1)[:3].requires_grad_()
    expected, untouched = _gradients(make, leaf, backend="cpp")
    found, maps = _gradients(make, leaf, overwrite_inputs=True, backend="cpp")
    assert torch.equal(found, expected)
    assert all(torch.equal(x, y) for x, y in zip(maps, untouched, strict=True))


def test_a_batch_of_gradients_is_refused_in_words() -> None:
    """``is_grads_batched`` has batches whose memory cannot be looked at."""
    leaf = _inputs(1)[0][0].requires_grad_()
    _, weights, gamma, beta = _inputs(1)
    y = norm_act_mix([leaf * 1], weights, gamma, beta, 4, overwrite_inputs=True)
    with pytest.raises(RuntimeError, match="Batching rule not implemented"):
        torch.autograd.grad(y, leaf, torch.randn(3, *y.shape), is_grads_batched=True)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_reference_keeps_the_first_maps_layout(device: str) -> None:
    xs, *rest = _inputs()
    xs[0] = xs[0].to(memory_format=torch.channels_last)
    xs, rest = [x.to(device) for x in xs], [t.to(device) for t in rest]
    for first in (0, 1):
        y = norm_act_mix([xs[first], xs[1 - first]], *rest, 4, backend="reference")
        assert y.is_contiguous(memory_format=torch.contiguous_format if first else torch.channels_last)


@pytest.mark.needs("cpp")
def test_compiled_calls_overwrite_nothing() -> None:
    leaf = _inputs(1)[0][0].requires_grad_()
    expected, untouched = _gradients(_twice, leaf, backend="cpp")
    found, maps = _gradients(_twice, leaf, compiled=True, overwrite_inputs=True, backend="cpp")
    torch.testing.assert_close(found, expected)
    assert torch.equal(maps[0], untouched[0])


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("make", [lambda x: x, lambda x: x.view(2, 8, 5, 6)], ids=["leaf", "view"])
def test_a_leaf_keeps_its_values(make: Any) -> None:
    xs, weights, gamma, beta = _inputs(1)
    leaf, before = xs[0].requires_grad_(), xs[0].clone()
    norm_act_mix([make(leaf)], weights, gamma, beta, 4, overwrite_inputs=True, backend="cpp").square().sum().backward()
    assert torch.equal(leaf, before) and leaf.grad is not None and leaf.grad.data_ptr() != leaf.data_ptr()


@pytest.mark.needs("cpp")
def test_a_map_that_is_the_incoming_gradient_too_is_not_overwritten() -> None:
    xs, weights, gamma, beta = _inputs()
    leaves = [x.requires_grad_() for x in xs]
    results = []
    for overwrite in (False, True):
        maps = [x * 1 for x in leaves]
        y = norm_act_mix(maps, weights, gamma, beta, 4, overwrite_inputs=overwrite, backend="cpp")
        results.append(torch.autograd.grad(y, leaves, maps[0].detach()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"num_groups": 3}, "num_groups must be a positive divisor of the 8 channels, got 3", id="groups"),
        pytest.param({"num_groups": 0}, "num_groups must be a positive divisor", id="no-groups"),
        pytest.param({"num_groups": True}, "num_groups must be a positive divisor.*, got True", id="bool-groups"),
        pytest.param({"eps": float("nan")}, "eps must be finite and at least 0, got nan", id="nan-eps"),
        pytest.param({"eps": -10}, "eps must be finite and at least 0, got -10", id="negative-eps"),
        pytest.param({"weights": torch.ones(3)}, r"weights must have shape \(2,\), got \(3,\)", id="weights"),
        pytest.param({"gn_weight": torch.ones(8)}, r"gn_weight must have shape \(2, 8\), got \(8,\)", id="gamma"),
        pytest.param({"gn_bias": torch.ones(2, 4)}, r"gn_bias must have shape \(2, 8\), got \(2, 4\)", id="beta"),
        pytest.param({"normalized": [True]}, "normalized must have 2 entries, got 1", id="flags"),
        pytest.param({"xs": [torch.ones(2, 8)]}, r"xs must hold maps of shape \(N, C, H, W\), got \(2, 8\)", id="rank"),
    ],
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    xs, weights, gamma, beta = _inputs()
    arguments: dict[str, Any] = {"xs": xs, "weights": weights, "gn_weight": gamma, "gn_bias": beta, "num_groups": 4}
    with pytest.raises(ValueError, match=message):
        norm_act_mix(**(arguments | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"eps": "1e-3"}, "eps must be a number, got '1e-3'"),
        ({"eps": None}, "eps must be a number, got None"),
        ({"normalized": "ab"}, "normalized must be a sequence of bools or None, got 'ab'"),
        ({"normalized": 3}, "normalized must be a sequence of bools or None, got 3"),
    ],
    ids=str,
)
def test_wrong_types_name_the_argument(change: dict[str, Any], message: str) -> None:
    xs, weights, gamma, beta = _inputs()
    with pytest.raises(TypeError, match=message):
        norm_act_mix(xs, weights, gamma, beta, 4, **change)


def test_numbers_of_other_libraries() -> None:
    xs, weights, gamma, beta = _inputs()
    y = norm_act_mix(xs, weights, gamma, beta, np.int64(4), eps=Fraction(1, 8), normalized=[np.True_, np.False_])
    assert torch.equal(y, norm_act_mix(xs, weights, gamma, beta, 4, eps=0.125, normalized=[True, False]))


def test_raw_ops_pass_opcheck() -> None:
    xs, weights, gamma, beta = _inputs()
    leaves = [x.requires_grad_() for x in xs]
    parameters = [t.requires_grad_() for t in (weights, gamma, beta)]
    torch.library.opcheck(torch.ops.nasdet.norm_act_mix.default, (leaves, *parameters, 4, 1e-5, [1, 0], False))
    with torch.no_grad():
        _, mean, rstd = torch.ops.nasdet.norm_act_mix(xs, weights, gamma, beta, 4, 1e-5, [1, 1], False)
    plain = [t.detach() for t in (weights, gamma, beta)]
    arguments = (torch.randn(2, 8, 5, 6), [x.detach() for x in xs], *plain, mean, rstd, 4, [1, 1])
    torch.library.opcheck(torch.ops.nasdet.norm_act_mix_backward.default, arguments, test_utils="test_faketensor")
    torch.library.opcheck(
        torch.ops.nasdet.norm_act_mix_backward_.default, arguments, test_utils=("test_schema", "test_faketensor")
    )
