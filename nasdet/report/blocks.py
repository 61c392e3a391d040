"""A path of blocks as a drawing: a row for each stage, a box for each block, coloured by its choice."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nasdet.report.markup import figure, legend, text

_COLORS = ("var(--c0)", "var(--c6)", "var(--c2)", "var(--c1)", "var(--c3)", "var(--c4)", "var(--c7)", "var(--c8)")
_WORDS = {"sh3": "3×3", "sh5": "5×5", "sh7": "7×7", "xcep": "Xception 3×3"}
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


def path_figure(stages: list[list[str]]) -> str:
    """The blocks in order, stage by stage; every stage halves the map."""
    names = list(dict.fromkeys([*_WORDS, *(choice for stage in stages for choice in stage)]))
    colors = {name: _COLORS[index % len(_COLORS)] for index, name in enumerate(names)}
    present = [name for name in names if any(name in stage for stage in stages)]
    widest = max(map(len, stages))
    parts, spoken = [], []
    for row, stage in enumerate(stages):
        y = row * _ROW + 4
        parts.append(f'<text class="layer" x="{_LEFT - 10}" y="{y + 21}">stage {row + 1}</text>')
        for place, choice in enumerate(stage):
            x = _LEFT + place * (_BOX + _GAP)
            word = _WORDS.get(choice, choice)
            short = {"xcep": "X"}.get(choice, word if len(word) <= 4 else word[:3] + "…")
            parts.append(
                f'<rect x="{x}" y="{y}" width="{_BOX}" height="{_ROW - 8}" rx="5" style="fill:{colors[choice]}">'
                f"<title>{text(f'stage {row + 1}, block {place + 1}: {word}')}</title></rect>"
                f'<text class="share" x="{x + _BOX / 2:.0f}" y="{y + 20.5}">{text(short)}</text>'
            )
        spoken.append(f"stage {row + 1}: {' '.join(stage)}")
    width, height = _LEFT + widest * (_BOX + _GAP), len(stages) * _ROW + 4
    drawing = (
        f'<svg class="intensities" viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" '
        f'aria-label="{text("; ".join(spoken))}">{"".join(parts)}</svg>'
    )
    shares = [(f"{_WORDS.get(name, name)} ({sum(s.count(name) for s in stages)})", colors[name]) for name in present]
    return figure(
        legend(shares) + drawing,
        "<b>The path</b>: the choice of every block, from the stem on; the first of each stage halves the map.",
        "wide",
    )
