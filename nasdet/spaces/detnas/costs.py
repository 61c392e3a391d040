"""Multiply-accumulates and parameters of a DetNAS path: a table with one entry for each block and choice. No torch.

Both are sums over blocks, so a path's cost is a sum of table entries, and the least and the largest over a space are
exact. MACs are of convolutions, batch 1, without norms, biases and activations, as in the paper and its released
table; parameters count all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nasdet.spaces.detnas.genotype import CHOICES, Sizes, check_genotype

INPUT = (224, 224)
"""Height and width that the constraint counts at."""
_KERNEL = {"sh3": 3, "sh5": 5, "sh7": 7, "xcep": 3}


@dataclass(frozen=True)
class Layer:
    """One convolution with its norm: ``inp / groups * out * kernel^2`` MACs at each of ``area`` places."""

    inp: int
    out: int
    kernel: int
    groups: int
    area: int

    @property
    def weights(self) -> int:
        """Weights of the convolution."""
        return self.inp // self.groups * self.out * self.kernel**2

    @property
    def macs(self) -> int:
        """Multiply-accumulates."""
        return self.weights * self.area

    @property
    def parameters(self) -> int:
        """Weights, and the norm's scale and shift."""
        return self.weights + 2 * self.out


def block_layers(choice: str, inp: int, out: int, size: tuple[int, int], stride: int) -> list[Layer]:
    """The convolutions of a block on a map of ``size`` (height, width)."""
    before, after = size[0] * size[1], _halved(size)[0] * _halved(size)[1] if stride == 2 else size[0] * size[1]
    kernel, mid = _KERNEL[choice], out // 2
    layers = []
    if stride == 2:
        layers += [_depthwise(inp, kernel, after), Layer(inp, inp, 1, 1, after)]
    own, made = (inp, out - inp) if stride == 2 else (inp // 2, out // 2)
    if choice == "xcep":
        layers += [_depthwise(own, kernel, after), Layer(own, mid, 1, 1, after)]
        layers += [_depthwise(mid, kernel, after), Layer(mid, mid, 1, 1, after)]
        layers += [_depthwise(mid, kernel, after), Layer(mid, made, 1, 1, after)]
    else:
        layers += [Layer(own, mid, 1, 1, before), _depthwise(mid, kernel, after), Layer(mid, made, 1, 1, after)]
    return layers


@dataclass(frozen=True)
class CostTable:
    """A cost by block and choice, and what every path pays on top of it."""

    fixed: int
    rows: tuple[dict[str, int], ...]

    def __call__(self, genotype: Sequence[str]) -> int:
        """The cost of a path."""
        check_genotype(genotype, len(self.rows))
        return self.fixed + sum(row[choice] for row, choice in zip(self.rows, genotype, strict=True))

    def reachable(self) -> tuple[int, int]:
        """The least and the largest cost of all paths."""
        return (
            self.fixed + sum(min(row.values()) for row in self.rows),
            self.fixed + sum(max(row.values()) for row in self.rows),
        )


def macs_table(sizes: Sizes, size: tuple[int, int] = INPUT, classes: int | None = None) -> CostTable:
    """MACs for an image of ``size`` (height, width).

    The backbone alone, which is what the paper's limits are about; with ``classes`` also the last 1x1 convolution and
    the classifier.
    """
    rows, end = _blocks(sizes, size, "macs")
    height, width = _halved(size)
    fixed = 27 * sizes.stem * height * width
    if classes is not None:
        fixed += sizes.channels[-1] * sizes.last * end[0] * end[1] + sizes.last * classes
    return CostTable(fixed, rows)


def parameters_table(sizes: Sizes) -> CostTable:
    """Parameters of the backbone: weights, the stem's bias, scales and shifts of norms."""
    rows, _ = _blocks(sizes, INPUT, "parameters")
    return CostTable(27 * sizes.stem + 3 * sizes.stem, rows)


def _blocks(sizes: Sizes, size: tuple[int, int], what: str) -> tuple[tuple[dict[str, int], ...], tuple[int, int]]:
    if min(size) < 1:
        raise ValueError(f"size must be a positive (height, width), got {tuple(size)}")
    rows, inp, now = [], sizes.stem, _halved(size)
    for channels, blocks in zip(sizes.channels, sizes.blocks, strict=True):
        for block in range(blocks):
            stride = 1 if block else 2
            made = {choice: block_layers(choice, inp, channels, now, stride) for choice in CHOICES}
            rows.append({choice: sum(getattr(layer, what) for layer in layers) for choice, layers in made.items()})
            inp, now = channels, _halved(now) if stride == 2 else now
    return tuple(rows), now


def _halved(size: tuple[int, int]) -> tuple[int, int]:
    return -(-size[0] // 2), -(-size[1] // 2)


def _depthwise(channels: int, kernel: int, area: int) -> Layer:
    return Layer(channels, channels, kernel, channels, area)
