"""A depthwise convolution in the place of a depthwise ``nn.Conv2d``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasdet._checks import check_whole
from nasdet.ops import depthwise_conv2d
from nasdet.ops._dilation import LARGEST_KERNEL, Pair, holds_data, pair
from nasdet.ops.depthwise_conv2d import checked_padding


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution's fresh result ``[N, C, H, W]`` with its bias: in place, which takes no further map, but where it
    is traced or transformed, for then the bias may be a batch of them."""
    if bias is None:
        return y
    column = bias.to(y.dtype)[:, None, None]
    return y.add_(column) if holds_data(column) else y + column


class LibraryConv2d(nn.Conv2d):
    """An ``nn.Conv2d`` that runs ``_library_forward``: all but what TorchScript compiles, and a padding mode that
    somebody set since."""

    def _library_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight, bias)  # subclasses have the library's in its place

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if torch.jit.is_scripting():  # which has no super()
            if self.padding_mode != "zeros":
                input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
                return F.conv2d(input, weight, bias, self.stride, 0, self.dilation, self.groups)
            return F.conv2d(input, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        if self.padding_mode != "zeros":
            return super()._conv_forward(input, weight, bias)
        return self._library_forward(input, weight, bias)


class DepthwiseConv2d(LibraryConv2d):
    """One ``k`` x ``k`` kernel per channel, run by :func:`nasdet.ops.depthwise_conv2d`.

    An ``nn.Conv2d`` with as many groups as channels: the same parameters ``weight [C, 1, k, k]`` and ``bias [C]``, in
    name, shape and initial distribution, the same attributes; where TorchScript traces or compiles the model, or it is
    exported, it is one. ``padding="same"``, the default, is ``dilation * (k // 2)`` at every stride.

    ``forward(x [N, C, H, W])`` gives ``[N, C, ceil(H / stride), ceil(W / stride)]`` with it; ``N`` may be left out.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        stride: int | Pair = 1,
        padding: int | Pair | str = "same",
        dilation: int | Pair = 1,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        if check_whole("kernel_size", kernel_size) % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        if kernel_size > LARGEST_KERNEL:
            raise ValueError(f"kernel_size must be at most {LARGEST_KERNEL}, got {kernel_size}")
        dilations = pair("dilation", dilation)
        super().__init__(
            check_whole("channels", channels),
            channels,
            kernel_size,
            pair("stride", stride),
            checked_padding(padding, kernel_size, dilations),
            dilations,
            channels,
            bias,
            device=device,
            dtype=dtype,
        )
        self.backend = backend

    @classmethod
    def from_conv(cls, conv: nn.Module, name: str = "conv") -> DepthwiseConv2d:
        """The same convolution: shares the parameters of ``conv``, a plain depthwise ``nn.Conv2d``, padded with zeros.

        Raises TypeError or ValueError, with ``name``, for any other module.
        """
        conv = check_depthwise(conv, name)
        with torch.device("meta"):  # nothing is allocated or drawn that is replaced at once
            made = cls(
                conv.in_channels,
                conv.kernel_size[0],
                (conv.stride[0], conv.stride[1]),
                conv.padding if isinstance(conv.padding, str) else (conv.padding[0], conv.padding[1]),
                (conv.dilation[0], conv.dilation[1]),
                bias=False,
            )
        made.weight, made.bias = conv.weight, conv.bias
        return made.train(conv.training)

    def _library_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _depthwise(x, weight, bias, (self.stride, self.padding, self.dilation), self.backend)


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, how: tuple[Any, ...], backend: str | None) -> Tensor:
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return F.conv2d(x, weight, bias, how[0], how[1], how[2], weight.shape[0])
    if x.dim() == 3:
        return _depthwise(x.unsqueeze(0), weight, bias, how, backend).squeeze(0)
    return add_bias(depthwise_conv2d(x, weight, *how, backend=backend), bias)


torch.fx.wrap("_depthwise")  # one node in a graph that torch.fx traces: the op looks at real tensors


def beside_the_weight(conv: nn.Module) -> str | None:
    """What a module in the place of ``conv`` would lack, in words, or None."""
    if changed := [name for name in ("forward", "_conv_forward") if name in vars(conv)]:
        return f"a {changed[0]} of its own"
    if hooks := [name for name, value in vars(conv).items() if name.endswith("_hooks") and value]:
        return hooks[0].strip("_").replace("_", " ")
    if conv._parameters.get("weight") is None:  # weight norm, spectral norm, pruning
        return "a weight that is computed"
    own = [*conv._parameters, *conv._buffers, *conv._modules]
    return ", ".join(repr(name) for name in own if name not in ("weight", "bias")) or None


def check_sizes(conv: nn.Conv2d, name: str) -> Pair:
    """The dilations of ``conv``, if the ops take its channels, kernel, weight, stride and dilations."""
    if 0 in (conv.in_channels, conv.out_channels):
        raise ValueError(f"{name} must have channels, got {conv.in_channels} inputs and {conv.out_channels} outputs")
    height, width = conv.kernel_size
    if height != width or height % 2 == 0:
        raise ValueError(f"{name} must have a square kernel of odd size, got {height}x{width}")
    if height > LARGEST_KERNEL:
        raise ValueError(f"{name} must have a kernel of at most {LARGEST_KERNEL}, got {height}x{width}")
    shape = (conv.out_channels, conv.in_channels // conv.groups, height, width)
    if (got := getattr(conv.weight, "shape", None)) != shape:
        raise ValueError(f"{name} must have a weight of shape {shape}, got {None if got is None else tuple(got)}")
    pair(f"stride of {name}", conv.stride)
    return pair(f"dilation of {name}", conv.dilation)


def check_depthwise(conv: nn.Module, name: str = "conv", *, kept: bool = False) -> nn.Conv2d:
    """``conv``, if it is a plain depthwise ``nn.Conv2d`` that the op can stand for; ``name`` is for the error.

    Unless the module itself is ``kept``, it has nothing either that another in its place would lack."""
    if type(conv) is not nn.Conv2d:
        raise TypeError(f"{name} must be a plain nn.Conv2d, got {type(conv).__name__}")
    if not kept and (own := beside_the_weight(conv)):
        raise ValueError(f"{name} must have nothing but a weight and a bias, got {own}, which would be lost")
    if not conv.groups == conv.in_channels == conv.out_channels:
        raise ValueError(
            f"{name} must have as many groups as input and output channels, got {conv.groups}, {conv.in_channels} and "
            f"{conv.out_channels}"
        )
    dilations = check_sizes(conv, name)
    if conv.padding_mode != "zeros" or conv.padding == "valid":
        raise ValueError(
            f"{name} must be padded with zeros, 'same' or by a number, got {conv.padding} ({conv.padding_mode})"
        )
    checked_padding(conv.padding, conv.kernel_size[0], dilations)  # type: ignore[arg-type]  # any tuple, to mypy
    return conv
