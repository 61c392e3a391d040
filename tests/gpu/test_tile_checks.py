"""The checks of tiles and of TF32 that run on a device: they reach what they are about, and notice what is wrong."""

from __future__ import annotations

import importlib
from typing import Any

import op_checks
import pytest
import tiles
import torch
from torch import Tensor

from nasdet._dispatch import OPS
from nasdet.testing import Case, Inputs


def launched(name: str, kind: str, index: int, shape: str) -> list[tiles.Launch]:
    """What a call and its backward would start on a device of capability 9.0."""
    (dtype, tf32), (op, case) = tiles.KINDS[kind], tiles.case_of(shape, name, kind, index)
    raw, _ = case.make(Inputs(dtype))
    operands = [value.to("meta") for value in raw if isinstance(value, Tensor)]
    dilations, *splits, stride, groups = raw[len(operands) :]
    options = [[d for dilation in dilations for d in (dilation, dilation)], *map(list, splits), stride, stride, groups]
    kernels: Any = importlib.import_module(f"nasdet.kernels.{op}")
    with tiles.forced(name, kind, index, start=False) as launches, op_checks.tf32_products(tf32):
        y = kernels.forward(*operands, *options, 0)
        kernels.backward(y, *operands, *options, 0, *(True for _ in operands))
    return launches


@pytest.mark.needs("triton")
@pytest.mark.parametrize("shape", tiles.CHANNELS)
@pytest.mark.parametrize(("name", "kind", "index"), tiles.configurations())
def test_every_configuration_is_reached(name: str, kind: str, index: int, shape: str) -> None:
    config = tiles.config_of(name, kind, index)
    if tiles.why_not_on(90, config, shape):
        with pytest.raises(IndexError):  # none is left
            launched(name, kind, index, shape)
        return
    tiles.assert_ran(launched(name, kind, index, shape), name, config)


@pytest.mark.needs("triton")
def test_lists_are_whole_again_afterwards() -> None:
    before = tiles.configurations()
    assert {kind for _, kind, _ in before} == set(tiles.KINDS) and {name for name, *_ in before} == set(tiles.LISTS)
    with tiles.forced("PRODUCTS", "tf32", 1, start=False):
        assert len(tiles._lists()["PRODUCTS"]["tf32"]) == 1
    assert tiles.configurations() == before


@pytest.mark.needs("triton")
def test_another_configuration_is_noticed() -> None:
    config = tiles.config_of("PRODUCTS", "tf32", 0)
    right = ("product_kernel", config.block_m, config.warps, config.stages)
    tiles.assert_ran([right, right, ("weight_gradient_kernel", 1, 1, 1)], "PRODUCTS", config)
    for wrong in ([right], [right, (*right[:3], config.stages + 1)], [right, right, right]):
        with pytest.raises(AssertionError, match="launched"):
            tiles.assert_ran(wrong, "PRODUCTS", config)


def dropped(x: Tensor, bits: int = 13) -> Tensor:
    """Without the last bits of the mantissa, as matrix units read float32."""
    return (x.contiguous().view(torch.int32) & -(1 << bits)).view(torch.float32)


class Rounded(torch.autograd.Function):
    """A convolution of which every product, forward and backward, is made of rounded operands."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, how: Any) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.how = how
        return torch.nn.functional.conv2d(how(x), how(weight), padding=1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = (ctx.how(value).requires_grad_() for value in ctx.saved_tensors)
        with torch.enable_grad():
            y = torch.nn.functional.conv2d(x, weight, padding=1)
        return *torch.autograd.grad(y, (x, weight), ctx.how(grads[0])), None


def one_tap_less(x: Tensor) -> Tensor:
    x = dropped(x).clone()
    if x.shape[-1] == 3:
        x[:, :, 0, 0] = 0
    return x


def one_wrong(x: Tensor) -> Tensor:
    x = dropped(x).clone()
    x.view(-1)[-1] += 8
    return x


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (dropped, None),
        (lambda x: x.clone(), "not computed in TF32"),
        (lambda x: dropped(x, 15), "TF32"),
        (lambda x: x.bfloat16().float(), "TF32"),
        (one_tap_less, "TF32"),
        (one_wrong, "beyond what TF32 may do"),
    ],
    ids=["tf32", "exact", "8-bits", "bfloat16", "tap", "element"],
)
def test_tf32_is_told_from_more_and_from_less(how: Any, message: str | None) -> None:
    plain = OPS["grouped_dilation_conv2d"]

    def make(inputs: Inputs) -> tuple[list[Any], dict[str, Any]]:
        return [inputs.randn(2, 24, 13, 15), inputs.randn(32, 24, 3, 3, scale=0.07), (1,), (32,), 1, 1], {}

    def call(x: Tensor, weight: Tensor, *rest: Any, backend: str) -> Tensor:
        assert torch.backends.cudnn.allow_tf32
        return Rounded.apply(x.clone(), weight.clone(), how)

    op = type(plain)(plain.name, call, plain.reference, (), (), plain.reduce_len, plain.differentiable)
    if message is None:
        op_checks.check_tf32(op, Case("plain", make), "cpu", "made up")
        return
    with pytest.raises(AssertionError, match=message):
        op_checks.check_tf32(op, Case("plain", make), "cpu", "made up")
