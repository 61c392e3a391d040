"""DetNAS's supernet: one path at a time, the rest untouched; a path is the network of its card, bit for bit."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from nasdet.arch import Card, load_card, published
from nasdet.detectors import BACKBONES
from nasdet.engine.optim import make_optimizer
from nasdet.measure import count, total
from nasdet.spaces.assemble import ModelConfig, build_model, searched_fields
from nasdet.spaces.detnas import CHOICES, DetNASSpace, Sizes, card_sizes, parameters_table

TINY = Sizes(4, (8, 12, 16, 20), (1, 2, 1, 1), 32)
SHUFFLES = ("even_odd", "halves")
LEVELS = {"c2": 4, "c3": 8, "c4": 16, "c5": 32}


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 64, 96, generator=torch.Generator().manual_seed(1))


def loss(maps: dict[str, Tensor]) -> Tensor:
    return torch.stack([level.square().mean() for level in maps.values()]).sum()


def warmed(space: DetNASSpace, **options: Any) -> Any:
    """A supernet whose norms have statistics of their own on every path."""
    supernet = space.supernet(**options).train()
    for choice in CHOICES:
        space.activate(supernet, space.card([choice] * space.sizes.depth))
        supernet(images())
    return supernet


@pytest.mark.parametrize("norm", ["bn", "gn", "frozen_bn"])
@pytest.mark.parametrize("mode", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shuffle", SHUFFLES)
def test_a_path_is_its_cards_network(shuffle: str, mode: bool, norm: str) -> None:
    """Maps, gradients and running statistics, to the bit."""
    space = DetNASSpace(TINY, shuffle=shuffle)
    supernet, card = warmed(space, norm=norm), space.random(Random(3))
    net = space.backbone(card, norm=norm)
    space.inherit(net, supernet, card)
    space.activate(supernet, card)
    ours, theirs = supernet.train(mode)(images()), net.train(mode)(images())
    assert list(ours) == list(LEVELS)
    assert all(torch.equal(ours[level], theirs[level]) for level in LEVELS)
    loss(ours).backward()
    loss(theirs).backward()
    gradients = {name: value.grad for name, value in net.named_parameters()}
    path = supernet.path_state(card.genotype)
    assert set(gradients) <= set(path) == set(net.state_dict())
    assert all(torch.equal(value, path[name]) for name, value in net.state_dict().items())
    of_supernet = {id(value): value.grad for value in supernet.parameters() if value.grad is not None}
    assert len(of_supernet) == len(gradients)
    for mine, yours in zip(of_supernet.values(), gradients.values(), strict=True):
        assert yours is not None and torch.equal(mine, yours)


def test_the_two_shuffles_differ() -> None:
    spaces = [DetNASSpace(TINY, shuffle=shuffle) for shuffle in SHUFFLES]
    nets = [space.backbone(space.card(["sh3"] * 5), norm="gn") for space in spaces]
    nets[1].load_state_dict(nets[0].state_dict())
    maps = [net(images())["c3"] for net in nets]
    assert not torch.equal(*maps), "stage 2 has a block of stride 1"


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_what_is_not_on_the_path_is_left_alone(name: str) -> None:
    """Weights, momentum, and decay, also of weights that have momentum from a step before."""
    space = DetNASSpace(TINY)
    supernet = space.supernet(norm="bn").train()
    optimizer = make_optimizer(name, supernet, 0.1, momentum=0.9, weight_decay=0.1)
    stem = set(supernet.conv1.state_dict(prefix="conv1."))

    def step(genotype: list[str]) -> tuple[set[str], set[str]]:
        before = {key: value.clone() for key, value in supernet.state_dict().items()}
        supernet.activate(genotype)
        optimizer.zero_grad(set_to_none=True)
        loss(supernet(images())).backward()
        graded = {key for key, value in supernet.named_parameters() if value.grad is not None}
        optimizer.step()
        return graded, {key for key, value in supernet.state_dict().items() if not torch.equal(value, before[key])}

    first, second = ["sh3", "sh5", "sh7", "xcep", "sh3"], ["sh3", "sh7", "xcep", "sh5", "sh5"]
    for genotype in (first, second, first, second):
        graded, moved = step(genotype)
        blocks = [name for name, _ in supernet.blocks()]
        path = tuple(f"{block}.{choice}." for block, choice in zip(blocks, genotype, strict=True))
        own = {key for key in supernet.state_dict() if key.startswith(path)} | stem
        assert graded == own & {key for key, _ in supernet.named_parameters()}
        assert moved <= own and graded <= moved, "all of the path moves, and nothing else"


def test_frozen_stages_and_missing_levels() -> None:
    space = DetNASSpace(TINY)
    supernet = space.supernet(norm="bn", frozen_stages=2, outputs=("c3",)).train()
    assert list(supernet(images())) == ["c3"] and supernet.channels == {"c3": 12} and supernet.strides == {"c3": 8}
    assert [name for name, _ in supernet.blocks()] == ["stage1.0", "stage2.0", "stage2.1"]
    space.activate(supernet, space.card(["sh5", "sh7", "xcep", "sh3", "sh3"]))
    assert [block.chosen for _, block in supernet.blocks()] == ["sh5", "sh7", "xcep"]
    loss(supernet(images())).backward()
    graded = {key.split(".")[0] for key, value in supernet.named_parameters() if value.grad is not None}
    assert graded == {"stage2"} and not supernet.stage1.training
    net = space.backbone(space.random(Random(0)), norm="bn", frozen_stages=2, outputs=("c3",))
    assert [key.split(".")[0] for key, value in net.named_parameters() if value.requires_grad][0] == "stage2"


def test_parameters_of_the_supernet_are_those_of_all_choices() -> None:
    table = parameters_table(TINY)
    with torch.device("meta"):
        supernet = DetNASSpace(TINY).supernet()
    expected = table.fixed + sum(sum(row.values()) for row in table.rows)
    assert sum(p.numel() for p in supernet.parameters()) == expected


@pytest.mark.parametrize("name", [name for name in published() if load_card(name).method == "detnas"])
def test_published_nets_cost_what_was_published(name: str) -> None:
    """Built from their cards alone, and in a detector; the tables are checked against the paper elsewhere."""
    card = load_card(name)
    sizes = card_sizes(card)
    with torch.device("meta"):
        net = DetNASSpace.backbone(card)
        config = ModelConfig(detector="retinanet", fpn_channels=8, norm="bn", **searched_fields(card))
        model = build_model(config)
    costs = total(count(net, torch.empty(1, 3, 224, 224, device="meta")))
    space = DetNASSpace(sizes)
    assert (costs.macs, costs.parameters) == (space.macs(card.genotype), space.parameters(card.genotype))
    part = next(part for part in count(model, torch.empty(1, 3, 224, 224, device="meta")) if part.name == "backbone")
    assert (part.macs, part.parameters) == (costs.macs, costs.parameters)
    assert ModelConfig.from_json(config.to_json()).card == card


def test_the_default_path_is_the_registrys_net() -> None:
    with torch.device("meta"):
        ours = DetNASSpace.backbone(DetNASSpace("small").card(["sh3"] * 20), norm="bn")
        theirs = BACKBONES["shufflenet_v2_20"](norm="bn")
    assert {key: value.shape for key, value in ours.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }


@pytest.mark.parametrize("detector", ["retinanet", "faster_rcnn"])
def test_in_a_detector_as_supernet(detector: str) -> None:
    space = DetNASSpace("tiny")
    levels = 3 if detector == "retinanet" else 4
    config = ModelConfig(detector=detector, fpn_channels=8, levels=levels, num_classes=2, norm="gn", tower_convs=1)
    model: Any = build_model(config, backbone=space.supernet)
    first, second = space.card(["sh3"] * 8), space.card(["xcep"] * 8)
    found = []
    for card in (first, second, first):
        space.activate(model.backbone, card)
        outputs = model(images())
        found.append(outputs["cls" if detector == "retinanet" else "rpn_cls"][0])
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


SPACE = DetNASSpace(TINY)
GOOD = SPACE.random(Random(0))


def other(card: Card, **changes: Any) -> Card:
    return Card(**{"method": "detnas", "name": "x", "genotype": card.genotype, "settings": card.settings} | changes)


CALLS: dict[str, tuple[Any, str]] = {
    "gene": (
        lambda net: net.activate(["sh3", "sh9", "sh3", "sh3", "sh3"]),
        "genotype choices must be among sh3, sh5, sh7, xcep, got 'sh9' for block 2",
    ),
    "length": (lambda net: net.activate(["sh3"]), "genotype must have 5 choices, one for each block, got 1"),
    "method": (
        lambda net: SPACE.activate(net, load_card("fad-paper")),
        "fad-paper: method must be 'detnas', got 'fad'",
    ),
    "space": (
        lambda net: SPACE.activate(net, load_card("detnasnet")),
        "detnasnet: settings must have .*'stem': 4.* got .*'stem': 48",
    ),
    "shuffle": (
        lambda net: SPACE.activate(net, other(GOOD, settings=GOOD.settings | {"shuffle": "halves"})),
        "x: settings must have .*, got .*'shuffle': 'halves'",
    ),
    "unknown-shuffle": (
        lambda net: SPACE.backbone(other(GOOD, settings=GOOD.settings | {"shuffle": "output"})),
        "x: settings.shuffle must be one of even_odd, halves, got 'output'",
    ),
    "space-shuffle": (lambda net: DetNASSpace(TINY, shuffle="output"), "shuffle must be one of even_odd, halves"),
    "heir-of-another-path": (
        lambda net: SPACE.inherit(SPACE.backbone(SPACE.card(["xcep"] * 5)), net, SPACE.card(["sh3"] * 5)),
        "net must be the path's own, got stage1.0.branch2.2.weight in one of the two only",
    ),
    "heir-of-another-size": (
        lambda net: SPACE.inherit(SPACE.backbone(SPACE.card(["sh3"] * 5), width=3), net, SPACE.card(["sh3"] * 5)),
        "net must be the path's own, got conv1.0.weight of .16, 3, 3, 3.",
    ),
}


@pytest.mark.parametrize(("call", "words"), CALLS.values(), ids=CALLS)
def test_bad_cards(call: Any, words: str) -> None:
    net = SPACE.supernet()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(ValueError, match=words):
        call(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
