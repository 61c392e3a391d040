"""NATS's derived dilations as the paper draws them (Figure 3, intensities), and how the search came there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nasdet.report.alphas import Matrix, histories
from nasdet.report.markup import figure, legend, text

Pair = tuple[int, int]
Intensities = dict[str, dict[Pair, float]]

# Dilation 1, the original's, is grey; the paper's others have a colour each, and whatever else a set may hold follows.
_COLORS = {(1, 1): "var(--c5)"} | {
    pair: f"var(--c{index})"
    for pair, index in zip(
        ((2, 2), (3, 3), (4, 4), (5, 5), (1, 3), (3, 1), (1, 5), (5, 1)), (0, 2, 6, 3, 1, 4, 7, 8), strict=True
    )
}
_ROW, _BAR, _LEFT, _WIDTH = 22, 15, 128, 460
_MOST = 48


def intensities(genotype: Any) -> Intensities:
    """The share of the channel groups that have each dilation, by layer, of ``{layer: [[dilation, count], ...]}``.

    Empty for anything else: the genotype of another method.
    """
    if not isinstance(genotype, Mapping) or not genotype:
        return {}
    found: Intensities = {}
    for layer, entries in genotype.items():
        shares: dict[Pair, float] = {}
        for entry in entries if isinstance(entries, list) else [None]:
            if not (isinstance(entry, list) and len(entry) == 2 and (pair := _pair(entry[0])) and _positive(entry[1])):
                return {}
            shares[pair] = shares.get(pair, 0.0) + entry[1]
        if not shares:
            return {}
        total = sum(shares.values())
        found[str(layer)] = {pair: count / total for pair, count in shares.items()}
    return found


def _positive(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _pair(value: Any) -> Pair | None:
    if _positive(value):
        return value, value
    if isinstance(value, list) and len(value) == 2 and all(map(_positive, value)):
        return value[0], value[1]
    return None


def _name(pair: Pair) -> str:
    return str(pair[0]) if pair[0] == pair[1] else f"{pair[0]}×{pair[1]}"


def _color(pair: Pair) -> str:
    return _COLORS.get(pair, f"var(--c{(3 * pair[0] + pair[1]) % 9})")


def _order(pairs: Any) -> list[Pair]:
    """Square dilations by size, then the others: the order of the paper's sets."""
    return sorted(pairs, key=lambda pair: (pair[0] != pair[1], max(pair), pair))


def intensity_bars(layers: Intensities) -> str:
    """A stacked bar for each block: which share of its channels has which dilation."""
    present = _order({pair for shares in layers.values() for pair in shares})
    height = _ROW * len(layers) + 4
    parts, spoken = [], []
    for row, (layer, shares) in enumerate(layers.items()):
        y, x = row * _ROW + 4, float(_LEFT)
        parts.append(f'<text class="layer" x="{_LEFT - 8}" y="{y + 12}">{text(_short(layer))}</text>')
        for pair in (pair for pair in present if pair in shares):
            width = _WIDTH * shares[pair]
            label = f"{layer}: dilation {_name(pair)}, {100 * shares[pair]:.3g} %"
            parts.append(
                f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_BAR}" fill="{_color(pair)}">'
                f"<title>{text(label)}</title></rect>"
            )
            if width >= 34:
                parts.append(
                    f'<text class="share" x="{x + width / 2:.1f}" y="{y + 11.5}">{100 * shares[pair]:.0f}</text>'
                )
            x += width
        said = ", ".join(f"{_name(pair)} {100 * shares[pair]:.3g} %" for pair in present if pair in shares)
        spoken.append(f"{layer}: {said}")
    drawing = (
        f'<svg class="intensities" viewBox="0 0 {_LEFT + _WIDTH + 2} {height}" role="img" '
        f'aria-label="{text("; ".join(spoken))}">{"".join(parts)}</svg>'
    )
    colors = [(f"dilation {_name(pair)}", _color(pair)) for pair in present]
    return figure(
        legend(colors) + drawing,
        "<b>Intensity of each dilation</b>: the share of a block's channels that has it, in percent (vertical × "
        "horizontal; 1 is the original's). Parameters and multiply-accumulates do not depend on it.",
        "wide",
    )


