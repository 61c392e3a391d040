"""Runs an op in Triton's interpreter and prints a verdict for each case: ``python interpret_ops.py OP LABEL...``.

Labels are those of :func:`dtypes_of`. A program of its own, because TRITON_INTERPRET is read when triton is imported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import op_checks
import torch
from torch import Tensor

from nasdet._dispatch import INTERPRETING, OPS
from nasdet.ops._triton import ensure_registered
from nasdet.testing import Case, Inputs

CONVOLUTION_OPS = ("mixed_dilation_conv2d", "grouped_dilation_conv2d")


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


def compile_without_graph_breaks(cases: dict[str, str]) -> None:
    for name, case_id in cases.items():
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


def convolution(op: str, case: str = "seventeen-in") -> tuple[list[Tensor], list[Any]]:
    """The tensors of a case as the raw op takes them, and its other arguments."""
    raw, _ = op_checks.case_named(op, case).make(Inputs(torch.float32))
    operands = [value for value in raw if isinstance(value, Tensor)]
    if op == "mixed_dilation_conv2d":
        operands[2] = operands[2].repeat_interleave(operands[1].shape[1] // operands[2].shape[1], dim=1)
    dilations, *splits, stride, groups = raw[len(operands) :]
    pairs = [pair if isinstance(pair, tuple) else (pair, pair) for pair in dilations]
    return operands, [[d for pair in pairs for d in pair], *map(list, splits), stride, stride, groups]


def convolutions_compute_only_what_is_needed(op: str) -> None:
    operands, options = convolution(op)
    raw = getattr(torch.ops.nasdet, f"{op}_backward_triton")
    y = getattr(torch.ops.nasdet, f"{op}_triton")(*operands, *options, 0)
    grad = op_checks.upstream_of(y)
    every = raw(grad, *operands, *options, 0, *(True for _ in operands))
    for wanted in range(len(operands)):
        some = raw(grad, *operands, *options, 0, *(place == wanted for place in range(len(operands))))
        assert torch.equal(some[wanted], every[wanted])
        assert all(result.numel() == 0 for place, result in enumerate(some) if place != wanted)


def convolutions_refuse_other_algorithms(op: str) -> None:
    operands, options = convolution(op)
    raw = getattr(torch.ops.nasdet, f"{op}_triton")
    y = raw(*operands, *options, 0)
    assert torch.equal(raw(*operands, *options, 1), y) and torch.equal(raw(*operands, *options, 4), y)
    for code, name in ((2, "frequency"), (3, "winograd")):
        try:
            raw(*operands, *options, code)
        except ValueError as error:
            assert f"algorithm must be 'direct' on this backend, got '{name}'" in str(error)
        else:
            raise AssertionError(f"{name} was ignored")


def convolutions_pass_opcheck(op: str) -> None:
    operands, options = convolution(op)
    leaves = [value.detach().requires_grad_() for value in operands]
    torch.library.opcheck(getattr(torch.ops.nasdet, f"{op}_triton"), (*leaves, *options, 0))
    grad = torch.ones_like(getattr(torch.ops.nasdet, f"{op}_triton")(*operands, *options, 0))
    needed = [True for _ in operands]
    torch.library.opcheck(
        getattr(torch.ops.nasdet, f"{op}_backward_triton"),
        (grad, *operands, *options, 0, *needed),
        test_utils=("test_schema", "test_faketensor"),
    )


def convolutions_do_not_depend_on_the_tiles(op: str) -> None:
    """Every configuration of every kind gives what the chosen one gives, up to the order of its sums.

    Of few channels; in the grouped form also of so many that tiles and steps have several widths.
    """
    choices = importlib.import_module("nasdet.kernels._dilation_choice")
    cases = ("seventeen-in", "several-widths") if op == "grouped_dilation_conv2d" else ("seventeen-in",)
    seen = {config for case in cases for config in compare_configurations(op, case)}
    assert len(seen) == len({*sum(choices.PRODUCTS.values(), ()), *sum(choices.WEIGHT_PRODUCTS.values(), ())})


def compare_configurations(op: str, case: str) -> set[Any]:
    run, choices = (importlib.import_module(f"nasdet.kernels._dilation_{name}") for name in ("run", "choice"))
    operands, options = convolution(op, case)
    forward, backward = (getattr(torch.ops.nasdet, f"{op}{suffix}_triton") for suffix in ("", "_backward"))
    grad = op_checks.upstream_of(forward(*operands, *options, 0))

    def results() -> list[Tensor]:
        return [forward(*operands, *options, 0), *backward(grad, *operands, *options, 0, *(True for _ in operands))]

    expected, seen = results(), set()
    for products, weight_products in zip(choices.PRODUCTS.values(), choices.WEIGHT_PRODUCTS.values(), strict=True):
        for index in range(max(len(products), len(weight_products))):
            pair = products[index % len(products)], weight_products[index % len(weight_products)]

            def forced(choice: Any, like: Any, launch: Any, pair: Any = pair) -> None:
                config = pair[choice.key[0] == "weights"]
                seen.add(config)
                launch(choice.prepared(config))

            with mock.patch.object(run, "run_fastest", forced):
                for ours, theirs in zip(results(), expected, strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    return seen


def bfloat16_as_on_a_device() -> None:
    """The interpreter multiplies matrices of bfloat16 as bit patterns, and rounds float32 to bfloat16 towards zero.

    Here it widens before products, and rounds to the nearest.
    """
    import numpy
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot, cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(numpy.uint32) << 16).view(numpy.float32), tl.float32)

    def wide_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    def rounding_cast(self: Any, x: Any, to: Any) -> Any:
        if x.dtype.scalar == tl.bfloat16 and to.scalar == tl.float32:
            return widened(x)
        if x.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            narrow = torch.tensor(numpy.asarray(x.data)).bfloat16().view(torch.int16)
            return TensorHandle(narrow.numpy().view(numpy.uint16), tl.bfloat16)
        return cast_impl(self, x, to)

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = wide_dot, rounding_cast


# 16-bit maps differ in how they are loaded, stored and multiplied alone: cases for each of that; the others are fp32.
CONVOLUTIONS_IN_16_BITS = {
    "one-dilation", "plain-dilated", "stride-2", "resnext", "1x1", "dilation-beyond-the-map", "channels-last", "sliced",
    "kernels-channels-last", "joined-groups", "several-widths", "empty",
}  # fmt: skip


# The interpreter checks every sum and product of integers, which takes half of its time: once per case is enough. The
# convolutions have a run of their own for that, which is not among the fast tests.
CHECKED = "fp32-overflow"


def dtypes_of(name: str, case: Case) -> dict[str, torch.dtype]:
    """16-bit maps differ in how they are loaded and stored alone: the cases that take seconds need not repeat them."""
    if name not in CONVOLUTION_OPS:
        return {"fp32": torch.float32} if case.id.startswith("repshare") else op_checks.DTYPES
    every = op_checks.DTYPES if case.id in CONVOLUTIONS_IN_16_BITS else {"fp32": torch.float32}
    return {**every, CHECKED: torch.float32}


def checks_overflow(name: str, label: str) -> bool:
    return label == (CHECKED if name in CONVOLUTION_OPS else "fp32")


@contextlib.contextmanager
def without_overflow_checks(skip: bool) -> Iterator[None]:
    from triton.runtime.interpreter import interpreter_builder

    options = interpreter_builder.options
    if skip:
        interpreter_builder.options = dataclasses.replace(options, sanitize_overflow=False)
    try:
        yield
    finally:
        interpreter_builder.options = options


def compiles_without_graph_breaks() -> None:
    compile_without_graph_breaks({"mix": "vector", "norm_act_mix": "one-group"})


def convolutions_compile_without_graph_breaks(op: str) -> None:
    compile_without_graph_breaks({op: "two-groups"})


def of(op: str, test: Callable[[str], None]) -> Callable[[], None]:
    return functools.update_wrapper(functools.partial(test, op), test)


CONVOLUTIONS = (
    convolutions_compute_only_what_is_needed,
    convolutions_refuse_other_algorithms,
    convolutions_pass_opcheck,
    convolutions_compile_without_graph_breaks,
    convolutions_do_not_depend_on_the_tiles,
)
PROPERTIES: dict[str, tuple[Callable[[], None], ...]] = {
    "mix": (zero_weight_keeps_a_nan_out, only_what_is_needed),
    "norm_act_mix": (backward_in_place_is_the_same, compiles_without_graph_breaks),
    **{op: tuple(of(op, test) for test in CONVOLUTIONS) for op in CONVOLUTION_OPS},
}


def main(name: str, labels: list[str]) -> None:
    assert INTERPRETING, "TRITON_INTERPRET must be 1"
    torch.set_num_threads(1)
    bfloat16_as_on_a_device()
    verdicts: dict[str, str] = {}
    op = OPS[name]
    ensure_registered(name)
    for case in op_checks.cases_of(op):
        for label, dtype in dtypes_of(name, case).items():
            if label in labels:
                check = functools.partial(op_checks.check, op, case, dtype, "cpu", "triton")
                with without_overflow_checks(not checks_overflow(name, label)):
                    verdicts[f"{case.id}-{label}"] = verdict(check)
    with without_overflow_checks(True):
        for test in PROPERTIES.get(name, ()) if "fp32" in labels else ():
            verdicts[test.__name__] = verdict(test)
    print(json.dumps(verdicts))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
