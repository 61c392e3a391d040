"""Forward-mode differentiation and torch.func: never a kernel that would lose what they follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import nasdet.ops  # noqa: F401  enters every op in the registry
from nasdet._dispatch import OPS, Op
from nasdet.testing import Inputs, tensors, with_leaves

DIFFERENTIABLE = [op for op in OPS.values() if op.differentiable]


def _duals(values: Any, tangents: dict[int, Tensor]) -> Any:
    if isinstance(values, Tensor):
        return forward_ad.make_dual(values, tangents[id(values)]) if id(values) in tangents else values
    return [_duals(value, tangents) for value in values] if isinstance(values, list) else values


@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_tangents_are_those_of_the_gradients(op: Op) -> None:
    """<u, J v> by forward mode is <J^T u, v> by the kernels' backward."""
    case = next(c for c in op.cases if not c.large)
    args, leaves = with_leaves(op, case.make(Inputs(torch.float64))[0])
    outputs = tensors(op.call(*args))
    upstream = [torch.randn_like(y) for y in outputs]
    gradients = torch.autograd.grad(outputs, leaves, upstream)
    tangents = {id(leaf): torch.randn_like(leaf) for leaf in leaves}
    backward = sum(float((g * tangents[id(leaf)]).sum()) for g, leaf in zip(gradients, leaves, strict=True))
    with forward_ad.dual_level():
        found = [forward_ad.unpack_dual(y).tangent for y in tensors(op.call(*(_duals(a, tangents) for a in args)))]
        forward = sum(float((u * t.detach()).sum()) for u, t in zip(upstream, found, strict=True))
    assert abs(forward) > 1e-3
    assert forward == pytest.approx(backward, rel=1e-9)


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("op", DIFFERENTIABLE, ids=lambda op: op.name)
def test_kernels_refuse_what_they_would_lose(op: Op) -> None:
    args = next(c for c in op.cases if not c.large).make(Inputs(torch.float32))[0]
    with forward_ad.dual_level(), pytest.raises(ValueError, match="'cpp' cannot run .* left to the reference"):
        op.call(*args, backend="cpp")
    op.call(*args, backend="cpp")
