"""Checks of one case of an op on one backend, shared by the tests on a device and by the interpreter's program."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import nasdet.ops  # noqa: F401  enters every op in the registry
from nasdet._dispatch import OPS, Op
from nasdet.testing import (
    Case,
    Inputs,
    assert_close,
    assert_gradient_matches,
    double,
    tensors,
    tolerance,
    with_leaves,
)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PAD = 1024  # elements before and after every guarded tensor
CANARY = -7.0


def _many_maps_to_mix(inputs: Inputs) -> tuple[Sequence[Any], dict[str, Any]]:
    return ([inputs.randn(3, 11) for _ in range(67)], inputs.weights(67)), {}


def _zero_weight(inputs: Inputs) -> tuple[Sequence[Any], dict[str, Any]]:
    xs, weights = [inputs.randn(2, 3, 33) for _ in range(3)], inputs.weights(3)
    weights[1] = 0
    return (xs, weights), {}


def _many_maps_to_norm(inputs: Inputs) -> tuple[Sequence[Any], dict[str, Any]]:
    gn_weight, gn_bias = inputs.affine(35, 3)
    xs = [inputs.randn(1, 3, 5, 3, layout="channels_last" if p % 2 else "contiguous") for p in range(35)]
    return (xs, inputs.weights(35), gn_weight, gn_bias, 1), {"normalized": [p % 3 > 0 for p in range(35)]}


def _several_chunks(inputs: Inputs) -> tuple[Sequence[Any], dict[str, Any]]:
    gn_weight, gn_bias = inputs.affine(1, 2)
    return ([inputs.randn(1, 2, 131, 129, shift=3.0)], inputs.weights(1), gn_weight, gn_bias, 1), {}


def _convolution(
    inputs: Inputs, x: tuple[int, int, int, int], weight: tuple[int, ...], channels_last: bool = False
) -> tuple[Tensor, Tensor]:
    """Map and kernels; these as ``module.to(memory_format=torch.channels_last)`` leaves them, if wished."""
    kernels = inputs.randn(*weight, scale=(weight[-3] * weight[-1] ** 2) ** -0.5)
    if channels_last:
        kernels = kernels.flatten(0, -4).to(memory_format=torch.channels_last).view(weight)
    return inputs.randn(*x, layout="channels_last" if channels_last else "contiguous"), kernels


def _mixed(
    x: tuple[int, int, int, int], weight: tuple[int, ...], dilations: Sequence[Any], *options: Any, **more: bool
) -> Any:
    def make(inputs: Inputs) -> tuple[Sequence[Any], dict[str, Any]]:
        mix = torch.stack([inputs.weights(weight[0]) for _ in range(weight[1])], dim=1)
        return (*_convolution(inputs, x, weight, **more), mix, dilations, *options), {}

    return make


def _grouped(
    x: tuple[int, int, int, int], weight: tuple[int, ...], dilations: Sequence[Any], *options: Any, **more: bool
) -> Any:
    def make(inputs: Inputs) -> tuple[Sequence[Any], dict[str, Any]]:
        return (*_convolution(inputs, x, weight, **more), dilations, *options), {}

    return make


# What only the GPU kernels have to be afraid of: lists longer than one launch takes, slices longer than one chunk,
# channels of several tiles of which the last is not full, kernels in the layout that the products read.
EXTRA_CASES = {
    "mix": (Case("many-maps", _many_maps_to_mix), Case("zero-weight-vector", _zero_weight)),
    "norm_act_mix": (Case("many-maps", _many_maps_to_norm), Case("several-chunks", _several_chunks)),
    "mixed_dilation_conv2d": (
        Case("several-blocks", _mixed((1, 72, 6, 7), (2, 137, 72, 3, 3), (1, (1, 2)), 1, 1)),
        Case("several-chunks", _mixed((2, 3, 40, 30), (2, 2, 3, 1, 1), (1, 3), 1, 1)),
        Case("kernels-channels-last", _mixed((1, 16, 5, 6), (2, 16, 16, 3, 3), (1, 2), 1, 1, channels_last=True)),
    ),
    "grouped_dilation_conv2d": (
        Case("several-blocks", _grouped((1, 72, 6, 7), (137, 72, 3, 3), (1, (1, 2)), (70, 67), 1, 1)),
        Case("several-chunks", _grouped((2, 3, 40, 30), (2, 3, 1, 1), (1,), (2,), 1, 1)),
        Case(
            "kernels-channels-last", _grouped((2, 32, 5, 6), (48, 32, 3, 3), (1, 2), (16, 32), 2, 1, channels_last=True)
        ),
        Case("several-widths", _grouped((1, 40, 2, 3), (48, 40, 3, 3), (2, (1, 2)), (40, 8), 1, 1)),
        Case("joined-groups", _grouped((1, 24, 6, 5), (48, 3, 3, 3), (1, 2), (24, 24), 2, 8)),
    ),
}


def cases_of(op: Op, large: bool = False) -> list[Case]:
    return [case for case in op.cases if large or not case.large] + list(EXTRA_CASES.get(op.name, ()))


def case_named(op: str, name: str) -> Case:
    return next(case for case in cases_of(OPS[op], large=True) if case.id == name)


def typical_case(op: Op) -> Case:
    """One case for what no case decides: mixed layouts where the op has such, else the largest small one."""
    small = [case for case in op.cases if not case.large]
    named = [case for case in small if case.id == "mixed-layouts"]
    return named[0] if named else max(small, key=lambda case: sum(t.numel() for t in tensors(case.make(Inputs()))))


def filler(dtype: torch.dtype) -> float | int:
    """What nobody should read: NaN, or the least integer."""
    return float("nan") if dtype.is_floating_point else torch.iinfo(dtype).min


def embedded(tensor: Tensor) -> Tensor:
    """A copy with the same strides amid fillers: what a kernel reads beyond it, or between its elements, shows."""
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    buffer = torch.full((span + 2 * PAD,), filler(tensor.dtype), dtype=tensor.dtype, device=tensor.device)
    view = buffer.as_strided(tensor.shape, tensor.stride(), PAD)
    if tensor.numel() and 0 not in tensor.stride():
        view.copy_(tensor)
    elif tensor.numel():
        buffer[PAD : PAD + span] = tensor.as_strided((span,), (1,))
    return view


@contextlib.contextmanager
def guarded_allocations() -> Iterator[list[Tensor]]:
    """Within the block, what ``empty_like`` and ``new_empty`` return is fillers, with canaries before and after it."""
    buffers: list[Tensor] = []
    empty_like, new_empty = torch.empty_like, Tensor.new_empty

    def guard(tensor: Tensor) -> Tensor:
        buffer = torch.full((tensor.numel() + 2 * PAD,), CANARY, dtype=tensor.dtype, device=tensor.device)
        buffer[PAD : PAD + tensor.numel()] = filler(tensor.dtype)
        buffers.append(buffer)
        return buffer.as_strided(tensor.shape, tensor.stride(), PAD)

    def guarded_empty_like(*args: Any, **kwargs: Any) -> Tensor:
        return guard(empty_like(*args, **kwargs))

    def guarded_new_empty(*args: Any, **kwargs: Any) -> Tensor:
        return guard(new_empty(*args, **kwargs))

    with mock.patch.object(torch, "empty_like", guarded_empty_like):
        with mock.patch.object(Tensor, "new_empty", guarded_new_empty):
            yield buffers
    for buffer in buffers:
        ends = torch.cat([buffer[:PAD], buffer[-PAD:]])
        assert bool((ends == CANARY).all()), f"written outside a tensor of {buffer.numel() - 2 * PAD} elements"


@contextlib.contextmanager
def deterministic_algorithms(on: bool = True) -> Iterator[None]:
    """Sums in an order of their own, where an op has a slower form that gives it; nothing changes when not ``on``."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(on or before, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


