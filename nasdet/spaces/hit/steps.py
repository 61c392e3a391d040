"""One step of a supernet's part by itself, to have its memory forecast and measured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from nasdet._checks import check_whole
from nasdet.spaces.hit.costs import INPUT, Size, activations_table
from nasdet.spaces.hit.space import HitSpace
from nasdet.spaces.hit.supernet import mixed_layers

LEARNS = ("weights", "alphas")
STRIDES = (4, 8, 16, 32, 64, 128)  # of c2 to c7


class PartStep:
    """``part``'s supernet by itself; a call runs it forward and backward once, as in a search, on inputs of noise, and
    returns the mean of its outputs.

    ``size``: (height, width) of the images; ``rois``: of each image, for the head; ``memory`` as for
    :meth:`HitSpace.supernet`, with ``samples`` candidates drawn for ``"sampled"``, here the most expensive ones of each
    layer, so that no draw needs more; ``learns``: ``"weights"`` or ``"alphas"``, the two halves of a search step.

    What it needs, as the peak of a search step of the part, is ``forecast_memory(lambda: PartStep(...))`` before and
    ``peak_memory(PartStep(...))`` after; parameters and inputs are made here and are in neither.
    """

    def __init__(
        self,
        space: HitSpace,
        part: str,
        *,
        size: Size = INPUT,
        batch: int = 1,
        rois: int = 512,
        memory: str = "full",
        samples: int = 2,
        learns: str = "weights",
        norm: str = "bn",
        device: str | torch.device = "cpu",
    ) -> None:
        if learns not in LEARNS:
            raise ValueError(f"learns must be one of {', '.join(LEARNS)}, got {learns!r}")
        with torch.device(device):
            self.model = space.supernet(part, memory=memory, norm=norm).train()
            self.inputs = _inputs(space, part, size, batch, rois)
        of_alphas = {id(alpha) for alpha in space.arch_parameters(self.model)}
        for parameter in self.model.parameters():
            parameter.requires_grad_((id(parameter) in of_alphas) == (learns == "alphas"))
        if memory == "sampled":
            check_whole("samples", samples)
            draw_the_largest(space, self.model, samples, size)

    def __call__(self) -> Tensor:
        self.model.zero_grad(set_to_none=True)
        outputs = [self.model(value) for value in self.inputs]
        mean = torch.stack([value.float().mean() for value in tree_leaves(outputs)]).sum()
        mean.backward()
        return mean.detach()


def draw_the_largest(space: HitSpace, net: nn.Module, samples: int, size: Size) -> None:
    """Draw in each mixed layer of ``net`` the candidates that keep the most for backward: no draw needs more memory."""
    for part, layers in mixed_layers(net).items():
        stored = activations_table(space.sizes, {part: space.candidates[part]}, size).parts[part]
        for layer, row in zip(layers, stored.rows, strict=True):
            order = sorted(range(len(layer.names)), key=[row[name] for name in layer.names].__getitem__, reverse=True)
            layer.drawn = tuple(sorted(order[:samples]))


def _inputs(space: HitSpace, part: str, size: Size, batch: int, rois: int) -> list[Any]:
    """What the part is called with, one after the other. Maps need a gradient: what they come from learns too."""
    sizes = space.sizes
    if part == "backbone":
        return [torch.randn(batch, 3, *size)]
    if part == "head":
        return [_map(batch * rois, sizes.channels, (sizes.pooled, sizes.pooled))]
    levels = {f"c{2 + index}": (-(-size[0] // stride), -(-size[1] // stride)) for index, stride in enumerate(STRIDES)}
    if part == "neck":
        channels = sizes.level_channels()
        return [{level: _map(batch, channels[level], levels[level]) for level in sizes.inputs}]
    return [_map(batch, sizes.channels, levels[level]) for level in sizes.pyramid()]


def _map(batch: int, channels: int, size: Size) -> Tensor:
    return torch.randn(batch, channels, *size, requires_grad=True)
