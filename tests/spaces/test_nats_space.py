"""NATS's space on networks: counts, the supernet in place, derivation, building, and foreign ResNets."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasdet.arch import Card, load_card, save_card
from nasdet.detectors import BACKBONES, ResNet
from nasdet.measure import count, total
from nasdet.nn import GroupedDilationConv2d, MixedDilationConv2d
from nasdet.spaces import space_class
from nasdet.spaces.nats import NATSSpace, find_layers

PUBLISHED_NETS = ("resnet50", "resnet101", "resnext101_32x4d")


def tiny(name: str = "resnet50", **options: Any) -> nn.Module:
    """A narrow net with batch norm that has seen something, in evaluation mode."""
    torch.manual_seed(0)
    net = BACKBONES[name](width=0.25, **options)
    net(torch.randn(2, 3, 64, 64))
    return net.eval()


def image() -> Tensor:
    return torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(5))


def maps(net: nn.Module, x: Tensor) -> Tensor:
    """All maps of a backbone as one vector."""
    with torch.no_grad():
        out = net(x)
    return torch.cat([level.flatten() for level in out.values()]) if isinstance(out, dict) else out


# counts


@pytest.mark.parametrize(
    ("name", "options", "layers", "alphas"),
    [
        ("resnet50", {}, 13, 1232),
        ("resnet101", {}, 30, 2592),
        ("resnext101_32x4d", {}, 30, 2592),
        ("resnet50", {"dilations": "A"}, 13, 10 * 16 * 2 + 3 * 16 * 3),
        ("resnet50", {"dilations": "B"}, 13, 10 * 16 * 3 + 3 * 16 * 5),
        ("resnet50", {"channel_groups": 1}, 13, 10 * 5 + 3 * 9),
        ("resnet50", {"channel_groups": 32}, 13, 2464),
        ("resnet50", {"channels_per_group": 32}, 13, 4 * 4 * 5 + 6 * 8 * 5 + 3 * 16 * 9),
        ("resnet101", {"channels_per_group": 1}, 30, (4 * 128 + 23 * 256) * 5 + 3 * 512 * 9),
        ("resnext101_32x4d", {"channels_per_group": 32}, 30, 4 * 8 * 5 + 23 * 16 * 5 + 3 * 32 * 9),
    ],
)
def test_published_counts_of_alphas(name: str, options: dict[str, Any], layers: int, alphas: int) -> None:
    space = NATSSpace(backbone=name, **options)
    assert len(space.layers) == layers and space.alpha_count() == alphas


@pytest.mark.parametrize("name", PUBLISHED_NETS)
def test_searched_convolutions_are_the_papers(name: str) -> None:
    stages: dict[int, list[int]] = {3: [], 4: [], 5: []}
    for layer in NATSSpace(backbone=name).layers:
        stages[layer.stage].append(layer.channels)
    width = 256 if "x" in name[5:] else 128
    assert stages == {3: [width] * 4, 4: [2 * width] * (6 if "50" in name else 23), 5: [4 * width] * 3}


@pytest.mark.parametrize("name", PUBLISHED_NETS)
def test_derived_nets_cost_exactly_the_original(name: str) -> None:
    picture = torch.empty(1, 3, 800, 1200, device="meta")
    with torch.device("meta"):
        original, space = BACKBONES[name](), NATSSpace(backbone=name)
        before = total(count(original, picture))
        for card in (space.random(random.Random(1)), space.random(random.Random(2))):
            derived = NATSSpace.build(card, copy.deepcopy(original))
            assert total(count(derived, picture)) == before
            assert any(len(m.splits) > 3 for m in derived.modules() if isinstance(m, GroupedDilationConv2d))
            assert set(derived.state_dict()) == set(original.state_dict())
    assert round(before.macs / 1e9) == {"resnet50": 78, "resnet101": 149, "resnext101_32x4d": 153}[name]


def test_sizes() -> None:
    space = NATSSpace(channel_groups=2, dilations="A", backbone=tiny())
    assert space.size() == 3**10 * 6**3, "pairs of 2 are 3, pairs of 3 are 6"
    in_place = NATSSpace(channel_groups=2, dilations="A", backbone=tiny(), index_preserving=True)
    assert in_place.size() == 4**10 * 9**3
    assert NATSSpace(channel_groups=1, backbone="resnet50").size() == 5**10 * 9**3
    assert NATSSpace().size() == math.comb(20, 4) ** 10 * math.comb(24, 8) ** 3


# supernet


def test_supernet_holds_copies_and_starts_even() -> None:
    net = tiny()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    space = NATSSpace(backbone=net)
    assert space.supernet(net) is net
    mixed = {name: m for name, m in net.named_modules() if isinstance(m, MixedDilationConv2d)}
    assert list(mixed) == [layer.name for layer in space.layers]
    for name, module in mixed.items():
        dilations = space.dilations_of(next(layer for layer in space.layers if layer.name == name))
        assert module.dilations == dilations and module.replicas.shape[0] == len(dilations)
        assert all(torch.equal(replica, before[f"{name}.weight"]) for replica in module.replicas)
        assert module.alpha.shape == (16, len(dilations)) and not module.alpha.any()
    assert sum(alpha.numel() for alpha in NATSSpace.arch_parameters(net)) == space.alpha_count() == 1232
    untouched = {name: value for name, value in net.state_dict().items() if name in before and "conv2" not in name}
    assert all(torch.equal(value, before[name]) for name, value in untouched.items())


def test_one_block_is_the_papers_equation() -> None:
    """Figure 2: mixed slice by slice, concatenated, then the block's one norm and ReLU."""
    net = tiny()
    block = copy.deepcopy(net.get_submodule("layer2.1"))
    NATSSpace(backbone=net, channel_groups=4).supernet(net)
    mixed = net.get_submodule("layer2.1")
    with torch.no_grad():
        mixed.conv2.alpha.copy_(torch.randn(4, 5))
        mixed.conv2.weight.add_(0.1 * torch.randn_like(mixed.conv2.weight))
        x = torch.randn(1, mixed.conv1.in_channels, 9, 8)
        y = F.relu(block.bn1(block.conv1(x)))
        share, slices = mixed.conv2.alpha.softmax(1), []
        for i in range(4):
            rows = slice(8 * i, 8 * i + 8)
            slices.append(
                sum(
                    share[i, g] * F.conv2d(y, mixed.conv2.replicas[g, rows], padding=d, dilation=d)
                    for g, d in enumerate([(1, 1), (2, 2), (3, 3), (1, 3), (3, 1)])
                )
            )
        y = F.relu(block.bn2(torch.cat(slices, 1)))
        torch.testing.assert_close(mixed(x), F.relu(block.bn3(block.conv3(y)) + x))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_supernet_restricted_to_a_card_is_the_built_net(name: str, in_place: bool) -> None:
    net = tiny(name)
    cut = {"channels_per_group": 32} if "next" in name else {"channel_groups": 8}
    space = NATSSpace(backbone=net, index_preserving=in_place, **cut)
    card = space.random(random.Random(3))
    built = NATSSpace.build(card, copy.deepcopy(net))
    plain = maps(net, image())
    space.supernet(net)
    space.restrict(net, card.genotype)
    ours, theirs = maps(net, image()), maps(built, image())
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain, theirs, rtol=1e-2, atol=1e-2), "the dilations change something"
    assert space.derive(net).genotype == card.genotype


