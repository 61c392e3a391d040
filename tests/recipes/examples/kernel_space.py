"""The worked example of a search space: one convolution per tower, of size 1 or 3."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn

from nasdet.arch import Card

SIZES = (1, 3)
GROUPS = ("box", "cls")


def _conv(channels: int, size: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, size, padding=size // 2)


class KernelTowers(nn.Module):
    """The derived towers: ``choice[group]`` is the size of the group's convolution."""

    def __init__(self, channels: int, choice: dict[str, int]) -> None:
        super().__init__()
        self.box_channels = self.cls_channels = channels
        self.convs = nn.ModuleDict({group: _conv(channels, choice[group]) for group in GROUPS})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.relu(self.convs["box"](x)), torch.relu(self.convs["cls"](x))


class KernelSupernet(nn.Module):
    """Both sizes in each tower, mixed by ``softmax(alpha)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.box_channels = self.cls_channels = channels
        self.alphas = nn.ParameterDict({group: nn.Parameter(torch.zeros(len(SIZES))) for group in GROUPS})
        self.convs = nn.ModuleDict({g: nn.ModuleList(_conv(channels, size) for size in SIZES) for g in GROUPS})

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        features = []
        for group in GROUPS:
            weights = self.alphas[group].softmax(0)
            features.append(sum(w * conv(x) for w, conv in zip(weights, self.convs[group], strict=True)).relu())
        return tuple(features)


class KernelSpace:
    """Two choices for each of two towers."""

    method = "kernel"

    def size(self) -> int:
        """Number of architectures."""
        return len(SIZES) ** len(GROUPS)

    def random(self, rng: random.Random) -> Card:
        """A uniformly random architecture."""
        return Card(self.method, "kernel-random", {group: rng.choice(SIZES) for group in GROUPS})

    def check(self, card: Card) -> None:
        """Raise ``ValueError`` unless the card is an architecture of this space."""
        if card.method != self.method or set(card.genotype) != set(GROUPS):
            raise ValueError(f"{card.name}: genotype must be a kernel card with {', '.join(GROUPS)}")
        for group, size in card.genotype.items():
            if size not in SIZES:
                raise ValueError(f"{card.name}: {group} must be one of {SIZES}, got {size!r}")

    def supernet(self, in_channels: int, backend: str | None = None) -> KernelSupernet:
        """The searchable towers."""
        return KernelSupernet(in_channels)

    @staticmethod
    def arch_parameters(supernet: KernelSupernet) -> list[nn.Parameter]:
        """The alphas."""
        return list(supernet.alphas.values())

    def derive(self, supernet: KernelSupernet, name: str = "kernel-searched") -> Card:
        """The sizes with the largest alphas."""
        return Card(self.method, name, {g: SIZES[int(a.argmax())] for g, a in supernet.alphas.items()})

    @staticmethod
    def build(card: Card, in_channels: int, **_: Any) -> KernelTowers:
        """The towers of a card."""
        KernelSpace().check(card)
        return KernelTowers(in_channels, card.genotype)