@contextlib.contextmanager
def tf32_products(on: bool) -> Iterator[None]:
    """Convolutions of float32 in TF32, as torch has them by default, or as exact as :func:`check` expects them."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, on
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def upstream_of(y: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(y.shape, generator=generator).to(y.dtype).to(y.device)


def gradients_of(op: Op, outputs: Sequence[Tensor], leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Of every differentiable output, for ``upstream_of`` it; () for an op that has no gradients, which is checked."""
    ys = [y for y in outputs if y.requires_grad]
    if not op.differentiable:
        assert not ys, "no argument is differentiable"
        return ()
    return torch.autograd.grad(ys, leaves, [embedded(upstream_of(y)) for y in ys])


def run(
    op: Op, case: Case, dtype: torch.dtype, device: str, backend: str, tf32: bool = False, **more: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients, between guards."""
    raw, kwargs = tree_map_only(Tensor, embedded, tuple(case.make(Inputs(dtype, device))))
    args, leaves = with_leaves(op, raw)
    with tf32_products(tf32), guarded_allocations() as buffers:
        outputs = tensors(op.call(*args, **kwargs, **more, backend=backend))
        gradients = gradients_of(op, outputs, leaves)
        assert buffers or backend != "triton", "no allocation went through the guards"
    assert all(y.dtype == dtype for y in outputs if y.is_floating_point())
    assert not gradients or all(g.dtype == x.dtype for g, x in zip(gradients, leaves, strict=True))
    return [y.detach() for y in outputs], list(gradients)


def in_float64(
    op: Op, raw: Sequence[Any], kwargs: dict[str, Any], outputs: Sequence[Tensor], size_of: bool = False
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What the reference gives in float64: outputs, the gradients of ``upstream_of(outputs)``, and these.

    ``size_of``: of the magnitudes of all that is multiplied and summed, which bound how far a rounding can go.
    """
    exact_raw: list[Any] = double(list(raw))
    if size_of:
        exact_raw = [value.abs() if isinstance(value, Tensor) else value for value in exact_raw]
    args, leaves = with_leaves(op, exact_raw)
    exact = tensors(op.reference(*args, **double(dict(kwargs))))
    if not op.differentiable:
        return exact, [], []
    ups = [upstream_of(y).double() for y, e in zip(outputs, exact, strict=True) if e.requires_grad]
    ups = [up.abs() for up in ups] if size_of else ups
    found = torch.autograd.grad([e for e in exact if e.requires_grad], leaves, ups, allow_unused=True)
    gradients = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves, strict=True)]
    return [e.detach() for e in exact], gradients, ups


