"""Effective receptive fields: kernels whose fields are known, and what is passed over on the way."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasdet.arch import Card
from nasdet.detectors import BACKBONES
from nasdet.measure import effective_receptive_field, field_size
from nasdet.nn import GroupedDilationConv2d, MixedDilationConv2d
from nasdet.spaces.nats import NATSSpace, to_plain_torch


def ones(conv: nn.Module) -> nn.Module:
    """The convolution with a kernel of ones, and no bias."""
    with torch.no_grad():
        conv.weight.fill_(1.0)
        if conv.bias is not None:
            conv.bias.zero_()
    return conv


def taps(field: Tensor) -> set[tuple[int, int]]:
    """Pixels that matter, as offsets from the centre; fast convolutions leave a rounding error beside their taps."""
    height, width = field.shape
    return {(int(y) - height // 2, int(x) - width // 2) for y, x in (field > 1e-5).nonzero()}


def square(radius: int, step: int = 1) -> set[tuple[int, int]]:
    offsets = range(-radius, radius + 1, step)
    return {(y, x) for y in offsets for x in offsets}


def test_a_3x3_convolution_of_ones_is_a_square() -> None:
    field = effective_receptive_field(ones(nn.Conv2d(3, 4, 3, padding=1)), (9, 11))
    assert taps(field) == square(1) and field.shape == (9, 11)
    assert torch.equal(field[field > 0], torch.ones(9)) and field_size(field) == 3.0


@pytest.mark.parametrize("dilation", [2, 3, (1, 3), (3, 1)], ids=str)
def test_a_dilation_gives_its_taps(dilation: int | tuple[int, int]) -> None:
    down, across = (dilation, dilation) if isinstance(dilation, int) else dilation
    expected = {(y * down, x * across) for y, x in square(1)}
    plain = nn.Conv2d(3, 2, 3, padding=(down, across), dilation=dilation)
    for conv in (plain, GroupedDilationConv2d(3, 2, dilations=[dilation])):
        field = effective_receptive_field(ones(conv), (13, 15))
        assert taps(field) == expected and field_size(field) == 3.0


def test_slices_and_mixtures_add_their_taps() -> None:
    grouped = ones(GroupedDilationConv2d(3, 4, dilations=[1, 3], splits=[3, 1]))
    field = effective_receptive_field(grouped, (13, 13))
    assert taps(field) == square(1) | square(3, 3)
    assert [float(field[y, 6]) for y in (6, 5, 3)] == pytest.approx([1.0, 0.75, 0.25], abs=1e-5)
    mixed = ones(MixedDilationConv2d(3, 4, dilations=[1, 3]))
    assert taps(effective_receptive_field(mixed, (13, 13))) == square(1) | square(3, 3)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_a_stack_is_a_binomial_of_known_size(depth: int) -> None:
    """n 3x3 convolutions of ones: the 2n + 1 wide square, with the values of the convolved box."""
    stack = nn.Sequential(*(ones(nn.Conv2d(3 if i == 0 else 1, 1, 3, padding=1, bias=False)) for i in range(depth)))
    field = effective_receptive_field(stack, (31, 31))
    assert taps(field) == square(depth)
    row = torch.ones(1)
    for _ in range(depth):
        row = F.conv1d(row[None, None], torch.ones(1, 1, 3), padding=2)[0, 0]
    wanted = torch.outer(row, row) / row.max() ** 2
    torch.testing.assert_close(field[15 - depth : 16 + depth, 15 - depth : 16 + depth], wanted)
    assert field_size(field) == math.sqrt(int((wanted > 0.0455).sum()))


def test_stride_and_pooling_widen() -> None:
    net = nn.Sequential(ones(nn.Conv2d(3, 1, 3, 2, 1)), ones(nn.Conv2d(1, 1, 3, 1, 1)))
    assert taps(effective_receptive_field(net, (16, 16))) == square(3), "2 * (3 - 1) + 3 = 7 wide"
    pooled = nn.Sequential(nn.AvgPool2d(2), ones(nn.Conv2d(3, 1, 3, padding=1)))
    assert field_size(effective_receptive_field(pooled, (16, 16))) == 6.0


def test_threshold_is_a_share_of_the_maximum() -> None:
    field = torch.tensor([[1.0, 0.05, 0.045, 0.0]])
    assert field_size(field) == math.sqrt(2) == field_size(7 * field)
    assert field_size(field, 0.5) == 1.0 and field_size(field, 0.0) == math.sqrt(3)


class Functional(nn.Module):
    """Calls ReLU in every way that is not a module."""

    def __init__(self, relu: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.relu = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), relu

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.second(self.relu(self.first(x))))


RELUS = {
    "F.relu": F.relu,
    "in place": lambda x: F.relu(x, inplace=True),
    "torch.relu": torch.relu,
    "torch.relu_": torch.relu_,
    "method": lambda x: x.relu(),
    "method_": lambda x: x.relu_(),
    "module": nn.ReLU(inplace=True),
    "relu6": nn.ReLU6(),
    "leaky": nn.LeakyReLU(0.1),
}


@pytest.mark.parametrize("name", RELUS)
def test_relus_are_passed_over(name: str) -> None:
    net = Functional(RELUS[name])
    with torch.no_grad():
        net.first.bias.fill_(-100.0)  # a ReLU would let nothing through
    linear = Functional(nn.Identity())
    linear.load_state_dict(net.state_dict())
    assert torch.equal(effective_receptive_field(net, (11, 11)), effective_receptive_field(linear, (11, 11)))
    if name != "leaky":
        assert float(net(torch.ones(1, 3, 11, 11)).detach().abs().max()) < 1.0, "outside it is a ReLU again"


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(8), nn.GroupNorm(2, 8), nn.GroupNorm(4, 8, affine=False)], ids=str)
def test_norms_are_constants(norm: nn.Module) -> None:
    """Their statistics would let every pixel act on every other."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), norm, nn.Conv2d(8, 4, 3, padding=1)).train()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 2.0)
    assert taps(effective_receptive_field(net, (15, 15))) == square(2)


