"""Hit-Detector's operations: their scores over time by part, what every layer chose, the expected cost by part."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from nasdet.report.alphas import histories
from nasdet.report.blocks import path_figure
from nasdet.report.curves import COLORS, Line, Series, chart, css, series
from nasdet.report.markup import figure, grid, legend, table, text
from nasdet.report.read import Run, number

_GREY = COLORS[5]
_BRIGHT = tuple(color for color in COLORS if color != _GREY)
_NAME = re.compile(r"(ir|sep|conv)_k(\d+)_d(\d+)(?:_e(\d+))?")
_PATHS = {"neck": ("neck, top-down", "neck, bottom-up"), "towers": ("box tower", "class tower")}


def is_search(run: Run) -> bool:
    """Whether the run is a stage of Hit-Detector's search."""
    return str(run.info.get("verb", "")).startswith("search hit")


def rows_of(card: Any) -> list[tuple[str, list[str]]]:
    """The operations of a Hit-Detector card by stage, path or part, each with its name; empty for any other card."""
    if not isinstance(card, Mapping) or card.get("method") != "hit" or not isinstance(card.get("genotype"), Mapping):
        return []
    found: list[tuple[str, list[str]]] = []
    for part, names in card["genotype"].items():
        if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
            return []
        found += zip(*_cut(str(part), names, card.get("settings")), strict=True)
    return found


def _cut(part: str, names: list[str], settings: Any) -> tuple[Sequence[str], list[list[str]]]:
    """A part's operations in rows."""
    stages = settings.get("stages") if isinstance(settings, Mapping) else None
    if part == "backbone" and isinstance(stages, list):
        counts = [stage[1] for stage in stages if isinstance(stage, list) and len(stage) == 3]
        if (
            len(counts) == len(stages)
            and all(isinstance(n, int) and n > 0 for n in counts)
            and sum(counts) == len(names)
        ):
            left = iter(names)
            rows = [[next(left) for _ in range(count)] for count in counts]
            return [f"backbone {index}" for index in range(1, len(rows) + 1)], rows
    if part in _PATHS and len(names) % 2 == 0:
        half = len(names) // 2
        return _PATHS[part], [names[:half], names[half:]]
    return [part], [names]


def short(name: str) -> str:
    """An operation in a few characters: ``ir_k3_d2_e6`` is ``3e6:2``, a separable one ``s3``, a plain one ``c3``."""
    found = _NAME.fullmatch(name)
    if found is None:
        return name if len(name) <= 5 else f"{name[:4]}…"
    kind, kernel, dilation, expansion = found.groups()
    word = f"{kernel}e{expansion}" if kind == "ir" else f"{kind[0]}{kernel}"
    return word if dilation == "1" else f"{word}:{dilation}"


def operation_figure(rows: Sequence[tuple[str, list[str]]]) -> str:
    """The chosen operation of every layer."""
    note = (
        "<b>The operation of every layer</b>, in the order of the maps. 3e6:2 is an inverted residual of kernel 3, "
        "expansion 6 and dilation 2; s a separable convolution, c a plain one."
    )
    return path_figure([names for _, names in rows], [name for name, _ in rows], short, note)


def score_section(run: Run) -> str:
    """Scores of the operations over time for each part, and the expected cost by part."""
    found = [_scores(part, lines, gone) for part, lines, gone in _parts(run)]
    return grid([*found, _expected(run.metrics, run.info.get("cost"))]) + kept_table(run.screening)


def _parts(run: Run) -> list[tuple[str, dict[str, Series], dict[str, float]]]:
    """For each part its operations' scores over steps, and the step after which a removed one went."""
    record = run.screening or {}
    if isinstance(record.get("history"), list):
        return [_screened(record, run.info.get("epoch_ends"))]
    choices = run.info.get("choices")
    found: list[tuple[str, dict[str, Series], dict[str, float]]] = []
    for part, history in histories(run.alphas).items():
        names = choices.get(part) if isinstance(choices, Mapping) else None
        width = len(history[-1][1][0])
        if not isinstance(names, list) or len(names) != width:
            names = [f"choice {index}" for index in range(width)]
        scores: dict[str, Series] = {
            str(name): [(step, sum(row[index] for row in rows) / len(rows)) for step, rows in history]
            for index, name in enumerate(names)
        }
        found.append((part, scores, {}))
    return found


