"""Convolutions with several dilations, in the place of one ``nn.Conv2d``: mixed while searching, grouped afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nasdet._checks import check_whole
from nasdet.nn.depthwise_conv import DepthwiseConv2d, add_bias, beside_the_weight, check_sizes
from nasdet.ops import grouped_dilation_conv2d, mixed_dilation_conv2d
from nasdet.ops._dilation import LARGEST_KERNEL, Pair, checked_algorithm, checked_dilations, checked_splits, pair


def check_same_conv2d(conv: nn.Module, name: str = "conv", *, kept: bool = False) -> nn.Conv2d:
    """``conv``, if it is a plain ``nn.Conv2d`` that the modules below can stand for; ``name`` is for the error.

    That is: a square kernel of odd size up to 255, zero padding that keeps the size at stride 1, and no subclass, whose
    own forward would be lost, but :class:`DepthwiseConv2d` and :class:`~nasdet.nn.AcceleratedConv2d`, which compute the
    same. Unless the module itself is ``kept``, it has nothing either that another in its place would lack: hooks, a
    forward of its own, or buffers, parameters and children beside weight and bias.
    """
    from nasdet.nn.accelerate import AcceleratedConv2d  # which imports this file

    if not isinstance(conv, nn.Conv2d) or type(conv) not in (nn.Conv2d, DepthwiseConv2d, AcceleratedConv2d):
        raise TypeError(f"{name} must be a plain nn.Conv2d, got {type(conv).__name__}")
    if not kept and (own := beside_the_weight(conv)):
        raise ValueError(f"{name} must have nothing but a weight and a bias, got {own}, which would be lost")
    same = tuple(dilation * (conv.kernel_size[0] // 2) for dilation in check_sizes(conv, name))
    padding = same if conv.padding == "same" else conv.padding
    if padding != same or conv.padding_mode != "zeros":
        raise ValueError(
            f"{name} must be padded with {same[0]}x{same[1]} zeros, got {conv.padding} ({conv.padding_mode})"
        )
    return conv


def lay_out_weight(conv: nn.Conv2d | GroupedDilationConv2d, layout: torch.memory_format) -> None:
    """Lay the weight out anew, but where another process or a flat buffer would lose it in a new place."""
    weight = conv.weight
    shared = weight.is_cpu and weight.is_shared()  # elsewhere torch calls everything shared
    if not shared and weight.untyped_storage().nbytes() == weight.nbytes:
        with torch.inference_mode(weight.is_inference()):  # what could learn still can
            weight.data = weight.data.contiguous(memory_format=layout)


def _grouped(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any, **how: Any) -> Tensor:
    if x.dim() == 3:
        return _grouped(x.unsqueeze(0), weight, bias, *arguments, **how).squeeze(0)
    return add_bias(grouped_dilation_conv2d(x, weight, *arguments, **how), bias)


def _mixed(x: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any, **how: Any) -> Tensor:
    if x.dim() == 3:
        return _mixed(x.unsqueeze(0), weight, bias, *arguments, **how).squeeze(0)
    return add_bias(mixed_dilation_conv2d(x, weight, *arguments, **how), bias)


torch.fx.wrap("_grouped")  # one node each in a graph that torch.fx traces: the ops look at real tensors
torch.fx.wrap("_mixed")


class _DilationConv2d(nn.Module):
    """What both have in common: the shape, a weight and perhaps a bias, and how the op is called."""

    weight: Tensor
    bias: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        dilations: Sequence[int | Pair],
        stride: int | Pair,
        groups: int,
        algorithm: str | None,
        precision: str,
        backend: str | None,
    ) -> None:
        super().__init__()
        self.in_channels = check_whole("in_channels", in_channels)
        self.out_channels = check_whole("out_channels", out_channels)
        self.kernel_size = pair("kernel_size", kernel_size)
        if self.kernel_size[0] != self.kernel_size[1] or self.kernel_size[0] % 2 == 0:
            raise ValueError(f"kernel_size must be odd, and the same in both directions, got {kernel_size}")
        if self.kernel_size[0] > LARGEST_KERNEL:
            raise ValueError(f"kernel_size must be at most {LARGEST_KERNEL}, got {kernel_size}")
        self.stride = pair("stride", stride)
        self.groups = check_whole("groups", groups)
        if in_channels % groups or out_channels % groups:
            raise ValueError(
                f"groups must divide in_channels {in_channels} and out_channels {out_channels}, got {groups}"
            )
        self.dilations = checked_dilations(dilations)
        checked_algorithm(algorithm, precision)
        self.algorithm, self.precision, self.backend = algorithm, precision, backend

    def _make_parameters(self, replicas: int, bias: bool, device: Any, dtype: Any) -> None:
        fan = self.in_channels // self.groups
        options = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.empty(replicas * self.out_channels, fan, *self.kernel_size, **options))
        self.bias = nn.Parameter(torch.empty(self.out_channels, **options)) if bias else None

    def reset_parameters(self) -> None:
        """Weight and bias drawn as ``nn.Conv2d`` draws them."""
        bound = 1 / math.sqrt(self.weight[0].numel())
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def _how(self) -> dict[str, Any]:
        return {"algorithm": self.algorithm, "precision": self.precision, "backend": self.backend}

    def _take(self, conv: nn.Conv2d, weight: Tensor) -> None:
        """``weight`` and the bias of ``conv`` as parameters, training where those of ``conv`` do."""
        self.weight = nn.Parameter(weight, requires_grad=conv.weight.requires_grad)
        self.bias = conv.bias
        self.train(conv.training)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """``.to(memory_format=torch.channels_last)`` included, which would make every call copy the weight."""
        super()._apply(fn, recurse)
        if (weight := self._parameters.get("weight")) is not None:  # else it is computed
            weight.data = weight.data.contiguous()
        return self

    def extra_repr(self) -> str:
        dilations = ", ".join(str(d[0]) if d[0] == d[1] else f"{d[0]}x{d[1]}" for d in self.dilations)
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"groups={self.groups}, bias={self.bias is not None}, dilations=({dilations})"
        )


class GroupedDilationConv2d(_DilationConv2d):
    """A convolution whose slices of output channels have their own dilations, in the place of an ``nn.Conv2d``.

    Its parameters ``weight [Cout, Cin / groups, k, k]`` and ``bias`` are those of the convolution that it replaces, in
    name, shape and order, and so are its multiply-accumulates; "same" padding. See
    :func:`nasdet.ops.grouped_dilation_conv2d` for ``dilations``, ``splits``, ``algorithm``, ``precision`` and
    ``backend``; ``splits=None`` gives every dilation an equal share.

    ``forward(x [N, Cin, H, W])`` gives ``[N, Cout, ceil(H / stride), ceil(W / stride)]``; ``N`` may be left out.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair = 3,
        dilations: Sequence[int | Pair] = (1,),
        splits: Sequence[int] | None = None,
        stride: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        algorithm: str | None = None,
        precision: str = "fast",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, dilations, stride, groups, algorithm, precision, backend
        )
        count = len(self.dilations)
        if splits is None:
            if out_channels % count:
                raise ValueError(f"out_channels must be a multiple of the {count} dilations, got {out_channels}")
            splits = [out_channels // count] * count
        self.splits = checked_splits(splits, count, out_channels, groups)
        self._make_parameters(1, bias, device, dtype)
        self.reset_parameters()

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, dilations: Sequence[int | Pair], splits: Sequence[int] | None = None
    ) -> GroupedDilationConv2d:
        """The same convolution with other dilations: shares the parameters of ``conv``, row by row."""
        check_same_conv2d(conv)
        with torch.device("meta"):  # nothing is allocated or drawn that is replaced at once
            made = cls(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size[0],
                dilations,
                splits,
                (conv.stride[0], conv.stride[1]),
                conv.groups,
                bias=False,
            )
        made._take(conv, conv.weight)
        made.weight = conv.weight
        lay_out_weight(made, torch.contiguous_format)  # or every call would copy it
        return made

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """With other values of the parameters, as ``nn.Conv2d`` has it."""
        return _grouped(x, weight, bias, self.dilations, self.splits, self.stride, self.groups, **self._how())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, splits={self.splits}"


