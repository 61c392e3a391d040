"""Runs ops in Triton's interpreter and prints a verdict for each case: ``python interpret_ops.py OP...``.

A program of its own, because TRITON_INTERPRET is read when triton is imported.
"""

from __future__ import annotations

import functools
import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

import op_checks
import torch

from nasdet._dispatch import INTERPRETING, OPS
from nasdet.testing import Case, Inputs


def verdict(test: Callable[[], None]) -> str:
    try:
        test()
    except Exception:  # whatever it is, the test that asked for it shows it
        return traceback.format_exc()
    return "right"


def zero_weight_keeps_a_nan_out() -> None:
    xs = [torch.randn(2, 3, 5), torch.full((2, 3, 5), float("nan"))]
    y = OPS["mix"].call(xs, torch.tensor([0.5, 0.0]), backend="triton")
    assert torch.equal(y, 0.5 * xs[0])


def backward_in_place_is_the_same() -> None:
    op = OPS["norm_act_mix"]
    for name in ("odd-channels-nhwc", "mixed-layouts"):
        case = op_checks.case_named("norm_act_mix", name)
        raw, kwargs = case.make(Inputs(torch.float32))
        results = []
        for overwrite in (False, True):
            args, leaves = op_checks.with_leaves(op, raw)
            args[0] = [x.clone() for x in args[0]]  # what is overwritten may not be a leaf
            y = op.call(*args, **kwargs, backend="triton", overwrite_inputs=overwrite)
            results.append(torch.autograd.grad(y, leaves, op_checks.upstream_of(y)))
            changed = any(bool((x != leaf).any()) for x, leaf in zip(args[0], leaves, strict=False))
            assert changed == overwrite, f"{name}: overwrite_inputs={overwrite}, maps overwritten: {changed}"
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), name


def only_what_is_needed() -> None:
    xs, weights = [torch.randn(5, 7) for _ in range(3)], torch.randn(3)
    grad = torch.randn(5, 7)
    both = torch.ops.nasdet.mix_backward_triton(grad, xs, weights, True, True)
    maps_only = torch.ops.nasdet.mix_backward_triton(grad, xs, weights, True, False)
    weights_only = torch.ops.nasdet.mix_backward_triton(grad, xs, weights, False, True)
    assert all(torch.equal(a, b) for a, b in zip(both[0], maps_only[0], strict=True))
    assert maps_only[1].numel() == 0 and weights_only[0] == []
    assert torch.equal(both[1], weights_only[1])


def compiles_without_graph_breaks() -> None:
    for name, case_id in (("mix", "vector"), ("norm_act_mix", "one-group")):
        op, case = OPS[name], op_checks.case_named(name, case_id)
        raw, kwargs = case.make(Inputs(torch.float32))
        args, leaves = op_checks.with_leaves(op, raw)

        def step(*inputs: Any, call: Callable[..., torch.Tensor] = op.call, kwargs: Any = kwargs) -> torch.Tensor:
            return call(*inputs, **kwargs, backend="triton").sin()

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        y, expected = compiled(*args), step(*args)
        torch.testing.assert_close(y, expected)
        gradients = torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)
        for a, b in zip(*gradients, strict=True):
            torch.testing.assert_close(a, b)


def dtypes_of(case: Case) -> dict[str, torch.dtype]:
    """16-bit maps differ in how they are loaded and stored alone: the cases that take seconds need not repeat them."""
    return {"fp32": torch.float32} if case.id.startswith("repshare") else op_checks.DTYPES


PROPERTIES = {
    "mix": (zero_weight_keeps_a_nan_out, only_what_is_needed),
    "norm_act_mix": (backward_in_place_is_the_same, compiles_without_graph_breaks),
}


def main(names: list[str]) -> None:
    assert INTERPRETING, "TRITON_INTERPRET must be 1"
    torch.set_num_threads(1)
    verdicts: dict[str, str] = {}
    for name in names:
        op = OPS[name]
        for case in op_checks.cases_of(op):
            for label, dtype in dtypes_of(case).items():
                check = functools.partial(op_checks.check, op, case, dtype, "cpu", "triton")
                verdicts[f"{name}-{case.id}-{label}"] = verdict(check)
        for test in PROPERTIES.get(name, ()):
            verdicts[f"{name}-{test.__name__}"] = verdict(test)
    print(json.dumps(verdicts))


if __name__ == "__main__":
    main(sys.argv[1:])