def check(op: Op, case: Case, dtype: torch.dtype, device: str, backend: str, deterministic: bool = False) -> None:
    """Outputs and every gradient against the reference in float64; integer outputs to the bit."""
    raw, kwargs = case.make(Inputs(dtype, device))
    with deterministic_algorithms(deterministic):  # not for the reference: torch's own products may have no such form
        outputs, gradients = run(op, case, dtype, device, backend)
    exact_outputs, wanted, upstream = in_float64(op, raw, dict(kwargs), outputs)
    assert outputs
    for index, (y, exact) in enumerate(zip(outputs, exact_outputs, strict=True)):
        if not exact.is_floating_point():
            assert y.dtype == exact.dtype and torch.equal(y, exact), f"output {index}: got {y}, expected {exact}"
            continue
        scale = exact.abs().max().item() if exact.numel() else 0.0
        bound = tolerance(dtype, op.reduce_len(*raw), scale * case.condition)
        assert_close(y, exact, bound, f"output {index}")
    if not op.differentiable:
        return
    terms = sum(up.numel() for up in upstream)
    for index, (actual, expected) in enumerate(zip(gradients, wanted, strict=True)):
        size = max((t.abs().max().item() for t in (expected, *upstream) if t.numel()), default=0.0)
        bound = tolerance(actual.dtype, terms, size * case.condition)
        what = f"gradient of leaf {index}"
        if case.large and actual.shape == outputs[0].shape:
            actual = ignoring_flips(actual, expected, bound, what)
        assert_gradient_matches(actual, expected, bound, what)


def check_tf32(op: Op, case: Case, device: str, backend: str, deterministic: bool = False) -> None:
    """Outputs and gradients of a multilinear op whose float32 products are made in TF32."""
    raw, kwargs = case.make(Inputs(torch.float32, device))
    with deterministic_algorithms(deterministic):
        outputs, gradients = run(op, case, torch.float32, device, backend, tf32=True)
    exact, wanted, _ = in_float64(op, raw, dict(kwargs), outputs)
    sizes, gradient_sizes, _ = in_float64(op, raw, dict(kwargs), outputs, size_of=True)
    names = [*(f"output {i}" for i in range(len(outputs))), *(f"gradient of leaf {i}" for i in range(len(gradients)))]
    results = zip([*outputs, *gradients], [*exact, *wanted], [*sizes, *gradient_sizes], names, strict=True)
    for actual, expected, size, name in results:
        assert_tf32(actual, expected, size, max(op.reduce_len(*raw), sum(y.numel() for y in outputs)), name)


# TF32 has 10 bits of mantissa. The kernels hand float32 to the matrix units, which read these bits and drop the 13
# others (no `cvt.rna` stands before a product): an operand is off by less than 2^-10 of itself, a product of two by
# less than TF32_PRODUCT of itself, and a sum by less than that of the sum of magnitudes. With random signs the L2 norm
# of many sums is off by no more than the root mean square of the products' errors, the largest being TF32_PRODUCT.
TF32_PRODUCT = 2 * 2**-10 + 2**-20
ENOUGH = 64  # values for a norm to be near its mean
LEAST_TF32 = 2**-14  # relative L2; random operands lose 2^-11 to 2^-10, and float32's sums 2^-20


def assert_tf32(actual: Tensor, expected: Tensor, size: Tensor, terms: int, what: str) -> None:
    """``actual`` is ``expected`` but for TF32's rounding, and shows it. ``size``: the sums of magnitudes."""
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not expected.numel():
        return
    error = (actual.double() - expected).abs()
    bound = TF32_PRODUCT * size + tolerance(torch.float32, terms, 1.0) * size
    wrong = ~(error <= bound)  # a NaN is wrong
    assert not wrong.any(), (
        f"{what}: {int(wrong.sum())} elements beyond what TF32 may do, the first {wrong.nonzero()[0]}"
    )
    if expected.numel() < ENOUGH:
        return
    distance = (error.norm() / expected.norm()).item()
    assert distance <= TF32_PRODUCT, f"{what}: relative L2 error {distance:.2e}, TF32 explains {TF32_PRODUCT:.2e}"
    assert distance >= LEAST_TF32, f"{what}: relative L2 error {distance:.2e}, so it was not computed in TF32"


def ignoring_flips(actual: Tensor, expected: Tensor, bound: float, what: str) -> Tensor:
    """``actual`` without the few elements whose rectifier is within a rounding of its kink: they may go either way."""
    wrong = (actual.double() - expected).abs() > bound
    assert int(wrong.sum()) <= actual.numel() // 100_000, f"{what}: {int(wrong.sum())} elements are wrong"
    return torch.where(wrong, expected.to(actual.dtype), actual)
