"""Hit-Detector's operations as modules (Figure 2): ``[N, inp, H, W]`` to ``[N, out, ceil(H / s), ceil(W / s)]``.

Spatial convolutions carry the stride and are padded by ``dilation * (kernel - 1) / 2``; no convolution has a bias.
"""

from __future__ import annotations

from torch import Tensor, nn

from nasdet.detectors.norm import FoldingSequential, norm_layer
from nasdet.detectors.parts.layers import he_init
from nasdet.nn import DepthwiseConv2d
from nasdet.spaces.hit.genotype import named_operation


def spatial(inp: int, out: int, kernel: int, stride: int, dilation: int, norm: str) -> list[nn.Module]:
    """A plain ``kernel`` x ``kernel`` convolution, its norm and ReLU."""
    padding = dilation * (kernel - 1) // 2
    conv = nn.Conv2d(inp, out, kernel, stride, padding, dilation, bias=False)
    return [conv, norm_layer(norm, out), nn.ReLU(inplace=True)]


def _pointwise(inp: int, out: int, norm: str) -> list[nn.Module]:
    return [nn.Conv2d(inp, out, 1, bias=False), norm_layer(norm, out)]


def _depthwise(channels: int, kernel: int, stride: int, dilation: int, norm: str) -> list[nn.Module]:
    conv = DepthwiseConv2d(channels, kernel, stride, dilation=dilation, bias=False)
    return [conv, norm_layer(norm, channels), nn.ReLU(inplace=True)]


class Residual(nn.Module):
    """``body(x)``, plus ``x`` where the shape stays.

    The body ends in a norm, whose output nobody keeps: the sum goes into it.
    """

    def __init__(self, body: nn.Module, skip: bool) -> None:
        super().__init__()
        self.body = body
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return y.add_(x) if self.skip else y


def operation(name: str, inp: int, out: int, stride: int = 1, norm: str = "bn") -> nn.Module:
    """The module of an operation by name (:func:`~nasdet.spaces.hit.named_operation`), weights drawn by He's normal.

    ``ir``: 1x1 to ``expansion * inp`` channels, norm, ReLU; depthwise with the stride, norm, ReLU; 1x1, norm. ``sep``:
    depthwise, norm, ReLU; 1x1, norm. Both add their input where the shape stays. ``conv``: convolution, norm, ReLU (the
    paper names neither for it). ``norm`` is one of :data:`nasdet.detectors.norm.NORMS`.
    """
    op = named_operation(name)
    made: nn.Module
    if op.kind == "conv":
        made = FoldingSequential(*spatial(inp, out, op.kernel, stride, op.dilation, norm))
    else:
        inner = inp * (op.expansion or 1)
        first = [*_pointwise(inp, inner, norm), nn.ReLU(inplace=True)] if op.kind == "ir" else []
        middle = _depthwise(inner, op.kernel, stride, op.dilation, norm)
        body = FoldingSequential(*first, *middle, *_pointwise(inner, out, norm))
        made = Residual(body, stride == 1 and inp == out)
    he_init(made)
    return made
