"""The architecture parameters of a search: where they ended, and how they came there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from nasdet.report.curves import COLORS, Line, Series, chart
from nasdet.report.graph import Edge, transformation
from nasdet.report.markup import figure, table, text
from nasdet.report.read import number

Matrix = list[list[float]]


def softmax(row: Sequence[float]) -> list[float]:
    """``exp(a_i) / sum exp(a_j)``, safe for large values."""
    highest = max(row)
    shifted = [math.exp(value - highest) for value in row]
    return [value / sum(shifted) for value in shifted]


def entropy(shares: Sequence[float]) -> float:
    """Entropy over its largest value, ln K: 1 is undecided, 0 is one choice (K = 1 gives 0)."""
    if len(shares) < 2:
        return 0.0
    return -sum(p * math.log(p) for p in shares if p > 0) / math.log(len(shares))


def histories(records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, Matrix]]]:
    """For each group the softmax per edge over steps, oldest first.

    Records whose shape differs from the group's last one, or that hold anything but finite numbers, are left out.
    """
    found: dict[str, dict[float, Matrix]] = {}
    for record in records:
        step = number(record.get("step"))
        for group, value in record["alphas"].items():
            matrix = _matrix(value)
            if step is not None and matrix is not None:
                found.setdefault(str(group), {})[step] = [softmax(row) for row in matrix]
    result = {}
    for group, by_step in found.items():
        shape = [len(row) for row in by_step[max(by_step)]]
        result[group] = [(step, m) for step, m in sorted(by_step.items()) if [len(row) for row in m] == shape]
    return result


def _matrix(value: Any) -> Matrix | None:
    if not isinstance(value, list) or not value or not all(isinstance(row, list) and row for row in value):
        return None
    rows = [[number(entry) for entry in row] for row in value]
    if any(entry is None for row in rows for entry in row) or len({len(row) for row in rows}) != 1:
        return None
    return [[entry for entry in row if entry is not None] for row in rows]


def edge_ends(edges: int) -> list[tuple[int, int]]:
    """(source, node) of each edge of a cell with two inputs in which every node sums all earlier states.

    Node by node, as the alphas are written; empty when ``edges`` is no such number (2, 5, 9, 14, ...).
    """
    ends: list[tuple[int, int]] = []
    node = 2
    while len(ends) < edges:
        ends += [(source, node) for source in range(node)]
        node += 1
    return ends if len(ends) == edges else []


def kept(nodes: list[list[Edge]] | None, edges: int, choices: Sequence[str]) -> set[tuple[int, int]]:
    """(edge, choice) of what a derived cell kept, where the two belong together."""
    ends = edge_ends(edges)
    if not nodes or not ends:
        return set()
    wanted = {(edge.source, 2 + index, edge.op) for index, node in enumerate(nodes) for edge in node}
    return {(e, c) for e, (s, n) in enumerate(ends) for c, name in enumerate(choices) if (s, n, name) in wanted}


def group_figures(
    group: str, history: list[tuple[float, Matrix]], choices: Sequence[str] | None, nodes: list[list[Edge]] | None
) -> list[str]:
    """Heat map of the last softmax, the way of every edge, and their entropies, for one group; always these three."""
    last = history[-1][1]
    width = len(last[0])
    names = list(choices) if choices is not None and len(choices) == width else [f"choice {i}" for i in range(width)]
    marks = kept(nodes, len(last), names)
    heat = _heat_map(group, history[-1][0], last, names, marks)
    if len(history) == 1:
        return [heat, "", ""]
    return [heat, _ways(group, history, names, marks), _entropies(group, history)]


def _edge_names(edges: int) -> list[str]:
    return [f"{source}→{node}" for source, node in edge_ends(edges)] or [f"edge {i}" for i in range(edges)]


def _heat_map(group: str, step: float, last: Matrix, names: Sequence[str], marks: set[tuple[int, int]]) -> str:
    order = _display_order(names)
    highest = max(max(row) for row in last)
    rows = []
    for choice in order:
        stream = transformation(names[choice]).stream
        cells = [f'<span class="{stream}">{text(names[choice])}</span>']
        for edge, row in enumerate(last):
            here = (edge, choice) in marks
            # The tint grows from the even share, so that a search that has decided nothing looks like it.
            even = 1 / len(row)
            strength = 0.6 * max(0.0, row[choice] - even) / max(highest - even, 0.15)
            note = ' <span class="out">kept</span>' if here else ""
            shade = f'class="heat {stream}{" kept" if here else ""}" style="--p:{min(0.6, strength):.2f}"'
            cells.append(f"<span {shade}>{100 * row[choice]:.0f}{note}</span>")
        rows.append(cells)
    edges = [f'<span class="edge-name">{text(name)}</span>' for name in _edge_names(len(last))]
    ring = "; ringed: kept by the derived cell" if marks else ""
    return figure(
        table(["", *edges], rows, kind="heatmap"),
        f"<b>Group {text(group)}: softmax of the alphas at step {step:g}</b> in percent, one column per edge "
        f"(from → to). Undecided would be {100 / len(names):.1f} everywhere{ring}.",
    )


def _display_order(names: Sequence[str]) -> list[int]:
    streams = {"std": 0, "sep": 1, "other": 2, "none": 3}
    shown = [transformation(name) for name in names]
    if not any(s.stream in ("std", "sep") for s in shown):
        return list(range(len(names)))
    return sorted(range(len(names)), key=lambda i: (streams[shown[i].stream], shown[i].field, shown[i].detail, i))


def _ways(group: str, history: list[tuple[float, Matrix]], names: Sequence[str], marks: set[tuple[int, int]]) -> str:
    highest = max(p for _, matrix in history for row in matrix for p in row)
    panels = []
    for edge, name in enumerate(_edge_names(len(history[-1][1]))):
        final = history[-1][1][edge]
        best = max(range(len(final)), key=lambda i: final[i])
        mark = next((choice for e, choice in marks if e == edge), None)
        panels.append(_panel(name, edge, history, names, best, mark, highest))
    return figure(
        f'<div class="panels">{"".join(panels)}</div>',
        f"<b>Group {text(group)}: the way of every edge</b> over steps {history[0][0]:g} to {history[-1][0]:g}; in "
        f"colour the choice that ends highest. Every panel is 0 to {100 * highest:.0f} %, dotted is an even share.",
    )


def _panel(
    name: str,
    edge: int,
    history: list[tuple[float, Matrix]],
    names: Sequence[str],
    best: int,
    mark: int | None,
    highest: float,
) -> str:
    width, height = 160.0, 64.0
    first, last = history[0][0], history[-1][0]
    stride = max(1, math.ceil(len(history) / 48))
    shown = history[::-1][::stride][::-1]

    def path(choice: int) -> str:
        spots = (
            f"{width * (step - first) / (last - first):.0f} {height * (1 - matrix[edge][choice] / highest):.1f}"
            for step, matrix in shown
        )
        return "M" + "L".join(spots)

    others = "".join(f'<path d="{path(i)}"/>' for i in range(len(names)) if i != best)
    stream = transformation(names[best]).stream
    share = 100 * history[-1][1][edge][best]
    even = height * (1 - 1 / len(names) / highest)
    tag = ' <span class="tag">kept</span>' if mark == best else ""
    label = f"Edge {name}: {names[best]} ends highest with {share:.0f} percent"
    return (
        f'<div class="panel {stream}"><p><b>{text(name)}</b>{tag}<br><span class="{stream}">{text(names[best])}</span> '
        f"{share:.0f} %</p>"
        f'<svg viewBox="0 -2 {width:.0f} {height + 4:.0f}" preserveAspectRatio="none" role="img" '
        f'aria-label="{text(label)}">'
        f'<path class="even" d="M0 {even:.1f}H{width:.0f}"/>{others}<path class="best" d="{path(best)}"/></svg></div>'
    )


def _entropies(group: str, history: list[tuple[float, Matrix]]) -> str:
    edges = len(history[-1][1])
    ways: list[Series] = [[(step, entropy(matrix[edge])) for step, matrix in history] for edge in range(edges)]
    mean = [(step, sum(way[i][1] for way in ways) / edges) for i, (step, _) in enumerate(history)]
    lines = [Line(name, way, COLORS[5], width=0.8) for name, way in zip(_edge_names(edges), ways, strict=True)]
    label = f"Entropy of the alphas of group {group}: mean {mean[0][1]:.3f} at first, {mean[-1][1]:.3f} at last"
    return figure(
        chart([*lines, Line("mean", mean, COLORS[0], width=2.2)], label, floor=0, top=1.02, height=2.0),
        f"<b>Group {text(group)}: entropy of each edge</b> (thin) and their mean (bold, {mean[-1][1]:.3f} at the end), "
        f"as a share of ln&nbsp;{len(history[-1][1][0])}: 1 is undecided, 0 is one choice alone.",
    )
