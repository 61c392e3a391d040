"""The transformation block: Equation 2 written out, and how much it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasdet.spaces.fad.blocks import RepShareBlock, UnsharedBlock
from nasdet.spaces.fad.genotype import SUBSETS
from nasdet.spaces.fad.transformations import Pool, Unit, norm_groups, set_backend, transformation

C = 12
CLOSE: Any = {"rtol": 1e-9, "atol": 1e-10}


def randomised(module: nn.Module) -> nn.Module:
    """Float64, with norm parameters away from 1 and 0, on the reference: the most exact form."""
    generator = torch.Generator().manual_seed(1)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return set_backend(module, "reference")


def some_input() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, C, 7, 9, generator=generator, dtype=torch.float64)
    return x, torch.randn(13, generator=generator, dtype=torch.float64).softmax(0)


def conv(module: nn.Module, x: Tensor) -> Tensor:
    """A unit's convolution from its parameters alone."""
    parts = [module] if isinstance(module, nn.Conv2d) else list(module.children())
    for part in parts:
        assert isinstance(part, nn.Conv2d)
        x = F.conv2d(x, part.weight, part.bias, padding=part.padding, dilation=part.dilation, groups=part.groups)
    return x


def written_out(unit: nn.Module, x: Tensor) -> Tensor:
    assert isinstance(unit, Unit)
    return F.relu(F.group_norm(conv(unit.conv, x), norm_groups(C), unit.norm.weight, unit.norm.bias, 1e-5))


def shared_by_hand(block: RepShareBlock, x: Tensor, h_relu: bool, decoupled: bool) -> dict[str, Tensor]:
    """Every representation of the figure, one line each."""
    maps = {}
    for stream in ("std", "sep"):
        stem = list(block.stem[stream].children())
        p1 = written_out(stem[0], x)
        p2 = written_out(stem[1], p1)
        maps[f"{stream}3"] = written_out(stem[2], p2)
        for name, p in ((f"{stream}1", p1), (f"{stream}2", p2)):
            h = conv(block.decouple[name], p) if decoupled else p
            maps[name] = F.relu(h) if h_relu and decoupled else h
        maps[f"{stream}1+dil2"] = written_out(block.dilated[f"{stream}1+dil2"], p1)
        maps[f"{stream}2+dil2"] = written_out(block.dilated[f"{stream}2+dil2"], p2)
        maps[f"{stream}1+dil3"] = written_out(block.dilated[f"{stream}1+dil3"], p1)
    return maps


@pytest.mark.parametrize(("decouple", "released"), [(True, False), (True, True), (False, False)])
def test_repshare_is_equation_2(decouple: bool, released: bool) -> None:
    names = SUBSETS["full"]
    block = RepShareBlock(C, names, decouple=decouple, released=released)
    randomised(block)
    x, weights = some_input()
    maps = shared_by_hand(block, x, h_relu=not released, decoupled=decouple)
    expected = sum((weight * maps[name] for weight, name in zip(weights, names, strict=False)), torch.zeros(()))
    torch.testing.assert_close(block(x, weights), expected, **CLOSE)


