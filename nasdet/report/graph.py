"""The derived cells of an architecture card as a drawing.

The states of a cell are vertical lanes: its inputs on the left, its nodes on the right. An edge leaves the lane of its
source at a dot, runs through the label of its transformation, and joins the others in the disc of its node, whose own
lane starts there. Labels stand in rows of their own, so none can lie on another, on a node or on a foreign line.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from nasdet.report.markup import text

_LEFT, _LANE, _GAP = 46, 17, 12
_LEVEL, _HEIGHT, _DISC = 12, 37, 14


@dataclass(frozen=True)
class Edge:
    """One edge of a cell: ``source`` is the index of a state (0 and 1: the inputs), ``op`` a transformation's name."""

    op: str
    source: int


@dataclass(frozen=True)
class Transformation:
    """A transformation as it is shown: ``stream`` is std, sep, none or other; ``field`` is 0 where it is not known."""

    stream: str
    title: str
    detail: str
    field: int


def transformation(name: str) -> Transformation:
    """What a name such as ``sep2+dil2`` says: stream, stacked 3x3 units, dilation, and the receptive field of all."""
    match = re.fullmatch(r"(std|sep)(\d+)(?:\+dil(\d+))?", name)
    if match is None:
        stream = "none" if name == "none" else "other"
        return Transformation(stream, name if len(name) <= 16 else name[:15] + "…", "", 0)
    stream, units, dilation = match[1], int(match[2]), int(match[3] or 0)
    field = 1 + 2 * units + 2 * dilation
    detail = f"dil {dilation} · RF {field}" if dilation else f"RF {field}"
    return Transformation(stream, f"{stream} ×{units}", detail, field)


def find_cells(card: Any) -> dict[str, list[list[Edge]]]:
    """The cells inside a card: for each group the nodes, for each node its edges; empty when the card has no cells.

    A cell is a list of nodes, a node a non-empty list of edges ``[transformation, source]`` or objects with a name
    (``op``, ``name``, ``choice``) and a source (``source``, ``input``, ``from``).
    """
    if not isinstance(card, dict):
        return {}
    cells = {str(name): cell for name, value in card.items() if (cell := _cell(value))}
    if cells:
        return cells
    for value in card.values():
        if cells := find_cells(value):
            return cells
    return {}


def _cell(value: Any) -> list[list[Edge]] | None:
    if isinstance(value, dict) and isinstance(value.get("nodes"), list):
        value = value["nodes"]
    if not isinstance(value, list) or not value:
        return None
    nodes = []
    for index, node in enumerate(value):
        if not isinstance(node, list) or not node:
            return None
        edges = [_edge(entry) for entry in node]
        if any(edge is None or not 0 <= edge.source < 2 + index for edge in edges):
            return None
        nodes.append([edge for edge in edges if edge is not None])
    return nodes


def _edge(value: Any) -> Edge | None:
    op: Any = None
    source: Any = None
    if isinstance(value, list) and len(value) == 2:
        op, source = value
    elif isinstance(value, dict):
        op = next((value[key] for key in ("op", "name", "choice") if key in value), None)
        source = next((value[key] for key in ("source", "input", "from") if key in value), None)
    if isinstance(op, str) and isinstance(source, int) and not isinstance(source, bool):
        return Edge(op, source)
    return None


def cell_svg(nodes: list[list[Edge]], title: str, inputs: tuple[str, str] = ("input 0", "input 1")) -> str:
    """An inline SVG of one cell; ``title`` names it for those who cannot see it (the edges follow in words)."""
    layout = _Layout(nodes)
    back = [_output(layout)]
    front: list[str] = []
    for index in range(len(nodes)):
        front += [_draw_edge(layout, index, column, edge) for column, edge in enumerate(layout.nodes[index])]
        x, y = layout.middle, layout.discs[index]
        end = f"H{layout.lane(2 + index)}V{layout.bottom}" if index < len(nodes) - 1 else f"V{layout.bottom}"
        back.append(f'<path class="rail" d="M{x:.0f} {y}{end}"/>')
        front.append(f'<circle class="node" cx="{x:.0f}" cy="{y}" r="{_DISC}"/>')
        front.append(f'<text class="mid" x="{x:.0f}" y="{y + 4.5}">{2 + index}</text>')
    back += [_input(layout, state, label) for state, label in enumerate(inputs)]
    sums = [" plus ".join(f"{edge.op} of {edge.source}" for edge in node) for node in nodes]
    words = "; ".join(f"node {2 + index}: {total}" for index, total in enumerate(sums))
    return (
        f'<svg class="cell" viewBox="0 0 {layout.width:.0f} {layout.bottom + 34}" role="img" '
        f'aria-label="{text(f"{title}: {words}")}">{"".join(back + front)}</svg>'
    )


