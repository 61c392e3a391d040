"""DetNAS's vocabulary: the choices of a block, the sizes of the three spaces, paths, and their variation. No torch.

A genotype is the list of its choices, one for each block from the stem on: ``["sh7", "sh5", "xcep", ...]``. ``sh3``,
``sh5`` and ``sh7`` are ShuffleNetV2 blocks by the kernel of their depthwise convolution, ``xcep`` the one with three
3x3 ones. A gene is the place of a choice in :data:`CHOICES`, 0 to 3.

Source: Chen et al., "DetNAS: Backbone Search for Object Detection", NeurIPS 2019, section 3.3 and Table 1.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

CHOICES = ("sh3", "sh5", "sh7", "xcep")


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


@dataclass(frozen=True)
class Sizes:
    """Sizes of a space: channels of the stem, channels and blocks of the four stages, and the channels of the last 1x1
    convolution, which only classification uses."""

    stem: int
    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    last: int

    def __post_init__(self) -> None:
        for name in ("stem", "last"):
            if not _positive(getattr(self, name)):
                raise ValueError(f"{name} must be a positive integer, got {getattr(self, name)!r}")
        for name in ("channels", "blocks"):
            values = getattr(self, name)
            if len(values) != 4 or not all(map(_positive, values)):
                raise ValueError(f"{name} must be four positive integers, got {values!r}")
        before = self.stem
        for channels in self.channels:
            if channels % 2 or channels <= before:
                raise ValueError(f"channels must be even and grow from the stem on, got {self.stem}, {self.channels}")
            before = channels

    @property
    def depth(self) -> int:
        """Blocks, and genes."""
        return sum(self.blocks)


SPACES = {
    "small": Sizes(16, (64, 160, 320, 640), (4, 4, 8, 4), 1024),
    "large": Sizes(48, (96, 240, 480, 960), (8, 8, 16, 8), 1024),
    "3.8g": Sizes(72, (172, 432, 864, 1728), (8, 8, 16, 8), 1728),
    "tiny": Sizes(8, (16, 32, 64, 96), (1, 2, 3, 2), 128),
}
"""The paper's spaces (300 M and 1.3 G), the large one with 1.8 times its channels (1.5 times at the stem), and a tiny
one of ours, whose search takes minutes on a CPU."""


def check_genotype(genotype: Any, depth: int | None = None) -> None:
    """Raise ``ValueError`` with the place and the reason unless the genotype is legal; ``depth``: the blocks it must
    have."""
    if not isinstance(genotype, (list, tuple)) or not genotype:
        raise ValueError(f"genotype must be a list of choices, got {genotype!r}")
    if depth is not None and len(genotype) != depth:
        raise ValueError(f"genotype must have {depth} choices, one for each block, got {len(genotype)}")
    for block, choice in enumerate(genotype, 1):
        if not isinstance(choice, str) or choice not in CHOICES:
            raise ValueError(f"genotype choices must be among {', '.join(CHOICES)}, got {choice!r} for block {block}")


def from_genes(genes: Sequence[int]) -> list[str]:
    """Choices by number, as published: 0 to 3 for sh3, sh5, sh7, xcep."""
    for block, gene in enumerate(genes, 1):
        if isinstance(gene, bool) or not isinstance(gene, int) or not 0 <= gene < len(CHOICES):
            raise ValueError(f"genes must be integers in 0..{len(CHOICES) - 1}, got {gene!r} for block {block}")
    return [CHOICES[gene] for gene in genes]


def to_genes(genotype: Sequence[str]) -> list[int]:
    """The reverse of :func:`from_genes`."""
    check_genotype(genotype)
    return [CHOICES.index(choice) for choice in genotype]


def random_genotype(depth: int, rng: random.Random) -> list[str]:
    """A uniformly random choice for each block."""
    return [rng.choice(CHOICES) for _ in range(depth)]


def mutate(genotype: Sequence[str], rng: random.Random, probability: float = 0.1) -> list[str]:
    """Each gene, with ``probability``, drawn anew from all choices; it may come out as it was (released code)."""
    if not 0 < probability <= 1:
        raise ValueError(f"probability must be in (0, 1], got {probability}")
    return [rng.choice(CHOICES) if rng.random() < probability else choice for choice in genotype]


def crossover(first: Sequence[str], second: Sequence[str], rng: random.Random) -> list[str]:
    """Each gene from either parent with probability one half."""
    return [rng.choice(pair) for pair in zip(first, second, strict=True)]
