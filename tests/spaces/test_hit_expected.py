"""Hit-Detector's expected costs: exact over all nets, differentiable, of any table."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasdet.measure import count, total
from nasdet.spaces.hit import (
    HitSpace,
    Sizes,
    alpha_matrix,
    expected_cost,
    expected_part_cost,
    keep,
    mixed_layers,
    table,
)

STAGES = ((8, 1, 2), (8, 2, 2), (12, 1, 2), (16, 1, 2))
SIZES = Sizes(stem=4, stages=STAGES, tail=(20, 32), channels=8, blocks=2, hidden=6)
NAMES = ("ir_k3_d1_e3", "ir_k5_d2_e1", "sep_k3_d3", "conv_k3_d2")


def nets_of(part: str, names: Sequence[str], count_: int) -> list[list[str]]:
    return [list(choice) for choice in product(names, repeat=count_)]


def test_the_expected_cost_is_the_mean_over_all_nets() -> None:
    """Every architecture of a tiny space is built and counted, and weighted by its probability."""
    sizes = Sizes(
        stem=4, stages=((6, 1, 2), (6, 1, 2), (8, 1, 2), (8, 1, 2)), tail=(), channels=6, inputs=("c5",), blocks=1
    )
    space = HitSpace(sizes, {"backbone": NAMES[:2], "neck": NAMES[:3]}, ("backbone", "neck"))
    size, image = (40, 56), torch.empty(1, 3, 40, 56, device="meta")
    torch.manual_seed(8)
    nets = nn.ModuleDict({part: space.supernet(part) for part in space.parts})
    for alpha in space.arch_parameters(nets):
        nn.init.normal_(alpha)
    found = expected_cost(nets, space.macs(size))
    for part in space.parts:
        layers = mixed_layers(nets)[part]
        mean, least = 0.0, float("inf")
        for choice in nets_of(part, space.candidates[part], len(layers)):
            card = HitSpace(sizes, "full", (part,)).card({part: choice})
            with torch.device("meta"):
                net: nn.Module = HitSpace.build(card, part)
            if part == "neck":
                net = OnTheCoarsest(net)
            x = image if part == "backbone" else torch.empty(1, 8, 2, 2, device="meta")
            rows = zip(layers, choice, strict=True)
            shares = [layer.weights()[layer.names.index(name)].item() for layer, name in rows]
            cost = total(count(net, x)).macs
            mean += torch.tensor(shares, dtype=torch.float64).prod().item() * cost
            least = min(least, cost)
        assert found[part].item() == pytest.approx(mean, rel=1e-5)
        assert least < found[part].item()


class OnTheCoarsest(nn.Module):
    def __init__(self, neck: nn.Module) -> None:
        super().__init__()
        self.neck = neck

    def forward(self, x: Tensor) -> Any:
        return self.neck({"c5": x})


def test_the_expected_costs_gradient_and_any_other_cost() -> None:
    """A latency instead of MACs; the derivative is that of a softmax: p (c - mean)."""
    space = HitSpace(SIZES, NAMES, ("head",))
    milliseconds = table(SIZES, space.candidates, lambda place, name: 0.1 * len(name) + place.index, {"head": 2.0})
    net = space.supernet("head")
    for alpha in space.arch_parameters(net):
        nn.init.normal_(alpha)
    value = expected_cost(net, milliseconds)["head"]
    value.backward()
    spent = 2.0
    for index, layer in enumerate(mixed_layers(net)["head"]):
        p, costs = layer.alpha.detach().softmax(0), torch.tensor([0.1 * len(name) + index for name in NAMES])
        spent += float((p * costs).sum())
        assert layer.alpha.grad is not None
        assert torch.allclose(layer.alpha.grad, p * (costs - (p * costs).sum()), atol=1e-6)
    assert value.item() == pytest.approx(spent, rel=1e-6)
    keep(net, "head", NAMES[2:])
    half = expected_cost(net, milliseconds)["head"]
    alphas = alpha_matrix(mixed_layers(net)["head"])
    assert alphas.shape == (2, 2)
    assert float(half) == pytest.approx(float(expected_part_cost(alphas, NAMES[2:], milliseconds.parts["head"])))
    with pytest.raises(ValueError, match=r"alphas must have shape \(2, 4\), got \(2, 2\)"):
        expected_part_cost(alphas, NAMES, milliseconds.parts["head"])


def test_a_lambda_on_macs_alone_finds_the_cheapest_net() -> None:
    space = HitSpace(SIZES, NAMES, ("neck",))
    net = space.supernet("neck")
    table_ = space.macs((64, 64))
    optimizer = torch.optim.Adam(space.arch_parameters(net), lr=0.2)
    for _ in range(120):
        optimizer.zero_grad()
        (expected_cost(net, table_)["neck"] / 1e6).backward()
        optimizer.step()
    genotype = space.derive(net).genotype
    assert table_(genotype) == table_.reachable()[0]