@pytest.mark.parametrize(("decouple", "released"), [(True, False), (True, True), (False, False)])
def test_repshare_gradients_are_those_of_equation_2(decouple: bool, released: bool) -> None:
    names = SUBSETS["full"]
    block = RepShareBlock(C, names, decouple=decouple, released=released)
    randomised(block)
    x, weights = some_input()
    inputs = [x.requires_grad_(), weights.requires_grad_(), *block.parameters()]
    found = torch.autograd.grad(block(x, weights).square().sum(), inputs)
    maps = shared_by_hand(block, x, h_relu=not released, decoupled=decouple)
    total = sum((weight * maps[name] for weight, name in zip(weights, names, strict=False)), torch.zeros(()))
    for ours, theirs in zip(found, torch.autograd.grad(total.square().sum(), inputs), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


def alone(name: str, module: nn.Module, x: Tensor) -> Tensor:
    """A stand-alone transformation, unit by unit."""
    if isinstance(module, (Pool, nn.Identity)):
        return F.group_norm(pooled(name, x), norm_groups(C), eps=1e-5) if isinstance(module, Pool) else x
    for unit in module.children():
        x = written_out(unit, x)
    return x


def pooled(name: str, x: Tensor) -> Tensor:
    if name.startswith("max"):
        return F.max_pool2d(x, 3, 1, 1)
    return F.avg_pool2d(x, 3, 1, 1) * 9 / F.avg_pool2d(torch.ones_like(x), 3, 1, 1) / 9


@pytest.mark.parametrize("subset", ["full", "darts"])
def test_unshared_is_equation_2_over_separate_chains(subset: str) -> None:
    names = SUBSETS[subset]
    block = UnsharedBlock(C, names)
    randomised(block)
    x, _ = some_input()
    weights = torch.rand(len(names) + 1, dtype=torch.float64)
    expected = torch.zeros_like(x)
    for weight, name in zip(weights, names, strict=False):
        expected = expected + weight * alone(name, block.transformations[name], x)
    torch.testing.assert_close(block(x, weights), expected, **CLOSE)


@contextmanager
def counted(module: nn.Module) -> Iterator[dict[str, int]]:
    """How many representations and how many H are computed."""
    counts = {"units": 0, "decouple": 0}

    def add(kind: str, *_: object) -> None:
        counts[kind] += 1

    units = [m.conv for m in module.modules() if isinstance(m, Unit)]
    handles = [conv.register_forward_hook(partial(add, "units")) for conv in units]
    handles += [h.register_forward_hook(partial(add, "decouple")) for h in getattr(module, "decouple", {}).values()]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


# 12 against 26 is the paper's count; t1 and t2 of each stream have an H, but not the end of a shortened stem.
COUNTS = {"full": (12, 4, 26), "subset1": (4, 2, 6), "subset2": (8, 4, 16), "sep": (6, 2, 13), "released": (10, 4, 22)}


@pytest.mark.parametrize(("subset", "expected"), COUNTS.items(), ids=COUNTS)
def test_representations_computed(subset: str, expected: tuple[int, int, int]) -> None:
    names, x = SUBSETS[subset], torch.randn(1, C, 4, 4)
    shared, unshared = RepShareBlock(C, names), UnsharedBlock(C, names)
    weights = torch.full((len(names) + 1,), 1 / (len(names) + 1))
    with counted(shared) as ours, counted(unshared) as theirs:
        shared(x, weights)
        unshared(x, weights)
    assert (ours["units"], ours["decouple"], theirs["units"]) == expected


def test_without_decoupling_there_is_no_h() -> None:
    block = RepShareBlock(C, SUBSETS["full"], decouple=False)
    assert not len(block.decouple)
    with counted(block) as counts:
        block(torch.randn(1, C, 4, 4), torch.rand(13))
    assert counts["units"] == 12


@pytest.mark.parametrize("make", [RepShareBlock, UnsharedBlock])
def test_none_takes_mass_and_adds_nothing(make: type) -> None:
    block = make(C, SUBSETS["full"])
    randomised(block)
    x, _ = some_input()
    alpha = torch.zeros(13, dtype=torch.float64)
    without = block(x, alpha.softmax(0))
    alpha[-1] = torch.log(torch.tensor(13.0, dtype=torch.float64))  # weight 13 of 25
    torch.testing.assert_close(block(x, alpha.softmax(0)), without * 13 / 25, **CLOSE)


@pytest.mark.parametrize("make", [RepShareBlock, UnsharedBlock])
@pytest.mark.parametrize("subset", ["full", "subset1", "released"])
def test_every_alpha_and_every_weight_gets_a_gradient(make: type, subset: str) -> None:
    torch.manual_seed(0)
    block = make(C, SUBSETS[subset])
    alpha = torch.zeros(len(SUBSETS[subset]) + 1, requires_grad=True)
    block(torch.randn(2, C, 6, 6), alpha.softmax(0)).square().mean().backward()
    assert alpha.grad is not None and bool((alpha.grad != 0).all()), "none gets one through the softmax"
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None and bool((parameter.grad != 0).any()), name


def test_order_of_transformations_is_only_a_matter_of_names() -> None:
    names = SUBSETS["full"]
    turned = tuple(reversed(names))
    block, other = RepShareBlock(C, names), RepShareBlock(C, turned)
    randomised(block)
    other.double().load_state_dict(block.state_dict())
    set_backend(other, "reference")
    x, weights = some_input()
    again = torch.cat([weights[:-1].flip(0), weights[-1:]])
    torch.testing.assert_close(other(x, again), block(x, weights), **CLOSE)


@pytest.mark.parametrize("shape", [(1, C, 1, 1), (0, C, 4, 4), (2, C, 1, 3)], ids=str)
def test_odd_shapes(shape: tuple[int, ...]) -> None:
    for block in (RepShareBlock(C, SUBSETS["full"]), UnsharedBlock(C, SUBSETS["darts"])):
        count = 13 if isinstance(block, RepShareBlock) else 8
        out = block(torch.randn(shape), torch.rand(count))
        assert out.shape == shape and bool(out.isfinite().all())


def test_bfloat16_autocast() -> None:
    block, x = RepShareBlock(C, SUBSETS["full"]), torch.randn(1, C, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x, torch.rand(13))
        out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and bool(out.isfinite().all())


def test_group_norm_groups() -> None:
    assert [norm_groups(c) for c in (96, 128, 256)] == [32, 32, 32], "the paper's"
    for channels in range(1, 200):
        groups = norm_groups(channels)
        assert channels % groups == 0 and groups <= 32 and (groups == 1 or channels // groups >= 3)
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        norm_groups(0)


def test_bad_names() -> None:
    with pytest.raises(ValueError, match="transformations of a shared block must be chains .*, got 'max_pool_3x3'"):
        RepShareBlock(C, SUBSETS["darts"])
    with pytest.raises(ValueError, match="transformation must be one of FAD's or DARTS's, got 'std4'"):
        transformation("std4", C)
