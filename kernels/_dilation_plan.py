"""What the dilation convolutions' kernels walk over: lists of tiles and of steps, made of shapes alone, on the host.

A *part* is a range of output channels with its taps; the mixture is one part with the union of all branches' taps, the
grouped form has a part per slice. A tile never reaches beyond a part or a convolution group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

Tap = tuple[int, int, int]  # vertical and horizontal offset into the source, index of its matrix among the weights
Part = tuple[int, int, tuple[Tap, ...]]  # output channels [first, last), taps

MOST = 2**30  # of a map's height and width, so that sums of positions stay within 32 bits


@dataclass(frozen=True)
class Problem:
    """A convolution by its shapes. ``groups`` counts blocks of channels that see each other, see :func:`joined`."""

    images: int
    in_channels: int
    out_channels: int
    groups: int
    height: int
    width: int
    stride_h: int
    stride_w: int
    matrices: int  # of [out_channels, in_channels / groups] among the weights, one per distinct tap
    parts: tuple[Part, ...]

    @property
    def out_height(self) -> int:
        return -(-self.height // self.stride_h)

    @property
    def out_width(self) -> int:
        return -(-self.width // self.stride_w)

    @property
    def out_pixels(self) -> int:
        return self.images * self.out_height * self.out_width

    @property
    def fan_in(self) -> int:
        return self.in_channels // self.groups

    @property
    def fan_out(self) -> int:
        return self.out_channels // self.groups

    def alive(self, tap: Tap) -> bool:
        """Whether any output sees the map, and not only its padding, through the tap."""
        sizes = (
            (tap[0], self.stride_h, self.out_height, self.height),
            (tap[1], self.stride_w, self.out_width, self.width),
        )
        for offset, stride, outputs, size in sizes:
            first = max(0, -(offset // stride))  # the first output that does not see the padding before the map
            if first >= outputs or first * stride + offset >= size:
                return False
        return True


@dataclass(frozen=True, eq=False)  # is its own key in a dictionary, without hashing the numbers for each call
class Rows:
    """A table of integers that a kernel reads."""

    values: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Table:
    """The tiles of one launch and the steps of their sums, and what all of their numbers have in common."""

    tiles: Rows
    steps: Rows  # and one more row, which is read but not used
    rows_align: int  # a power of two that divides where every tile's rows begin and end
    sum_align: int  # the same of the channels that are summed over
    rows_full: bool  # every tile is full, and needs no mask
    sum_full: bool
    pixels: int  # the most of any tile's plane
    longest: int  # steps of the longest sum


def kernel_taps(kernel: int, dilation: tuple[int, int]) -> list[tuple[int, int]]:
    """The offsets of a kernel's taps, in the order of its elements."""
    radius = kernel // 2
    offsets = range(-radius, radius + 1)
    return [(i * dilation[0], j * dilation[1]) for i in offsets for j in offsets]


@dataclass(frozen=True, eq=False)
class Taps:
    """The distinct taps of all branches, each with a matrix of its own, and which elements of the kernels they are."""

    taps: tuple[Tap, ...]
    branches: Rows  # of every matrix: the element of each branch's kernel, or -1
    matrices: Rows  # of every branch: the matrix of each element of its kernel


@cache
def union_of_taps(kernel: int, dilations: tuple[tuple[int, int], ...]) -> Taps:
    index: dict[tuple[int, int], int] = {}
    matrices = [
        [index.setdefault(offset, len(index)) for offset in kernel_taps(kernel, dilation)] for dilation in dilations
    ]
    branches = [[row.index(matrix) if matrix in row else -1 for row in matrices] for matrix in index.values()]
    return Taps(
        taps=tuple((*offset, matrix) for offset, matrix in index.items()),
        branches=Rows(tuple(map(tuple, branches))),
        matrices=Rows(tuple(map(tuple, matrices))),
    )