def test_constant_group_norm_has_group_norms_values() -> None:
    from nasdet.measure.receptive_field import _constant_group_norm

    x, weight, bias = torch.randn(2, 6, 5, 4), torch.randn(6), torch.randn(6)
    torch.testing.assert_close(_constant_group_norm(x, 3, weight, bias, 1e-3), F.group_norm(x, 3, weight, bias, 1e-3))
    torch.testing.assert_close(_constant_group_norm(x, 2), F.group_norm(x, 2))


def test_the_last_convolution_or_a_named_layer() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1))
    headed = nn.Sequential(net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    assert taps(effective_receptive_field(headed, (9, 9))) == square(2), "not the pooled one's"
    assert taps(effective_receptive_field(headed, (9, 9), layer="0.0")) == square(1)


class Shifted(nn.Module):
    """Writes into the map after its convolution made it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = ones(nn.Conv2d(3, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        y += x.roll(4, 3)
        return y


def test_the_map_is_the_convolutions_own() -> None:
    assert taps(effective_receptive_field(Shifted(), (9, 11))) == {(0, 0)}


def test_the_network_is_left_as_it_was() -> None:
    net = BACKBONES["resnet50"](width=0.125, frozen_stages=1).train()
    state = copy.deepcopy(net.state_dict())
    modes = [module.training for module in net.modules()]
    learning = [parameter.requires_grad for parameter in net.parameters()]
    effective_receptive_field(net, (64, 96))
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes
    assert [parameter.requires_grad for parameter in net.parameters()] == learning
    assert not any(module._forward_hooks for module in net.modules())
    assert all(parameter.grad is None for parameter in net.parameters())


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_dilations_widen_a_backbones_field(name: str) -> None:
    net, size = BACKBONES[name](width=0.25), (448, 448)
    space = NATSSpace(backbone=net, channels_per_group=32)
    before = effective_receptive_field(net, size)
    same, wide = (Card("nats", "all", {layer.name: [[d, 1]] for layer in space.layers}) for d in (1, 2))
    copied = NATSSpace.build(same, copy.deepcopy(net))
    torch.testing.assert_close(effective_receptive_field(copied, size), before, rtol=1e-3, atol=1e-4)
    derived = NATSSpace.build(wide, net)
    after = effective_receptive_field(derived, size)
    assert field_size(after) > 1.1 * field_size(before)
    torch.testing.assert_close(effective_receptive_field(to_plain_torch(derived), size), after, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: effective_receptive_field(nn.Conv2d(3, 1, 1), (0, 4)), r"size must be \(height, width\) of at least"),
        (
            lambda: effective_receptive_field(nn.Conv2d(3, 1, 1), (4, 4), layer="x"),
            "layer must name a module of Conv2d",
        ),
        (lambda: effective_receptive_field(nn.ReLU(), (4, 4)), "layer must give a map .* got none from any conv"),
        (
            lambda: effective_receptive_field(nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), (4, 4), layer="1"),
            "layer must give a map .* got none from 1",
        ),
        (
            lambda: effective_receptive_field(nn.Conv2d(3, 1, 1).requires_grad_(False).apply(_zero), (4, 4)),
            "network must connect its input with the centre of the map, got a gradient of 0",
        ),
    ],
    ids=["size", "name", "no convolution", "no map", "unconnected"],
)
def test_what_has_no_field_is_refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def _zero(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
