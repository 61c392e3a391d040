"""The ops on a CUDA device: every backend, case and dtype, and what only a device has (streams, graphs, its memory)."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import op_checks
import pytest
import tiles
import torch
from pairs import BACKENDS, PAIRS, rows_of
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from nasdet._dispatch import Backend, Op
from nasdet.testing import Case, Inputs, has_data_dependent_size

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
# Their gradients are summed by atomics, in any order, unless torch is told to use deterministic algorithms.
ATOMIC = ("roi_align", "multilevel_roi_align")


def marks_of(op: Op, case: Case) -> Any:
    """The reference's samples of a thousand RoIs take up to 10 GB in float64: not in sixteen processes at once."""
    return pytest.mark.whole_gpu if case.large and op.name in ATOMIC else ()


ROWS = [
    pytest.param(op, backend, case, id=f"{op.name}-{backend.name}-{case.id}", marks=marks_of(op, case))
    for op, backend in PAIRS
    for case in op_checks.cases_of(op, large=True)
]
# Matrix products, which are made of float32 in TF32 where torch's own may be: by default.
PRODUCTS = ("mixed_dilation_conv2d", "grouped_dilation_conv2d")
PRODUCT_ROWS = [row for row in ROWS if row.values[0].name in PRODUCTS and row.values[1].name == "triton"]
ATOMIC_ROWS = [row for row in ROWS if row.values[0].name in ATOMIC]
# For graphs: an op whose size depends on the data has to wait for it, which no graph can hold.
FORMS = [
    pytest.param(op, backend, deterministic, id=f"{op.name}-{backend.name}" + "-deterministic" * deterministic)
    for op, backend in PAIRS
    if not has_data_dependent_size(op)
    for deterministic in ((False, True) if op.name in ATOMIC else (False,))
]
DTYPES = {**op_checks.DTYPES, "fp64": torch.float64}