def test_a_step_moves_replicas_and_alphas() -> None:
    net = tiny().train()
    NATSSpace(backbone=net, channel_groups=2, dilations="A").supernet(net)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    torch.stack([level.square().mean() for level in net(torch.randn(2, 3, 64, 64)).values()]).sum().backward()
    optimizer.step()
    still = [name for name, p in net.named_parameters() if torch.equal(p, before[name])]
    assert not still
    replicas = net.get_submodule("layer2.1.conv2").replicas
    assert not torch.equal(replicas[0], replicas[1]), "each has gone its own way"


# derived nets


@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_all_dilation_1_is_the_original_bit_for_bit(name: str) -> None:
    """With the norms of training: those of evaluation become a bias, which the op adds after, torch while summing."""
    net = tiny(name)
    space = NATSSpace(backbone=net, channel_groups=4 if name == "resnet50" else 1)
    expected = maps(net.train(), image())
    searched = space.supernet(copy.deepcopy(net))
    card = space.derive(searched)  # zeros: the first dilation, which is 1, wins everywhere
    assert all(entries == [[1, space.groups_of(space.layers[0])]] for entries in card.genotype.values())
    derived = NATSSpace.build(card, net, backend="reference")
    assert torch.equal(maps(derived.train(), image()), expected)


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("name", ["resnet50", "resnext50_32x4d"])
def test_all_dilation_1_is_the_original_by_the_kernels_too(name: str) -> None:
    """In evaluation, at full width: sums in another order, within 1e-5 of each map's norm."""
    torch.manual_seed(0)
    net = BACKBONES[name]()
    net(torch.randn(2, 3, 64, 64))
    ones = Card("nats", "ones", {layer.name: [[1, 1]] for layer in find_layers(net)})
    with torch.no_grad():
        expected = net.eval()(image())
        derived = NATSSpace.build(ones, net)
        assert sum(isinstance(m, GroupedDilationConv2d) and m.backend is None for m in derived.modules()) == 13
        found = derived(image())
    for level, wanted in expected.items():
        assert float((found[level] - wanted).norm() / wanted.norm()) < 1e-5, level


