"""The new backend's values and gradients are the reference's, on every case."""

from __future__ import annotations

import torch

import nasdet.ops  # noqa: F401  enters the operators
from nasdet._dispatch import OPS
from nasdet.testing import Inputs, assert_close, tolerance

op = OPS["scale"]
for case in op.cases:
    results = []
    for backend in ("triton", "reference"):
        (x, factor), _ = case.make(Inputs(torch.float32))
        x.requires_grad_(), factor.requires_grad_()
        y = op.call(x, factor, backend=backend)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), (x, factor))])
    for got, expected in zip(*results, strict=True):
        atol = tolerance(torch.float32, max(expected.numel(), 120), 10.0)
        assert_close(got, expected, atol, case.id)
print("same")
