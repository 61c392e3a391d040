"""MSNAS's vocabulary: strides of a chain of blocks, what follows from them, and which head reads which map. No torch.

A genotype is ``{"strides": [...], "heads": [...], "laterals": [[to, from], ...]}``. ``strides`` has 0.5, 1 or 2 for
each block of the encoder in turn; ``heads`` has, for each group of objects from small to large, the *resolution* of
the map it is detected on; resolutions are strides relative to the image (4: a quarter of its height and width).
``laterals`` follow from the strides and are written down for readers that have no rule. Blocks count from 1.

Source: "Multi-scale Network Architecture Search for Object Detection" (under review, ICLR 2021), sections 3.2 and 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import combinations_with_replacement
from typing import Any

Genotype = dict[str, list[Any]]

STRIDES = (0.5, 1, 2)
RESOLUTIONS = (4, 8, 16, 32, 64)
START = 4
"""Resolution of the stem's map, which the first block reads."""
GROUPS = 5
"""Groups of objects, and detection heads."""
FPN_HEADS = (4, 8, 16, 32, 64)


def resolutions(strides: Sequence[float]) -> list[int]:
    """The resolution of each block's map: 4 times the product of the strides so far.

    ``ValueError`` for a stride other than 0.5, 1 or 2, no strides, or a map finer than 1/4 or coarser than 1/64 of the
    image.
    """
    if isinstance(strides, (str, Mapping)) or not isinstance(strides, Sequence) or not strides:
        raise ValueError(f"strides must be a non-empty list of 0.5, 1 and 2, got {strides!r}")
    found, now = [], START
    for block, stride in enumerate(strides, 1):
        # 1.0 is refused: JSON keeps it apart from 1, and a card's key with it.
        if isinstance(stride, bool) or stride not in STRIDES or isinstance(stride, float) != (stride == 0.5):
            raise ValueError(f"strides must be 0.5, 1 or 2, got {stride!r} for block {block}")
        now = now // 2 if stride == 0.5 else now * int(stride)
        if now not in RESOLUTIONS:
            raise ValueError(f"strides must keep resolutions within 4 to 64, got {now} after block {block}")
        found.append(now)
    return found


def stage_ends(strides: Sequence[float]) -> list[int]:
    """The last block of each stage: followed by a block of stride other than 1, or by none."""
    blocks = len(strides)
    return [block for block in range(1, blocks + 1) if block == blocks or strides[block] != 1]


def laterals(strides: Sequence[float]) -> list[list[int]]:
    """The lateral connections ``[to, from]`` (Equations 4 to 6): ``to`` is a stage's last block, ``from`` the nearest
    earlier stage's last block of the same resolution; where there is none, neither is a connection.

    The map of block ``from``, after its own addition, passes a 1x1 convolution and is added to that of ``to``.
    """
    found, nearest = [], dict[int, int]()
    maps = resolutions(strides)
    for end in stage_ends(strides):
        resolution = maps[end - 1]
        if resolution in nearest:
            found.append([end, nearest[resolution]])
        nearest[resolution] = end
    return found


@cache
def head_vectors(finest: int = RESOLUTIONS[0], coarsest: int = RESOLUTIONS[-1]) -> tuple[tuple[int, ...], ...]:
    """The legal ``heads`` (Equation 7) with resolutions from ``finest`` to ``coarsest``; 103 of 4 to 64.

    They do not fall, their smallest is at most 8, their largest at least 8, and these two differ.
    """
    present = [resolution for resolution in RESOLUTIONS if finest <= resolution <= coarsest]
    rising = combinations_with_replacement(present, GROUPS)
    return tuple(heads for heads in rising if heads[0] <= 8 <= heads[-1] and heads[0] != heads[-1])


def legal_heads(strides: Sequence[float]) -> tuple[tuple[int, ...], ...]:
    """The legal ``heads`` of an encoder."""
    # Strides change a resolution by one step, so none is left out between the finest and the coarsest.
    maps = resolutions(strides)
    return head_vectors(min(maps), max(maps))


def head_blocks(strides: Sequence[float], heads: Sequence[int]) -> list[int]:
    """The block that each head reads: the last stage's end of its resolution."""
    maps = resolutions(strides)
    last = {maps[end - 1]: end for end in stage_ends(strides)}
    if missing := [head for head in heads if head not in last]:
        raise ValueError(f"heads must be among the encoder's resolutions {sorted(last)}, got {missing[0]}")
    return [last[head] for head in heads]


def genotype(strides: Sequence[float], heads: Sequence[int]) -> Genotype:
    """The genotype of an encoder and its heads, with its laterals; ``ValueError`` unless it is legal."""
    made: Genotype = {"strides": list(strides), "heads": list(heads), "laterals": laterals(strides)}
    check_genotype(made)
    return made


def check_genotype(genotype: Any) -> None:
    """Raise ``ValueError`` with the place and the reason unless the genotype is legal."""
    if not isinstance(genotype, Mapping) or set(genotype) != {"strides", "heads", "laterals"}:
        got = ", ".join(map(str, genotype)) if isinstance(genotype, Mapping) else repr(genotype)
        raise ValueError(f"genotype must be an object of strides, heads and laterals, got {got or 'nothing'}")
    strides, heads = genotype["strides"], genotype["heads"]
    try:
        maps = resolutions(strides)
        _check_heads(heads, sorted(set(maps)))
    except ValueError as error:
        raise ValueError(f"genotype.{error}") from error
    given = genotype["laterals"]
    if not isinstance(given, (list, tuple)) or [_plain(pair) for pair in given] != laterals(strides):
        raise ValueError(f"genotype.laterals must be {laterals(strides)}, which follow from its strides, got {given!r}")


def _plain(pair: Any) -> Any:
    return list(pair) if isinstance(pair, (list, tuple)) else pair


def _check_heads(heads: Any, present: Sequence[int]) -> None:
    if not isinstance(heads, (list, tuple)) or len(heads) != GROUPS:
        raise ValueError(f"heads must have {GROUPS} resolutions, got {heads!r}")
    for head in heads:
        if isinstance(head, bool) or not isinstance(head, int) or head not in RESOLUTIONS:
            raise ValueError(f"heads must be among {', '.join(map(str, RESOLUTIONS))}, got {head!r}")
    if tuple(heads) not in head_vectors():
        raise ValueError(
            f"heads must not fall, have a smallest of at most 8, a largest of at least 8, and differ, got {list(heads)}"
        )
    if missing := [head for head in heads if head not in present]:
        raise ValueError(f"heads must be among the encoder's resolutions {list(present)}, got {missing[0]}")
