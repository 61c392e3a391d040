"""The bilevel search: who moves when, and on what."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasdet.search.gradient import Bilevel


class Toy(nn.Module):
    """y = w2 (softmax(alpha) . (w1 x)): both sides matter to both losses."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 1)
        self.frozen = nn.Parameter(torch.ones(1), requires_grad=False)
        self.alpha = nn.Parameter(1e-3 * torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.norm(self.first(x)) * self.alpha.softmax(0) * self.frozen)
        return out


def toy(**options: Any) -> tuple[Toy, Bilevel]:
    torch.manual_seed(0)
    model = Toy()
    weights = [p for name, p in model.named_parameters() if name != "alpha"]
    return model, Bilevel(weights, [model.alpha], **options)


def loss(model: Toy, seed: int) -> Callable[[], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 3, generator=generator), torch.randn(8, 1, generator=generator)
    return lambda: (model(x) - y).square().mean()


def values(model: Toy) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_the_optimisers_hold_disjoint_parameters() -> None:
    model, search = toy()
    sgd = {id(p) for group in search.weight_optimizer.param_groups for p in group["params"]}
    adam = {id(p) for group in search.arch_optimizer.param_groups for p in group["params"]}
    assert adam == {id(model.alpha)} and not sgd & adam
    assert sgd == {id(p) for name, p in model.named_parameters() if name not in ("alpha", "frozen")}


def test_paper_settings_are_the_defaults() -> None:
    _, search = toy()
    (sgd,), (adam,) = search.weight_optimizer.param_groups, search.arch_optimizer.param_groups
    assert (sgd["lr"], sgd["momentum"], sgd["weight_decay"], search.clip) == (0.004, 0.9, 1e-4, 20.0)
    assert (adam["lr"], adam["betas"], adam["weight_decay"]) == (3e-4, (0.5, 0.999), 1e-3)


def test_arch_step_moves_alphas_only() -> None:
    model, search = toy()
    search.weight_step(0, loss(model, 0))  # momentum, so that a stray step of SGD would show
    before = values(model)
    search.arch_step(loss(model, 1))
    after = values(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {"alpha"}
    assert all(p.grad is None for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()] == [name != "frozen" for name, _ in model.named_parameters()]


def test_weight_step_moves_weights_only() -> None:
    model, search = toy()
    search.arch_step(loss(model, 1))  # Adam's moments, likewise
    before = values(model)
    search.weight_step(0, loss(model, 0))
    after = values(model)
    assert {n for n in before if torch.equal(before[n], after[n])} == {"alpha", "frozen"}


def test_step_is_first_order_alternation() -> None:
    model, search = toy(clip=None, momentum=0.0, weight_decay=0.0, lr=0.1)
    twin = copy.deepcopy(model)
    found = search.step(0, loss(model, 0), loss(model, 1))
    arch = loss(twin, 1)()
    adam = torch.optim.Adam([twin.alpha], lr=3e-4, betas=(0.5, 0.999), weight_decay=1e-3)
    (twin.alpha.grad,) = torch.autograd.grad(arch, [twin.alpha])
    adam.step()
    weights = [p for name, p in twin.named_parameters() if name not in ("alpha", "frozen")]
    value = loss(twin, 0)()
    gradients = torch.autograd.grad(value, weights)
    with torch.no_grad():
        for parameter, gradient in zip(weights, gradients, strict=True):
            parameter.sub_(0.1 * gradient)
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, msg=name)
    torch.testing.assert_close(found["arch_loss"], arch.detach())
    torch.testing.assert_close(found["loss"], value.detach())
    assert float(found["grad_norm"]) == pytest.approx(float(torch.cat([g.flatten() for g in gradients]).norm()), 1e-5)


def test_clip_and_schedule() -> None:
    model, search = toy(clip=1e-3, momentum=0.0, weight_decay=0.0, schedule=lambda step: 1.0 if step == 0 else 0.0)
    before = values(model)
    norm = search.weight_step(0, loss(model, 0))["grad_norm"]
    moved = sum(float((p.detach() - before[n]).square().sum()) for n, p in model.named_parameters()) ** 0.5
    assert float(norm) > 1e-3 and moved == pytest.approx(1e-3, rel=1e-3)
    before = values(model)
    search.weight_step(1, loss(model, 0))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_a_failing_loss_leaves_everything_trainable() -> None:
    model, search = toy()

    def fail() -> Tensor:
        raise RuntimeError("out of memory")

    for step in (search.arch_step, lambda fail: search.weight_step(0, fail)):
        with pytest.raises(RuntimeError, match="out of memory"):
            step(fail)
        assert all(p.requires_grad for name, p in model.named_parameters() if name != "frozen")


def test_model_and_optimisers_continue_bit_for_bit() -> None:
    model, search = toy()
    for index in range(3):
        search.step(index, loss(model, index), loss(model, index + 10))
    other, resumed = toy()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    for name in ("weight_optimizer", "arch_optimizer"):
        getattr(resumed, name).load_state_dict(copy.deepcopy(getattr(search, name).state_dict()))
    for index in range(3, 6):
        search.step(index, loss(model, index), loss(model, index + 10))
        resumed.step(index, loss(other, index), loss(other, index + 10))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())


def test_bad_arguments() -> None:
    model, search = toy()
    with pytest.raises(ValueError, match="arch_parameters must not be among weight_parameters, got 1 in both"):
        Bilevel(model.parameters(), [model.alpha])
    with pytest.raises(ValueError, match="must not be empty, got 0 and 1"):
        Bilevel([model.frozen], [model.alpha])
    with pytest.raises(ValueError, match="clip must be positive or None, got 0"):
        Bilevel(model.first.parameters(), [model.alpha], clip=0)
    with pytest.raises(ValueError, match="arch_loss must depend on the parameters of its side, got a constant"):
        search.arch_step(lambda: torch.ones(()))
    with pytest.raises(ValueError, match=r"weight_loss must return a scalar tensor, got \(2,\)"):
        search.weight_step(0, lambda: model.first.weight[0, :2])
