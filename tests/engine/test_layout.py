from __future__ import annotations

import pytest
import torch
from torch import nn

from nasdet.engine.layout import place_model, training_layout
from nasdet.nn import AcceleratedConv2d


@pytest.mark.parametrize(
    ("layer", "safe"),
    [
        (nn.Conv2d(8, 16, 1, stride=2), False),
        (nn.Conv2d(15, 16, 1, stride=(1, 2)), False),
        (nn.Conv2d(32, 32, 1, stride=2, groups=4), False),
        (nn.Conv2d(16, 32, 1, stride=2), True),
        (nn.Conv2d(8, 16, 1), True),
        (nn.Conv2d(8, 16, 3, stride=2, padding=1), True),
        (nn.Linear(4, 4), True),
    ],
    ids=["narrow", "one_axis", "narrow_groups", "wide", "no_stride", "three_by_three", "no_conv"],
)
def test_only_the_overrunning_convolution_is_kept_out_of_channels_last(layer, safe):
    model = nn.Sequential(nn.ReLU(), layer)
    cpu = torch.device("cpu")
    assert training_layout(model, cpu) is (torch.channels_last if safe else torch.contiguous_format)
    assert training_layout(model, cpu, channels_last=False) is torch.contiguous_format
    assert training_layout(model, torch.device("cuda", 0)) is torch.channels_last


@pytest.mark.needs("cpp")
def test_a_placed_model_runs_on_the_librarys_convolutions():
    model = nn.Sequential(nn.Conv2d(64, 64, 1), nn.Conv2d(64, 64, 3, padding=1))
    assert place_model(model, torch.device("cpu")) is torch.channels_last
    assert [type(conv) for conv in model] == [nn.Conv2d, AcceleratedConv2d]
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