@pytest.fixture(autouse=True)
def _need(request: pytest.FixtureRequest, require: Callable[[str, str | None], None]) -> Iterator[None]:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    if backend := parameters.get("backend"):
        require(backend.name, backend.available())
    yield
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # the other workers have no use for what this one keeps


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(("op", "backend", "case"), ROWS)
def test_matches_float64(op: Op, backend: Backend, case: Case, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and backend.name == "triton":
        args, kwargs = op.cases[0].make(Inputs(dtype, DEVICE))
        with pytest.raises(ValueError, match="float64"):
            op.call(*args, **kwargs, backend="triton")
        return
    op_checks.check(op, case, dtype, DEVICE, backend.name)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize(("op", "backend", "case"), ATOMIC_ROWS)
def test_deterministic_form_matches_float64(op: Op, backend: Backend, case: Case, dtype: torch.dtype) -> None:
    op_checks.check(op, case, dtype, DEVICE, backend.name, deterministic=True)


@pytest.mark.parametrize(("op", "backend", "case"), PRODUCT_ROWS)
def test_tf32_is_float64_but_for_its_roundings(op: Op, backend: Backend, case: Case) -> None:
    op_checks.check_tf32(op, case, DEVICE, backend.name)


@pytest.mark.needs("triton")
@pytest.mark.parametrize("shape", tiles.CHANNELS)
@pytest.mark.parametrize(("name", "kind", "index"), tiles.configurations())
def test_every_tile_matches_float64(name: str, kind: str, index: int, shape: str) -> None:
    tiles.check(name, kind, index, shape, DEVICE)


@pytest.mark.parametrize(("op", "backend", "case"), ROWS)
def test_runs_twice_bit_for_bit(op: Op, backend: Backend, case: Case) -> None:
    with op_checks.deterministic_algorithms():
        first = op_checks.run(op, case, torch.bfloat16, DEVICE, backend.name)
        second = op_checks.run(op, case, torch.bfloat16, DEVICE, backend.name)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_compiles_without_graph_breaks(op: Op, backend: Backend) -> None:
    torch._dynamo.reset()
    for case in op.cases:
        if case.large:
            continue
        raw, kwargs = case.make(Inputs(torch.float32, DEVICE))
        args, leaves = op_checks.with_leaves(op, raw)

        def step(*inputs: Any, kwargs: Any = kwargs) -> list[Tensor]:
            outputs = op_checks.tensors(op.call(*inputs, **kwargs, backend=backend.name))
            return [y.sin() if y.is_floating_point() else y + 1 for y in outputs]

        torch._dynamo.reset()
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            outputs = torch.compile(step, fullgraph=True)(*args)
        expected = step(*args)
        torch.testing.assert_close(outputs, expected)
        if op.differentiable and expected[0].numel():
            gradients = zip(
                op_checks.gradients_of(op, outputs, leaves), op_checks.gradients_of(op, expected, leaves), strict=True
            )
            for a, b in gradients:
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_runs_on_the_current_stream(op: Op, backend: Backend) -> None:
    """The inputs are written late on a stream of its own: a kernel on any other stream would read fillers."""
    raw, kwargs = op_checks.typical_case(op).make(Inputs(torch.float32, DEVICE))
    expected = op_checks.tensors(op.call(*raw, **kwargs, backend=backend.name))  # compiled and loaded by now
    values = op_checks.tensors(list(raw))
    late = [torch.full_like(x, float("nan")) if x.is_floating_point() else torch.zeros_like(x) for x in values]
    places = iter(late)
    args = tree_map_only(Tensor, lambda _: next(places), list(raw))
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_000_000_000)  # clock cycles, about half a second
        for x, value in zip(late, values, strict=True):
            x.copy_(value)
        outputs = op_checks.tensors(op.call(*args, **kwargs, backend=backend.name))
    if not has_data_dependent_size(op):  # else the op has waited for the size itself
        assert not stream.query(), "the stream was done too early to tell"
    stream.synchronize()
    assert all(torch.equal(y, wanted) for y, wanted in zip(outputs, expected, strict=True))


@pytest.mark.parametrize(("op", "backend", "deterministic"), FORMS)
def test_records_into_a_cuda_graph(op: Op, backend: Backend, deterministic: bool) -> None:
    raw, kwargs = op_checks.typical_case(op).make(Inputs(torch.float32, DEVICE))
    args, leaves = op_checks.with_leaves(op, raw)

    def step() -> tuple[list[Tensor], tuple[Tensor, ...]]:
        with op_checks.deterministic_algorithms(deterministic):
            outputs = op_checks.tensors(op.call(*args, **kwargs, backend=backend.name))
            ys = [y for y in outputs if y.requires_grad]
            gradients = torch.autograd.grad(ys, leaves, upstream) if op.differentiable else ()
        return [y.detach() for y in outputs], gradients

    upstream = [op_checks.upstream_of(y) for y in op_checks.tensors(op.call(*args, **kwargs)) if y.requires_grad]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels compile and load outside the graph
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    for _ in range(2):  # replays read what the inputs hold then
        with torch.no_grad():
            for leaf in leaves:
                leaf.mul_(0.75)
        graph.replay()
        torch.cuda.synchronize()
        replayed = [[t.clone() for t in part] for part in recorded]
        outputs, gradients = step()
        assert all(torch.equal(a, b) for a, b in zip(replayed[0], outputs, strict=True))
        if op.name in ATOMIC and not deterministic:
            torch.testing.assert_close(replayed[1], list(gradients), rtol=1e-4, atol=1e-5)
        else:
            assert all(torch.equal(a, b) for a, b in zip(replayed[1], gradients, strict=True))


