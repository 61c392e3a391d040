"""A path of blocks as a drawing: a row for each stage, a box for each block, coloured by its choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nasdet.report.markup import figure, legend, text

_COLORS = ("var(--c0)", "var(--c6)", "var(--c2)", "var(--c1)", "var(--c3)", "var(--c4)", "var(--c7)", "var(--c8)")
_WORDS = {"sh3": "3×3", "sh5": "5×5", "sh7": "7×7", "xcep": "Xception 3×3"}
_CAPTION = "<b>The path</b>: the choice of every block, from the stem on; the first of each stage halves the map."
_LEFT, _BOX, _ROW, _GAP = 92, 34, 40, 4


def stages_of(card: Any) -> list[list[str]]:
    """The choices of a card by stage, where its genotype is a list of names and ``settings.blocks`` cuts it; else
    empty."""
    genotype = card.get("genotype") if isinstance(card, Mapping) else None
    if not isinstance(genotype, list) or not genotype or not all(isinstance(one, str) for one in genotype):
        return []
    settings = card.get("settings")
    blocks = settings.get("blocks") if isinstance(settings, Mapping) else None
    whole = isinstance(blocks, list) and all(isinstance(b, int) and not isinstance(b, bool) and b > 0 for b in blocks)
    if not isinstance(blocks, list) or not whole or sum(blocks) != len(genotype):
        return [genotype]
    left = iter(genotype)
    return [[next(left) for _ in range(count)] for count in blocks]


def path_figure(
    stages: list[list[str]],
    rows: Sequence[str] | None = None,
    short: Callable[[str], str] | None = None,
    caption: str = _CAPTION,
) -> str:
    """The blocks in order, stage by stage; ``rows`` names the stages, ``short`` writes a choice into its box."""
    names = list(dict.fromkeys([*_WORDS, *(choice for stage in stages for choice in stage)]))
    present = [name for name in names if any(name in stage for stage in stages)]
    coloured = names if short is None else present
    colors = {name: _COLORS[index % len(_COLORS)] for index, name in enumerate(coloured)}
    rows = rows or [f"stage {index}" for index in range(1, len(stages) + 1)]
    left, widest = max(_LEFT, 8 * max(map(len, rows)) + 20), max(map(len, stages))
    parts, spoken = [], []
    for row, (title, stage) in enumerate(zip(rows, stages, strict=True)):
        y = row * _ROW + 4
        parts.append(f'<text class="layer" x="{left - 10}" y="{y + 21}">{text(title)}</text>')
        for place, choice in enumerate(stage):
            x = left + place * (_BOX + _GAP)
            word = _WORDS.get(choice, choice)
            label = (short or _short)(choice)
            parts.append(
                f'<rect x="{x}" y="{y}" width="{_BOX}" height="{_ROW - 8}" rx="5" style="fill:{colors[choice]}">'
                f"<title>{text(f'{title}, block {place + 1}: {word}')}</title></rect>"
                f'<text class="share" x="{x + _BOX / 2:.0f}" y="{y + 20.5}">{text(label)}</text>'
            )
        spoken.append(f"{title}: {' '.join(stage)}")
    width, height = left + widest * (_BOX + _GAP), len(stages) * _ROW + 4
    drawing = (
        f'<svg class="intensities" viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-label="{text("; ".join(spoken))}">{"".join(parts)}</svg>'
    )
    shares = [(f"{_WORDS.get(name, name)} ({sum(s.count(name) for s in stages)})", colors[name]) for name in present]
    return figure(legend(shares) + drawing, caption, "wide")


def _short(choice: str) -> str:
    word = _WORDS.get(choice, choice)
    return {"xcep": "X"}.get(choice, word if len(word) <= 4 else word[:3] + "…")
