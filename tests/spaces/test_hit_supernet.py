"""Hit-Detector's supernets: the three ways to hold activations, restriction, inheritance, and expected costs."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasdet.ops import mix
from nasdet.search.gradient import Bilevel
from nasdet.spaces.hit import (
    OPERATIONS,
    HitSpace,
    MixedLayer,
    Place,
    Sizes,
    draw,
    expected_cost,
    keep,
    kept_names,
    mixed_layers,
    recomputed_mix,
    set_memory,
)

STAGES = ((8, 1, 2), (8, 2, 2), (12, 1, 2), (16, 1, 2))
SIZES = Sizes(stem=4, stages=STAGES, tail=(20, 32), channels=8, blocks=2, hidden=6)
NAMES = ("ir_k3_d1_e3", "ir_k5_d2_e1", "sep_k3_d3", "conv_k3_d2")
SPACE = HitSpace(SIZES, NAMES)


def inputs_of(part: str, seed: int = 0) -> Any:
    """What a part of SIZES is called with; every tensor is a leaf that learns."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_()

    if part == "backbone":
        return randn(2, 3, 48, 64)
    if part == "head":
        return randn(5, 8, 7, 7)
    return {
        name: randn(2, c, 32 // s, 48 // s) for name, c, s in (("c2", 8, 1), ("c3", 8, 2), ("c4", 12, 4), ("c5", 32, 8))
    }


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value.values())


def double_supernet(part: str, memory: str) -> nn.Module:
    torch.manual_seed(1)
    net = SPACE.supernet(part, memory=memory).double().train()
    for alpha in SPACE.arch_parameters(net):
        nn.init.normal_(alpha)
    return net


def run(net: nn.Module, part: str, calls: int = 1) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and gradients, of the inputs too, of ``calls`` forward passes and one backward pass."""
    outputs, given = [], []
    for call in range(calls):
        inputs = inputs_of(part, call)
        leaves = [value.detach().double().requires_grad_() for value in tensors(inputs)]
        given += leaves
        fed = leaves[0] if isinstance(inputs, Tensor) else dict(zip(inputs, leaves, strict=True))
        outputs += tensors(net(fed))
    weights = torch.Generator().manual_seed(9)
    loss = sum((y * torch.randn(y.shape, generator=weights).to(y.dtype)).sum() for y in outputs)
    assert isinstance(loss, Tensor)
    loss.backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    gradients |= {f"input {index}": x.grad for index, x in enumerate(given) if x.grad is not None}
    return [y.detach() for y in outputs], gradients


def assert_close(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float) -> None:
    assert set(a) == set(b) and a
    for name, value in a.items():
        scale = max(1.0, float(b[name].double().abs().max()))
        assert float((value.double() - b[name].double()).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("calls", [1, 2], ids=["once", "twice"])
@pytest.mark.parametrize("part", ["backbone", "neck", "head"])
def test_recomputation_has_the_full_modes_gradients(part: str, calls: int) -> None:
    """And its statistics: a batch norm is updated once a call, although its operation runs twice."""
    full, again = double_supernet(part, "full"), double_supernet(part, "recompute")
    outputs, gradients = run(full, part, calls)
    other_outputs, other_gradients = run(again, part, calls)
    for a, b in zip(outputs, other_outputs, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-11)
    # of sums of some thousand terms in another order, amplified by the norms in between
    assert_close(other_gradients, gradients, 1e-9)
    assert {name for name, _ in full.named_parameters()} <= set(gradients)
    assert_close(dict(again.named_buffers()), dict(full.named_buffers()), 1e-11)
    tracked = [b for name, b in again.named_buffers() if name.endswith("num_batches_tracked")]
    assert tracked and all(int(b) == calls for b in tracked)


class Noisy(nn.Module):
    """Drops and counts: chance, a parameter, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.5]))
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.nn.functional.dropout(x * self.scale, 0.5)


