"""NATS's vocabulary: dilations, the sets of them, decoding, and legal genotypes. Plain Python, no torch.

A genotype is ``{layer: [[dilation, count], ...]}``: layer names are module paths such as ``"layer2.0.conv2"``; a
dilation is an int or ``[vertical, horizontal]``; the counts say how many of the layer's N channel groups have it, in
the order of the output channels. They are shares, not channels, so one genotype serves backbones of several widths.

Source: Peng et al., "Efficient Neural Architecture Transformation Search in Channel-Level for Object Detection",
NeurIPS 2019, section 3.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

Pair = tuple[int, int]
STAGES = (3, 4, 5)


def _pairs(*dilations: int | Pair) -> tuple[Pair, ...]:
    return tuple((d, d) if isinstance(d, int) else d for d in dilations)


SETS: dict[str, dict[int, tuple[Pair, ...]]] = {
    "A": {3: _pairs(1, 3), 4: _pairs(1, 3), 5: _pairs(1, 3, 5)},
    "B": {3: _pairs(1, 2, 3), 4: _pairs(1, 2, 3), 5: _pairs(1, 2, 3, 4, 5)},
    "C": {
        3: _pairs(1, 2, 3, (1, 3), (3, 1)),
        4: _pairs(1, 2, 3, (1, 3), (3, 1)),
        5: _pairs(1, 2, 3, 4, 5, (1, 3), (3, 1), (1, 5), (5, 1)),
    },
}
"""The paper's sets of dilations by stage; C is the one that it uses."""


def dilation_name(dilation: Pair) -> str:
    """``"2"`` or ``"1x3"`` (vertical x horizontal), for tables."""
    return str(dilation[0]) if dilation[0] == dilation[1] else f"{dilation[0]}x{dilation[1]}"


def to_plain(dilation: Pair) -> int | list[int]:
    """A dilation as JSON: one number, or two where they differ."""
    return dilation[0] if dilation[0] == dilation[1] else list(dilation)


def to_pair(dilation: Any, where: str = "dilation") -> Pair:
    """A dilation as (vertical, horizontal), from an int or two of them."""
    if _positive(dilation):
        return dilation, dilation
    if isinstance(dilation, (list, tuple)) and len(dilation) == 2 and all(map(_positive, dilation)):
        return dilation[0], dilation[1]
    raise ValueError(f"{where} must be a positive integer or two of them, got {dilation!r}")


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def genotype_set(dilations: str | Mapping[Any, Sequence[int | Pair]]) -> dict[int, tuple[Pair, ...]]:
    """Dilations by stage: a set of :data:`SETS` by name, or your own ``{3: [...], 4: [...], 5: [...]}``.

    The keys may be text, as in JSON. ``ValueError`` for a name that is none, a stage other than 3, 4 or 5, an empty or
    repeating list, or a dilation below 1.
    """
    if isinstance(dilations, str):
        if dilations not in SETS:
            raise ValueError(f"dilations must be one of {', '.join(SETS)}, or lists by stage, got {dilations!r}")
        return SETS[dilations]
    if not isinstance(dilations, Mapping) or not dilations:
        raise ValueError(f"dilations must be one of {', '.join(SETS)}, or lists by stage, got {dilations!r}")
    found = {}
    for key, values in dilations.items():
        if str(key) not in map(str, STAGES):
            raise ValueError(f"dilations must have the stages 3, 4 and 5, got {key!r}")
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ValueError(f"dilations of stage {key} must be a non-empty list, got {values!r}")
        pairs = tuple(to_pair(value, f"dilations of stage {key}") for value in values)
        if len(set(pairs)) != len(pairs):
            raise ValueError(f"dilations of stage {key} must differ, got {values!r}")
        found[int(key)] = pairs
    return found


