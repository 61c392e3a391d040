"""The candidates of an evolutionary search: score against cost, generation by generation, and the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nasdet.report.markup import amount, figure, grid, legend, percent, table, text
from nasdet.report.read import number

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 460.0, 260.0, 44.0, 10.0, 12.0, 34.0
_WORDS = {"macs": "multiply-accumulates", "parameters": "parameters", "milliseconds": "milliseconds"}
_METRICS = {"search classification": "top-1 accuracy"}


@dataclass(frozen=True)
class Point:
    """A scored candidate: its ``cost``, its ``score``, and the generation (from 1) and operator that made it."""

    cost: float
    score: float
    generation: int
    operator: str


def points(content: Any, cost: str | None = None) -> list[Point]:
    """The scored candidates of an ``evolution.json``, in their order; without ``cost`` against their number."""
    found: list[Point] = []
    for generation, one in _candidates(content):
        costs, score = one.get("costs"), number(one.get("score"))
        where = float(len(found) + 1) if cost is None else None
        if isinstance(costs, Mapping) and cost is not None:
            where = number(costs.get(cost))
        if score is not None and where is not None:
            found.append(Point(where, score, generation, str(one.get("operator", ""))))
    return found


def costs_of(content: Any) -> list[str]:
    """The names of the costs that the candidates have, in their order."""
    names: dict[str, None] = {}
    for _, one in _candidates(content):
        costs = one.get("costs")
        names.update(dict.fromkeys(map(str, costs)) if isinstance(costs, Mapping) else {})
    return list(names)


def _candidates(content: Any) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Generation, from 1, and candidate; what has another form is passed over."""
    state = content.get("state") if isinstance(content, Mapping) else None
    generations = state.get("generations") if isinstance(state, Mapping) else None
    for place, generation in enumerate(generations if isinstance(generations, list) else [], 1):
        for one in generation if isinstance(generation, list) else []:
            if isinstance(one, Mapping):
                yield place, one


def front(found: Sequence[Point]) -> list[Point]:
    """The Pareto front, by cost: those that no other beats in score at the same cost or less."""
    kept: list[Point] = []
    for point in sorted(found, key=lambda one: (one.cost, -one.score)):
        if not kept or point.score > kept[-1].score:
            kept.append(point)
    return kept


def metric_of(verb: Any) -> str:
    """What the scores of a search are, by its verb: AP where it does not say otherwise."""
    return _METRICS.get(str(verb), "AP")


def population_section(content: Any, metric: str = "AP") -> str:
    """The figures of an ``evolution.json``: a scatter for each cost, the generations, and the front as a table.

    ``metric`` is what its scores are, in words.
    """
    names: list[str | None] = [*costs_of(content)] or [None]
    scatters = [scatter(found, name, metric) for name in names if (found := points(content, name))]
    if not scatters:
        return ""
    shown = grid([*scatters, progress(points(content), metric)])
    return shown if names[0] is None else shown + _front_table(points(content, names[0]), names[0], metric)


def scatter(found: Sequence[Point], cost: str | None, metric: str = "AP") -> str:
    """Score against cost: a dot for each candidate, coloured by generation, and the Pareto front as steps."""
    axis = _Axes([point.cost for point in found], [100 * point.score for point in found])
    last = max(point.generation for point in found)
    parts = axis.frame(_WORDS.get(cost or "", cost or "candidates in their order"))
    best = max(found, key=lambda point: point.score)
    kept = front(found) if cost is not None else []
    if kept:
        steps = "".join(
            f"{'M' if index == 0 else 'H'}{axis.x(point.cost):.1f}{' ' if index == 0 else 'V'}"
            f"{axis.y(100 * point.score):.1f}"
            for index, point in enumerate(kept)
        )
        parts.append(f'<path class="front" d="{steps}H{_WIDTH - _RIGHT:.1f}"/>')
    for point in found:
        said = f"generation {point.generation}, {point.operator}: {percent(point.score)} at {amount(point.cost)}"
        ring = ' class="best"' if point is best else ""
        parts.append(
            f'<circle{ring} cx="{axis.x(point.cost):.1f}" cy="{axis.y(100 * point.score):.1f}" r="3.4" '
            f'style="fill:{generation_color(point.generation, last)}"><title>{text(said)}</title></circle>'
        )
    spoken = f"{len(found)} candidates; best {percent(best.score)} at {amount(best.cost)} {cost or ''}".rstrip()
    colors = [("generation 1", generation_color(1, last)), (f"generation {last}", generation_color(last, last))]
    return figure(
        legend(colors[: min(last, 2)] + ([("Pareto front", "var(--c1)")] if kept else [])) + _svg(parts, spoken),
        f"<b>{_titled(metric)} against {text(_WORDS.get(cost or '', cost or 'order'))}</b> in points, on the images of "
        "the search, with weights from the supernet; the best has a ring.",
    )