def _short(layer: str) -> str:
    return layer if len(layer) <= 18 else f"…{layer[-17:]}"


def searched_dilations(records: Sequence[Mapping[str, Any]], choices: Any) -> str:
    """For each layer its mean softmax over the channel groups from step to step, as a stacked area; and how decided.

    ``choices`` has the names of each layer's dilations, ``{layer: ["1", "2", "1x3", ...]}``, as the run recorded them.
    """
    stride = max(1, math.ceil((len(records) - 1) / (_MOST - 1)))
    thinned = [*records[:-1:stride], *records[-1:]]
    panels = []
    pairs: set[Pair] = set()
    named = choices if isinstance(choices, Mapping) else {}
    for layer, history in histories(thinned).items():
        names = named.get(layer)
        width = len(history[-1][1][0])
        known = [_parse(name) for name in names] if isinstance(names, list) and len(names) == width else []
        if not known or None in known:
            known = [(index + 1, index + 1) for index in range(width)]
        own = [pair for pair in known if pair is not None]
        pairs |= set(own)
        panels.append(_panel(layer, history, own))
    if not panels:
        return ""
    colors = [(f"dilation {_name(pair)}", _color(pair)) for pair in _order(pairs)]
    return figure(
        f'{legend(colors)}<div class="panels ways">{"".join(panels)}</div>',
        "<b>The way of every block</b>: the softmax of its alphas over the steps, mean over its channel groups, "
        "stacked to 1; beside the name the mean share of each group's largest at the end, which decides for the group.",
        "wide",
    )


def _parse(name: Any) -> Pair | None:
    words = name.split("x") if isinstance(name, str) else []
    if len(words) not in (1, 2) or not all(word.isdecimal() and int(word) for word in words):
        return None
    return int(words[0]), int(words[-1])


def mean_shares(matrix: Matrix) -> list[float]:
    """The mean over the channel groups (rows) of a layer's softmax; sums to 1."""
    return [sum(column) / len(matrix) for column in zip(*matrix, strict=True)]


def _panel(layer: str, history: list[tuple[float, Matrix]], pairs: Sequence[Pair]) -> str:
    width, height = 160.0, 64.0
    first, last = history[0][0], history[-1][0]
    xs = [width * (step - first) / (last - first) if last > first else 0.0 for step, _ in history]
    if len(xs) == 1:
        xs, history = [0.0, width], [history[0], history[0]]
    rows = [mean_shares(matrix) for _, matrix in history]
    order = [pairs.index(pair) for pair in _order(pairs)]
    below = [0.0] * len(rows)
    areas = []
    for choice in order:
        above = [base + row[choice] for base, row in zip(below, rows, strict=True)]
        upper = "L".join(f"{x:.0f} {height * (1 - y):.1f}" for x, y in zip(xs, above, strict=True))
        lower = "L".join(f"{x:.0f} {height * (1 - y):.1f}" for x, y in zip(reversed(xs), reversed(below), strict=True))
        areas.append(f'<path d="M{upper}L{lower}Z" style="fill:{_color(pairs[choice])}"/>')
        below = above
    end = history[-1][1]
    sure = 100 * sum(max(row) for row in end) / len(end)
    spoken = ", ".join(f"dilation {_name(pairs[choice])} {100 * rows[-1][choice]:.0f} %" for choice in order)
    return (
        f'<div class="panel"><p><b>{text(_short(layer))}</b> {sure:.0f} %</p>'
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" preserveAspectRatio="none" role="img" '
        f'aria-label="{text(f"{layer} ends with mean shares {spoken}")}">{"".join(areas)}</svg></div>'
    )
