"""Which tiles the products of the dilation convolutions may have, and what they are expected to cost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import torch

from ._dilation_plan import LEAST, Piece, Problem, blocks, cdiv
from ._tuning import Config

HOPPER, NOWHERE = 99, 1000  # as compute capabilities: the last of Hopper's, and none

# Tiles of (pixels, output channels, input channels), warps, stages. Of narrow parts tiles and steps are narrower. What
# some processors are left out of would spill registers there. Of equal estimates the one that stands first is taken.
# Behind their equals stand those whose products Triton 3.6's ptxas serialises on Hopper, where tiles and steps have one
# width: (128, 256) in 16 bits, (128, 128) of 8 warps in TF32, and the same of the weights' gradient in 16 bits.
PRODUCTS = {
    "16-bit": (
        Config(128, 128, 64, 8, 3),
        Config(256, 128, 64, 8, 3, least=90),
        Config(128, 256, 64, 8, 3, uneven=90),
        Config(128, 128, 32, 8, 4),
        Config(128, 64, 64, 4, 3, least=90),
        Config(128, 64, 32, 4, 4, most=89),
        Config(64, 64, 64, 4, 4),
    ),
    "tf32": (
        Config(128, 128, 32, 4, 3, least=90, most=HOPPER, uneven=NOWHERE),
        Config(128, 256, 32, 8, 3, least=90, most=HOPPER, uneven=NOWHERE),
        Config(128, 128, 32, 8, 3, uneven=90),
        Config(128, 64, 32, 4, 3, uneven=90),
        Config(64, 64, 32, 4, 4),
    ),
    "ieee": (Config(128, 64, 16, 8, 2), Config(64, 64, 16, 4, 3)),
}
# Tiles of (input channels, output channels, pixels) for the gradient of the weights.
WEIGHT_PRODUCTS = {
    "16-bit": (
        Config(128, 128, 64, 4, 3, least=90, most=HOPPER, uneven=NOWHERE),
        Config(128, 128, 64, 8, 3),
        Config(128, 256, 64, 8, 3),
        Config(128, 64, 64, 4, 3),
        Config(64, 64, 64, 4, 4),
    ),
    "tf32": (Config(128, 128, 32, 8, 3), Config(64, 64, 32, 4, 4)),
    "ieee": (Config(64, 64, 16, 4, 3),),
}
UNALIGNED_TERMS = 32  # of a sum at a time where channels are loaded one by one, which takes registers
MEASURED = 3  # configurations that are tried, best first by the estimate
PROCESSORS = 132  # that the estimate fills; not the device's own, so that shapes alone cut the sums
STEP_COST, LOAD_COST = 300_000, 64  # of the estimate, in multiply-adds: a step, and an element of an operand


@cache
def processor_of(device: torch.device) -> tuple[int, int]:
    """Compute capability (90 for 9.0) and bytes of shared memory that a block may have."""
    if device.type != "cuda":
        return 90, 232448
    properties = torch.cuda.get_device_properties(device)
    shared = getattr(properties, "shared_memory_per_block_optin", 101376)  # the least since 8.0
    return 10 * properties.major + properties.minor, shared


def fitting_on(processor: tuple[int, int], configs: Sequence[Config], element_bytes: int) -> list[Config]:
    capability, shared = processor
    return [
        config
        for config in configs
        if config.least <= capability <= config.most and config.shared_memory(element_bytes) <= shared
    ]


def side(size: int) -> int:
    """Of the tile that holds ``size``."""
    return max(LEAST, 1 << (size - 1).bit_length())


def candidates(
    kind: str, dtype: torch.dtype, device: torch.device, pieces: tuple[Piece, ...], pixels: int, aligned: bool
) -> list[Config]:
    """The configurations of a product, cut down to the sizes of small ones, best first."""
    processor = processor_of(device)
    rows = side(max(last - first for piece in pieces for first, last in [piece.rows]))
    terms = side(max(last - first for piece in pieces for (first, last), _ in piece.sums))
    terms = terms if aligned else min(terms, UNALIGNED_TERMS)
    costs: dict[Config, float] = {}
    for config in fitting_on(processor, PRODUCTS[kind], dtype.itemsize):
        own = config.cut(max(side(pixels), 64), rows, terms)
        steps = {width for piece in pieces for sums, _ in piece.sums for *_, width in blocks(*sums, own.block_k)}
        if processor[0] >= config.uneven or (aligned and len(steps) == len(widths(own, pieces)) == 1):
            costs[own] = estimate(own, pieces, pixels)
    return sorted(costs, key=costs.__getitem__)[:MEASURED]


def widths(config: Config, pieces: Iterable[Piece]) -> set[int]:
    """Of the tiles."""
    return {width for piece in pieces for *_, width in blocks(*piece.rows, config.block_n)}


def weight_candidates(
    kind: str,
    dtype: torch.dtype,
    device: torch.device,
    pieces: tuple[Piece, ...],
    chunks: tuple[int, int],
    aligned: bool,
) -> list[Config]:
    """The same of the weights' gradient."""
    rows = side(max(last - first for piece in pieces for first, last in [piece.rows]))
    columns, pixels = max(side(pieces[0].sums[0][0][1]), 64), 64 if aligned else UNALIGNED_TERMS
    processor = processor_of(device)
    costs: dict[Config, float] = {}
    for config in fitting_on(processor, WEIGHT_PRODUCTS[kind], dtype.itemsize):
        own = config.cut(columns, rows, pixels)
        if processor[0] >= config.uneven or (aligned and len(widths(own, pieces)) == 1):
            costs[own] = weight_estimate(own, pieces, chunks)
    return sorted(costs, key=costs.__getitem__)[:MEASURED]


