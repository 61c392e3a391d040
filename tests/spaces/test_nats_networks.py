"""NATS on networks that are not ours, and what is refused: then everything stays as it was."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from foreign_net import Bottleneck, foreign
from torch import Tensor, nn

from nasdet.arch import Card
from nasdet.detectors import BACKBONES, build_fcos
from nasdet.nn import GroupedDilationConv2d
from nasdet.spaces.nats import NATSSpace, bottleneck_convs


def image() -> Tensor:
    return torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("bias", [False, True])
def test_a_users_network(bias: bool) -> None:
    net = foreign(bias)
    space = NATSSpace(backbone=net, channel_groups=2)
    assert [layer.stage for layer in space.layers] == [3, 3, 4, 4, 5, 5]
    expected = net(image())
    ones = Card("nats", "ones", {layer.name: [[1, 2]] for layer in space.layers})
    torch.testing.assert_close(NATSSpace.build(ones, copy.deepcopy(net))(image()), expected)
    card = space.random(random.Random(0))
    built = NATSSpace.build(card, copy.deepcopy(net))
    space.supernet(net)
    space.restrict(net, card.genotype)
    torch.testing.assert_close(net(image()), built(image()), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="network must be given to a space that was made from a network"):
        space.supernet()
    with pytest.raises(ValueError, match="network must be given, as the card names no backbone"):
        NATSSpace.build(card)


def test_inside_a_detector_by_prefix() -> None:
    model = build_fcos("resnet50", 3, width=0.25, fpn_channels=16, levels=3)
    inner = NATSSpace(backbone=model.backbone).random(random.Random(0))
    assert list(bottleneck_convs(model)) == [f"backbone.{name}" for name in inner.genotype]
    before = sum(p.numel() for p in model.parameters())
    NATSSpace.build(inner, model, prefix="backbone.")
    assert isinstance(model.backbone.get_submodule("layer2.0.conv2"), GroupedDilationConv2d)
    assert sum(p.numel() for p in model.parameters()) == before


def deeper(blocks: int) -> nn.Module:
    """A net whose third stage has so many blocks: its layers have the names of a shallower one's, and more."""
    net = foreign()
    net.get_submodule("layer3").extend(Bottleneck(8, 4) for _ in range(blocks - 2))  # type: ignore[operator]
    return net


def test_a_card_of_a_shallower_net_is_refused() -> None:
    """Half of the layers would be transformed, and the rest left as they were."""
    card = NATSSpace(backbone="resnet50", width=0.25).random(random.Random(0))
    net = BACKBONES["resnet101"](width=0.25)
    before = repr(net)
    words = "nats-random: network must be the card's resnet50, got one that has layer3.6.conv2 as well"
    with pytest.raises(ValueError, match=words):
        NATSSpace.build(card, net)
    inside = nn.ModuleDict({"body": net})
    with pytest.raises(ValueError, match=words):
        NATSSpace.build(card, inside, prefix="body.")
    assert repr(net) == before


def test_parts_of_a_net_and_nets_beside_it_are_left_alone() -> None:
    card = NATSSpace(backbone="resnet50", width=0.25).random(random.Random(0))
    part = {name: entries for name, entries in card.genotype.items() if name != "layer3.5.conv2"}
    own = Card("nats", "part", part, card.settings)
    assert type(NATSSpace.build(own).get_submodule("layer3.5.conv2")) is nn.Conv2d, "as a selector chose"
    two = nn.ModuleDict({"one": BACKBONES["resnet50"](width=0.25), "other": deeper(9)})
    NATSSpace.build(card, two, prefix="one.")
    assert not any(isinstance(module, GroupedDilationConv2d) for module in two["other"].modules())
    unnamed = Card("nats", "own", {name: [[2, 1]] for name in bottleneck_convs(foreign())})
    assert isinstance(NATSSpace.build(unnamed, deeper(5)), nn.Sequential), "a user's card may mean a part"


