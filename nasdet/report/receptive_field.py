"""Effective receptive fields side by side: what the centre of the last map listens to (NATS, Figure 4)."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from nasdet.report.markup import figure, grid, text
from nasdet.report.read import number

_PICTURE = 600  # pixels across


def field_section(content: Mapping[str, Any]) -> str:
    """The maps of an ``erf.json`` as pictures, each with the side of its field; empty without any.

    Raises ``ImportError`` without Pillow or matplotlib.
    """
    maps = content["maps"]
    if not maps:
        return ""
    size = content.get("size")
    height, width = size if isinstance(size, list) and len(size) == 2 else (None, None)
    figures = [_one(entry, number(height), number(width), number(content.get("steps")) or 1.0) for entry in maps]
    threshold = number(content.get("threshold"))
    weights = content.get("weights")
    note = (
        "How strongly each pixel acts on the centre neuron of the last convolution, in proportion to the strongest: "
        "the input is ones, ReLUs are passed over, norms are constants; the gradient's absolute values are summed over "
        "the input's channels. The colour follows the square root, so that weak influence is seen. The side is that of "
        f"a square of as many pixels as exceed {100 * (threshold or 0):.3g} % of the maximum; the frame shows it."
    )
    whose = f" Weights: {text(weights)}." if isinstance(weights, str) and weights else ""
    at = f" Input of {text(height)} × {text(width)} pixels." if size else ""
    return f'{grid(figures)}<p class="note">{note}{at}{whose}</p>'


def _one(entry: Mapping[str, Any], height: float | None, width: float | None, most: float) -> str:
    name, side = str(entry.get("name", "?")), number(entry.get("side"))
    share = side / width if side is not None and width else None
    told = f"field of {side:.0f} pixels" if side is not None else "field of unknown size"
    data = _png(entry["rows"], most, share)
    alt = f"Effective receptive field, {name}: {told} on a side"
    return figure(
        f'<img class="field" src="data:image/png;base64,{data}" alt="{text(alt)}">', f"<b>{text(name)}</b>: {told}"
    )


def _png(rows: Sequence[Sequence[float]], most: float, share: float | None) -> str:
    """The map in matplotlib's magma, 64 colours, with a frame of ``share`` of the width around the centre."""
    import matplotlib
    from PIL import Image, ImageDraw

    shades = bytes(round(255 * min(1.0, max(0.0, value / most)) ** 0.5) for row in rows for value in row)
    image = Image.frombytes("L", (len(rows[0]), len(rows)), shades)
    scale = _PICTURE / image.width
    image = image.resize((_PICTURE, max(1, round(image.height * scale))), Image.Resampling.BILINEAR)
    image = image.point([4 * (level // 4) for level in range(256)])
    colors = matplotlib.colormaps["magma"](range(256), bytes=True)
    image.putpalette([int(value) for color in colors for value in color[:3]])
    if share:
        half = share * _PICTURE / 2
        x, y = image.width / 2, image.height / 2
        ImageDraw.Draw(image).rectangle((x - half, y - half, x + half, y + half), outline=255, width=1)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()
