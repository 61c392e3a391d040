"""A derived network in plain PyTorch. This file needs torch and nothing else: it is also what exports consist of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SplitConv2d(nn.Module):
    """One convolution whose slices of output channels have their own dilations: a convolution each, and a concat.

    ``weight`` and ``bias`` are those of the plain convolution that it replaces; ``dilations`` and ``splits`` have an
    entry for each slice, (vertical, horizontal) and output channels.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        dilations: Sequence[Sequence[int]],
        splits: Sequence[int],
        stride: Sequence[int],
        groups: int,
    ) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.dilations = tuple((down, across) for down, across in dilations)
        self.splits = tuple(splits)
        self.stride = tuple(stride)
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        out_channels, fan, kernel, _ = self.weight.shape
        width = out_channels // self.groups
        parts, first = [], 0
        for dilation, size in zip(self.dilations, self.splits, strict=True):
            weight = self.weight[first : first + size]
            bias = None if self.bias is None else self.bias[first : first + size]
            padding = (dilation[0] * (kernel // 2), dilation[1] * (kernel // 2))
            inputs, groups = x, self.groups
            if self.groups > 1:  # a slice reads the inputs of its own convolution groups only
                groups = size // width
                inputs = x[:, first // width * fan : (first // width + groups) * fan]
            parts.append(F.conv2d(inputs, weight, bias, self.stride, padding, dilation, groups))
            first += size
        return torch.cat(parts, 1)


def transform(network: nn.Module, genotype: Mapping[str, Sequence[Sequence[Any]]]) -> nn.Module:
    """Give the convolutions named in ``genotype`` their dilations, in place; their weights and names stay.

    ``genotype``: ``{module path: [[dilation, count], ...]}``, a dilation an int or [vertical, horizontal], the counts
    shares of the output channels. The convolutions must be padded to keep their size at stride 1.
    """
    made = {}
    for name, entries in genotype.items():
        conv = network.get_submodule(name)
        if not isinstance(conv, nn.Conv2d):
            raise TypeError(f"{name} must be a Conv2d, got {type(conv).__name__}")
        total, width = sum(count for _, count in entries), conv.out_channels // conv.groups
        if conv.out_channels % total:
            raise ValueError(f"{name} must have a multiple of {total} output channels, got {conv.out_channels}")
        splits = [count * (conv.out_channels // total) for _, count in entries]
        if conv.groups > 1 and any(size % width for size in splits):
            raise ValueError(f"{name} must be cut between convolution groups of {width} channels, got {splits}")
        dilations = [(d, d) if isinstance(d, int) else d for d, _ in entries]
        made[name] = SplitConv2d(conv.weight, conv.bias, dilations, splits, conv.stride, conv.groups)
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        setattr(network.get_submodule(parent), child, module)
    return network