def progress(found: Sequence[Point], metric: str = "AP") -> str:
    """Best so far, and best and mean of each generation."""
    generations = sorted({point.generation for point in found})
    if len(generations) < 2:
        return ""
    scores = [[100 * p.score for p in found if p.generation == generation] for generation in generations]
    lines = {
        "best so far": ([max(max(s) for s in scores[: i + 1]) for i in range(len(scores))], "var(--accent)"),
        "best": ([max(s) for s in scores], "var(--c1)"),
        "mean": ([sum(s) / len(s) for s in scores], "var(--c5)"),
    }
    axis = _Axes([float(one) for one in generations], [v for values, _ in lines.values() for v in values], whole=True)
    parts = axis.frame("generation")
    for values, color in lines.values():
        places = zip(generations, values, strict=True)
        drawn = "L".join(f"{axis.x(generation):.1f} {axis.y(value):.1f}" for generation, value in places)
        parts.append(f'<path class="line" d="M{drawn}" style="stroke:{color}"/>')
    told = "; ".join(f"{name} {values[0]:.1f} to {values[-1]:.1f}" for name, (values, _) in lines.items())
    return figure(
        legend((name, color) for name, (_, color) in lines.items()) + _svg(parts, f"{metric} by generation: {told}"),
        f"<b>Generation by generation</b> {metric} in points.",
    )


def generation_color(generation: int, last: int) -> str:
    """From grey, the first, to the page's accent, the last."""
    share = 100 * (generation - 1) / (last - 1) if last > 1 else 100
    return f"color-mix(in srgb,var(--accent) {share:.0f}%,var(--c5))"


def _titled(metric: str) -> str:
    return metric[:1].upper() + metric[1:]


def _front_table(found: Sequence[Point], cost: str, metric: str) -> str:
    rows = [
        [text(amount(point.cost)), percent(point.score), str(point.generation), text(point.operator)]
        for point in front(found)
    ]
    head = [text(_WORDS.get(cost, cost)), metric, "generation", "made by"]
    caption = f"The Pareto front: what no other candidate beats in {metric} at this cost or less."
    return table(head, rows, caption, "front")


class _Axes:
    """Places in the drawing for values, with a margin, and ticks at round numbers."""

    def __init__(self, xs: Sequence[float], ys: Sequence[float], whole: bool = False) -> None:
        self.xs, self.ys = _spread(xs), _spread(ys, floor=0.0)
        self.whole = whole

    def x(self, value: float) -> float:
        low, high = self.xs
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - low) / (high - low)

    def y(self, value: float) -> float:
        low, high = self.ys
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * (value - low) / (high - low)

    def frame(self, label: str) -> list[str]:
        """Rules and numbers of both axes; ``label`` names the horizontal one."""
        parts, bottom = [], _HEIGHT - _BOTTOM
        for value in _ticks(*self.ys):
            y = self.y(value)
            parts.append(f'<path class="rule" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
            parts.append(f'<text class="end" x="{_LEFT - 6}" y="{y + 3.5:.1f}">{value:.4g}</text>')
        for value in _ticks(*self.xs):
            if not self.whole or value == round(value):
                shown = f"{value:.0f}" if self.whole else amount(value)
                parts.append(f'<text class="mid" x="{self.x(value):.1f}" y="{bottom + 15}">{shown}</text>')
        middle = (_LEFT + _WIDTH - _RIGHT) / 2
        parts.append(f'<text class="mid" x="{middle:.1f}" y="{_HEIGHT - 4}">{text(label)}</text>')
        return parts


def _spread(values: Sequence[float], floor: float | None = None) -> tuple[float, float]:
    """The range of the values with a twentieth on each side, not below ``floor`` where no value is."""
    low, high = min(values), max(values)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    if floor is not None and low >= floor:
        return max(floor, low - margin), high + margin
    return low - margin, high + margin


def _ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within a range, at most ``most``."""
    size = 10.0 ** math.floor(math.log10((high - low) / 2))
    step = next(size * by for by in (1, 2, 5, 10, 20) if (high - low) / (size * by) <= most - 1)
    first = math.ceil(low / step)
    return [index * step for index in range(first, math.floor(high / step) + 1)]


def _svg(parts: Sequence[str], label: str) -> str:
    return (
        f'<svg class="scatter" viewBox="0 0 {_WIDTH:.0f} {_HEIGHT:.0f}" role="img" aria-label="{text(label)}">'
        f"{''.join(parts)}</svg>"
    )