@pytest.mark.parametrize(("op", "backend"), rows_of("mixed_dilation_conv2d", "grouped_dilation_conv2d"))
def test_compiles_to_cuda_graphs_for_shapes_not_seen_before(op: Op, backend: Backend) -> None:
    """Inductor warms up on its graphs' own memory, and refuses what a kernel keeps of it for later calls."""
    raw, kwargs = op_checks.typical_case(op).make(Inputs(torch.float32, DEVICE))
    args, leaves = op_checks.with_leaves(op, raw)
    flat, structure = tree_flatten(list(args))

    def step(*inputs: Any) -> Tensor:
        return op.call(*tree_unflatten(list(inputs), structure), **kwargs, backend=backend.name).sin()

    def results(function: Callable[..., Tensor]) -> list[Tensor]:
        y = function(*flat)
        return [y.detach().clone(), *(g.clone() for g in torch.autograd.grad(y.sum(), leaves))]

    tables = importlib.import_module("nasdet.kernels._dilation_plan")._on_device
    torch._dynamo.reset()
    with mock.patch.dict(tables, clear=True):  # put back afterwards: graphs that other tests recorded may read them
        compiled = torch.compile(step, fullgraph=True, mode="reduce-overhead")
        for _ in range(4):  # warms up, records, replays
            torch.compiler.cudagraph_mark_step_begin()
            found = results(compiled)
            for actual, wanted in zip(found, results(step), strict=True):
                torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
        assert tables
    torch._dynamo.reset()


@pytest.mark.parametrize(("op", "backend"), rows_of("mix"))
def test_zero_weight_keeps_a_nan_out(op: Op, backend: Backend) -> None:
    xs = [torch.randn(2, 3, 50, device=DEVICE), torch.full((2, 3, 50), float("nan"), device=DEVICE)]
    y = op.call(xs, torch.tensor([0.5, 0.0], device=DEVICE), backend=backend.name)
    assert torch.equal(y, 0.5 * xs[0])


@pytest.mark.parametrize(("op", "backend"), rows_of("mix"))
def test_unaligned_maps(op: Op, backend: Backend) -> None:
    xs = [torch.randn(1001, device=DEVICE)[1:], torch.randn(1003, device=DEVICE)[3:]]
    weights = torch.tensor([0.25, 0.75], device=DEVICE)
    y = op.call(xs, weights, backend=backend.name)
    torch.testing.assert_close(y, 0.25 * xs[0] + 0.75 * xs[1])


@pytest.mark.parametrize(("op", "backend"), rows_of("norm_act_mix"))
def test_backward_over_the_maps_is_the_same(op: Op, backend: Backend) -> None:
    for name in ("repshare", "repshare-nhwc", "mixed-layouts"):
        raw, kwargs = op_checks.case_named(op.name, name).make(Inputs(torch.bfloat16, DEVICE))
        results = []
        for overwrite in (False, True):
            args, leaves = op_checks.with_leaves(op, raw)
            args[0] = [x.clone() for x in args[0]]  # what is overwritten may not be a leaf
            y = op.call(*args, **kwargs, backend=backend.name, overwrite_inputs=overwrite)
            results.append(torch.autograd.grad(y, leaves, op_checks.upstream_of(y)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), name


@pytest.mark.needs("two_gpus")
@pytest.mark.parametrize(("op", "backend"), BACKENDS)
def test_runs_on_the_tensors_device(op: Op, backend: Backend) -> None:
    with torch.cuda.device(0):
        op_checks.check(op, op.cases[0], torch.float32, "cuda:1", backend.name)
        assert torch.cuda.current_device() == 0


@pytest.mark.parametrize(("op", "backend"), rows_of("mix"))
def test_sums_in_float32(op: Op, backend: Backend) -> None:
    """300 bfloat16 maps of 1: a sum kept in bfloat16 would stop growing at 256."""
    xs = [torch.ones(129, dtype=torch.bfloat16, device=DEVICE) for _ in range(300)]
    y = op.call(xs, torch.ones(300, device=DEVICE), backend=backend.name)
    assert torch.equal(y, torch.full_like(y, 300))
