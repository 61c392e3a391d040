"""``transform`` of the exported file: what it refuses, which is what ``NATSSpace.build`` refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasdet.arch import Card
from nasdet.nn import DepthwiseConv2d
from nasdet.spaces.nats import NATSSpace, plain


class Doubled(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


Namesake = type("Conv2d", (Doubled,), {})  # detectron2 has such a class


def net(kind: type[nn.Conv2d] = nn.Conv2d, **options: Any) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 1), kind(8, 8, **{"kernel_size": 3, "padding": 1, **options}))


NETS = {
    "circular": (lambda: net(padding_mode="circular"), "circular"),
    "dilated": (lambda: net(dilation=2, padding=2), "dilation 1"),
    "unpadded": (lambda: net(padding=0), "padded"),
    "valid": (lambda: net(padding="valid"), "padded"),
    "oblong": (lambda: net(kernel_size=(3, 5), padding=(1, 2)), "square kernel of odd size"),
    "even": (lambda: net(kernel_size=4, padding=2), "square kernel of odd size"),
    "subclass": (lambda: net(Doubled), "plain"),
    "subclass-of-the-same-name": (lambda: net(Namesake), "plain"),
    "conv1d": (lambda: nn.Sequential(nn.Identity(), nn.Conv1d(8, 8, 3, padding=1)), "plain"),
    "divisible": (lambda: net(), "divisor of its 8 output channels|multiple of 3 output channels"),
    "cut-group": (lambda: net(groups=4), "whole convolution groups of 2|between convolution groups of 2"),
}
ENTRIES = {"divisible": [[1, 1], [2, 2]], "cut-group": [[1, 1], [2, 7]]}


@pytest.mark.parametrize("case", NETS)
def test_both_refuse_the_same_networks(case: str) -> None:
    make, words = NETS[case]
    network = make()
    genotype = {"1": ENTRIES.get(case, [[1, 1]])}
    before = repr(network)
    for transform in (
        lambda: plain.transform(network, genotype),
        lambda: NATSSpace.build(Card("nats", "x", genotype), network),
    ):
        with pytest.raises((TypeError, ValueError), match=f"1(:| must) .*({words})"):
            transform()
        assert repr(network) == before


@pytest.mark.parametrize(
    "genotype",
    [
        {},
        [["1", [[1, 1]]]],
        {"": [[1, 1]]},
        {1: [[1, 1]]},
        {"1": []},
        {"1": "11"},
        {"1": [1]},
        {"1": [[1, 1, 1]]},
        {"1": [[0, 1]]},
        {"1": [[True, 1]]},
        {"1": [[1.0, 1]]},
        {"1": [[1, 0]]},
        {"1": [[1, 1.0]]},
        {"1": [[[1, 2, 3], 1]]},
        {"1": [[[1], 1]]},
        {"0": [[1, 1]], "1": [[1, -1], [1, 2]]},
    ],
)
def test_both_refuse_the_same_genotypes(genotype: Any) -> None:
    network = net()
    before = repr(network)
    for transform in (
        lambda: plain.transform(network, genotype),
        lambda: NATSSpace.build(Card("nats", "x", genotype), network),
    ):
        with pytest.raises((TypeError, ValueError), match="genotype"):
            transform()
        assert repr(network) == before


def test_a_convolution_alone_is_refused() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1)
    with pytest.raises(ValueError, match="genotype layers must be module paths, got ''"):
        plain.transform(conv, {"": [[1, 1]]})
    assert not list(conv.children())


@pytest.mark.parametrize("name", ["5", "backbone.1", "1.weight"])
def test_a_network_without_the_layer_is_refused(name: str) -> None:
    network = net()
    before = repr(network)
    with pytest.raises(ValueError, match=f"network must have a module {name}, got a Sequential without"):
        plain.transform(network, {"1": [[2, 1]], name: [[1, 1]]})
    assert repr(network) == before


@pytest.mark.parametrize("options", [{}, {"padding": "same"}, {"stride": 2}, {"groups": 4}, {"bias": False}])
def test_both_make_the_same(options: dict[str, Any]) -> None:
    genotype = {"1": [[2, 1], [[1, 3], 1]]}
    network, x = net(**options), torch.randn(2, 3, 9, 8)
    theirs = NATSSpace.build(Card("nats", "x", genotype), net(**options))
    theirs.load_state_dict(network.state_dict())
    torch.testing.assert_close(plain.transform(network, genotype)(x), theirs(x), rtol=1e-4, atol=1e-5)


def test_depthwise_convolutions_of_the_library_and_modes() -> None:
    network = nn.Sequential(DepthwiseConv2d(8), nn.Conv2d(8, 8, 3, padding=1).eval()).train()
    network[1].eval()
    x = torch.randn(1, 8, 9, 8)
    expected = network(x)
    plain.transform(network, {"0": [[1, 1], [1, 1]], "1": [[1, 1]]})
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)
    assert network[0].training and not network[1].training