def test_block_order_keeps_rows_and_their_norms() -> None:
    """The pretrained rows stay in their order: a slice of the derived output is that slice of the dilated layer."""
    net = tiny()
    weight = net.get_submodule("layer3.2").conv2.weight
    genotype = {layer.name: [[1, 4]] for layer in find_layers(net)}
    genotype["layer3.2.conv2"] = [[1, 1], [2, 2], [[3, 1], 1]]
    NATSSpace.build(Card("nats", "hand", genotype), net)
    conv = net.get_submodule("layer3.2.conv2")
    assert isinstance(conv, GroupedDilationConv2d) and conv.weight is weight and conv.splits == (16, 32, 16)
    x = torch.randn(1, 64, 8, 9)
    torch.testing.assert_close(conv(x)[:, 16:48], F.conv2d(x, weight[16:48], padding=2, dilation=2))
    torch.testing.assert_close(conv(x)[:, 48:], F.conv2d(x, weight[48:], padding=(3, 1), dilation=(3, 1)))


def test_weights_of_the_original_load_into_the_derived() -> None:
    net = tiny()
    card = NATSSpace(backbone=net).random(random.Random(0))
    fresh = NATSSpace.build(card, BACKBONES["resnet50"](width=0.25)).eval()
    fresh.load_state_dict(net.state_dict())
    assert torch.equal(maps(fresh, image()), maps(NATSSpace.build(card, net), image()))


def test_one_genotype_serves_several_widths() -> None:
    card = NATSSpace(backbone="resnet50", width=0.25).random(random.Random(0))
    for width in (0.25, 0.5):
        net = NATSSpace.build(card, ResNet(50, width=width))
        conv = net.get_submodule("layer4.2.conv2")
        assert isinstance(conv, GroupedDilationConv2d) and sum(conv.splits) == 512 * width


# cards


def test_cards_round_trip_and_build(tmp_path: Path) -> None:
    assert space_class("nats") is NATSSpace
    space = NATSSpace("B", channel_groups=4, width=0.25, index_preserving=True)
    card = space.random(random.Random(1), "some", settings={"note": "x"})
    assert card.settings == {
        "space": "B",
        "channel_groups": 4,
        "index_preserving": True,
        "backbone": "resnet50",
        "width": 0.25,
        "note": "x",
    }
    again = load_card(save_card(card, tmp_path / "card.json"))
    assert again == card
    space.check(again)
    with torch.device("meta"):
        built = NATSSpace.build(again)
    assert isinstance(built.get_submodule("layer3.5.conv2"), GroupedDilationConv2d)
    lines = NATSSpace.describe(card)
    assert len(lines) == 13 and lines[0].startswith("layer2.0.conv2: ") and "%" in lines[0]


def test_own_sets_are_recorded() -> None:
    own = {3: [1, 2], 4: [1, (1, 4)], 5: [1, 7]}
    card = NATSSpace(own, width=0.25).random(random.Random(0))
    assert card.settings["space"] == {"3": [1, 2], "4": [1, [1, 4]], "5": [1, 7]}
    NATSSpace(card.settings["space"], width=0.25).check(card)


@pytest.mark.parametrize("in_place", [False, True])
def test_random_cards_are_legal_and_seeded(in_place: bool) -> None:
    space = NATSSpace(width=0.25, index_preserving=in_place)
    cards = [space.random(random.Random(seed)) for seed in range(20)]
    assert len({card.key for card in cards}) == 20
    assert space.random(random.Random(7)) == cards[7]
    for card in cards:
        space.check(card)
        for entries in card.genotype.values():
            assert sum(number for _, number in entries) == 16
            if not in_place:
                assert len({str(dilation) for dilation, _ in entries}) == len(entries)
