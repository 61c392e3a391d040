"""Multiply-accumulates of an MSNAS encoder with its RPN, which the search holds within a window; and its parameters.
No torch.

The net behind the formula: stem 7x7 stride 2 and max-pooling; in each block two 3x3 convolutions (``"basic"``) or 1x1,
3x3, 1x1 with four times the channels out (``"bottleneck"``), with the stride on the 3x3 and upsampling before the
block; a 1x1 shortcut where channels or resolution change; a 1x1 convolution for each lateral; after bottlenecks, a 1x1
convolution back to a quarter of the channels on each map that heads read; and, for each head on its map, a 3x3
convolution to 256 channels and 1x1 ones to 3 scores and 12 offsets. Biases and norms do not count.

The paper does not spell this net out. It was inferred from its FLOPs at 832 x 1280: the five published R18 nets count
144.8 to 146.5 G, where the paper has 145.45 G with 1 % to either side. Its R34 nets count 170.5 to 173.9 G and its R50
nets 189.0 to 192.9 G: each within 1 % of their middle, as the paper's window demands, but 5.5 % and 3.2 % below its
182.20 and 197.33 G. (With RPNs on all 576 channels the R50 nets would lie 8 % apart.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from nasdet._checks import check_whole
from nasdet.spaces.msnas.genotype import RESOLUTIONS, START, STRIDES, head_vectors, laterals, resolutions

BLOCKS = ("basic", "bottleneck")
STEM_CHANNELS = 64
RPN_CHANNELS = 256
RPN_OUTPUTS = 3 + 4 * 3
INPUT = (832, 1280)
"""Height and width that the paper counts at, for images of 800 x 1333; 576 x 1024 for those of 600 x 1000."""


@dataclass(frozen=True)
class Variant:
    """Sizes of an encoder, and the MACs of the FPN baseline that its nets are held to within 1 % (Table 1)."""

    blocks: int
    channels: int
    block: str
    target: float


VARIANTS = {
    "r18": Variant(13, 180, "basic", 145.45e9),
    "r34": Variant(21, 160, "basic", 182.20e9),
    "r50": Variant(21, 144, "bottleneck", 197.33e9),
}


def encoder_macs(
    strides: Sequence[float], channels: int, block: str = "basic", size: tuple[int, int] = INPUT, stem: bool = True
) -> int:
    """MACs of stem (optional), blocks and laterals for an image of ``size`` (height, width), divisible by 64."""
    area = _areas(size)
    maps = resolutions(strides)
    out = _out_channels(channels, block)
    total = _stem_macs(area) if stem else 0
    inp, before = STEM_CHANNELS, START
    for stride, resolution in zip(strides, maps, strict=True):
        total += _block_macs(inp, channels, block, stride, area[before], area[resolution])
        inp, before = out, resolution
    return total + sum(out * out * area[maps[end - 1]] for end, _ in laterals(strides))


def _stem_macs(area: Mapping[int, int]) -> int:
    return 49 * 3 * STEM_CHANNELS * 4 * area[START]


def _block_macs(inp: int, channels: int, block: str, stride: float, before: int, here: int) -> int:
    """MACs of a block that reads a map of ``before`` places and makes one of ``here``."""
    out = _out_channels(channels, block)
    if block == "basic":
        total = 9 * (inp + channels) * channels * here
    else:
        # Upsampling comes first, a stride of 2 only at the 3x3.
        total = inp * channels * (before if stride == 2 else here) + (9 * channels + out) * channels * here
    return total + (inp * out * here if inp != out or stride != 1 else 0)


def rpn_macs(
    heads: Sequence[int],
    channels: int,
    block: str = "basic",
    size: tuple[int, int] = INPUT,
    rpn_channels: int = RPN_CHANNELS,
) -> int:
    """MACs of the RPN: every head on its own map, also where two read the same; and of the convolutions before it that
    reduce a bottleneck's maps, once for each map."""
    area = _areas(size)
    out = _out_channels(channels, block)
    reduced = 0 if out == channels else sum(out * channels * area[head] for head in set(heads))
    return reduced + sum((9 * channels + RPN_OUTPUTS) * rpn_channels * area[head] for head in heads)