def estimate(config: Config, pieces: Iterable[Piece], pixels: int) -> float:
    """What a product costs, to choose among tiles by: whole waves of tiles, their products, loads and steps."""
    tiles = []
    for piece in pieces:
        steps = [(width, len(taps)) for sums, taps in piece.sums for *_, width in blocks(*sums, config.block_k)]
        for *_, rows in blocks(*piece.rows, config.block_n):
            tiles.append(sum(taps * step_cost(config.block_m, rows, width) for width, taps in steps))
    return in_waves(tiles, cdiv(pixels, config.block_m))


def weight_estimate(config: Config, pieces: Iterable[Piece], chunks: tuple[int, int]) -> float:
    """The same of the weights' gradient, where the long sums are over a chunk of the pixels."""
    count, length = chunks
    tiles = []
    for piece in pieces:
        (((_, fan_in), taps),) = piece.sums
        for *_, rows in blocks(*piece.rows, config.block_n):
            cost = cdiv(length, config.block_k) * step_cost(config.block_m, rows, config.block_k)
            tiles += [cost] * (len(taps) * cdiv(fan_in, config.block_m))
    return in_waves(tiles, count)


def step_cost(m: int, n: int, k: int) -> int:
    return k * (m * n + LOAD_COST * (m + n)) + STEP_COST


def in_waves(tiles: Sequence[int], times: int) -> float:
    """Of tiles of these costs, so many times, with one at a time on each of the processors."""
    waves = cdiv(len(tiles) * times, PROCESSORS)
    return max(waves * sum(tiles) / len(tiles), max(tiles))


def chunks_of(problem: Problem, pieces: Iterable[Piece]) -> tuple[int, int]:
    """How many chunks the pixels are cut into, and how long: enough that few tiles fill a device, by shapes alone."""
    tiles = 0
    for piece in pieces:
        (((_, fan_in), taps),) = piece.sums
        tiles += len(list(blocks(*piece.rows, 128))) * cdiv(fan_in, 128) * len(taps)
    wanted = min(cdiv(2 * PROCESSORS, tiles), cdiv(problem.out_pixels, 512))
    chunk = cdiv(cdiv(problem.out_pixels, wanted), 64) * 64
    return cdiv(problem.out_pixels, chunk), chunk