def _screened(record: Mapping[str, Any], ends: Any) -> tuple[str, dict[str, Series], dict[str, float]]:
    scores: dict[str, Series] = {}
    gone: dict[str, float] = {}
    for entry in record["history"]:
        epoch = number(entry.get("epoch")) if isinstance(entry, Mapping) else None
        if epoch is None or not isinstance(entry.get("scores"), Mapping):
            continue
        place = int(epoch) - 1
        known = number(ends[place]) if isinstance(ends, list) and 0 <= place < len(ends) else None
        step = epoch if known is None else known
        for name, value in entry["scores"].items():
            if (score := number(value)) is not None:
                scores.setdefault(str(name), []).append((step, score))
        removed = entry.get("removed")
        gone |= {str(name): step for name in removed} if isinstance(removed, list) else {}
    return str(record.get("part", "the part")), scores, gone


def _scores(part: str, scores: Mapping[str, Series], gone: Mapping[str, float]) -> str:
    left = sorted((name for name in scores if name not in gone), key=lambda name: -scores[name][-1][1])
    if not left:
        return ""
    colors = {name: _BRIGHT[index] for index, name in enumerate(left[: len(_BRIGHT)])}
    order = [*(name for name in scores if name not in colors), *reversed(colors)]
    lines = [
        Line(name, scores[name], colors.get(name, _GREY), width=1.8 if name in colors else 0.8, markers=name in gone)
        for name in order
    ]
    label = f"Scores of the operations of the {part}. " + "; ".join(
        f"{name}: {scores[name][-1][1]:.3f} at last" for name in left
    )
    removed = f", {len(gone)} removed (grey, to their last score)" if gone else ""
    others = [(f"{len(scores) - len(colors)} others", css(_GREY))] if len(colors) < len(scores) else []
    return figure(
        legend([*((name, css(color)) for name, color in colors.items()), *others]) + chart(lines, label, floor=0),
        f"<b>{text(part[:1].upper() + part[1:])}: scores of the operations</b>, means of their softmax over the "
        f"layers{removed}.",
    )


def _expected(rows: Sequence[Mapping[str, Any]], cost: Any = None) -> str:
    unit, words = ("ms", "milliseconds") if cost == "milliseconds" else ("G", "G multiply-accumulates")
    keys = dict.fromkeys(key for row in rows for key in row if key.startswith("expected_"))
    lines = [
        Line(key.removeprefix("expected_"), points, _BRIGHT[index % len(_BRIGHT)])
        for index, key in enumerate(keys)
        if (points := series(rows, key))
    ]
    if not lines:
        return ""
    told = "; ".join(f"{line.name}: {line.points[0][1]:.4g} to {line.points[-1][1]:.4g}" for line in lines)
    return figure(
        legend((line.name, css(line.color)) for line in lines)
        + chart(lines, f"Expected cost by part in {unit}. {told}", floor=0),
        f"<b>Expected cost by part</b>, in {words}: the mean over nets drawn by the softmax.",
    )


def kept_table(record: Any) -> str:
    """What each part keeps, of a ``screening.json`` of several parts; empty for any other."""
    kept = record.get("kept") if isinstance(record, Mapping) else None
    if not isinstance(kept, Mapping) or not all(isinstance(names, list) for names in kept.values()):
        return ""
    everything = list(dict.fromkeys(str(name) for names in kept.values() for name in names))
    rows = [[text(name), *("●" if name in names else "" for names in kept.values())] for name in everything]
    return table(["", *(text(part) for part in kept)], rows, "What screening kept in each part", "kept")