class _Layout:
    """Where things stand, in the units of the drawing."""

    def __init__(self, nodes: list[list[Edge]]) -> None:
        self.nodes = [sorted(node, key=lambda edge: edge.source) for node in nodes]
        self.label = max(80.0, *(_label_width(edge) for node in nodes for edge in node))
        columns = max(len(node) for node in nodes)
        self.span = columns * self.label + (columns - 1) * _GAP
        self.middle = _LEFT + self.span / 2
        self.width = max(_LEFT + self.span + _LANE * (len(nodes) - 1) + 14, 180.0)
        self.tops: list[int] = []
        self.discs: list[int] = []
        self.last = {0: 54, 1: 54}
        y = 62
        for index, node in enumerate(self.nodes):
            inner = sum(edge.source < 2 for edge in node)
            self.tops.append(y + _LEVEL * max(inner, len(node) - inner) + 16)
            self.discs.append(self.tops[-1] + _HEIGHT + 34)
            for column, edge in enumerate(node):
                self.last[edge.source] = max(self.last.get(edge.source, 0), self.bus(index, column))
            y = self.discs[-1] + _DISC + 4
        self.bottom = y + 14

    def lane(self, state: int) -> int:
        """x of the vertical line that carries a state: the inputs run on the left, the nodes on the right."""
        return (10 + 18 * state) if state < 2 else round(_LEFT + self.span + 14 + _LANE * (state - 2))

    def bus(self, node: int, column: int) -> int:
        """y where an edge leaves its lane: a line to a farther label runs above those to nearer ones, so none cross."""
        edges = self.nodes[node]
        level = column if edges[column].source < 2 else len(edges) - 1 - column
        return self.tops[node] - 16 - _LEVEL * level

    def center(self, node: int, column: int) -> float:
        """x of the middle of a label; a node with fewer edges than the widest has them in the middle."""
        count = len(self.nodes[node])
        start = self.middle - (count * self.label + (count - 1) * _GAP) / 2
        return start + column * (self.label + _GAP) + self.label / 2


def _label_width(edge: Edge) -> float:
    # Type of 13 and 11 pixels; the widths are those of the widest of the usual system fonts.
    shown = transformation(edge.op)
    return max(8.2 * len(shown.title), 6.6 * len(shown.detail)) + 12


def _input(layout: _Layout, state: int, label: str) -> str:
    x, left = layout.lane(state), 2 + 88 * state
    turn = "" if state == 0 else f"M{left + 40} 30V42Q{left + 40} 48 {left + 34} 48H{x + 6}Q{x} 48 {x} 54"
    start = f"M{x} 30" if state == 0 else turn
    return (
        f'<path class="rail" d="{start}V{layout.last[state]}"/>'
        f'<rect class="box" x="{left}" y="2" width="80" height="28" rx="6"/>'
        f'<text class="mid" x="{left + 40}" y="20.5">{text(label)}</text>'
    )


def _output(layout: _Layout) -> str:
    end = layout.width - 4
    return (
        f'<rect class="box" x="{_LEFT}" y="{layout.bottom}" width="{end - _LEFT:.0f}" height="30" rx="6"/>'
        f'<text class="mid" x="{(_LEFT + end) / 2:.0f}" y="{layout.bottom + 19.5}">concat, then 1×1</text>'
    )


def _draw_edge(layout: _Layout, node: int, column: int, edge: Edge) -> str:
    shown = transformation(edge.op)
    x, lane, bus = layout.center(node, column), layout.lane(edge.source), layout.bus(node, column)
    top, disc = layout.tops[node], layout.discs[node]
    bottom = top + _HEIGHT
    side = 1 if edge.source < 2 else -1
    inward = f"M{lane} {bus}H{x - 8 * side:.0f}Q{x:.0f} {bus} {x:.0f} {bus + 8}V{top}"
    onward = f"M{x:.0f} {bottom}C{x:.0f} {bottom + 20} {layout.middle:.0f} {disc - 34} {layout.middle:.0f} {disc - 10}"
    width = 1.5 + 0.6 * (shown.field - 3) if shown.field else 2.0
    style = f'style="stroke-width:{width:.1f}"'
    label = f'<text class="mid strong" x="{x:.0f}" y="{top + (16 if shown.detail else 22)}">{text(shown.title)}</text>'
    if shown.detail:
        label += f'<text class="mid small" x="{x:.0f}" y="{top + 30}">{text(shown.detail)}</text>'
    return (
        f'<g class="edge {shown.stream}"><title>{text(edge.op)} from state {edge.source}</title>'
        f'<circle class="tap" cx="{lane}" cy="{bus}" r="3.5"/><path d="{inward}" {style}/><path d="{onward}" {style}/>'
        f'<rect x="{x - layout.label / 2:.0f}" y="{top}" width="{layout.label:.0f}" height="{_HEIGHT}" rx="9"/>'
        f"{label}</g>"
    )
