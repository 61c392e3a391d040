"""The FAD module and its space: published counts, wiring, derivation, the supernet against the net it stands for."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasdet.arch import Card, load_card
from nasdet.detectors.fcos import FCOSHead
from nasdet.measure import count
from nasdet.spaces.fad import EDGES, SUBSETS, FADSpace, FADStack, FADSupernet, FADTower, set_backend

PAPER = load_card("fad-paper")


class Subnet(nn.Module):
    """Towers and predictors of FCOS on one level: what the paper counts as the subnet."""

    def __init__(self, towers: nn.Module, channels: int = 256) -> None:
        super().__init__()
        self.towers, self.head = towers, FCOSHead(channels, channels, 80, 5, 0.01)

    def forward(self, x: Tensor) -> Any:
        return self.head(*self.towers(x), 0)


def cost(card: Card, locations: tuple[int, int] = (1, 1), **changes: Any) -> tuple[int, int]:
    parts = count(Subnet(FADSpace.build(card, **changes)), torch.empty(1, 256, *locations, device="meta"))
    return sum(part.parameters for part in parts), sum(part.macs for part in parts)


def test_published_counts() -> None:
    assert cost(PAPER) == (4_169_498, 4_143_360)


def test_counts_of_table_3_at_800_by_1280() -> None:
    parameters, macs = cost(PAPER, (1, 21_330))
    assert (round(parameters / 1e6, 1), round(macs / 1e9)) == (4.2, 88)
    parameters, macs = cost(PAPER, (1, 21_330), inner_channels=128)
    assert (round(parameters / 1e6, 3), round(macs / 1e9, 1)) == (6.097, 129.4)


def test_macs_follow_the_locations() -> None:
    assert cost(PAPER, (3, 5))[1] == 15 * 4_143_360


def test_sizes() -> None:
    assert FADSpace().size() == 13**12 == 23_298_085_122_481
    assert FADSpace("released").size() == 11**12
    assert FADSpace("subset1", groups=("mask",)).size() == 5**6


@pytest.mark.parametrize("subset", SUBSETS)
def test_supernet_serves_as_a_tower(subset: str) -> None:
    net = FADSpace(subset).supernet(12, 6)
    box, cls = net(torch.randn(1, 12, 5, 3))
    assert box.shape == cls.shape == (1, 12, 5, 3)
    assert (net.box_channels, net.cls_channels) == (12, 12)
    assert {name: tuple(p.shape) for name, p in net.alphas.items()} == dict.fromkeys(
        ("box", "cls"), (9, len(SUBSETS[subset]) + 1)
    )
    assert max(float(p.detach().abs().max()) for p in net.alphas.values()) < 0.01, "drawn as 1e-3 N(0, 1)"


def test_search_convolutions_around_a_block_have_no_bias_and_derived_ones_have() -> None:
    for net, biased in ((FADSpace().supernet(12, 6), False), (FADSpace.build(PAPER, 12, 6), True)):
        edges = [m for name, m in net.named_modules() if name.endswith((".squeeze", ".expand"))]
        assert len(edges) == 2 * (18 if not biased else 24)
        assert {m.bias is not None for m in edges if isinstance(m, nn.Conv2d)} == {biased}


def naive_cell(cell: nn.Module, s0: Tensor, s1: Tensor) -> Tensor:
    edges: Any = cell.edges
    states = [s0, s1]
    for node in (2, 3, 4):
        total = torch.zeros_like(s0)
        for source in range(node):
            if f"{source}_{node}" in edges:
                total = total + edges[f"{source}_{node}"](states[source])
        states.append(total)
    return torch.cat(states[2:], 1)


def test_wiring_of_groups_and_cells() -> None:
    torch.manual_seed(0)
    net = FADSpace.build(PAPER, 12, 6, cells=3).double()
    set_backend(net, "reference")
    assert isinstance(net, FADTower)
    x = torch.randn(2, 12, 6, 5, dtype=torch.float64)

    def group(module: Any, s0: Tensor, s1: Tensor) -> Tensor:
        for cell, reduction in zip(module.cells[:-1], module.reductions, strict=True):
            out = F.conv2d(naive_cell(cell, s0, s1), reduction.conv.weight, reduction.conv.bias)
            s0, s1 = s1, F.relu(F.group_norm(out, 4, reduction.norm.weight, reduction.norm.bias))
        return F.conv2d(naive_cell(module.cells[-1], s0, s1), module.output.weight, module.output.bias)

    box = group(net.box, x, x)
    cls = group(net.cls, box, x)
    for ours, theirs in zip(net(x), (box, cls), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    assert not torch.equal(net(x)[1], group(net.cls, x, box)), "which input is which matters"


def inherit(built: nn.Module, supernet: FADSupernet, card: Card) -> None:
    """Copy an unshared supernet's weights into the net of a card; the derived 1x1 biases, which it lacks, become 0."""
    theirs = supernet.body.state_dict()
    names = {(f"{g}.", f"{s}_{2 + n}"): t for g, ns in card.genotype.items() for n, es in enumerate(ns) for t, s in es}
    state = {}
    for key, value in built.state_dict().items():
        prefix = key.split(".")[0] + "."
        if ".transform." in key:
            head, rest = key.split(".transform.", 1)
            name = names[prefix, head.split(".")[-1]]
            state[key] = theirs[f"{head}.transform.transformations.{name}.{rest}"]
        else:
            state[key] = theirs.get(key, torch.zeros_like(value))
    built.load_state_dict(state)