def joined(problem: Problem, width: int) -> Problem:
    """The same convolution with neighbouring groups joined into blocks of at most ``width`` channels.

    The weights between different groups of a block are zeros: some more products, but rows that fill a matrix unit.
    """
    whole = [problem.groups, *((last - first) // problem.fan_out for first, last, _ in problem.parts)]
    shared = math.gcd(*whole) if problem.groups > 1 else 1
    widest = max(problem.fan_in, problem.fan_out)
    count = max((n for n in range(1, shared + 1) if shared % n == 0 and n * widest <= width), default=1)
    return replace(problem, groups=problem.groups // count)


def _blocks(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(first, last, size):
        yield start, min(start + size, last)


def _pieces(problem: Problem) -> Iterator[tuple[int, int, int, tuple[Tap, ...]]]:
    """(group, first and last output channel, taps): the parts cut at the groups."""
    for first, last, taps in problem.parts:
        for group in range(first // problem.fan_out, (last - 1) // problem.fan_out + 1):
            low, high = group * problem.fan_out, (group + 1) * problem.fan_out
            yield group, max(first, low), min(last, high), taps


def _common(numbers: Sequence[int]) -> int:
    return math.gcd(16, *numbers)


class _Builder:
    def __init__(self, block_n: int, block_k: int):
        self.block_n, self.block_k = block_n, block_k
        self.tiles: list[tuple[int, ...]] = []
        self.steps: list[tuple[int, ...]] = []
        self.known: dict[tuple[tuple[tuple[int, int], tuple[Tap, ...]], ...], tuple[int, int]] = {}

    def steps_of(self, sums: tuple[tuple[tuple[int, int], tuple[Tap, ...]], ...]) -> tuple[int, int]:
        """Where the steps over these channels and taps stand. All taps of one block of channels come in a row, so
        that what one tap reads is still in the caches for the next."""
        if sums not in self.known:
            first = len(self.steps)
            for channels, taps in sums:
                for block in _blocks(*channels, self.block_k):
                    self.steps.extend((*tap, *block) for tap in taps)
            self.known[sums] = first, len(self.steps)
        return self.known[sums]

    def add(self, rows: tuple[int, int], base: int, steps: tuple[int, int], plane: tuple[int, int, int, int]) -> None:
        self.tiles.extend((*block, base, *steps, *plane) for block in _blocks(*rows, self.block_n))

    def table(self, images: int) -> Table:
        tiles, steps = self.tiles, self.steps
        return Table(
            tiles=Rows(tuple(tiles)),
            steps=Rows((*steps, (0,) * 5)),  # kernels read one step ahead
            rows_align=_common([v for tile in tiles for v in tile[:2]]),
            sum_align=_common([v for tile in tiles for v in tile[2:3]] + [v for step in steps for v in step[3:]]),
            rows_full=all(tile[1] - tile[0] == self.block_n for tile in tiles),
            sum_full=all(step[4] - step[3] == self.block_k for step in steps),
            pixels=max(images * tile[7] * tile[8] for tile in tiles),
            longest=max(tile[4] - tile[3] for tile in tiles),
        )


@cache
def forward_table(problem: Problem, block_n: int, block_k: int) -> Table:
    """Tiles (rows, first source channel, steps, origin and size of the plane) and steps (tap, source channels)."""
    builder = _Builder(block_n, block_k)
    for group, first, last, taps in _pieces(problem):
        steps = builder.steps_of((((0, problem.fan_in), tuple(tap for tap in taps if problem.alive(tap))),))
        builder.add((first, last), group * problem.fan_in, steps, (0, 0, problem.out_height, problem.out_width))
    return builder.table(problem.images)


@cache
def gradient_table(problem: Problem, block_n: int, block_k: int) -> Table:
    """The same of the map's gradient, a convolution of the upstream gradient.

    With a stride, every phase of the map's positions is a plane of its own with the taps that reach it.
    """
    builder = _Builder(block_n, block_k)
    pieces: dict[int, list[tuple[tuple[int, int], tuple[Tap, ...]]]] = {}
    for group, first, last, taps in _pieces(problem):
        base = group * problem.fan_out
        alive = tuple(tap for tap in taps if problem.alive(tap))
        pieces.setdefault(group, []).append(((first - base, last - base), alive))
    for top in range(min(problem.stride_h, problem.height)):
        for left in range(min(problem.stride_w, problem.width)):
            rows = -(-(problem.height - top) // problem.stride_h)
            columns = -(-(problem.width - left) // problem.stride_w)
            for group, sums in pieces.items():
                own = tuple((channels, _reaching(problem, taps, top, left)) for channels, taps in sums)
                channels = group * problem.fan_in, (group + 1) * problem.fan_in
                builder.add(channels, group * problem.fan_out, builder.steps_of(own), (top, left, rows, columns))
    return builder.table(problem.images)


def _reaching(problem: Problem, taps: Sequence[Tap], top: int, left: int) -> tuple[Tap, ...]:
    return tuple(
        ((top - dy) // problem.stride_h, (left - dx) // problem.stride_w, matrix)
        for dy, dx, matrix in taps
        if (top - dy) % problem.stride_h == 0 and (left - dx) % problem.stride_w == 0
    )


@cache
def weight_table(problem: Problem, block_n: int, block_k: int) -> Table:
    """Tiles of the weights' gradient: tap, whether it is alive, rows, first source channel, columns; no steps."""
    tiles: list[tuple[int, ...]] = []
    for group, first, last, taps in _pieces(problem):
        for rows in _blocks(first, last, block_n):
            for columns in _blocks(0, problem.fan_in, block_k):
                for tap in taps:
                    alive = problem.alive(tap)
                    where = tap if alive else (0, 0, tap[2])
                    tiles.append((*where, int(alive), *rows, group * problem.fan_in, *columns))
    return Table(
        tiles=Rows(tuple(tiles)),
        steps=Rows(()),
        rows_align=_common([v for tile in tiles for v in tile[4:6]]),
        sum_align=_common([v for tile in tiles for v in tile[6:]]),
        rows_full=all(tile[5] - tile[4] == block_n for tile in tiles),
        sum_full=all(tile[8] - tile[7] == block_k for tile in tiles),
        pixels=problem.out_pixels,
        longest=0,
    )


_on_device: dict[tuple[Rows, torch.device], Tensor] = {}


def on_device(rows: Rows, like: Tensor) -> Tensor:
    """The numbers as int32 on the device of ``like``. Kept for good: recorded CUDA graphs hold their address.

    The first call with new shapes copies from the host, and waits for that. A graph must not: while one is recorded,
    an unknown table becomes part of the graph, element by element. Warm up before recording, as for any Triton kernel.
    """
    table = _on_device.get((rows, like.device))
    if table is not None:
        return table
    if like.is_cuda and torch.cuda.is_current_stream_capturing():
        values = [value for row in rows.values for value in row]
        table = like.new_empty(len(values), dtype=torch.int32)
        for place, value in zip(table.unbind(), values, strict=True):
            place.fill_(value)
        return table
    table = _on_device[rows, like.device] = torch.tensor(rows.values, dtype=torch.int32, device=like.device)
    return table
