"""Where and how a model runs: its device, its memory order, its convolutions."""

from __future__ import annotations

import torch
from torch import nn

from nasdet.nn import accelerate


def place_model(model: nn.Module, device: torch.device, channels_last: bool = True) -> torch.memory_format:
    """Move ``model`` to ``device`` and into :func:`training_layout`, which is returned.

    On the CPU its convolutions run on the library's kernels from then on, where these are faster.
    """
    model.to(device)
    layout = training_layout(model, device, channels_last)
    model.to(memory_format=layout)  # type: ignore[call-overload]  # missing from its stub
    accelerate(model)
    return layout


def training_layout(model: nn.Module, device: torch.device, channels_last: bool = True) -> torch.memory_format:
    """``channels_last`` when it is wanted and safe, else contiguous.

    On the CPU it is not safe for a strided 1x1 convolution of fewer than 16 channels (the shortcuts of a ResNet of
    width below 0.25): its weight gradient writes past a workspace and corrupts memory (oneDNN issue 6035, seen with
    torch 2.13.0; never from 16 channels on, nor in contiguous memory).
    """
    if not channels_last or (device.type == "cpu" and any(map(_overruns, model.modules()))):
        return torch.contiguous_format
    return torch.channels_last


def _overruns(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d):
        return False
    return module.kernel_size == (1, 1) and max(module.stride) > 1 and module.in_channels // module.groups < 16
