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
from typing import Any

from nasdet.spaces.msnas.genotype import laterals, resolutions

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
    total = 49 * 3 * STEM_CHANNELS * 4 * area[4] if stem else 0
    inp, before = STEM_CHANNELS, 4
    for stride, resolution in zip(strides, maps, strict=True):
        here = area[resolution]
        if block == "basic":
            total += 9 * (inp + channels) * channels * here
        else:
            # Upsampling comes first, a stride of 2 only at the 3x3.
            total += inp * channels * (area[before] if stride == 2 else here) + (9 * channels + out) * channels * here
        if inp != out or stride != 1:
            total += inp * out * here
        inp, before = out, resolution
    return total + sum(out * out * area[maps[end - 1]] for end, _ in laterals(strides))


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
