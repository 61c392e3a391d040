"""FAD's transformations as modules: units (convolution, group norm, ReLU) and chains of them.

Where the convolutions carry a bias is what the published parameter count fixes (``published.json``: 4,169,498):
standard 3x3 yes; plain separable on the pointwise part only; dilated separable on both parts.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from nasdet.nn import group_norm_relu
from nasdet.spaces.fad.genotype import CHAINS


def norm_groups(channels: int) -> int:
    """Groups of a group norm: the largest divisor of ``channels`` that is at most 32 and leaves at least 3 channels
    in a group.

    At the paper's widths (96, 128, 256) that is its 32. Narrower than three channels a group norm would be an
    instance norm, which is constant on the 1x1 maps that the top pyramid level has for small pictures.
    """
    if channels < 1:
        raise ValueError(f"channels must be at least 1, got {channels}")
    return max(groups for groups in range(1, max(1, min(32, channels // 3)) + 1) if channels % groups == 0)


class Mixing(nn.Module):
    """A module that calls a mixing op; ``backend`` is the op's (None: the best at each call)."""

    backend: str | None = None


class Unit(Mixing):
    """relu(group_norm(conv(x))), one *representation*: ``[N, C, H, W]`` to the same shape.

    ``raw(x)`` is the convolution alone, for a mixture that does norm and activation itself in one pass.
    """

    def __init__(self, conv: nn.Module, channels: int) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.GroupNorm(norm_groups(channels), channels)

    def raw(self, x: Tensor) -> Tensor:
        """The convolution's output, before norm and activation; nobody else holds it."""
        out: Tensor = self.conv(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """One representation; the convolution's output is handed over to the op as scratch for its gradient."""
        return group_norm_relu(self.raw(x), self.norm, overwrite=True, backend=self.backend)


def standard(channels: int) -> Unit:
    """A 3x3 convolution unit."""
    return Unit(nn.Conv2d(channels, channels, 3, padding=1), channels)


def separable(channels: int, kernel: int = 3, dilation: int = 1, depthwise_bias: bool = False) -> Unit:
    """A depthwise ``kernel`` x ``kernel`` convolution and a pointwise one; one norm and ReLU, after the pointwise
    part."""
    padding = dilation * (kernel - 1) // 2
    depthwise = nn.Conv2d(
        channels, channels, kernel, padding=padding, dilation=dilation, groups=channels, bias=depthwise_bias
    )
    return Unit(nn.Sequential(depthwise, nn.Conv2d(channels, channels, 1)), channels)


def dilated(channels: int, dilation: int) -> Unit:
    """The dilated unit of t4, t5 and t6: always depthwise separable (section 3.1)."""
    return separable(channels, dilation=dilation, depthwise_bias=True)


def base(stream: str, channels: int) -> Unit:
    """The undilated unit of a stream, ``"std"`` or ``"sep"``."""
    return standard(channels) if stream == "std" else separable(channels)


class UnitChain(nn.Sequential):
    """Units in a row. ``raw`` stops before the last unit's norm and activation."""

    def raw(self, x: Tensor) -> tuple[Tensor, nn.GroupNorm]:
        """The last unit's raw convolution and the norm that belongs to it."""
        *head, last = self
        for unit in head:
            x = unit(x)
        assert isinstance(last, Unit)
        return last.raw(x), last.norm


class Pool(nn.Module):
    """3x3 max or average pooling at stride 1, then group norm without an affine part (DARTS pools, then normalises
    without one)."""

    def __init__(self, kind: str, channels: int) -> None:
        super().__init__()
        self.kind = kind
        self.norm = nn.GroupNorm(norm_groups(channels), channels, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "max":
            return self.norm(F.max_pool2d(x, 3, stride=1, padding=1))
        return self.norm(F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False))


def transformation(name: str, channels: int) -> nn.Module:
    """The stand-alone, unshared module of a transformation: ``[N, channels, H, W]`` to the same shape.

    A :class:`UnitChain` for everything that convolves, else a :class:`Pool` or an identity.
    """
    if name in CHAINS:
        chain = CHAINS[name]
        units = [base(chain.stream, channels) for _ in range(chain.depth)]
        return UnitChain(*units, *([dilated(channels, chain.dilation)] if chain.dilation else []))
    if name in ("sep_conv_3x3", "sep_conv_5x5"):
        kernel = int(name[-1])
        return UnitChain(separable(channels, kernel), separable(channels, kernel))
    if name in ("dil_conv_3x3", "dil_conv_5x5"):
        return UnitChain(separable(channels, int(name[-1]), dilation=2))
    if name in ("max_pool_3x3", "avg_pool_3x3"):
        return Pool(name[:3], channels)
    if name == "skip_connect":
        return nn.Identity()
    raise ValueError(f"transformation must be one of FAD's or DARTS's, got {name!r}")


def set_backend(module: nn.Module, backend: str | None) -> nn.Module:
    """Choose the backend of every mixing op below ``module``: ``"reference"``, ``"cpp"``, ... or None for the best at
    each call."""
    for part in module.modules():
        if isinstance(part, Mixing):
            part.backend = backend
    return module
