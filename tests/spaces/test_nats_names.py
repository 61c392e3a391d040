"""NATS where convolutions have several names, tied weights or more than a weight, and where supernets are wrapped."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from foreign_net import foreign
from torch import Tensor, nn

from nasdet.arch import Card
from nasdet.nn import GroupedDilationConv2d, MixedDilationConv2d, accelerate
from nasdet.spaces.nats import NATSSpace, bottleneck_convs, plain, to_plain_torch


class Twice(nn.Module):
    """One convolution by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3, padding=1)
        self.b = self.a

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).relu())
        return out


class Head(nn.Module):
    """One convolution in two sequences, as in heads that all levels share."""

    def __init__(self) -> None:
        super().__init__()
        conv = nn.Conv2d(8, 8, 3, padding=1)
        self.a, self.b = nn.Sequential(conv, nn.ReLU()), nn.Sequential(conv, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.a(x) + self.b(x)
        return out


class Tied(nn.Module):
    """Two convolutions with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).relu())
        return out


def selected(**stages: Any) -> Any:
    return lambda _: {name.replace("_", "."): stage for name, stage in stages.items()}


def picture() -> Tensor:
    return torch.randn(1, 8, 9, 7, generator=torch.Generator().manual_seed(1))


SHARED = {
    "first": (Twice, "a", ("a", "b")),
    "second": (Twice, "b", ("a", "b")),
    "in-sequences": (Head, "a.0", ("a.0", "b.0")),
    "in-sequences-second": (Head, "b.0", ("a.0", "b.0")),
}


@pytest.mark.parametrize(("kind", "name", "names"), SHARED.values(), ids=SHARED)
def test_all_names_of_a_convolution_are_transformed(kind: Any, name: str, names: tuple[str, str]) -> None:
    net = kind()
    card = Card("nats", "two", {name: [[3, 1], [2, 1]]})
    expected = copy.deepcopy(net)
    for layer in names:
        expected.set_submodule(layer, GroupedDilationConv2d.from_conv(net.get_submodule(layer), [3, 2]))
    built = NATSSpace.build(card, copy.deepcopy(net))
    assert built.get_submodule(names[0]) is built.get_submodule(names[1])
    assert isinstance(built.get_submodule(names[0]), GroupedDilationConv2d)
    assert list(built.state_dict()) == list(net.state_dict())
    torch.testing.assert_close(built(picture()), expected(picture()))
    for made in (to_plain_torch(built), plain.transform(copy.deepcopy(net), card.genotype)):
        assert {type(made.get_submodule(layer)) for layer in names} == {plain.SplitConv2d}
        assert made.get_submodule(names[0]) is made.get_submodule(names[1])
        assert not [part for part in made.modules() if type(part).__module__.startswith("nasdet.nn")]
        torch.testing.assert_close(made(picture()), expected(picture()))


@pytest.mark.parametrize(("kind", "name", "names"), SHARED.values(), ids=SHARED)
def test_all_names_of_a_convolution_are_searched(kind: Any, name: str, names: tuple[str, str]) -> None:
    net = kind()
    plain_map = net(picture())
    space = NATSSpace("A", backbone=net, channel_groups=2, selector=lambda _: {name: 3})
    assert [layer.name for layer in space.layers] == [name]
    genotype = {name: [[1, 1], [3, 1]]}
    built = NATSSpace.build(Card("nats", "two", genotype), copy.deepcopy(net))
    space.supernet(net)
    mixed = net.get_submodule(names[0])
    assert isinstance(mixed, MixedDilationConv2d) and net.get_submodule(names[1]) is mixed
    assert len(NATSSpace.arch_parameters(net)) == 1 and list(space.alphas(net)) == [name]
    space.restrict(net, genotype)
    torch.testing.assert_close(net(picture()), built(picture()))
    assert not torch.allclose(net(picture()), plain_map, atol=1e-3)
    assert space.derive(net).genotype == genotype


def test_a_convolution_is_named_once() -> None:
    message = "must name a convolution once, got 'a' and 'b' for the same one"
    with pytest.raises(ValueError, match=f"selector {message}"):
        NATSSpace(backbone=Twice(), channel_groups=2, selector=selected(a=3, b=3))
    net, genotype = Twice(), {"a": [[2, 1]], "b": [[1, 1]]}
    for transform in (
        lambda: NATSSpace.build(Card("nats", "x", genotype), net),
        lambda: plain.transform(net, genotype),
    ):
        with pytest.raises(ValueError, match=message):
            transform()
        assert type(net.a) is nn.Conv2d and net.a is net.b


def test_bottlenecks_with_other_names_too() -> None:
    net = foreign()
    other = nn.Sequential()
    other.add_module("first", net.get_submodule("layer2.0.conv2"))  # a name that tells no stage comes first
    other.add_module("body", net)
    other.add_module("again", net)
    assert bottleneck_convs(other) == {f"body.{name}": stage for name, stage in bottleneck_convs(net).items()}
    space = NATSSpace(backbone=other, channel_groups=2)
    space.supernet(other)
    assert isinstance(other.first, MixedDilationConv2d) and len(space.alphas(other)) == 6


def test_tied_weights_are_not_untied() -> None:
    net = Tied()
    space = NATSSpace("A", backbone=net, channel_groups=2, selector=selected(b=3))
    with pytest.raises(ValueError, match="b must have a weight of its own, got one that is a.weight and b.weight"):
        space.supernet(net)
    assert type(net.b) is nn.Conv2d
    derived = NATSSpace.build(Card("nats", "x", {"a": [[2, 1]], "b": [[3, 1]]}), net)
    assert derived.a.weight is derived.b.weight, "they can stay tied where nothing is copied"


@pytest.mark.parametrize(
    ("selector", "error", "message"),
    [
        (selected(a=3.0), ValueError, "selector must give stage 3, 4 or 5 for a, got 3.0"),
        (selected(a=True), ValueError, "selector must give stage 3, 4 or 5 for a, got True"),
        (selected(a="3"), ValueError, "selector must give stage 3, 4 or 5 for a, got '3'"),
        (lambda _: ["a"], TypeError, "selector must give stages by module path, got list"),
        (lambda _: None, TypeError, "selector must give stages by module path, got NoneType"),
        (lambda _: {0: 3}, ValueError, "selector must name modules of Twice, got 0"),
        (lambda _: {"": 3}, ValueError, "selector must name modules of Twice, got ''"),
    ],
)
def test_selectors_that_select_nothing(selector: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NATSSpace(backbone=Twice(), channel_groups=2, selector=selector)


@pytest.mark.parametrize("what", ["hook", "buffer", "forward", "weight norm"])
def test_what_would_be_lost_is_refused_and_nothing_is_changed(what: str) -> None:
    net = foreign()
    space = NATSSpace(backbone=net, channel_groups=2)
    conv = net.get_submodule("layer4.1.conv2")  # the last one: the others come before
    if what == "hook":
        conv.register_forward_hook(lambda module, inputs, output: 2 * output)
    elif what == "buffer":
        conv.register_buffer("mask", torch.ones(4))
    elif what == "forward":
        conv.forward = lambda x: 2 * x  # type: ignore[method-assign]  # what is tested
    else:
        nn.utils.parametrizations.weight_norm(conv)
    before = repr(net)
    card = Card("nats", "ones", {layer.name: [[1, 2]] for layer in space.layers})
    for transform in (
        lambda: NATSSpace(backbone=net, channel_groups=2),
        lambda: space.supernet(net),
        lambda: NATSSpace.build(card, net),
        lambda: plain.transform(net, card.genotype),
    ):
        with pytest.raises((TypeError, ValueError), match=r"layer4\.1\.conv2 must (have nothing but|be a plain)"):
            transform()
        assert repr(net) == before


def test_accelerated_networks_are_searched_and_built() -> None:
    torch.manual_seed(0)
    net: Any = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 3, padding=1))
    x = torch.randn(1, 3, 20, 20)
    card = Card("nats", "two", {"1": [[1, 1], [2, 1]]})
    expected = NATSSpace.build(card, copy.deepcopy(net))(x)
    for conv in accelerate(net).swapped:
        assert conv == "1", "only where the compiled library is there"
    for built in (NATSSpace.build(card, copy.deepcopy(net)), plain.transform(copy.deepcopy(net), card.genotype)):
        torch.testing.assert_close(built(x), expected, rtol=1e-4, atol=1e-5)
    space = NATSSpace("B", backbone=net, channel_groups=2, selector=lambda _: {"1": 3})
    space.supernet(net)
    space.restrict(net, card.genotype)
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


class Detector(nn.Module):
    """A supernet as a part of something."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone


@pytest.mark.parametrize(
    ("wrap", "got"),
    [
        (Detector, "Detector with 'backbone.layer2.0.conv2'"),
        (nn.DataParallel, "DataParallel with 'module.layer2.0.conv2'"),
        (torch.compile, "OptimizedModule with '_orig_mod.layer2.0.conv2'"),
        (lambda net: foreign(), "Sequential with 0 of them"),
        (lambda net: net.get_submodule("layer2"), "Sequential with '0.conv2'"),
        (lambda net: nn.Sequential(net), "Sequential with '0.layer2.0.conv2'"),
    ],
)
def test_only_the_supernet_itself_is_read(wrap: Any, got: str) -> None:
    net = foreign()
    space = NATSSpace(backbone=net, channel_groups=2)
    other = wrap(space.supernet(net))
    genotype: Mapping[str, Any] = {layer.name: [[2, 2]] for layer in space.layers}
    message = f"supernet must have the space's layers searchable, 6 from layer2.0.conv2 .*, got {got}"
    for read in (space.derive, space.alphas, lambda part: space.restrict(part, genotype)):
        with pytest.raises(ValueError, match=message):
            read(other)
    assert not any(alpha.any() for alpha in NATSSpace.arch_parameters(net))
    space.restrict(net, genotype)
    assert space.derive(net).genotype == genotype


def test_a_supernet_with_other_layers_or_choices_is_refused() -> None:
    net = foreign()
    space = NATSSpace("A", backbone=net, channel_groups=2)
    more = copy.deepcopy(net)
    space.supernet(more)
    more.conv1 = MixedDilationConv2d(3, 8, 3, [1, 2])
    with pytest.raises(ValueError, match="6 from layer2.0.conv2 .*, got Sequential with 'conv1'"):
        space.derive(more)
    own = NATSSpace({3: [1, 2], 4: [1, 3], 5: [1, 3, 5]}, backbone=net, channel_groups=2)
    cut = NATSSpace("A", backbone=net, channel_groups=4)
    for other, got in ((own, r"\(2, \(\(1, 1\), \(2, 2\)\)\)"), (cut, r"\(4, \(\(1, 1\), \(3, 3\)\)\)")):
        theirs = other.supernet(copy.deepcopy(net))
        with pytest.raises(ValueError, match=f"layer2.0.conv2 must have the space's channel groups .*, got {got}"):
            space.derive(theirs)