@pytest.mark.parametrize("cells", [1, 2])
@pytest.mark.parametrize("subset", ["full", "darts"])
def test_supernet_restricted_to_a_card_is_the_built_net(subset: str, cells: int) -> None:
    torch.manual_seed(0)
    space = FADSpace(subset, repshare=False)
    supernet = space.supernet(12, 6, cells=cells, backend="reference").double()
    card = PAPER if subset == "full" else space.random(random.Random(3))
    built = FADSpace.build(card, 12, 6, cells=cells, backend="reference").double()
    inherit(built, supernet, card)
    supernet.restrict(card.genotype)
    x = torch.randn(2, 12, 6, 5, dtype=torch.float64)
    for ours, theirs in zip(supernet(x), built(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        assert float(theirs.detach().std()) > 1e-4, "not a comparison of zeros"


@pytest.mark.parametrize("subset", ["full", "released", "darts"])
def test_restricted_supernet_derives_its_card(subset: str) -> None:
    space = FADSpace(subset)
    supernet = space.supernet(12, 6)
    card = space.random(random.Random(5))
    supernet.restrict(card.genotype)
    derived = space.derive(supernet)
    for group, nodes in card.genotype.items():
        assert [sorted(node) for node in derived.genotype[group]] == [sorted(node) for node in nodes]
    assert [t.shape for t in supernet(torch.randn(1, 12, 4, 4))] == [
        t.shape for t in FADSpace.build(derived)(torch.randn(1, 12, 4, 4))
    ]


def test_derived_card_builds_at_its_own_settings() -> None:
    space = FADSpace()
    card = space.derive(space.supernet(12, {"box": 6, "cls": 9}), "mine", source={"run": "x"})
    assert card.settings == {"channels": 12, "inner_channels": {"box": 6, "cls": 9}, "cells": 2, "space": "full"}
    json.dumps(card.to_json())
    net = FADSpace.build(card)
    assert isinstance(net, FADTower) and len(net.box.cells) == 2
    assert net.cls(torch.randn(1, 12, 3, 3), torch.randn(1, 12, 3, 3)).shape == (1, 12, 3, 3)


def test_every_alpha_of_every_edge_gets_a_gradient() -> None:
    torch.manual_seed(0)
    space = FADSpace()
    net = space.supernet(12, 6)
    box, cls = net(torch.randn(2, 12, 6, 6))
    (box.square().mean() + cls.square().mean()).backward()
    for parameter in space.arch_parameters(net):
        assert parameter.shape == (len(EDGES), 13)
        assert parameter.grad is not None and bool((parameter.grad != 0).all())


def test_arch_parameters_are_the_alphas_and_nothing_else() -> None:
    net = FADSpace().supernet(12, 6)
    alphas = {id(p) for p in FADSpace.arch_parameters(net)}
    assert alphas == {id(p) for name, p in net.named_parameters() if "alpha" in name}
    values = FADSpace.alphas(net)
    assert [torch.tensor(values[g]).float().equal(net.alphas[g]) for g in ("box", "cls")] == [True, True]


def test_single_group() -> None:
    space = FADSpace("sep", groups=("mask",))
    net = space.supernet(12, 6, cells=2)
    x = torch.randn(3, 12, 14, 14)
    assert net(x).shape == x.shape and net.out_channels == 12
    card = space.derive(net)
    assert set(card.genotype) == {"mask"}
    built = FADSpace.build(card)
    assert isinstance(built, FADStack) and built(x).shape == x.shape


@pytest.mark.parametrize("seed", range(5))
def test_random_cards_are_valid_and_build(seed: int) -> None:
    space = FADSpace("subset2")
    card = space.random(random.Random(seed), settings={"channels": 12, "inner_channels": 6})
    space.check(card)
    assert FADSpace.build(card)(torch.randn(1, 12, 4, 4))[0].shape == (1, 12, 4, 4)


def test_check_refuses_what_is_not_of_the_space() -> None:
    with pytest.raises(ValueError, match="fad-paper: genotype.box node 2 transformation must be one of .*, got 'sep3'"):
        FADSpace("subset1").check(PAPER)
    with pytest.raises(ValueError, match="fad-paper: groups must be mask, got box, cls"):
        FADSpace(groups=("mask",)).check(PAPER)
    other = Card("nats", "other", {"layer": [1]})
    with pytest.raises(ValueError, match="other: method must be 'fad', got 'nats'"):
        FADSpace.build(other)
    FADSpace("subset2").check(Card("fad", "ok", FADSpace("subset1").random(random.Random(0)).genotype))


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "subset": ({"subset": "all"}, "subset must be one of full, .*, got 'all'"),
    "darts": ({"subset": "darts", "repshare": True}, "repshare must be off for subset 'darts'"),
    "groups": ({"groups": ("cls", "box")}, r"groups must be \('box', 'cls'\) or one name"),
}


@pytest.mark.parametrize(("arguments", "words"), BAD.values(), ids=BAD)
def test_bad_spaces(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FADSpace(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"in_channels": 0}, "in_channels must be a positive integer, got 0"),
        ({"inner_channels": True}, "inner_channels of box must be a positive integer, got True"),
        ({"inner_channels": {"box": 8}}, "inner_channels must have the groups box, cls, got box"),
        ({"cells": 0}, "cells must be a positive integer, got 0"),
    ],
)
def test_bad_builds(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        FADSpace.build(PAPER, **arguments)
    with pytest.raises(ValueError, match=words):
        FADSpace().supernet(**arguments)


def test_backend_reaches_every_mixing_op(monkeypatch: pytest.MonkeyPatch) -> None:
    from nasdet.nn import group_norm_relu as fused
    from nasdet.spaces.fad import blocks

    transformations = sys.modules[fused.__module__]

    seen = []
    for module in (blocks, transformations):
        real = module.norm_act_mix

        def spy(*args: Any, backend: str | None = None, real: Any = real, **options: Any) -> Tensor:
            seen.append(backend)
            return real(*args, backend=backend, **options)

        monkeypatch.setattr(module, "norm_act_mix", spy)
    x = torch.randn(1, 12, 4, 4)
    FADSpace().supernet(12, 6, cells=2, backend="reference")(x)
    FADSpace.build(PAPER, 12, 6, backend="reference")(x)
    assert len(seen) > 20 and set(seen) == {"reference"}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("subset", "options"), [("full", {}), ("full", {"decouple": False}), ("darts", {})], ids=str)
def test_fused_supernet_is_the_reference_supernet(
    subset: str, options: dict[str, Any], memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    # In float64: in float32 an activation at ReLU's kink may fall on either side.
    net = FADSpace(subset, **options).supernet(24, 12, cells=2).double()
    net.to(memory_format=memory_format)  # type: ignore[call-overload]  # torch's stub lacks this form
    x = torch.randn(2, 24, 9, 7, dtype=torch.float64).to(memory_format=memory_format)
    results = []
    for backend in ("reference", None):
        set_backend(net, backend)
        net.zero_grad()
        box, cls = net(x)
        (box.square().mean() + cls.square().mean()).backward()
        results.append([box.detach(), cls.detach(), *(p.grad for p in net.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1]) == 2 + len(list(net.parameters()))
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)
