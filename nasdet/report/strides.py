"""MSNAS's encoder as a path: resolution over blocks, with its lateral connections and what the heads read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nasdet.report.markup import figure, legend, text

_ROWS = (4, 8, 16, 32, 64)
_LEFT, _STEP, _TOP, _ROW, _RIGHT, _RADIUS = 46, 30, 34, 52, 136, 8


@dataclass(frozen=True)
class Path:
    """The resolution of the stem and of every block, laterals ``(to, from)``, and heads by the block they read."""

    rows: tuple[int, ...]
    laterals: tuple[tuple[int, int], ...]
    heads: dict[int, tuple[int, ...]]


def stride_path(genotype: Any) -> Path | None:
    """The path of ``{"strides": [...], "heads": [...], "laterals": [[to, from], ...]}``; None for anything else."""
    if not isinstance(genotype, Mapping) or set(genotype) != {"strides", "heads", "laterals"}:
        return None
    strides, heads, laterals = genotype["strides"], genotype["heads"], genotype["laterals"]
    if not all(isinstance(part, list) for part in (strides, heads, laterals)):
        return None
    rows = [4]
    for stride in strides:
        if stride not in (0.5, 1, 2) or (now := int(rows[-1] * stride)) not in _ROWS:
            return None
        rows.append(now)
    blocks = range(1, len(rows))
    pairs = [pair for pair in laterals if isinstance(pair, list) and len(pair) == 2 and all(b in blocks for b in pair)]
    last = {rows[block]: block for block in blocks}
    if len(pairs) != len(laterals) or not heads or any(head not in last for head in heads):
        return None
    read: dict[int, tuple[int, ...]] = {}
    for index, head in enumerate(heads, 1):
        read[last[head]] = (*read.get(last[head], ()), index)
    return Path(tuple(rows), tuple((pair[0], pair[1]) for pair in pairs), read)


def stride_figure(path: Path) -> str:
    """The path from the stem over the blocks; an arc for each lateral; on the right, which heads read which block."""
    width, height = _x(len(path.rows) - 1) + _RIGHT, _TOP + 4 * _ROW + 42
    present = sorted(set(path.rows))
    parts = [
        f'<path class="rail" d="M{_LEFT} {_y(row)}H{width - _RIGHT + 14}"/>'
        f'<text class="end" x="{_LEFT - 14}" y="{_y(row) + 4}">1/{row}</text>'
        for row in _ROWS
    ]
    parts += [_arc(path, to, origin) for to, origin in path.laterals]
    way = "L".join(f"{_x(block)} {_y(row)}" for block, row in enumerate(path.rows))
    parts.append(f'<path class="way" d="M{way}"/>')
    parts += [_head(path, block, heads, width) for block, heads in path.heads.items()]
    parts += [_node(path, block) for block in range(len(path.rows))]
    numbers = "".join(
        f'<text class="mid" x="{_x(block)}" y="{height - 8}">{block or "stem"}</text>'
        for block, _ in enumerate(path.rows)
    )
    resolutions = ", ".join(f"1/{row}" for row in path.rows[1:])
    added = ", ".join(f"{to} from {origin}" for to, origin in path.laterals) or "none"
    reads = "; ".join(f"{_named(heads)} read block {block}" for block, heads in path.heads.items())
    drawing = (
        f'<svg class="strides" viewBox="0 0 {width} {height}" role="img" aria-label="'
        f'{text(f"Resolutions {resolutions}. Laterals: {added}. {reads[:1].upper()}{reads[1:]}.")}">'
        f"{''.join(parts)}{numbers}</svg>"
    )
    colors = [("blocks in turn", "var(--c0)"), ("lateral, added at its end", "var(--c1)"), ("heads", "var(--c2)")]
    return figure(
        legend(colors) + drawing,
        f"<b>The path of strides</b>: the resolution of each block's map, {len(path.rows) - 1} blocks over "
        f"{len(present)} resolutions. Heads count from small objects to large.",
        "wide",
    )


def _x(block: int) -> int:
    return _LEFT + _STEP * block


def _y(row: int) -> int:
    return _TOP + _ROW * _ROWS.index(row)


def _arc(path: Path, to: int, origin: int) -> str:
    y, high = _y(path.rows[to]), 16 + 3 * min(to - origin, 6)
    start, end = _x(origin) + 3, _x(to) - 3
    return (
        f'<path class="lateral" d="M{start} {y - _RADIUS}C{start + 6} {y - high} {end - 6} {y - high} {end} '
        f'{y - _RADIUS - 1}"><title>block {origin} is added to block {to}</title></path>'
    )


def _node(path: Path, block: int) -> str:
    stage = " read" if block in path.heads else ""
    name = f"block {block}" if block else "stem"
    return (
        f'<circle class="block{stage}" cx="{_x(block)}" cy="{_y(path.rows[block])}" r="{_RADIUS if block else 5}">'
        f"<title>{name}: 1/{path.rows[block]}</title></circle>"
    )


def _head(path: Path, block: int, heads: tuple[int, ...], width: int) -> str:
    y = _y(path.rows[block])
    return (
        f'<path class="reads" d="M{_x(block) + _RADIUS} {y}H{width - _RIGHT + 24}"/>'
        f'<text class="heads" x="{width - _RIGHT + 28}" y="{y + 4}">{text(_named(heads))}</text>'
    )


def _named(heads: tuple[int, ...]) -> str:
    return ("head " if len(heads) == 1 else "heads ") + ", ".join(map(str, heads))
