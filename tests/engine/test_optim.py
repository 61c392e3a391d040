from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from nasdet.engine.optim import Schedule, clip_gradients, make_optimizer, make_sgd, scaled_lr, set_lr


@pytest.mark.parametrize(
    ("step", "expected"),
    [(0, 0.01 / 3), (250, 0.01 * (1 / 3 + 2 / 3 * 0.5)), (500, 0.01), (59_999, 0.01), (60_000, 1e-3), (79_999, 1e-3)]
    + [(80_000, 1e-4), (89_999, 1e-4)],
    ids=lambda value: str(value),
)
def test_the_papers_schedule(step, expected):
    assert Schedule(lr=0.01, steps=90_000).at(step) == pytest.approx(expected, rel=1e-12)


def test_the_search_schedule():
    # 17,500 iterations, a tenth from 12,500 on.
    schedule = Schedule(lr=0.004, steps=17_500, milestones=(12_500 / 17_500,))
    assert schedule.at(12_499) == 0.004 and schedule.at(12_500) == pytest.approx(0.0004, rel=1e-12)


def test_cosine_constant_and_warmups():
    cosine = Schedule(lr=2.0, steps=100, decay="cosine", warmup="none")
    assert cosine.at(0) == 2.0 and cosine.at(50) == pytest.approx(1.0) and cosine.at(100) == pytest.approx(0.0)
    assert all(cosine.at(step) > cosine.at(step + 1) for step in range(100))
    lifted = Schedule(lr=0.01, steps=100, decay="cosine", warmup="none", final=0.04)
    assert lifted.at(0) == 0.01 and lifted.at(50) == pytest.approx(0.0052) and lifted.at(100) == pytest.approx(0.0004)
    flat = Schedule(lr=1.0, steps=100, decay="constant", warmup="constant", warmup_steps=7)
    assert [flat.at(step) for step in (0, 6, 7, 99)] == [1 / 3, 1 / 3, 1.0, 1.0]
    short = Schedule(lr=1.0, steps=100, decay="constant")
    assert short.at(9) < 1.0 and short.at(10) == 1.0
    assert Schedule(lr=1.0, steps=3, decay="constant").at(0) == 1.0


@pytest.mark.parametrize(
    "bad",
    [{"lr": -1.0}, {"lr": math.nan}, {"steps": 0}, {"decay": "poly"}, {"warmup": "x"}, {"milestones": (60_000,)}]
    + [{"warmup_steps": -1}, {"warmup_factor": 2.0}, {"final": 1.5}],
    ids=str,
)
def test_bad_schedules(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
        Schedule(**{"lr": 0.1, "steps": 10, **bad})


def net():
    return nn.Sequential(nn.Conv2d(1, 4, 1), nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1, bias=False))


def decay_of(optimizer):
    return {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


@pytest.mark.parametrize(
    ("options", "spared"),
    [({}, set()), ({"decay_norm": False}, {"1.weight", "1.bias", "2.weight", "2.bias"})]
    + [({"decay_bias": False}, {"0.bias"})]
    + [({"decay_norm": False, "decay_bias": False}, {"0.bias", "1.weight", "1.bias", "2.weight", "2.bias"})],
    ids=["all", "no_norm", "no_bias", "neither"],
)
def test_decay_groups(options, spared):
    model = net()
    decay = decay_of(make_sgd(model, 0.1, **options))
    assert {name for name, p in model.named_parameters() if decay[id(p)] == 0} == spared
    assert len(decay) == len(list(model.parameters()))


def test_frozen_excluded_and_shared_parameters():
    model = net()
    model[0].weight.requires_grad_(False)
    model.again = model[3]
    decay = decay_of(make_sgd(model, 0.1, exclude=[model[1].weight]))
    names = {name for name, p in model.named_parameters() if id(p) in decay}
    assert names == {"0.bias", "1.bias", "2.weight", "2.bias", "3.weight"}
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="parameters to train"):
        make_sgd(model, 0.1)
    with pytest.raises(ValueError, match="lr must be"):
        make_sgd(net(), math.nan)


def test_clip_equals_torch_and_none_only_measures():
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0, 0]), torch.tensor([0, 4.0, 0, 0])
    assert clip_gradients(parameters, None) == 5 and parameters[0].grad[0] == 3
    assert clip_gradients(parameters, 10.0) == 5 and parameters[0].grad[0] == 3
    assert clip_gradients(parameters, 1.0) == 5
    assert torch.allclose(parameters[1].grad, torch.tensor([0, 0.8, 0, 0]), rtol=1e-5)
    with pytest.raises(ValueError, match="max_norm"):
        clip_gradients(parameters, 0.0)


def test_rates():
    optimizer = make_sgd(net(), 0.1, decay_norm=False)
    set_lr(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert scaled_lr(0.01, 4) == 0.0025


def test_adamw_spares_norms_and_biases() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    optimizer = make_optimizer("adamw", model, 0.1, momentum=0.9, weight_decay=0.5)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decay[id(p)] for p in model.parameters()] == [0.5, 0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="optimizer must be one of sgd, adamw, got 'lion'"):
        make_optimizer("lion", model, 0.1, momentum=0.9, weight_decay=0.5)
