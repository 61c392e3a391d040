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
                inputs = x.narrow(-3, first // width * fan, groups * fan)
            parts.append(F.conv2d(inputs, weight, bias, self.stride, padding, dilation, groups))
            first += size
        return torch.cat(parts, -3)


def transform(network: nn.Module, genotype: Mapping[str, Sequence[Sequence[Any]]]) -> nn.Module:
    """Give the convolutions named in ``genotype`` their dilations, in place; their weights and names stay.

    ``genotype``: ``{module path: [[dilation, count], ...]}``, a dilation an int or [vertical, horizontal], the counts
    shares of the output channels. The convolutions must be plain ones of dilation 1 with a square kernel of odd size,
    padded with zeros to keep their size at stride 1. Raises ``TypeError`` or ``ValueError`` otherwise; nothing is
    changed then.
    """
    if not isinstance(genotype, Mapping) or not genotype:
        raise ValueError(f"genotype must be an object of layers, got {genotype!r}")
    names: dict[nn.Module, str] = {}
    made: dict[nn.Module, nn.Module] = {}
    for name, entries in genotype.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"genotype layers must be module paths, got {name!r}")
        conv = _checked(name, _module(network, name))
        if (other := names.setdefault(conv, name)) != name:
            raise ValueError(f"genotype must name a convolution once, got {other!r} and {name!r} for the same one")
        dilations, counts = _entries(name, entries)
        total, width = sum(counts), conv.out_channels // conv.groups
        if conv.out_channels % total:
            raise ValueError(f"{name} must have a multiple of {total} output channels, got {conv.out_channels}")
        splits = [count * (conv.out_channels // total) for count in counts]
        if conv.groups > 1 and any(size % width for size in splits):
            raise ValueError(f"{name} must be cut between convolution groups of {width} channels, got {splits}")
        split = SplitConv2d(conv.weight, conv.bias, dilations, splits, conv.stride, conv.groups)
        made[conv] = split.train(conv.training)
    return replace_modules(network, made)


def replace_modules(network: nn.Module, made: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Each of some modules by another, in place, by every name that it has."""
    for parent in list(network.modules()):
        for child, module in list(parent._modules.items()):
            if module is not None and module in made:
                setattr(parent, child, made[module])
    return network


# By name, as this file needs torch alone: the last two compute what the first does.
_PLAIN = (
    "torch.nn.modules.conv.Conv2d",
    "nasdet.nn.depthwise_conv.DepthwiseConv2d",
    "nasdet.nn.accelerate.AcceleratedConv2d",
)


def _module(network: nn.Module, name: str) -> nn.Module:
    try:
        return network.get_submodule(name)
    except AttributeError:
        raise ValueError(f"network must have a module {name}, got a {type(network).__name__} without") from None


def _checked(name: str, conv: nn.Module) -> nn.Conv2d:
    """``conv``, if a ``SplitConv2d`` can stand for it."""
    kind = type(conv)
    if f"{kind.__module__}.{kind.__qualname__}" not in _PLAIN or not isinstance(conv, nn.Conv2d):
        raise TypeError(f"{name} must be a plain Conv2d, got {kind.__name__}")
    held = vars(conv)
    lost = [key for key in held if key in ("forward", "_conv_forward") or key.endswith("_hooks") and held[key]]
    lost += [key for key in (*conv._parameters, *conv._buffers, *conv._modules) if key not in ("weight", "bias")]
    if lost or conv._parameters.get("weight") is None:
        raise ValueError(f"{name} must have nothing but a weight and a bias, got {lost or 'a weight that is computed'}")
    if conv.kernel_size[0] != conv.kernel_size[1] or conv.kernel_size[0] % 2 == 0:
        raise ValueError(f"{name} must have a square kernel of odd size, got {conv.kernel_size}")
    if tuple(conv.dilation) != (1, 1):
        raise ValueError(f"{name} must have dilation 1, got {conv.dilation}")
    same = (conv.kernel_size[0] // 2,) * 2
    if conv.padding_mode != "zeros" or conv.padding not in ("same", same):
        raise ValueError(f"{name} must be padded with {same} zeros, got {conv.padding} ({conv.padding_mode})")
    return conv


def _entries(name: str, entries: Any) -> tuple[list[tuple[int, int]], list[int]]:
    """The dilations and the counts of a layer."""
    if not isinstance(entries, (list, tuple)) or not entries:
        raise ValueError(f"genotype.{name} must be a list of [dilation, count], got {entries!r}")
    dilations, counts = [], []
    for entry in entries:
        if not isinstance(entry, (list, tuple)) or len(entry) != 2:
            raise ValueError(f"genotype.{name} must be a list of [dilation, count], got {entry!r}")
        dilation, count = entry
        pair = dilation if isinstance(dilation, (list, tuple)) else (dilation, dilation)
        if len(pair) != 2 or not all(type(value) is int and value >= 1 for value in (*pair, count)):
            raise ValueError(f"genotype.{name} must have positive integers, dilations also two of them, got {entry!r}")
        dilations.append((pair[0], pair[1]))
        counts.append(count)
    return dilations, counts
