"""A small net, two of whose convolutions ``accelerate`` swaps, and a picture for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def net(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 7, stride=2, padding=3),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1, **options),
        nn.BatchNorm2d(32),
        nn.Conv2d(32, 48, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(48, 16, 1),
    )


def picture(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 72, 96, generator=torch.Generator().manual_seed(1))