def test_a_missing_layer_says_what_a_prefix_is() -> None:
    card = NATSSpace(backbone="resnet50", width=0.25).random(random.Random(0))
    model = nn.ModuleDict({"body": BACKBONES["resnet50"](width=0.25)})
    for prefix, words in (("", "no prefix, which says where they lie in a larger one"), ("net.", "prefix 'net.'")):
        with pytest.raises(ValueError, match=f"card's layer layer2.0.conv2, got a ModuleDict without, and {words}"):
            NATSSpace.build(card, model, prefix=prefix)


def test_detectron2_names() -> None:
    net = nn.ModuleDict({f"res{stage}": nn.Sequential(Bottleneck(8, 4)) for stage in (2, 3, 4, 5)})
    assert bottleneck_convs(net) == {f"res{stage}.0.conv2": stage for stage in (3, 4, 5)}


def test_a_selector_of_your_own() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 5, padding=2))
    space = NATSSpace(backbone=net, channel_groups=4, selector=lambda _: {"0": 3, "2": 5})
    assert [(layer.name, layer.stage, layer.channels) for layer in space.layers] == [("0", 3, 8), ("2", 5, 8)]
    assert space.supernet(net)(image()).shape == (1, 8, 64, 96)


def test_depthwise_convolutions_by_a_selector() -> None:
    """MobileNetV2 has no bottleneck that NATS knows; its depthwise 3x3 can be named. Each channel is a whole group."""
    net: Any = BACKBONES["mobilenet_v2"](width=0.25).eval()
    stages = {3: (5, 6), 4: (8, 9, 10, 12, 13), 5: (15, 16)}  # the blocks of stride 1 and equal widths
    chosen = {f"features.{block}.conv.1.0": stage for stage, blocks in stages.items() for block in blocks}
    space = NATSSpace(backbone=net, selector=lambda _: chosen, channel_groups=8)
    assert len(space.layers) == 9 and all(layer.groups == layer.channels for layer in space.layers)
    ones = Card("nats", "ones", {layer.name: [[1, 8]] for layer in space.layers})
    card = space.random(random.Random(0))
    expected, same = net(image()), NATSSpace.build(ones, copy.deepcopy(net))(image())
    built = NATSSpace.build(card, copy.deepcopy(net))(image())
    space.supernet(net)
    space.restrict(net, card.genotype)
    for level, found in net(image()).items():
        torch.testing.assert_close(same[level], expected[level], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found, built[level], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(built["c5"], expected["c5"], rtol=1e-2)


class Standardised(nn.Conv2d):
    """A subclass with a forward of its own, as in some of timm's nets."""


def _with(place: str, module: nn.Module) -> nn.Module:
    net = foreign()
    net.set_submodule(place, module)
    return net


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BACKBONES["resnet18"](width=0.25), ValueError, "or depthwise ones, got none in ResNet"),
        (
            lambda: _with("layer4.1.conv2", Standardised(4, 4, 3, padding=1)),
            TypeError,
            "layer4.1.conv2 must be a plain",
        ),
        (
            lambda: _with("layer4.1.conv2", nn.Conv2d(4, 4, 3, padding=2, dilation=2)),
            ValueError,
            "must have dilation 1",
        ),
        (lambda: _with("layer4.1.conv2", nn.Conv2d(4, 4, 3)), ValueError, "layer4.1.conv2 must be padded with 1x1"),
        (lambda: _with("layer4.1.conv2", nn.Conv2d(4, 6, 3, padding=1)), ValueError, "divide the 6 output channels of"),
        (
            lambda: _with("layer4.1.conv2", nn.Conv2d(4, 4, 3, padding=1, groups=2)),
            ValueError,
            "channel groups of layer4.1.conv2 must cover whole convolution groups of 2 channels, got 1 channels each",
        ),
        (
            lambda: NATSSpace.build(Card("nats", "a", {"layer2.0.conv2": [[2, 1]]}), foreign()),
            TypeError,
            "layer2.0.conv2 must be a plain nn.Conv2d, got GroupedDilationConv2d",
        ),
    ],
)
def test_networks_that_cannot_be_searched(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NATSSpace(backbone=make(), channel_groups=4)


def test_resnext_needs_whole_convolution_groups() -> None:
    NATSSpace(backbone="resnext101_32x4d", channels_per_group=32)
    with pytest.raises(
        ValueError, match="of layer4.0.conv2 must cover whole convolution groups of 32 channels, got 16"
    ):
        NATSSpace(backbone="resnext101_32x4d", channels_per_group=16)


GOOD: dict[str, Any] = {f"layer{stage}.{block}.conv2": [[1, 1], [2, 1]] for stage in (2, 3, 4) for block in (0, 1)}


@pytest.mark.parametrize(
    ("genotype", "message"),
    [
        ({**GOOD, "layer4.1.conv2": [[1, 3]]}, "bad: layer4.1.conv2: counts must sum to a divisor of its 4 .*got 3"),
        ({**GOOD, "layer4.1.conv2": [[0, 1]]}, "genotype.layer4.1.conv2 dilation must be a positive integer"),
        ({**GOOD, "layer5.0.conv2": [[1, 1]]}, "network must have the card's layer layer5.0.conv2, got a Sequential"),
    ],
)
def test_bad_cards_change_nothing(genotype: Any, message: str) -> None:
    net = foreign()
    before = repr(net)
    with pytest.raises(ValueError, match=message):
        NATSSpace.build(Card("nats", "bad", genotype), net)
    assert repr(net) == before


def test_a_supernet_of_other_layers_is_refused_and_left_alone() -> None:
    net = foreign()
    space = NATSSpace(backbone=net, channel_groups=2)
    other = _with("layer4.1.conv2", nn.Conv2d(4, 8, 3, padding=1))
    before = repr(other)
    with pytest.raises(ValueError, match=r"network must have the space's layers, 6 from layer2.0.conv2 .4 channels"):
        space.supernet(other)
    assert repr(other) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer2.0.conv2": [[1, 3]]}, "genotype.layer2.0.conv2 counts must sum to 2, got 3"),
        ({"layer2.0.conv2": [[1, 1], [7, 1]]}, "dilation must be one of 1, 2, 3, 1x3, 3x1, got 7"),
        ({"other": [[1, 2]]}, "genotype must have the layers of the space, .*got 'other'"),
    ],
)
def test_cards_of_another_space(change: dict[str, Any], message: str) -> None:
    space = NATSSpace(backbone=foreign(), channel_groups=2)
    with pytest.raises(ValueError, match=message):
        space.check(Card("nats", "odd", {**GOOD, **change}))
    with pytest.raises(ValueError, match="method must be 'nats', got 'fad'"):
        space.check(Card("fad", "odd", GOOD))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"channel_groups": 0}, "channel_groups must be a positive integer, got 0"),
        ({"channels_per_group": True}, "channels_per_group must be a positive integer, got True"),
        ({"channel_groups": 4, "channels_per_group": 4}, "must not both be given"),
        ({"dilations": "Z"}, "dilations must be one of A, B, C"),
        ({"dilations": {3: [1], 4: [1]}}, "dilations must have stage 5, that of layer4.0.conv2"),
        ({"channel_groups": 3}, "channel_groups must divide the 128 output channels of layer2.0.conv2, got 3"),
        ({"channels_per_group": 48}, "channels_per_group must divide the 128 output channels"),
        ({"backbone": "vgg"}, "backbone must be one of resnet18"),
    ],
)
def test_bad_settings(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NATSSpace(**options)


@pytest.mark.parametrize(("name", "count"), [("mobilenet_v2", 14), ("shufflenet_v2_20", 19), ("resnet50", 13)])
def test_what_is_searched_by_default(name: str, count: int) -> None:
    """Bottlenecks' convolutions, or else the depthwise ones of stages 3 to 5: the derived net costs what it cost."""
    backbone = BACKBONES[name](width=0.25)
    space = NATSSpace("A", channel_groups=2, backbone=name, width=0.25)
    assert len(space.layers) == count
    before = sum(parameter.numel() for parameter in backbone.parameters())
    derived = NATSSpace.build(space.random(random.Random(0)), backbone)
    assert sum(parameter.numel() for parameter in derived.parameters()) == before
    assert [map_.shape[-1] for map_ in derived(torch.randn(1, 3, 64, 64)).values()] == [16, 8, 4, 2]
