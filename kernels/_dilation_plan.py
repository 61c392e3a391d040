"""What the dilation convolutions' kernels walk over: lists of tiles and of steps, made of shapes alone, on the host.

A *part* is a range of output channels with its taps; the mixture is one part with the union of all branches' taps, the
grouped form has a part per slice. A tile never reaches beyond a part or a convolution group, and is as wide as its rows
need. Tables do not depend on the sizes of the maps, small ones excepted: training at many scales needs no more of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

Tap = tuple[int, int, int]  # vertical and horizontal offset into the source, index of its matrix among the weights
Part = tuple[int, int, tuple[Tap, ...]]  # output channels [first, last), taps

LEAST = 16  # of a tile's side
MOST = 2**30  # of a map's height and width, so that sums of positions stay within 32 bits


def cdiv(n: int, divisor: int) -> int:
    return -(-n // divisor)


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
        return cdiv(self.height, self.stride_h)

    @property
    def out_width(self) -> int:
        return cdiv(self.width, self.stride_w)

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
    widths: tuple[int, ...]  # that the tiles have, in rows of the result, widest first
    sums: tuple[int, ...]  # that the steps have, in channels; empty of the weights' gradient


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


def blocks(first: int, last: int, size: int) -> Iterator[tuple[int, int, int]]:
    """(first, last, width) of blocks of at most ``size``, a power of two; the rest in the least width that is worth it.

    Two narrower blocks read the other operand twice: worth it where one would be more than three eighths zeros.
    """
    while first < last:
        rest = last - first
        width = size
        while width > LEAST and 8 * rest <= 5 * width:
            width //= 2
        yield first, min(first + width, last), width
        first += width


@dataclass(frozen=True)
class Piece:
    """Rows of a result that have one sum in common, in one of its planes: at a stride, the gradient has several."""

    rows: tuple[int, int]
    base: int  # of the channels
    sums: tuple[tuple[tuple[int, int], tuple[Tap, ...]], ...]  # channels of the source, and their taps
    origin: tuple[int, int] = (0, 0)  # of the plane


def canonical(problem: Problem) -> Problem:
    """The problem of one small image that has the same pieces: those do not depend on the sizes of larger maps."""
    reach = [max(abs(tap[axis]) for _, _, taps in problem.parts for tap in taps) for axis in (0, 1)]
    height = min(problem.height, reach[0] + problem.stride_h + 1)
    width = min(problem.width, reach[1] + problem.stride_w + 1)
    return replace(problem, images=1, height=height, width=width)


def _slices(problem: Problem) -> Iterator[tuple[int, int, int, tuple[Tap, ...]]]:
    """(group, first and last output channel, taps): the parts cut at the groups."""
    for first, last, taps in problem.parts:
        for group in range(first // problem.fan_out, (last - 1) // problem.fan_out + 1):
            low, high = group * problem.fan_out, (group + 1) * problem.fan_out
            yield group, max(first, low), min(last, high), taps


@cache
def forward_pieces(problem: Problem) -> tuple[Piece, ...]:
    """Of a canonical problem: the result's channels."""
    return tuple(
        Piece((first, last), group * problem.fan_in, (((0, problem.fan_in), tuple(filter(problem.alive, taps))),))
        for group, first, last, taps in _slices(problem)
    )


@cache
def gradient_pieces(problem: Problem) -> tuple[Piece, ...]:
    """Of a canonical problem: the channels of the map's gradient, a convolution of the upstream gradient.

    With a stride, every phase of the map's positions is a plane of its own with the taps that reach it.
    """
    sums: dict[int, list[tuple[tuple[int, int], tuple[Tap, ...]]]] = {}
    for group, first, last, taps in _slices(problem):
        base = group * problem.fan_out
        sums.setdefault(group, []).append(((first - base, last - base), tuple(filter(problem.alive, taps))))
    return tuple(
        Piece(
            (group * problem.fan_in, (group + 1) * problem.fan_in),
            group * problem.fan_out,
            tuple((channels, _reaching(problem, taps, top, left)) for channels, taps in own),
            (top, left),
        )
        for top in range(min(problem.stride_h, problem.height))
        for left in range(min(problem.stride_w, problem.width))
        for group, own in sums.items()
    )