def macs(
    genotype: Mapping[str, Any],
    channels: int,
    block: str = "basic",
    size: tuple[int, int] = INPUT,
    stem: bool = True,
    rpn_channels: int = RPN_CHANNELS,
) -> int:
    """MACs of the encoder and the RPN, the quantity that the search constrains."""
    encoder = encoder_macs(genotype["strides"], channels, block, size, stem)
    return encoder + rpn_macs(genotype["heads"], channels, block, size, rpn_channels)


@cache
def macs_range(
    blocks: int,
    channels: int,
    block: str = "basic",
    size: tuple[int, int] = INPUT,
    stem: bool = True,
    rpn_channels: int = RPN_CHANNELS,
) -> tuple[int, int]:
    """The least and the largest :func:`macs` of all architectures of ``blocks`` blocks (at least 2), exactly.

    By dynamic programming over chains: what one more block costs, with the lateral of a stage that it ends, depends on
    the resolution before it and on those at which stages have ended; and so does which heads are legal in the end.
    """
    check_whole("blocks", blocks, 2)
    area, out = _areas(size), _out_channels(channels, block)
    start = _stem_macs(area) if stem else 0

    def ended(now: int, ends: frozenset[int]) -> tuple[frozenset[int], int]:
        """After a stage's end: all resolutions that have had one, and the MACs of its lateral."""
        return ends | {now}, out * out * area[now] if now in ends else 0

    chains: _Ranges = {(START, frozenset[int]()): (start, start)}
    for index in range(blocks):
        longer: _Ranges = {}
        for (now, ends), totals in chains.items():
            for stride in STRIDES:
                if (to := int(now * stride)) in RESOLUTIONS:
                    after, lateral = ended(now, ends) if index and stride != 1 else (ends, 0)
                    inp = out if index else STEM_CHANNELS
                    cost = lateral + _block_macs(inp, channels, block, stride, area[now], area[to])
                    _widen(longer, (to, after), totals, cost)
        chains = longer
    encoders: _Ranges = {}
    for (now, ends), totals in chains.items():
        after, lateral = ended(now, ends)
        _widen(encoders, (min(after), max(after)), totals, lateral)
    both: _Ranges = {}
    for present, totals in encoders.items():
        for heads in head_vectors(*present):
            _widen(both, (), totals, rpn_macs(heads, channels, block, size, rpn_channels))
    return both[()]


_Ranges = dict[Any, tuple[int, int]]
"""Least and largest MACs of all that is alike in what the key says."""


def _widen(ranges: _Ranges, key: Any, totals: tuple[int, int], cost: int) -> None:
    """Take in ``totals`` with ``cost`` on top."""
    least, most = totals[0] + cost, totals[1] + cost
    known = ranges.get(key, (least, most))
    ranges[key] = min(known[0], least), max(known[1], most)


def parameters(genotype: Mapping[str, Any], channels: int, block: str = "basic") -> int:
    """Parameters of the encoder: its convolutions, and two for each channel of the norm that follows each of them."""
    out = _out_channels(channels, block)
    total, inp = 49 * 3 * STEM_CHANNELS + 2 * STEM_CHANNELS, STEM_CHANNELS
    for stride in genotype["strides"]:
        if block == "basic":
            total += 9 * (inp + channels) * channels + 4 * channels
        else:
            total += (inp + 9 * channels + out) * channels + 4 * channels + 2 * out
        if inp != out or stride != 1:
            total += inp * out + 2 * out
        inp = out
    total += len(laterals(genotype["strides"])) * (out * out + 2 * out)
    return total + (0 if out == channels else len(set(genotype["heads"])) * (out * channels + 2 * channels))


def _areas(size: tuple[int, int]) -> dict[int, int]:
    height, width = size
    if height < 64 or width < 64 or height % 64 or width % 64:
        raise ValueError(f"size must be (height, width) divisible by 64, got {tuple(size)}")
    return {4 << level: (height >> level + 2) * (width >> level + 2) for level in range(5)}


def _out_channels(channels: int, block: str) -> int:
    if block not in BLOCKS:
        raise ValueError(f"block must be one of {', '.join(BLOCKS)}, got {block!r}")
    return channels if block == "basic" else 4 * channels
