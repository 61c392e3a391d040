"""Derived networks without nasdet: the same network from torch's own parts, or a file that makes it."""

from __future__ import annotations

import copy
import pprint
from pathlib import Path

from torch import nn

from nasdet._files import write_atomic
from nasdet.arch import Card
from nasdet.nn import GroupedDilationConv2d
from nasdet.nn.depthwise_conv import beside_the_weight
from nasdet.spaces.nats import plain
from nasdet.spaces.nats.genotype import check_genotype
from nasdet.spaces.nats.layers import exchange


def to_plain_torch(network: nn.Module) -> nn.Module:
    """A copy of a derived network in which each ``GroupedDilationConv2d`` is S convolutions and a concat.

    Its modules are torch's and :class:`nasdet.spaces.nats.plain.SplitConv2d`; its state dict has the same names and
    values, so ``torch.jit.trace``, ``torch.export`` and ONNX see plain convolutions. All other modules stay as they
    are, training or not. Of a ``GroupedDilationConv2d`` alone it is the ``SplitConv2d``.
    """
    network = copy.deepcopy(network)
    if isinstance(network, GroupedDilationConv2d):
        return _split(network)
    parts = {name: part for name, part in network.named_modules() if isinstance(part, GroupedDilationConv2d)}
    if not parts:
        raise ValueError(f"network must be a derived one, got {type(network).__name__} without a GroupedDilationConv2d")
    return exchange(network, {name: _split(part, name) for name, part in parts.items()})


def _split(part: GroupedDilationConv2d, name: str = "network") -> nn.Module:
    if own := beside_the_weight(part):
        raise ValueError(f"{name} must have nothing but a weight and a bias, got {own}, which would be lost")
    made = plain.SplitConv2d(part.weight, part.bias, part.dilations, part.splits, part.stride, part.groups)
    return made.train(part.training)


def plain_source(card: Card) -> str:
    """Python source, torch its only import, with the card's ``GENOTYPE`` and ``transform(network, genotype)``.

    ``transform(torchvision.models.resnet50(weights=...), GENOTYPE)`` is then the derived network; its weights and their
    names are the original's.
    """
    if card.method != "nats":
        raise ValueError(f"{card.name}: method must be 'nats', got {card.method!r}")
    check_genotype(card.genotype)
    source = Path(plain.__file__).read_text(encoding="utf-8")
    genotype = pprint.pformat(dict(card.genotype), width=110, compact=True, sort_dicts=False)
    return f"{source}\n\n# {card.name}\nGENOTYPE: dict[str, list[Any]] = {genotype}\n"


def save_plain_source(card: Card, path: str | Path) -> Path:
    """Write :func:`plain_source` to a file, atomically; returns the path."""
    return write_atomic(path, plain_source(card))