def _reaching(problem: Problem, taps: Sequence[Tap], top: int, left: int) -> tuple[Tap, ...]:
    return tuple(
        ((top - dy) // problem.stride_h, (left - dx) // problem.stride_w, matrix)
        for dy, dx, matrix in taps
        if (top - dy) % problem.stride_h == 0 and (left - dx) % problem.stride_w == 0
    )


@cache
def weight_pieces(problem: Problem) -> tuple[Piece, ...]:
    """Of a canonical problem: the output channels; what would be sums are the columns of the result."""
    return tuple(
        Piece((first, last), group * problem.fan_in, (((0, problem.fan_in), taps),))
        for group, first, last, taps in _slices(problem)
    )


def _common(numbers: Iterable[int]) -> int:
    return math.gcd(16, *numbers)


@cache
def product_table(pieces: tuple[Piece, ...], block_n: int, block_k: int) -> Table:
    """Tiles (rows, their width, first source channel, origin of the plane, first step, where the steps of each width
    end) and steps (tap, source channels)."""
    cuts = {
        piece: [(*cut, taps) for channels, taps in piece.sums for cut in blocks(*channels, block_k)] for piece in pieces
    }
    sums = tuple(sorted({cut[2] for own in cuts.values() for cut in own}, reverse=True))
    tiles: list[tuple[int, ...]] = []
    steps: list[tuple[int, ...]] = []
    known: dict[tuple[object, ...], tuple[int, ...]] = {}
    for piece in pieces:
        if piece.sums not in known:
            bounds = [len(steps)]
            for width in sums:
                # All taps of one block of channels come in a row: what one reads is in the caches for the next.
                steps += [(*tap, first, last) for first, last, own, taps in cuts[piece] if own == width for tap in taps]
                bounds.append(len(steps))
            known[piece.sums] = tuple(bounds)
        tiles += [(*rows, piece.base, *piece.origin, *known[piece.sums]) for rows in blocks(*piece.rows, block_n)]
    return Table(
        tiles=Rows(tuple(tiles)),
        steps=Rows((*steps, (0,) * 5)),  # kernels read one step ahead
        rows_align=_common(v for tile in tiles for v in tile[:2]),
        sum_align=_common([tile[3] for tile in tiles] + [v for step in steps for v in step[3:]]),
        rows_full=all(last - first == width for first, last, width, *_ in tiles),
        sum_full=all(last - first == width for own in cuts.values() for first, last, width, _ in own),
        widths=tuple(sorted({tile[2] for tile in tiles}, reverse=True)),
        sums=sums,
    )


@cache
def weight_table(problem: Problem, block_m: int, block_n: int) -> Table:
    """Tiles of the weights' gradient (tap, whether it is alive, output channels, their width, first source channel,
    columns) for a canonical problem; no steps."""
    tiles: list[tuple[int, ...]] = []
    for piece in weight_pieces(problem):
        (((_, fan_in), taps),) = piece.sums
        for rows in blocks(*piece.rows, block_n):
            for first in range(0, fan_in, block_m):
                for tap in taps:
                    alive = problem.alive(tap)
                    where = tap if alive else (0, 0, tap[2])
                    tiles.append((*where, int(alive), *rows, piece.base, first, min(first + block_m, fan_in)))
    return Table(
        tiles=Rows(tuple(tiles)),
        steps=Rows(()),
        rows_align=_common(v for tile in tiles for v in tile[4:6]),
        sum_align=_common(v for tile in tiles for v in tile[7:]),
        rows_full=all(tile[5] - tile[4] == tile[6] for tile in tiles),
        sum_full=all(tile[9] - tile[8] == block_m for tile in tiles),
        widths=tuple(sorted({tile[6] for tile in tiles}, reverse=True)),
        sums=(),
    )


_on_device: dict[tuple[Rows, torch.device], Tensor] = {}


def on_device(rows: Rows, like: Tensor) -> Tensor:
    """The numbers as int32 on the device of ``like``. Kept for good: recorded CUDA graphs hold their address.

    The first call with a new table copies from the host, and waits for that. A graph must not: while one is recorded,
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
    # Not from this thread: whoever warms up for a graph, such as Inductor, takes memory for this thread, or for its
    # current stream, from the graph's own pool, and would miss what is kept.
    with ThreadPoolExecutor(1) as thread:
        table = thread.submit(torch.tensor, rows.values, dtype=torch.int32, device=like.device).result()
    return _on_device.setdefault((rows, like.device), table)
