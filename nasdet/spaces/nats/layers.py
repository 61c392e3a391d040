"""Which convolutions of a network are searched, and how they are exchanged: all of them or none."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from nasdet.detectors.backbone import Backbone
from nasdet.nn import check_same_conv2d
from nasdet.spaces.nats.plain import replace_modules

#: network -> {module path of a convolution: stage (3, 4 or 5)}
Selector = Callable[[nn.Module], Mapping[str, int]]

# ``layer2.0.conv2`` (torchvision, timm, mmdetection, ours) or ``res3.0.conv2`` (detectron2), at any depth.
_BOTTLENECK = re.compile(r"(?:^|\.)(?:layer(?P<layer>[234])|res(?P<res>[345]))\.\d+\.conv2$")


@dataclass(frozen=True)
class Layer:
    """One convolution to transform: its module path, its stage, its output channels, and their convolution groups."""

    name: str
    stage: int
    channels: int
    groups: int = 1

    @property
    def width(self) -> int:
        """Output channels that must stay together: a convolution group's; 1 for an ungrouped convolution."""
        return 1 if self.groups == 1 else self.channels // self.groups


def bottleneck_convs(network: nn.Module) -> dict[str, int]:
    """The 3x3 convolution of every bottleneck block in stages 3, 4 and 5 of a ResNet or ResNeXt (the paper's choice).

    Known by name, ``layer2`` to ``layer4`` with ``conv1``, ``conv2``, ``conv3`` in each block, so it finds those of
    torchvision, timm, mmdetection and this library, alone or inside a detector (``"backbone.body.layer2.0.conv2"``),
    and detectron2's ``res3`` to ``res5``. A block without ``conv3`` is no bottleneck and is passed over; of several
    such names of one convolution the first is taken.
    """
    found: dict[nn.Module, tuple[str, int]] = {}
    for name, module in network.named_modules(remove_duplicate=False):
        match = _BOTTLENECK.search(name)
        if match is None or not hasattr(network.get_submodule(name.rpartition(".")[0]), "conv3"):
            continue
        found.setdefault(module, (name, int(match["res"]) if match["res"] else int(match["layer"]) + 1))
    return dict(found.values())


def depthwise_convs(network: nn.Module) -> dict[str, int]:
    """The depthwise convolutions of stages 3, 4 and 5 (strides 8, 16 and 32) of a :class:`nasdet.detectors.Backbone`:
    all that looks around in a ShuffleNetV2, a DetNAS net or a MobileNetV2. Other networks have none."""
    if not isinstance(network, Backbone):
        return {}
    found = {}
    names = {module: name for name, module in network.named_modules()}
    stages = {level: part for level, part in network.parts().items() if level in ("c3", "c4", "c5")}
    for level, part in stages.items():
        for module in part.modules():
            if isinstance(module, nn.Conv2d) and 1 < module.in_channels == module.groups:
                found[names[module]] = int(level[1:])
    return found


def spatial_convs(network: nn.Module) -> dict[str, int]:
    """:func:`bottleneck_convs`, or in a network without bottlenecks :func:`depthwise_convs`."""
    return bottleneck_convs(network) or depthwise_convs(network)


def find_layers(network: nn.Module, selector: Selector | None = None) -> tuple[Layer, ...]:
    """The layers of a network in its own order; ``selector`` is :func:`spatial_convs` by default.

    Raises ``ValueError`` when there is none, a name is no module's, two are one module's, a stage is not 3, 4 or 5, or
    a convolution has a dilation already or more than weight and bias; ``TypeError`` for anything but a plain
    ``nn.Conv2d``.
    """
    chosen = (selector or spatial_convs)(network)
    if not isinstance(chosen, Mapping):
        raise TypeError(f"selector must give stages by module path, got {type(chosen).__name__}")
    if not chosen:
        raise ValueError(
            f"network must have 3x3 convolutions in bottlenecks of its stages 3 to 5, or depthwise ones, got none in "
            f"{type(network).__name__}; name them with selector="
        )
    order = {name: index for index, (name, _) in enumerate(network.named_modules(remove_duplicate=False))}
    layers = []
    names: dict[nn.Module, str] = {}
    for name, stage in chosen.items():
        if name not in order or not name:
            raise ValueError(f"selector must name modules of {type(network).__name__}, got {name!r}")
        if isinstance(stage, bool) or not isinstance(stage, int) or stage not in (3, 4, 5):
            raise ValueError(f"selector must give stage 3, 4 or 5 for {name}, got {stage!r}")
        if (other := names.setdefault(network.get_submodule(name), name)) != name:
            raise ValueError(f"selector must name a convolution once, got {other!r} and {name!r} for the same one")
        conv = check_same_conv2d(network.get_submodule(name), name)
        if conv.dilation != (1, 1):
            raise ValueError(f"{name} must have dilation 1, got {conv.dilation}")
        layers.append(Layer(name, stage, conv.out_channels, conv.groups))
    return tuple(sorted(layers, key=lambda layer: order[layer.name]))


def check_own_weights(network: nn.Module, layers: Sequence[Layer]) -> None:
    """Raise ``ValueError`` where the weight of a layer is another module's too: their replicas would part."""
    holders: dict[int, list[str]] = {}
    for name, module in network.named_modules():
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            holders.setdefault(id(parameter), []).append(f"{name}.{key}".lstrip("."))
    for layer in layers:
        weight = network.get_submodule(layer.name).weight
        if len(held := holders[id(weight)]) > 1:
            raise ValueError(f"{layer.name} must have a weight of its own, got one that is {' and '.join(held)}")


def exchange(network: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """Put each module in its place, by all the names that the old one has; all were made before, so that nothing fails
    halfway."""
    return replace_modules(network, {network.get_submodule(name): module for name, module in replacements.items()})
