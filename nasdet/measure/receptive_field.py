"""The effective receptive field of a network: which pixels one neuron of its last convolution listens to.

Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks" (NeurIPS 2016), as used
by NATS (Peng et al., NeurIPS 2019, section 4.4 and Figure 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

#: The share of the strongest pixel's influence above which a pixel counts: two standard deviations of a Gaussian in one
#: direction, 1 - 0.9545.
THRESHOLD = 0.0455

_ACTIVATIONS: frozenset[Callable[..., Any]] = frozenset(
    function
    for name in (
        "relu",
        "relu_",
        "relu6",
        "hardtanh",
        "hardtanh_",
        "leaky_relu",
        "leaky_relu_",
    )  # nn.ReLU6 is a hardtanh
    for place in (F, torch, Tensor)
    if (function := getattr(place, name, None)) is not None
)
_GROUP_NORMS: tuple[Callable[..., Any], ...] = (F.group_norm, torch.group_norm)


def effective_receptive_field(network: nn.Module, size: tuple[int, int], *, layer: str | None = None) -> Tensor:
    """The influence of each input pixel on the centre neuron of a map, ``[H, W]`` in 0..1, the strongest being 1.

    The input is ones, ``[1, 3, H, W]`` with ``size = (H, W)``. The gradient of the centre neuron, summed over its
    channels, is taken with respect to the input; its absolute values are summed over the input channels and divided
    by their maximum. To see the strength of the connections alone, ReLUs (also leaky ones and ReLU6) are passed over,
    and the statistics of norms are constants: batch norm is in evaluation mode, and group norm's mean and variance
    take no part in the gradient. Max-pooling stays.

    ``layer`` names the module whose map is looked at, by default the convolution that runs last. The network runs
    where its parameters are, in their dtype, and is left as it was.

    Raises ``ValueError`` for a size below 1, a layer that is no module of the network or gives no map, and a network in
    which no pixel reaches the neuron.
    """
    height, width = size
    if min(height, width) < 1:
        raise ValueError(f"size must be (height, width) of at least 1 pixel, got {size}")
    if layer is not None and layer not in (names := dict(network.named_modules())):
        raise ValueError(f"layer must name a module of {type(network).__name__}, got {layer!r} of {len(names)}")
    like = next((p for p in network.parameters() if p.is_floating_point()), torch.empty(0))
    image = torch.ones(1, 3, height, width, dtype=like.dtype, device=like.device, requires_grad=True)
    with _in_evaluation(network), _last_map(network, layer) as maps, torch.enable_grad(), _LinearPath():
        network(image)
    if not maps:
        raise ValueError(f"layer must give a map [1, C, H, W], got none from {layer or 'any convolution'}")
    neuron = maps[0][0, :, maps[0].shape[2] // 2, maps[0].shape[3] // 2].sum()
    (gradient,) = torch.autograd.grad(neuron, image, allow_unused=True) if neuron.requires_grad else (None,)
    field = torch.zeros(height, width) if gradient is None else gradient[0].abs().float().sum(0).cpu()
    strongest = float(field.max())
    if not (math.isfinite(strongest) and strongest > 0):
        raise ValueError(f"network must connect its input with the centre of the map, got a gradient of {strongest:g}")
    return field / strongest


def field_size(field: Tensor, threshold: float = THRESHOLD) -> float:
    """The side of a square with as many pixels as have more than ``threshold`` of the field's maximum, in pixels."""
    return math.sqrt(int((field > threshold * field.max()).sum()))


class _LinearPath(TorchFunctionMode):
    """Calls of the ReLU family give their input; group norm's statistics are constants."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _ACTIVATIONS:
            return args[0] if args else kwargs["input"]
        if func in _GROUP_NORMS:
            return _constant_group_norm(*args, **kwargs)
        return func(*args, **kwargs)


def _constant_group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    grouped = input.detach().flatten(2).unflatten(1, (num_groups, -1)).flatten(2)
    variance, mean = torch.var_mean(grouped, dim=2, correction=0)
    per_channel = input.shape[1] // num_groups
    shape = (*input.shape[:2], *[1] * (input.dim() - 2))
    mean, scale = (
        value.repeat_interleave(per_channel, dim=1).view(shape) for value in (mean, torch.rsqrt(variance + eps))
    )
    y = (input - mean) * scale
    for factor, apply in ((weight, torch.mul), (bias, torch.add)):
        if factor is not None:
            y = apply(y, factor.view(1, -1, *shape[2:]))
    return y


@contextmanager
def _in_evaluation(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, and no gradients of parameters."""
    training = [module for module in network.modules() if module.training]
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    try:
        network.eval()
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


@contextmanager
def _last_map(network: nn.Module, layer: str | None) -> Iterator[list[Tensor]]:
    """A list that holds the newest map of ``layer``, or of any convolution, while the network runs."""
    found: list[Tensor] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.dim() == 4:
            found[:] = [output.clone()]  # what changes the map in place later is not the convolution's

    with ExitStack() as stack:
        for name, module in network.named_modules():
            if name == layer or (layer is None and _is_convolution(module)):
                handle = module.register_forward_hook(keep)
                stack.callback(handle.remove)
        yield found


def _is_convolution(module: nn.Module) -> bool:
    """Also one of another library, or of this one's: its kernel has four dimensions."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 4
