"""Every op, every backend that runs on this CPU, every case: values, gradients, schema, compile, determinism."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import nasdet.ops  # noqa: F401  enters every op in the registry
from nasdet._dispatch import OPS, Backend, Op
from nasdet.testing import (
    Case,
    Inputs,
    assert_close,
    assert_gradient_matches,
    double,
    has_data_dependent_size,
    tensors,
    tolerance,
    with_leaves,
)

DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "fp16": torch.float16, "bf16": torch.bfloat16}
ROWS = [
    pytest.param(op, backend, case, id=f"{op.name}-{backend.name}-{case.id}")
    for op in OPS.values()
    for backend in op.backends
    if backend.name in ("cpp", "folded", "reference")
    for case in op.cases
    if not case.large
]
COMPILED_ROWS = [row for row in ROWS if row.values[1].name == "cpp"]
DIFFERENTIABLE_ROWS = [row for row in COMPILED_ROWS if row.values[0].differentiable]


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty holds NaN under deterministic algorithms, so reading what was never written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _need(request: pytest.FixtureRequest) -> None:
    backend = request.node.callspec.params.get("backend") if hasattr(request.node, "callspec") else None
    if isinstance(backend, Backend) and (reason := backend.available()):
        request.getfixturevalue("require")(backend.name, reason)


def _values(outputs: list[Tensor]) -> list[Tensor]:
    """The outputs that gradients go through."""
    return [y for y in outputs if y.requires_grad]


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(("op", "backend", "case"), ROWS)
def test_values_and_gradients_match_float64(op: Op, backend: Backend, case: Case, dtype: torch.dtype) -> None:
    """Floating-point outputs and gradients within the rounding of the arithmetic, integer outputs to the bit."""
    raw, kwargs = case.make(Inputs(dtype))
    args, leaves = with_leaves(op, raw)
    exact_args, exact_leaves = with_leaves(op, double(list(raw)))
    outputs = tensors(op.call(*args, **kwargs, backend=backend.name))
    exact_outputs = tensors(op.reference(*exact_args, **double(dict(kwargs))))
    assert outputs
    for index, (y, exact) in enumerate(zip(outputs, exact_outputs, strict=True)):
        if not exact.is_floating_point():
            assert y.dtype == exact.dtype and torch.equal(y, exact), f"output {index}: got {y}, expected {exact}"
            continue
        assert y.dtype == dtype
        scale = exact.abs().max().item() if exact.numel() else 0.0
        assert_close(y, exact, tolerance(dtype, op.reduce_len(*raw), scale * case.condition), f"output {index}")
    if op.differentiable:
        _check_gradients(_values(outputs), leaves, _values(exact_outputs), exact_leaves, case)
    else:
        assert not _values(outputs), "no argument is differentiable"


def _check_gradients(
    ys: list[Tensor], leaves: list[Tensor], exacts: list[Tensor], exact_leaves: list[Tensor], case: Case
) -> None:
    generator = torch.Generator().manual_seed(7)
    upstream = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in ys]
    gradients = torch.autograd.grad(ys, leaves, upstream, allow_unused=True)
    expected = torch.autograd.grad(exacts, exact_leaves, [g.double() for g in upstream], allow_unused=True)
    largest = max((g.abs().max().item() for g in upstream if g.numel()), default=0.0)
    terms = sum(exact.numel() for exact in exacts)
    for index, (actual, wanted, leaf) in enumerate(zip(gradients, expected, leaves, strict=True)):
        wanted = torch.zeros_like(leaf, dtype=torch.float64) if wanted is None else wanted
        actual = torch.zeros_like(leaf) if actual is None else actual
        assert actual.dtype == leaf.dtype
        size = wanted.abs().max().item() if wanted.numel() else 0.0
        bound = tolerance(leaf.dtype, terms, max(size, largest if size else 0.0) * case.condition)
        assert_gradient_matches(actual, wanted, bound, f"gradient of leaf {index}")


@pytest.mark.parametrize(("op", "backend", "case"), DIFFERENTIABLE_ROWS)
def test_gradcheck(op: Op, backend: Backend, case: Case) -> None:
    raw, kwargs = case.make(Inputs(torch.float64, seed=1))
    args, leaves = with_leaves(op, raw)
    leaves = [leaf for leaf in leaves if 0 not in leaf.stride()]  # gradcheck writes into its inputs
    if sum(leaf.numel() for leaf in leaves) > 4000:
        leaves = leaves[len(leaves) // 2 :]
    assert torch.autograd.gradcheck(
        lambda *_: op.call(*args, **kwargs, backend=backend.name), leaves, fast_mode=True, atol=1e-6, nondet_tol=0.0
    )


@pytest.mark.parametrize(("op", "backend", "case"), COMPILED_ROWS)
def test_compiles_without_graph_breaks(op: Op, backend: Backend, case: Case) -> None:
    raw, kwargs = case.make(Inputs(torch.float32))
    args, leaves = with_leaves(op, raw)

    def step(*inputs: Any) -> list[Tensor]:
        return [y.sin() if y.is_floating_point() else y + 1 for y in tensors(op.call(*inputs, **kwargs))]

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        outputs = torch.compile(step, fullgraph=True, backend="aot_eager")(*args)
    expected = step(*args)
    for y, wanted in zip(outputs, expected, strict=True):
        assert y.stride() == wanted.stride()
        torch.testing.assert_close(y, wanted)
    if op.differentiable and expected[0].numel():
        actual = torch.autograd.grad([y.sum() for y in _values(outputs)], leaves, allow_unused=True)
        gradients = torch.autograd.grad([y.sum() for y in _values(expected)], leaves, allow_unused=True)
        for a, w in zip(actual, gradients, strict=True):
            torch.testing.assert_close(a, w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("op", "backend", "case"), COMPILED_ROWS)
def test_runs_twice_and_on_two_threads_bit_for_bit(op: Op, backend: Backend, case: Case) -> None:
    raw, kwargs = case.make(Inputs(torch.float32))
    args, leaves = with_leaves(op, raw)
    results: list[list[Tensor | None]] = []
    before = torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        outputs = tensors(op.call(*args, **kwargs, backend=backend.name))
        sums = [y.sum() for y in _values(outputs)]
        gradients = torch.autograd.grad(sums, leaves, allow_unused=True) if op.differentiable else ()
        results.append([*(y.detach() for y in outputs), *gradients])
    torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_meta_tensors_take_the_reference(op: Op) -> None:
    args, kwargs = op.cases[0].make(Inputs(torch.float32))
    expected = tensors(op.call(*args, **kwargs))
    on_meta, meta_kwargs = tree_map_only(Tensor, lambda t: t.to("meta"), (tuple(args), dict(kwargs)))
    if has_data_dependent_size(op):
        with pytest.raises(ValueError, match="must hold data, got a meta tensor"):
            op.call(*on_meta, **meta_kwargs)
        return
    outputs = tensors(op.call(*on_meta, **meta_kwargs))
    for y, wanted in zip(outputs, expected, strict=True):
        assert y.device.type == "meta" and y.shape == wanted.shape and y.dtype == wanted.dtype


@pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
def test_backends_explain_themselves(op: Op) -> None:
    args, kwargs = op.cases[0].make(Inputs(torch.float32))
    assert op.backends[-1].name == "reference" and op.backends[-1].available() is None
    with pytest.raises(ValueError, match="backend must be one of"):
        op.call(*args, **kwargs, backend="abacus")
    elsewhere = [backend.name for backend in op.backends if backend.why_not(*args)]
    for name in elsewhere:
        with pytest.raises(ValueError, match=f"{op.name}: backend '{name}' cannot run this call: "):
            op.call(*args, **kwargs, backend=name)
    with nasdet.ops.use_backend("reference"):
        torch.testing.assert_close(op.call(*args, **kwargs), op.reference(*args, **kwargs), rtol=0, atol=0)
    for name in elsewhere:
        with pytest.raises(ValueError, match="cannot run"), nasdet.ops.use_backend(name):
            op.call(*args, **kwargs)


def test_integers_of_numpy_are_taken_everywhere() -> None:
    one, two = np.int64(1), np.int32(2)
    x, boxes = torch.randn(1, 4, 6, 6), torch.tensor([[0, 0, 4, 4.0], [1, 1, 5, 6.0]])
    kernels, rois = torch.randn(4, 2, 3, 3), torch.cat([torch.zeros(2, 1), boxes], 1)
    for call in (
        lambda one, two: nasdet.ops.depthwise_conv2d(x, kernels[:, :1], two, (one, two), one),
        lambda one, two: nasdet.ops.grouped_dilation_conv2d(x, kernels, [one], [two * two], one, two),
        lambda one, two: nasdet.ops.mixed_dilation_conv2d(x, kernels[None], torch.ones(1, 4), [two], one, two),
        lambda one, two: nasdet.ops.roi_align(x, rois, (one, two), 1.0, two),
        lambda one, two: nasdet.ops.multilevel_roi_align([x], rois, two, [1], canonical_level=one, lowest_level=two),
        lambda one, two: nasdet.ops.nms_padded(boxes, boxes[:, 2], 0.5, two)[0],
    ):
        assert torch.equal(call(one, two), call(1, 2))
    limit = nasdet.scratch_limit()
    assert nasdet.scratch_limit(np.int64(limit or 1)) == limit
