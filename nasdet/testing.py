"""For tests of operators: their arguments and results, and comparisons that say what kind of wrong it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from nasdet._cases import Case, Inputs, tolerance
from nasdet._dispatch import Op

__all__ = [
    "Case",
    "Inputs",
    "assert_close",
    "assert_gradient_matches",
    "double",
    "has_data_dependent_size",
    "tensors",
    "tolerance",
    "with_leaves",
]


def tensors(values: Any) -> list[Tensor]:
    """The tensors of an op's arguments or results: one, a tuple, a list."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def double(values: Any) -> Any:
    """The same values with every floating-point tensor in float64."""
    return tree_map_only(Tensor, lambda t: t.detach().double() if t.is_floating_point() else t, values)


def with_leaves(op: Op, args: Sequence[Any]) -> tuple[list[Any], list[Tensor]]:
    """The arguments with fresh leaves in the differentiable places, and those leaves.

    An op without such places gets leaves everywhere: its outputs must not ask for a gradient.
    """
    leaves: list[Tensor] = []

    def leaf(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        leaves.append(tensor.detach().requires_grad_())
        return leaves[-1]

    places = op.differentiable or range(len(args))
    return [tree_map_only(Tensor, leaf, a) if i in places else a for i, a in enumerate(args)], leaves


def has_data_dependent_size(op: Op) -> bool:
    """Whether the shape of an output depends on values, by what the op's fake says."""
    args, kwargs = op.cases[0].make(Inputs(torch.float32))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fakes, fake_kwargs = tree_map_only(Tensor, mode.from_tensor, (tuple(args), dict(kwargs)))
            op.call(*fakes, **fake_kwargs)
    except DynamicOutputShapeException:
        return True
    return False


def assert_close(actual: Tensor, expected: Tensor, atol: float, what: str) -> None:
    """Elementwise: no NaN where there should be none, and no error above ``atol``."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return
    error = (actual.double() - expected.double()).abs()
    worst = error.nan_to_num(nan=float("inf")).max().item()
    index = int(error.nan_to_num(nan=float("inf")).argmax())
    assert worst <= atol, (
        f"{what}: error {worst:.3e} > {atol:.3e} at element {index}: got {actual.flatten()[index].item():.6g}, "
        f"expected {expected.flatten()[index].item():.6g}"
    )


def assert_gradient_matches(actual: Tensor, expected: Tensor, atol: float, what: str) -> None:
    """Elements, relative L2, direction and silently zero rows (first dimension) of one gradient."""
    assert_close(actual, expected, atol, what)
    a, e = actual.double().flatten(), expected.double().flatten()
    norm = e.norm().item()
    if norm == 0:
        assert a.norm().item() <= atol * max(e.numel(), 1) ** 0.5, f"{what}: not zero where it should be"
        return
    bound = atol * e.numel() ** 0.5 / norm
    assert (a - e).norm().item() / norm <= bound, f"{what}: relative L2 error above {bound:.3e}"
    cosine = (torch.dot(a, e) / (a.norm() * e.norm())).item()
    assert cosine >= 1 - max(bound, 1e-12), f"{what}: points elsewhere, cosine {cosine:.6f}"
    rows_a, rows_e = actual.reshape(actual.shape[0], -1), expected.reshape(expected.shape[0], -1)
    visible = rows_e.double().abs().amax(1) > 2 * atol
    silent = visible & (rows_a.abs().amax(1) == 0)
    assert not silent.any(), f"{what}: rows {silent.nonzero().flatten().tolist()} are zero"
