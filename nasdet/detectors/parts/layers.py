"""Layers that the heads are made of."""

from __future__ import annotations

from typing import Any

from torch import nn

from nasdet.detectors.norm import group_count, norm_layer
from nasdet.nn import GroupNormReLU


def conv_norm_relu(
    inp: int, out: int, norm: str | None, *, stride: int = 1, bias: bool | None = None
) -> tuple[nn.Conv2d, list[nn.Module]]:
    """A 3x3 convolution, and the list of it, its norm (none for None) and ReLU.

    ``norm`` is one of :data:`nasdet.detectors.norm.NORMS`; by default there is a bias where there is no norm.
    """
    conv = nn.Conv2d(inp, out, 3, stride=stride, padding=1, bias=norm is None if bias is None else bias)
    if norm is None:
        return conv, [conv, nn.ReLU(inplace=True)]
    if norm == "gn":
        return conv, [conv, GroupNormReLU(group_count(out), out)]
    return conv, [conv, norm_layer(norm, out), nn.ReLU(inplace=True)]


def he_init(module: nn.Module) -> None:
    """Draw every weight of ``module`` anew; biases are 0.

    (Transposed) convolutions from He's normal by fan-out, fully connected layers from the uniform of variance
    ``1 / fan_in``, as in Detectron.
    """
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(layer, nn.Linear):
            nn.init.kaiming_uniform_(layer.weight, a=1)
        else:
            continue
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def normal_init(*layers: nn.Conv2d | nn.Linear, std: float = 0.01, bias: float = 0.0) -> None:
    """Draw weights from a normal of deviation ``std`` and set the biases."""
    for layer in layers:
        nn.init.normal_(layer.weight, std=std)
        if layer.bias is not None:
            nn.init.constant_(layer.bias, bias)


def described(module: nn.Module, name: str, attribute: str) -> Any:
    """``module.attribute``, or a TypeError that names the part which lacks it."""
    value = getattr(module, attribute, None)
    if value is None:
        raise TypeError(f"{name} must say its {attribute}, got a {type(module).__name__} without")
    return value
