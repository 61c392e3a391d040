"""NATS on torchvision's own ResNets: their names, their weights, and a file that works without nasdet."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from nasdet.arch import Card
from nasdet.measure import count, total
from nasdet.spaces.nats import NATSSpace, plain_source, to_plain_torch

models = pytest.importorskip("torchvision.models")


def net(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return models.get_model(name, weights=None).eval()


@pytest.mark.parametrize(
    ("name", "cut", "alphas"),
    [
        ("resnet50", {}, 1232),
        ("resnet101", {}, 2592),
        ("resnext101_32x8d", {"channels_per_group": 64}, (4 * 8 + 23 * 16) * 5 + 3 * 32 * 9),
    ],
)
def test_torchvisions_networks_by_their_names(name: str, cut: dict[str, int], alphas: int) -> None:
    picture = torch.empty(1, 3, 224, 224, device="meta")
    with torch.device("meta"):
        original = models.get_model(name, weights=None)
        space = NATSSpace(backbone=original, **cut)
        before = total(count(original, picture))
        derived = NATSSpace.build(space.random(random.Random(0)), copy.deepcopy(original))
        assert total(count(derived, picture)) == before
    assert space.alpha_count() == alphas
    assert list(derived.state_dict()) == list(original.state_dict())


def test_derived_searched_and_exported_agree() -> None:
    network = net("resnet50")
    space = NATSSpace(backbone=network, channel_groups=8)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = network(x)
        same = Card("nats", "same", {layer.name: [[1, 8]] for layer in space.layers})
        torch.testing.assert_close(NATSSpace.build(same, copy.deepcopy(network))(x), expected, rtol=1e-4, atol=1e-4)
        card = space.random(random.Random(1))
        derived = NATSSpace.build(card, copy.deepcopy(network))
        wanted = derived(x)
        assert not torch.allclose(wanted, expected, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(to_plain_torch(derived)(x), wanted, rtol=1e-4, atol=1e-4)
        names: dict[str, object] = {}
        exec(plain_source(card), names)
        transform = names["transform"]
        assert callable(transform)
        torch.testing.assert_close(transform(copy.deepcopy(network), card.genotype)(x), wanted, rtol=1e-4, atol=1e-4)
        space.supernet(network)
        space.restrict(network, card.genotype)
        torch.testing.assert_close(network(x), wanted, rtol=1e-4, atol=1e-4)
