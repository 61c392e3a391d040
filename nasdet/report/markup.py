"""Small pieces of HTML; every text that comes from a file goes through ``text``."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from typing import Any

from nasdet.report.read import number


def text(value: Any) -> str:
    """``value`` as HTML text, also safe inside a double-quoted attribute."""
    return html.escape(str(value), quote=True)


def amount(value: Any, unit: str = "") -> str:
    """A count in three digits with k, M or G: ``4169498 -> 4.17 M``; a dash for no number."""
    size = number(value)
    if size is None:
        return "–"
    for factor, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(size) >= factor:
            return f"{size / factor:.3g} {letter}{unit}"
    return f"{size:.3g} {unit}".rstrip()


def memory(value: Any) -> str:
    """Bytes in MiB or GiB."""
    size = number(value)
    if size is None:
        return "–"
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def duration(value: Any) -> str:
    """Seconds as a person says them."""
    seconds = number(value)
    if seconds is None:
        return "–"
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def percent(value: Any) -> str:
    """An average precision, 0..1, in points as the papers print it; COCO's -1 (no ground truth) is a dash."""
    share = number(value)
    return "–" if share is None or share < 0 else f"{100 * share:.1f}"


def signed(value: float) -> str:
    """A difference with its sign (a real minus)."""
    shown = f"{abs(value):.1f}"
    return "±0.0" if shown == "0.0" else f"{'+' if value > 0 else '−'}{shown}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", kind: str = "") -> str:
    """A table of ready HTML cells: the first column is the row's header, the others are numbers."""
    columns = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    title = f"<caption>{caption}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0"><table class="{text(kind)}">{title}<thead><tr>{columns}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def bar(share: float, color: str = "var(--c0)") -> str:
    """A bar of ``share`` (0..1) of its cell's width; decoration, the number stands beside it."""
    width = 100 * min(1.0, max(0.0, share if math.isfinite(share) else 0.0))
    return f'<span class="bar" aria-hidden="true"><i style="width:{width:.1f}%;background:{color}"></i></span>'


def legend(entries: Iterable[tuple[str, str]]) -> str:
    """Colour and name of each line of a chart."""
    items = "".join(f'<li><i style="background:{color}"></i>{text(name)}</li>' for name, color in entries)
    return f'<ul class="legend">{items}</ul>'


def figure(content: str, caption: str, kind: str = "") -> str:
    """``content`` under its caption (both ready HTML)."""
    return f'<figure class="{text(kind)}"><figcaption>{caption}</figcaption>{content}</figure>'


def grid(figures: Iterable[str]) -> str:
    """Figures side by side where there is room; empty ones are left out."""
    shown = [part for part in figures if part]
    return f'<div class="grid n{len(shown)}">{"".join(shown)}</div>' if shown else ""


def tiles(facts: Iterable[tuple[str, str]]) -> str:
    """A few named figures (ready HTML), large."""
    shown = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in facts)
    return f'<dl class="tiles">{shown}</dl>' if shown else ""