def test_recomputation_draws_the_same_random_numbers() -> None:
    x, weights = torch.randn(3, 4, requires_grad=True), torch.tensor([0.3, 0.7], requires_grad=True)
    found = []
    for recompute in (False, True):
        torch.manual_seed(3)
        modules = [Noisy(), Noisy()]
        y = recomputed_mix(modules, x, weights) if recompute else mix([m(x) for m in modules], weights)
        after = torch.rand(2)  # what others draw between forward and backward
        grads = torch.autograd.grad(y.square().sum(), [x, weights, *(m.scale for m in modules)])
        found.append((y, *grads, after, torch.rand(2), *(m.calls for m in modules)))
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert float(found[1][-1]) == 1


def test_recomputation_repeats_autocast() -> None:
    """Backward runs outside of the block, as it should, and the block's cache is neither used nor filled."""
    place = Place("head", 0, 8, 8)
    found = {}
    for memory in ("full", "recompute"):
        torch.manual_seed(2)
        layer, x = MixedLayer(place, NAMES, memory=memory).train(), torch.randn(4, 8, 7, 7, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            assert y.dtype == torch.bfloat16
        y.float().square().mean().backward()
        found[memory] = {name: p.grad for name, p in layer.named_parameters()} | {"x": x.grad, "y": y.detach()}
    for name, value in found["full"].items():
        assert value is not None and value.dtype == found["recompute"][name].dtype
        other = found["recompute"][name]
        # bfloat16 keeps 8 bits; the full mode rounds the sum of the candidates' gradients at every step
        assert float((value - other).norm()) <= 0.03 * float(value.norm()) + 1e-6, name


@pytest.mark.parametrize("side", ["weights", "alphas"])
def test_recomputation_gives_what_one_side_of_a_search_needs(side: str) -> None:
    """The other side's parameters take no part, as :class:`Bilevel` has it."""
    nets = {memory: double_supernet("head", memory) for memory in ("full", "recompute")}
    found = {}
    for memory, net in nets.items():
        for name, parameter in net.named_parameters():
            parameter.requires_grad_(name.endswith("alpha") == (side == "alphas"))
        _, found[memory] = run(net, "head")
    assert_close(found["recompute"], found["full"], 1e-10)
    assert all(name.startswith("input") or name.endswith("alpha") == (side == "alphas") for name in found["full"])


def test_recomputation_refuses_a_second_derivative_and_changed_weights() -> None:
    layer, x = (
        MixedLayer(Place("head", 0, 8, 8), NAMES, memory="recompute"),
        torch.randn(2, 8, 7, 7, requires_grad=True),
    )
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    y = layer(x)
    with torch.no_grad():
        next(layer.candidates.parameters()).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("memory", ["full", "recompute"])
@pytest.mark.parametrize("part", ["backbone", "neck", "head"])
def test_a_restricted_supernet_is_the_derived_net(part: str, memory: str) -> None:
    torch.manual_seed(4)
    supernet = SPACE.supernet(part, memory=memory).train()
    fed = inputs_of(part)
    for _ in range(2):  # so that the statistics are not those of a new net
        supernet(fed)
    card = HitSpace(SIZES, NAMES, parts=(part,)).random(Random(5))
    net = HitSpace.build(card, part)
    net.load_state_dict(SPACE.inherited_state(supernet, card.genotype))
    SPACE.restrict(supernet, card.genotype)
    assert HitSpace(SIZES, NAMES, parts=(part,)).derive(supernet).genotype == card.genotype
    for mode in (True, False):
        with torch.no_grad():
            both = zip(tensors(supernet.train(mode)(fed)), tensors(net.train(mode)(fed)), strict=True)
        for a, b in both:
            assert torch.allclose(a, b, rtol=0, atol=2e-5 * float(b.abs().max()))


def test_a_draw_of_all_is_the_whole_layer_and_a_draw_of_some_their_mixture() -> None:
    torch.manual_seed(6)
    layer, x = MixedLayer(Place("neck", 0, 6, 6), NAMES, memory="sampled").train(), torch.randn(2, 6, 9, 9)
    nn.init.normal_(layer.alpha)
    with pytest.raises(ValueError, match="draw must be called before a step .* got no draw"):
        layer(x)
    draw(layer, 4)
    with torch.no_grad():
        whole = mix([layer.candidates[name](x) for name in NAMES], layer.alpha.softmax(0))
        assert torch.allclose(layer(x), whole, atol=1e-6)
    draw(layer, 2)
    assert layer.drawn is not None and len(layer.drawn) == 2
    layer(x).square().sum().backward()
    assert layer.alpha.grad is not None
    assert {i for i in range(4) if layer.alpha.grad[i] != 0} == set(layer.drawn)
    for index, name in enumerate(NAMES):
        learnt = any(p.grad is not None for p in layer.candidates[name].parameters())
        assert learnt == (index in layer.drawn)
    layer.eval()
    with torch.no_grad():
        whole = mix([layer.candidates[name](x) for name in NAMES], layer.alpha.softmax(0))
        assert torch.allclose(layer(x), whole, atol=1e-6)


def test_draws_follow_the_softmax_without_replacement() -> None:
    """Frequencies of pairs drawn one after the other; within 4 standard deviations. One generator, one result."""
    layer = MixedLayer(Place("neck", 0, 2, 2), NAMES[:3], memory="sampled")
    p = torch.tensor([0.6, 0.3, 0.1])
    layer.alpha.data = p.log() + 5
    expected = {(a, b): float(p[a] * p[b] / (1 - p[a]) + p[b] * p[a] / (1 - p[b])) for a, b in ((0, 1), (0, 2), (1, 2))}
    generator, times, seen = torch.Generator().manual_seed(0), 4000, dict.fromkeys(expected, 0)
    for _ in range(times):
        draw(layer, 2, generator=generator)
        assert layer.drawn is not None
        seen[layer.drawn[0], layer.drawn[1]] += 1
    for pair, share in expected.items():
        assert abs(seen[pair] - times * share) < 4 * (times * share * (1 - share)) ** 0.5
    layers = [MixedLayer(Place("neck", index, 2, 2), NAMES) for index in range(9)]
    drawn = []
    for _ in range(2):
        torch.manual_seed(7)
        draw(nn.ModuleList(layers), 1)
        drawn.append([layer.drawn for layer in layers])
    assert drawn[0] == drawn[1] and len(set(drawn[0])) > 1


def test_screened_out_operations_take_no_part_and_stay_so_in_a_checkpoint() -> None:
    supernet = SPACE.supernet("head")
    before = {name: p.shape for name, p in supernet.named_parameters()}
    keep(supernet, "head", [NAMES[1], NAMES[3]])
    assert kept_names(supernet) == {"head": (NAMES[1], NAMES[3])}
    assert {name: p.shape for name, p in supernet.named_parameters()} == before
    x = torch.randn(2, 8, 7, 7)
    supernet(x).sum().backward()
    first = mixed_layers(supernet)["head"][0]
    assert first.alpha.grad is not None and float(first.alpha.grad[0]) == float(first.alpha.grad[2]) == 0
    assert all(p.grad is None for p in first.candidates[NAMES[0]].parameters())
    assert first.weights().shape == (2,) and first.weights().sum().item() == pytest.approx(1)
    nn.init.constant_(first.alpha, 0)
    first.alpha.data[0] = 9
    assert SPACE.alphas(supernet)["head"][0] == [9, 0, 0, 0]
    derived = HitSpace(SIZES, NAMES, parts=("head",)).derive(supernet)
    assert derived.genotype["head"][0] == NAMES[1]
    resumed = SPACE.supernet("head")
    resumed.load_state_dict(supernet.state_dict())
    assert kept_names(resumed) == kept_names(supernet)
    assert torch.allclose(resumed.eval()(x), supernet.eval()(x))
    draw(resumed, 3)
    assert all(layer.drawn == (1, 3) for layer in mixed_layers(resumed)["head"])
    for names, words in (
        ([NAMES[0]], f"names must be among {NAMES[1]}, {NAMES[3]}, got {NAMES[0]}"),
        ([], "got none"),
    ):
        with pytest.raises(ValueError, match=words):
            keep(supernet, "head", names)


@pytest.mark.parametrize("memory", ["full", "recompute", "sampled"])
def test_a_bilevel_step_moves_weights_and_alphas(memory: str) -> None:
    torch.manual_seed(10)
    net, space = SPACE.supernet("head", memory=memory).train(), SPACE
    alphas = space.arch_parameters(net)
    weights = [p for p in net.parameters() if all(p is not alpha for alpha in alphas)]
    bilevel, x = Bilevel(weights, alphas, lr=0.1), torch.randn(4, 8, 7, 7)
    macs = space.macs((64, 64), proposals=4)
    before = [p.detach().clone() for p in (*alphas, *weights)]
    draw(net, 2)

    def arch_loss() -> Tensor:
        return net(x).square().mean() + 1e-6 * expected_cost(net, macs)["head"]

    bilevel.step(0, lambda: net(x).square().mean(), arch_loss)
    moved = [not torch.equal(a, b) for a, b in zip(before, (*alphas, *weights), strict=True)]
    assert all(moved[: len(alphas)])
    assert all(moved) == (memory != "sampled") and any(moved[len(alphas) :])


def test_all_parts_of_one_model() -> None:
    """Layers are found wherever they stand, and sorted into parts."""
    model = nn.Sequential(*(SPACE.supernet(part) for part in ("head", "backbone", "neck")))
    layers = mixed_layers(model)
    assert {part: [layer.place.index for layer in found] for part, found in layers.items()} == {
        "head": [0, 1],
        "backbone": [0, 1, 2, 3, 4],
        "neck": [0, 1, 2, 3, 4, 5, 6, 7],
    }
    set_memory(model, "recompute")
    assert all(layer.memory == "recompute" for found in layers.values() for layer in found)
    assert len(SPACE.arch_parameters(model)) == 15
    SPACE.check(SPACE.derive(model))


CALLS: dict[str, tuple[Any, str]] = {
    "memory": (
        lambda: SPACE.supernet("neck", memory="low"),
        "memory must be one of full, recompute, sampled, got 'low'",
    ),
    "part": (lambda: HitSpace(parts=("neck",)).supernet("head"), "part must be one of neck, got 'head'"),
    "samples": (lambda: draw(SPACE.supernet("head"), 0), "samples must be a positive integer, got 0"),
    "no-layers": (lambda: mixed_layers(nn.ReLU()), "model must have mixed layers, got a ReLU without"),
    "keep": (lambda: keep(SPACE.supernet("head"), "neck", NAMES), "part must be one of head, got 'neck'"),
    "places": (
        lambda: SPACE.restrict(SPACE.supernet("head"), {"head": [NAMES[0]]}),
        "genotype.head must have 2 operations, got 1",
    ),
    "other-part": (
        lambda: SPACE.inherited_state(SPACE.supernet("head"), {"neck": [NAMES[0]]}),
        "genotype.neck must have 0 operations, got 1",
    ),
    "outside": (
        lambda: SPACE.restrict(SPACE.supernet("head"), {"head": [NAMES[0], "conv_k5_d3"]}),
        "genotype.head must be among ir_k3_d1_e3, .*, got 'conv_k5_d3'",
    ),
}


@pytest.mark.parametrize(("call", "words"), CALLS.values(), ids=CALLS)
def test_bad_arguments(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_every_operation_stands_in_a_layer_of_all() -> None:
    layer = MixedLayer(Place("neck", 0, 4, 6), tuple(OPERATIONS), memory="recompute")
    y = layer(torch.randn(1, 4, 8, 9))
    y.sum().backward()
    assert y.shape == (1, 6, 8, 9) and all(p.grad is not None for p in layer.parameters())
    assert "32 of 32" in repr(layer)
