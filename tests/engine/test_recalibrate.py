"""Batch norm statistics measured anew: the right numbers, nothing else touched."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from nasdet.detectors import ResNet
from nasdet.detectors.norm import SyncBatchNorm
from nasdet.engine.recalibrate import recalibrate


def small(norm=nn.BatchNorm2d):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 1), norm(2)).double()


@pytest.fixture
def batches():
    return [torch.randn(5, 3, 8, 8, dtype=torch.double) * (1 + step) + step for step in range(4)]


def statistics(x):
    return x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=True)


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, SyncBatchNorm])
def test_cumulative_is_the_mean_over_batches(batches, norm):
    model = small(norm)
    assert recalibrate(model, iter(batches)) == 4
    each = [statistics(model[0](batch)) for batch in batches]
    torch.testing.assert_close(model[1].running_mean, torch.stack([mean for mean, _ in each]).mean(0))
    torch.testing.assert_close(model[1].running_var, torch.stack([var for _, var in each]).mean(0))


def test_momentum_runs_from_zero_and_one(batches):
    model = small()
    model[1].running_mean.fill_(7.0)
    recalibrate(model, batches, mode="momentum", momentum=0.3)
    mean, var = torch.zeros(4).double(), torch.ones(4).double()
    for batch in batches:
        new = statistics(model[0](batch))
        mean, var = 0.7 * mean + 0.3 * new[0], 0.7 * var + 0.3 * new[1]
    torch.testing.assert_close(model[1].running_mean, mean)
    torch.testing.assert_close(model[1].running_var, var)


def test_it_is_repeatable_and_draws_no_random_number(batches):
    model, before = small().train(), torch.get_rng_state()
    recalibrate(model, batches)
    first = {name: value.clone() for name, value in model.state_dict().items()}
    recalibrate(model, batches)
    assert all(torch.equal(value, first[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), before), "dropout took part"


@pytest.mark.parametrize("training", [True, False])
def test_modes_momenta_weights_and_gradients_stay(batches, training):
    model = small(SyncBatchNorm).train(training)
    model[3].eval()
    model[5].momentum = 0.25
    weights = {name: value.clone() for name, value in model.named_parameters()}
    modes = [module.training for module in model.modules()]
    recalibrate(model, batches)
    assert [module.training for module in model.modules()] == modes
    assert [norm.momentum for norm in norms(model)] == [0.1, 0.25]
    assert all("forward" not in norm.__dict__ for norm in norms(model))
    assert all(torch.equal(value, weights[name]) for name, value in model.named_parameters())
    assert all(value.grad is None for value in model.parameters())


def test_a_forward_of_ones_own_and_norms_off_the_path(batches):
    model = small()
    model[5].running_var.fill_(9.0)
    seen = []
    assert recalibrate(model, batches[:2], forward=lambda batch: seen.append(model[:3](batch))) == 2
    assert not any(result.requires_grad for result in seen)
    assert model[1].num_batches_tracked == 2 and model[5].num_batches_tracked == 0
    assert torch.equal(model[5].running_mean, torch.zeros(2).double())
    assert torch.equal(model[5].running_var, torch.ones(2).double()), "of another path: forgotten all the same"


def test_frozen_stages_and_other_norms_are_left_alone():
    model = ResNet(18, width=0.125, norm="bn", frozen_stages=2)
    for norm in norms(model):
        norm.running_mean.fill_(0.5)
    recalibrate(model, [torch.randn(2, 3, 32, 32)])
    assert all(bool((norm.running_mean == 0.5).all()) for norm in [model.bn1, *norms(model.layer1)])
    assert not any(bool((norm.running_mean == 0.5).all()) for norm in norms(model.layer2))
    assert recalibrate(nn.Sequential(nn.GroupNorm(1, 3)), iter(())) == 0
    assert recalibrate(nn.BatchNorm2d(3, track_running_stats=False), []) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "mean"}, "mode must be one of cumulative, momentum, got 'mean'"),
        ({"momentum": 0.0}, r"momentum must be in \(0, 1\], got 0.0"),
        ({}, "batches must hold at least one batch"),
    ],
    ids=["mode", "momentum", "no_batch"],
)
def test_bad_input_changes_nothing(options, message):
    model = small()
    model[1].running_mean.fill_(3.0)
    with pytest.raises(ValueError, match=message):
        recalibrate(model, [], **options)
    assert bool((model[1].running_mean == 3.0).all()) and model.training


def test_an_error_in_between_gives_the_modes_back(batches):
    model = small(SyncBatchNorm)

    def broken(batch):
        model(batch)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        recalibrate(model, batches, forward=broken)
    assert model.training and [norm.momentum for norm in norms(model)] == [0.1, 0.1]
    assert all("forward" not in norm.__dict__ for norm in norms(model))


def test_processes_do_not_wait_for_each_other(batches, monkeypatch):
    """Each rank recalibrates a path of its own: a synchronised norm would mix them, or wait for ever."""
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda *_: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda *_: pytest.fail("spoke to the other process"))
    model = small(SyncBatchNorm)
    assert recalibrate(model, batches) == 4
