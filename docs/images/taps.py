"""Draws taps.svg: the kernels of NATS's set C in stages 3 and 4, and the union of their taps.

python docs/images/taps.py
"""

from __future__ import annotations

from pathlib import Path

SVG = Path(__file__).with_suffix(".svg")
STAGE_3 = ((1, 1), (2, 2), (3, 3), (1, 3), (3, 1))
STAGE_5 = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (1, 3), (3, 1), (1, 5), (5, 1))
COLORS = ("#5b6472", "#1f5fbf", "#1d7f52", "#c2570c", "#be2f4a")
CELL, GAP = 17, 34
Tap = tuple[int, int]


def taps(dilation: tuple[int, int]) -> list[Tap]:
    """The nine offsets (vertical, horizontal) that a 3x3 kernel of this dilation reads."""
    return [(dilation[0] * row, dilation[1] * column) for row in (-1, 0, 1) for column in (-1, 0, 1)]


def union(dilations: tuple[tuple[int, int], ...]) -> dict[Tap, list[int]]:
    """Each offset that any of the kernels reads, with the places of those that do."""
    found: dict[Tap, list[int]] = {}
    for index, dilation in enumerate(dilations):
        for tap in taps(dilation):
            found.setdefault(tap, []).append(index)
    return found


def panel(left: int, title: str, note: str, cells: dict[Tap, list[int]], radius: int) -> str:
    """One grid of cells; a cell that several kernels read is cut into as many stripes."""
    side = (2 * radius + 1) * CELL
    middle = left + side / 2
    parts = [f'<text x="{middle:g}" y="22" class="title">{title}</text>']
    for row in range(-radius, radius + 1):
        for column in range(-radius, radius + 1):
            x, y = left + (column + radius) * CELL, 34 + (row + radius) * CELL
            owners = cells.get((row, column), [])
            for place, owner in enumerate(owners):
                width = CELL / len(owners)
                parts.append(
                    f'<rect x="{x + place * width:.2f}" y="{y}" width="{width:.2f}" height="{CELL}" '
                    f'fill="{COLORS[owner]}"/>'
                )
            parts.append(f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" class="cell"/>')
    parts.append(f'<text x="{middle:g}" y="{34 + side + 20}" class="note">{note}</text>')
    return "".join(parts)


def draw() -> str:
    """The figure: five kernels, an arrow, and their union."""
    radius = 3
    side = (2 * radius + 1) * CELL
    panels = []
    for index, dilation in enumerate(STAGE_3):
        name = str(dilation[0]) if dilation[0] == dilation[1] else f"{dilation[0]} × {dilation[1]}"
        own = {tap: [index] for tap in taps(dilation)}
        panels.append(panel(16 + index * (side + GAP), f"dilation {name}", "9 taps", own, radius))
    whole = union(STAGE_3)
    left = 16 + len(STAGE_3) * (side + GAP)
    reads = sum(map(len, whole.values()))
    panels.append(panel(left, "all five", f"{len(whole)} taps of {reads}", whole, radius))
    signs = "".join(
        f'<text x="{16 + index * (side + GAP) - GAP / 2:g}" y="{34 + side / 2 + 7:g}" class="sign">'
        f"{'=' if index == len(STAGE_3) else '+'}</text>"
        for index in range(1, len(STAGE_3) + 1)
    )
    width, height = left + side + 28, 34 + side + 34
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" aria-label="The taps of five dilated 3 by 3 kernels, and their union of 33">'
        "<style>text{font-family:system-ui,sans-serif;text-anchor:middle;fill:#1b1d21}.title{font-size:14px;"
        "font-weight:600}.note{font-size:12.5px}.sign{font-size:22px}.cell{fill:none;stroke:#c9ccd1;stroke-width:1}"
        f'</style><rect width="{width}" height="{height}" rx="10" fill="#fff"/>{"".join(panels)}{signs}</svg>\n'
    )


if __name__ == "__main__":
    SVG.write_text(draw(), encoding="utf-8")
