from __future__ import annotations

import pytest
import torch
from torch import nn

from nasdet.engine.layout import training_layout


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
