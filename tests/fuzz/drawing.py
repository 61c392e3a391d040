"""Random inputs of one fuzz case, all from one seed, and the comparison with a float64 reference."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nasdet.testing import assert_close

DTYPES = (torch.float32, torch.float32, torch.float64, torch.float16, torch.bfloat16)
EPS32 = torch.finfo(torch.float32).eps


class Draw:
    """The dice of one case: ``choice``, ``randint``, ... of ``random.Random``, tensors, layouts, and what was drawn."""

    def __init__(self, seed: int, op: str, index: int, backend: str) -> None:
        self.random = random.Random(f"{seed} {op} {index}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))
        self.backend = backend
        self.notes: dict[str, Any] = {}

    def note(self, **values: Any) -> None:
        """Remember what a failure should say of the case."""
        self.notes.update(values)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def choice(self, options: Sequence[Any]) -> Any:
        return self.random.choice(options)

    def size(self, largest: int) -> int:
        """Mostly small, sometimes 0, seldom ``largest``."""
        if self.chance(0.03):
            return 0
        return self.random.randint(1, largest if self.chance(0.15) else min(largest, 7))

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator) * scale

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(shape, generator=self.generator) * (high - low) + low

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 in ``low..high``, both ends included."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def laid_out(self, tensor: Tensor, expandable: bool = False) -> Tensor:
        """The same values in some layout: contiguous, channels_last, or any order of dimensions amid NaN, -1 or 255.

        With ``expandable`` also a dimension of stride 0, which makes its values equal.
        """
        if self.chance(0.3):
            return tensor.contiguous()
        if tensor.dim() == 4 and self.chance(0.4):
            return tensor.contiguous(memory_format=torch.channels_last)
        if expandable and tensor.dim() and tensor.numel() and self.chance(0.15):
            dim = self.random.randrange(tensor.dim())
            return tensor.narrow(dim, 0, 1).contiguous().expand(tensor.shape)
        order = self.random.sample(range(tensor.dim()), tensor.dim())
        margins = [(self.random.randint(0, 2), self.random.randint(0, 2)) for _ in order]
        wide = [tensor.shape[d] + sum(m) for d, m in zip(order, margins, strict=True)]
        offset = self.random.randint(0, 3)
        count = offset + torch.Size(wide).numel()
        filler = float("nan") if tensor.is_floating_point() else -1 if tensor.dtype.is_signed else 255
        view = torch.full((count,), filler, dtype=tensor.dtype)[offset:].view(wide)
        for position, (d, (before, _)) in enumerate(zip(order, margins, strict=True)):
            view = view.narrow(position, before, tensor.shape[d])
        view = view.permute([order.index(d) for d in range(tensor.dim())])
        return view.copy_(tensor)


def compare(
    draw: Draw,
    run: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    leaves: Sequence[Tensor],
    bound: Callable[[float], float],
    gradient_bound: Callable[[torch.dtype, float, Tensor], float],
    certain: Tensor | None = None,
) -> None:
    """Values and every gradient of ``run(*leaves)`` against ``exact`` of the same leaves in float64.

    ``bound(largest)`` is the error allowed in values up to ``largest``, ``gradient_bound(dtype, largest, upstream)``
    that in a gradient. The upstream gradient is 0 where ``certain`` is False.
    """
    before = [leaf.clone() for leaf in leaves]
    inputs = [leaf.detach().requires_grad_() for leaf in leaves]
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y, wanted = run(*inputs), exact(*doubles)
    assert_close(y.detach(), wanted.detach(), bound(_largest(wanted)), "y")
    upstream = draw.normal(*wanted.shape).to(y.dtype)
    if certain is not None:
        upstream = upstream * certain
    upstream = draw.laid_out(upstream, expandable=certain is None)
    gradients = torch.autograd.grad(y, inputs, upstream, materialize_grads=True)
    expected = torch.autograd.grad(wanted, doubles, upstream.double(), materialize_grads=True)
    for index, (got, want, leaf) in enumerate(zip(gradients, expected, leaves, strict=True)):
        assert got.dtype == leaf.dtype, f"gradient {index}: dtype {got.dtype}, expected {leaf.dtype}"
        assert_close(got, want, gradient_bound(leaf.dtype, _largest(want), upstream), f"gradient {index}")
    for index, (leaf, copy) in enumerate(zip(leaves, before, strict=True)):
        assert torch.equal(leaf, copy), f"input {index} was written to"


def _largest(tensor: Tensor) -> float:
    return float(tensor.detach().abs().max()) if tensor.numel() else 0.0