def decode(
    alphas: Mapping[str, Sequence[Sequence[float]]],
    dilations: Mapping[str, Sequence[Pair]],
    index_preserving: bool = False,
) -> dict[str, list[list[Any]]]:
    """Alphas to a genotype, per layer: the largest alpha of each channel group decides for it (Equation 4).

    ``alphas`` has, per layer, one row per channel group with one value for each of the layer's ``dilations``; of
    equals, the first wins. A dilation's count is its *intensity* times N (Equation 5), and a dilation of intensity 0 is
    left out. The rest stand in the order of ``dilations``, each once (the paper's block order); with
    ``index_preserving`` every group keeps its place and its choice, as in the supernet.
    """
    genotype = {}
    for layer, rows in alphas.items():
        choices = dilations[layer]
        chosen = []
        for index, row in enumerate(rows):
            if len(row) != len(choices):
                raise ValueError(f"alphas.{layer} row {index} must have {len(choices)} values, got {len(row)}")
            if not all(math.isfinite(value) for value in row):
                raise ValueError(f"alphas.{layer} row {index} must be finite, got {list(row)}")
            chosen.append(max(range(len(row)), key=row.__getitem__))
        if not chosen:
            raise ValueError(f"alphas.{layer} must have a row for each channel group, got none")
        genotype[layer] = runs(chosen if index_preserving else sorted(chosen), choices)
    return genotype


def runs(chosen: Sequence[int], dilations: Sequence[Pair]) -> list[list[Any]]:
    """Choices group by group as ``[[dilation, count], ...]``, neighbours of one choice together."""
    return [[to_plain(dilations[index]), len(list(same))] for index, same in groupby(chosen)]


def choices(entries: Sequence[Sequence[Any]], dilations: Sequence[Pair]) -> list[int]:
    """The reverse of :func:`runs`: the index of each channel group's dilation."""
    return [dilations.index(to_pair(dilation)) for dilation, count in entries for _ in range(count)]


def intensities(entries: Sequence[Sequence[Any]]) -> dict[Pair, float]:
    """The share of each dilation in a layer of a genotype; they sum to 1."""
    total = sum(count for _, count in entries)
    shares: dict[Pair, float] = {}
    for dilation, count in entries:
        shares[to_pair(dilation)] = shares.get(to_pair(dilation), 0.0) + count / total
    return shares


def random_choices(rng: random.Random, groups: int, dilations: Sequence[Pair]) -> list[int]:
    """A uniformly random choice for each of ``groups`` channel groups."""
    return [rng.randrange(len(dilations)) for _ in range(groups)]


def check_genotype(genotype: Any) -> tuple[str, ...]:
    """The layers of a legal genotype; ``ValueError`` with the place and the reason otherwise."""
    if not isinstance(genotype, Mapping) or not genotype:
        raise ValueError(f"genotype must be an object of layers, got {genotype!r}")
    for layer, entries in genotype.items():
        if not isinstance(layer, str) or not layer:
            raise ValueError(f"genotype layers must be module paths, got {layer!r}")
        if not isinstance(entries, (list, tuple)) or not entries:
            raise ValueError(f"genotype.{layer} must be a list of [dilation, count], got {entries!r}")
        for entry in entries:
            if not isinstance(entry, (list, tuple)) or len(entry) != 2:
                raise ValueError(f"genotype.{layer} must be a list of [dilation, count], got {entry!r}")
            to_pair(entry[0], f"genotype.{layer} dilation")
            if not _positive(entry[1]):
                raise ValueError(f"genotype.{layer} count must be a positive integer, got {entry[1]!r}")
    return tuple(genotype)


def splits(layer: str, entries: Sequence[Sequence[Any]], channels: int, width: int = 1) -> list[int]:
    """Output channels of each entry in a layer of ``channels``; ``width``: channels of one convolution group.

    ``ValueError`` where the counts do not divide the channels, or an entry would cut a convolution group.
    """
    total = sum(count for _, count in entries)
    if channels % total:
        raise ValueError(f"{layer}: counts must sum to a divisor of its {channels} output channels, got {total}")
    sizes = [count * (channels // total) for _, count in entries]
    for (dilation, _), size in zip(entries, sizes, strict=True):
        if size % width:
            raise ValueError(
                f"{layer}: dilation {dilation} must cover whole convolution groups of {width} channels, got {size}"
            )
    return sizes