class MixedDilationConv2d(_DilationConv2d):
    """The searchable form: a replica of the kernel per dilation, mixed by ``softmax(alpha)`` in each slice of channels.

    In the place of an ``nn.Conv2d`` (NATS, Peng et al., NeurIPS 2019, section 3.2). Parameters: ``weight [G Cout,
    Cin / groups, k, k]``, a replica for each of ``G`` dilations one after the other (four dimensions, so that the
    module can be laid out channels_last); ``alpha [channel_groups, G]``, zeros at first, the uniform mixture; one
    ``bias`` for all. ``channel_groups`` equal contiguous slices of the output channels decide
    independently; 1 is a choice for the whole path, as in DARTS. See :func:`nasdet.ops.mixed_dilation_conv2d` for
    ``dilations``, ``algorithm``, ``precision`` and ``backend``.

    ``forward(x [N, Cin, H, W])`` gives ``[N, Cout, ceil(H / stride), ceil(W / stride)]``; ``N`` may be left out.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair = 3,
        dilations: Sequence[int | Pair] = (1,),
        channel_groups: int = 1,
        stride: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        algorithm: str | None = None,
        precision: str = "fast",
        backend: str | None = None,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, dilations, stride, groups, algorithm, precision, backend
        )
        self.channel_groups = check_whole("channel_groups", channel_groups)
        if out_channels % channel_groups:
            raise ValueError(f"channel_groups must divide the {out_channels} output channels, got {channel_groups}")
        self._make_parameters(len(self.dilations), bias, device, dtype)
        self.alpha = nn.Parameter(torch.empty(channel_groups, len(self.dilations), device=device, dtype=dtype))
        self.reset_parameters()

    @classmethod
    def from_conv(
        cls, conv: nn.Conv2d, dilations: Sequence[int | Pair], channel_groups: int = 1
    ) -> MixedDilationConv2d:
        """A replica of ``conv``'s weight for each dilation; the bias of ``conv`` is shared."""
        check_same_conv2d(conv)
        with torch.device("meta"):
            made = cls(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size[0],
                dilations,
                channel_groups,
                (conv.stride[0], conv.stride[1]),
                conv.groups,
                bias=False,
            )
        count = len(made.dilations)
        made._take(conv, conv.weight.detach().repeat(count, 1, 1, 1))
        dtype = torch.promote_types(conv.weight.dtype, torch.float32)
        made.alpha = nn.Parameter(torch.zeros(channel_groups, count, device=conv.weight.device, dtype=dtype))
        return made

    def reset_parameters(self) -> None:
        """Weight and bias drawn as ``nn.Conv2d`` draws them, the mixture even."""
        super().reset_parameters()
        nn.init.zeros_(self.alpha)

    @property
    def replicas(self) -> Tensor:
        """The weight as ``[G, Cout, Cin / groups, k, k]``, a view."""
        return self.weight.unflatten(0, (len(self.dilations), self.out_channels))

    def mixture(self) -> Tensor:
        """The mixing weights ``[G, channel_groups]``: over the dilations of a slice they sum to 1."""
        return self.alpha.softmax(dim=1).T

    def forward(self, x: Tensor) -> Tensor:
        mixture = self.mixture()
        return _mixed(x, self.replicas, self.bias, mixture, self.dilations, self.stride, self.groups, **self._how())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, channel_groups={self.channel_groups}"
