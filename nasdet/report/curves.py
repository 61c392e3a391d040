"""Loss, AP and other curves of a run as inline SVG whose colours follow the page's theme."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nasdet.report.markup import duration, figure, grid, legend, text
from nasdet.report.read import number

Series = list[tuple[float, float]]

# matplotlib writes colours, the page wants CSS variables: each of these stands for one until the drawing is done.
_PLACEHOLDERS = {"#0102f0": "var(--muted)", "#0102f1": "var(--line)"} | {f"#0102a{i}": f"var(--c{i})" for i in range(8)}
COLORS = tuple(f"#0102a{i}" for i in range(8))
_NO_LOSS = re.compile(
    r"step|epoch|seconds|time|memory|grad_norm|norm|entropy|images|eta|lr.*|expected_.*|column_penalty|(mask_)?A[PR].*"
)


def css(color: str) -> str:
    """The CSS variable a placeholder colour stands for."""
    return _PLACEHOLDERS[color]


@dataclass(frozen=True)
class Line:
    """One line of a chart: ``faint`` is drawn behind as it was measured, ``points`` on top."""

    name: str
    points: Series
    color: str
    faint: Series | None = None
    width: float = 1.8
    markers: bool = False


def series(rows: Sequence[Mapping[str, Any]], key: str) -> Series:
    """(step, value) of every row with a finite ``key``, in step order; of a step logged twice the later counts."""
    points = {}
    for row in rows:
        step, value = number(row.get("step")), number(row.get(key))
        if step is not None and value is not None:
            points[step] = value
    return sorted(points.items())


def smooth(points: Series, weight: float | None = None) -> Series:
    """Exponential mean with bias correction, of the logarithm where all values are positive (a geometric mean).

    ``weight`` is the share of the past; by default the memory is a twentieth of the series, and at least 3 points.
    """
    if len(points) < 3:
        return points
    if weight is None:
        weight = 1 - 1 / max(3.0, len(points) / 20)
    logarithmic = all(value > 0 for _, value in points)
    total, mass, result = 0.0, 0.0, []
    for step, value in points:
        total = weight * total + (1 - weight) * (math.log(value) if logarithmic else value)
        mass = weight * mass + (1 - weight)
        result.append((step, math.exp(total / mass) if logarithmic else total / mass))
    return result


def thin(points: Series, most: int = 240) -> Series:
    """At most ``most`` points: means of equal runs of points; the first and the last are kept as they are."""
    if len(points) <= most:
        return points
    inner, chunks = points[1:-1], most - 2
    result = [points[0]]
    for i in range(chunks):
        part = inner[i * len(inner) // chunks : (i + 1) * len(inner) // chunks]
        result.append((sum(p[0] for p in part) / len(part), sum(p[1] for p in part) / len(part)))
    return [*result, points[-1]]


def chart(
    lines: Sequence[Line],
    label: str,
    *,
    log: bool = False,
    floor: float | None = None,
    top: float | None = None,
    height: float = 2.8,
) -> str:
    """Lines over steps as one inline SVG; ``label`` is its text for those who cannot see it.

    Raises ``ImportError`` without matplotlib.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {"svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "path.simplify": False}
    with matplotlib.rc_context(settings):
        plot = Figure(figsize=(5.2, height), layout="constrained")
        FigureCanvasSVG(plot)
        axes = plot.add_subplot()
        for line in lines:
            _draw(axes, line)
        _dress(axes, log)
        axes.set_ylim(bottom=floor, top=top)
        buffer = io.StringIO()
        plot.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(buffer.getvalue(), label)


def _draw(axes: Any, line: Line) -> None:
    def plot(points: Series, **style: Any) -> None:
        axes.plot([p[0] for p in points], [p[1] for p in points], color=line.color, clip_on=False, **style)

    if line.faint:
        plot(thin(line.faint), linewidth=1, alpha=0.3)
    points = thin(line.points)
    plot(points, linewidth=line.width)
    if len(points) == 1 or line.markers and len(points) <= 40:
        # Dots as lines of no length with round ends: markers would need names, which collide on a page.
        gaps = [spot for point in points for spot in (point, point, (point[0], math.nan))]
        plot(gaps, linewidth=5, solid_capstyle="round")


def _dress(axes: Any, log: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    muted, rule = list(_PLACEHOLDERS)[:2]
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
        low, high = axes.get_ylim()
        if math.log10(high) - math.log10(low) < 1.3:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    else:
        axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v / 1000:g}k" if v >= 10000 else f"{v:g}"))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("step", color=muted)
    axes.grid(axis="y", color=rule, linewidth=0.8)
    axes.tick_params(which="both", colors=muted, left=False, bottom=False)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(rule)


def _inline(svg: str, label: str) -> str:
    """The drawing without what only a file needs, and without names, which would collide on a page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    end = svg.index(">")
    svg = re.sub(r'\s(?:xmlns(?::\w+)?|version|width|height)="[^"]*"', "", svg[:end]) + svg[end:]
    svg = re.sub(r"<defs>.*?</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(?:id|clip-path)="[^"]*"', "", svg)
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for color, variable in _PLACEHOLDERS.items():
        svg = svg.replace(color, variable)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r">\s+<", "><", svg)
    return svg.replace("<svg", f'<svg class="chart" role="img" aria-label="{text(label)}"', 1)


def told(points: Series) -> str:
    """A line's first and last value in words."""
    return f"{points[0][1]:.4g} at step {points[0][0]:g} to {points[-1][1]:.4g} at step {points[-1][0]:g}"


def curve_section(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figures of one ``metrics.jsonl``: losses, their terms, AP, learning rate; those there is something for."""
    for row in rows:
        bad = [key for key, value in row.items() if isinstance(value, float) and not math.isfinite(value)]
        if bad:
            warning = f'<p class="warn">Not finite at step {row["step"]:g}: {text(", ".join(bad))}.</p>'
            return warning + grid(_figures(rows))
    return grid(_figures(rows))


def _figures(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    keys: dict[str, None] = {}
    for row in rows:
        keys.update(dict.fromkeys(key for key in row if series([row], key)))
    losses = [key for key in keys if re.fullmatch(r"loss|\w+_loss", key)]
    terms = [key for key in keys if key not in losses and not _NO_LOSS.fullmatch(key)]
    precisions = [key for key in ("AP", "AP50", "AP75", "mask_AP", "mask_AP50") if key in keys]
    result = [_loss_figure(rows, losses, "Loss"), _loss_figure(rows, terms[:7], "Terms of the loss")]
    if precisions:
        lines = [
            Line(key, [(s, 100 * v) for s, v in series(rows, key) if v >= 0], COLORS[i], markers=True)
            for i, key in enumerate(precisions)
        ]
        result.append(_precision_figure(lines, "Average precision"))
    rates = [key for key in keys if re.fullmatch(r"lr\w*", key)]
    positive = all(value > 0 for key in rates for _, value in series(rows, key))
    lines = [Line(key, series(rows, key), COLORS[i % 8]) for i, key in enumerate(rates)]
    result.append(_lines_figure(lines, "Learning rate", log=positive and len(rates) > 1, floor=None if positive else 0))
    return result


def _loss_figure(rows: Sequence[Mapping[str, Any]], keys: Sequence[str], title: str) -> str:
    lines = []
    for i, key in enumerate(keys):
        raw = series(rows, key)
        lines.append(Line(key, smooth(raw), COLORS[i % 8], faint=raw if len(raw) > 3 else None))
    log = all(value > 0 for line in lines for _, value in line.faint or line.points)
    note = f"{'log scale, ' if log else ''}bold: smoothed, faint: as logged"
    return _lines_figure(lines, title, note if any(line.faint for line in lines) else "", log=log)


def _precision_figure(lines: Sequence[Line], title: str) -> str:
    # From 0, and to 1 point at least: a detector that has learnt nothing looks like it.
    highest = max((value for line in lines for _, value in line.points), default=0.0)
    return _lines_figure(lines, title, "in points", floor=0, top=1 if highest < 1 else None)


def _lines_figure(lines: Sequence[Line], title: str, note: str = "", **options: Any) -> str:
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    label = f"{title} over steps. " + "; ".join(f"{line.name}: {told(line.points)}" for line in lines)
    return figure(
        legend((line.name, css(line.color)) for line in lines) + chart(lines, label, **options),
        f"<b>{text(title)}</b> {text(note)}",
    )


def together(named: Sequence[tuple[str, Sequence[Mapping[str, Any]]]]) -> list[str]:
    """AP and loss of several runs over the same steps; a figure that fewer than two runs have is left out."""
    precisions, losses = [], []
    for i, (name, rows) in enumerate(named):
        points = [(step, 100 * value) for step, value in series(rows, "AP") if value >= 0]
        precisions += [Line(name, points, COLORS[i % 8], markers=True)] if points else []
        losses += [Line(name, smooth(series(rows, "loss")), COLORS[i % 8])] if series(rows, "loss") else []
    log = all(value > 0 for line in losses for _, value in line.points)
    return [
        _precision_figure(precisions, "AP while training") if len(precisions) > 1 else "",
        _lines_figure(losses, "Loss while training", f"smoothed{', log scale' if log else ''}", log=log)
        if len(losses) > 1
        else "",
    ]


def step_seconds(rows: Sequence[Mapping[str, Any]]) -> str:
    """The median time of a step as logged, or nothing."""
    times = sorted(value for _, value in series(rows, "seconds"))
    return duration(times[len(times) // 2]) if times else ""
