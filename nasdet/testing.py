"""Comparisons for tests of operators: graded, so that a failure says what kind of wrong it is."""

from __future__ import annotations

import torch
from torch import Tensor

from nasdet._cases import Case, Inputs, tolerance

__all__ = ["Case", "Inputs", "assert_close", "assert_gradient_matches", "tolerance"]


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
