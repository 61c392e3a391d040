"""The report: one HTML file that asks for nothing from outside."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from nasdet._files import write_atomic
from nasdet.report import (
    alphas,
    blocks,
    curves,
    dilations,
    graph,
    operations,
    pictures,
    population,
    receptive_field,
    strides,
    tables,
)
from nasdet.report.markup import duration, figure, grid, legend, text
from nasdet.report.read import Run, number, read_run
from nasdet.report.style import CSS, SCRIPT

LIMIT = 1_500_000
# Whatever a file of the run might smuggle in, the page fetches nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_TITLES = {
    "search": "Architecture search",
    "train": "Training",
    "eval": "Evaluation",
    "demo": "Search, retrain, compare",
}
_TONES = {"done": "good", "failed": "bad", "interrupted": "bad"}


def write_report(run: Path | str, out: Path | str | None = None) -> Path:
    """Write the report of a run folder as one self-contained HTML page; returns its path.

    A section is there when its file is: a run that has only begun has a short page. Subfolders that hold a run.json are
    sub-runs: the page compares them (``demo.json``), then tells each. The page has no external request, is at most
    1.5 MB (pictures shrink, then go, to fit), and is written atomically.

    Args:
        run: the folder of a run.
        out: the file to write; by default ``report.html`` in the folder.

    Raises:
        ValueError: ``run`` is no run folder, or a JSON file in it is malformed; the text names the file. A torn line
            in a ``.jsonl`` file, as a kill leaves it, is no error.
    """
    content = read_run(run)
    target = Path(out) if out is not None else Path(run) / "report.html"
    pictured = sum(1 for part in content.all() if part.detections is not None) or 1
    page = ""
    for budget in (900_000, 500_000, 200_000, 0):
        page = _page(content, budget // pictured)
        if len(page.encode()) <= LIMIT:
            break
    return write_atomic(target, page)


def _page(run: Run, budget: int) -> str:
    sections: list[tuple[str, str, str]] = []
    if run.demo:
        parts = tables.comparison(run.demo)
        rows = [(child.name.removeprefix("train-"), child.metrics) for child in run.children if child.name != "search"]
        sections.append(("result", "Result", parts + _drawn(lambda: grid(curves.together(rows)))))
    seen: dict[str, str] = {}
    if run.children:
        own = _run_sections(run, budget, seen)
        sections += [(key, title, body) for key, title, body in own]
        for child in run.children:
            inner = "".join(f"<h3>{text(title)}</h3>{body}" for _, title, body in _run_sections(child, budget, seen))
            name = child.name.replace("-", " ").replace("_", " ")
            title = f"{name[:1].upper()}{name[1:]}"
            body = f'<p class="kicker">{_kicker(child)}</p>{_command(child)}{inner}'
            sections.append((f"run-{len(sections)}", title, body))
    else:
        sections += _run_sections(run, budget, seen)
    if deviations := _deviations(run):
        sections.append(("deviations", "Deviations from the paper", deviations))
    anchors = "".join(f'<a href="#{key}">{text(title)}</a>' for key, title, _ in sections)
    body = "".join(
        f'<section id="{key}" aria-labelledby="{key}-title"><h2 id="{key}-title">{text(title)}</h2>{content}</section>'
        for key, title, content in sections
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><meta name="generator" content="nasdet">'
        f"<title>{text(_title(run))} · {text(run.name)}</title><style>{CSS}</style></head>"
        f"<body>{_header(run)}"
        f'<nav aria-label="Sections"><div>{anchors}<button id="theme" type="button">light / dark</button></div></nav>'
        f"<main>{body}</main><footer>Made by <b>nasdet report</b> from the files of the run folder {text(run.name)}; "
        f"nothing on this page comes from elsewhere.</footer><script>{SCRIPT}</script></body></html>\n"
    )


def _title(run: Run) -> str:
    verb = str(run.info.get("verb", "demo" if run.demo else "run"))
    title = _TITLES.get(verb.split()[0] if verb.split() else "", f"Run of {verb}" if verb != "run" else "Run")
    method = (run.card or {}).get("method")
    return f"{title}, {str(method).upper()}" if isinstance(method, str) and len(method) <= 12 else title


def _header(run: Run) -> str:
    info = run.info
    given = info.get("arguments")
    arguments: dict[str, Any] = given if isinstance(given, dict) else {}
    data = info.get("data") or arguments.get("data")
    facts = [
        ("started", _time(info.get("started") or info.get("start"))),
        ("ended", _time(info.get("finished") or info.get("ended") or info.get("end"))),
        ("took", duration(info.get("seconds")) if number(info.get("seconds")) is not None else ""),
        ("seed", info.get("seed", arguments.get("seed"))),
        ("data", _words(data)),
        ("split", _split(run)),
        ("left out as bad", _words(info.get("skipped"))),
        ("machine", _words(info.get("machine"))),
        ("device", _words(info.get("device", arguments.get("device")))),
        ("versions", _words(info.get("versions"))),
    ]
    shown = "".join(f"<div><dt>{name}</dt><dd>{text(v)}</dd></div>" for name, v in facts if v not in (None, ""))
    return (
        f'<header><p class="kicker">nasdet · <b>{text(run.name)}</b></p><h1>{text(_title(run))} {_status(run)}</h1>'
        f'<dl class="facts">{shown}</dl>{_command(run)}{_error(run)}</header>'
    )


def _status(run: Run) -> str:
    status = run.info.get("status")
    if not isinstance(status, str) or not status:
        return ""
    return f'<span class="chip {_TONES.get(status, "plain")}">{text(status)}</span>'


def _error(run: Run) -> str:
    message = run.info.get("error") or run.info.get("reason")
    return f'<p class="warn">{text(message)}</p>' if isinstance(message, str) else ""


def _kicker(run: Run) -> str:
    parts = [_status(run), f"<code>{text(run.name)}/</code>"]
    steps = [number(row.get("step")) or 0 for row in run.metrics]
    if steps:
        parts.append(f"{max(steps):g} steps")
    if number(run.info.get("seconds")) is not None:
        parts.append(text(duration(run.info["seconds"])))
    if run.info.get("seed") is not None:
        parts.append(f"seed {text(run.info['seed'])}")
    return " · ".join(part for part in parts if part) + _error(run)


def _time(value: Any) -> str:
    return "" if value is None else str(value).replace("T", " ").split(".")[0].removesuffix("+00:00")


def _words(value: Any) -> str:
    """Plain data on one line: ``python 3.11.2, torch 2.13.0``."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {_words(entry)}" for key, entry in value.items() if entry not in (None, ""))
    if isinstance(value, list):
        return ", ".join(_words(entry) for entry in value)
    return "" if value is None else str(value)


def _split(run: Run) -> str:
    split = run.split or {}
    roles = {key: len(ids) for part in (split, *split.values()) if isinstance(part, dict)
             for key, ids in part.items() if isinstance(ids, list)}  # fmt: skip
    fingerprint = next((str(split[key])[:12] for key in ("hash", "sha256") if split.get(key)), "")
    counts = ", ".join(f"{count} {role.replace('_', ' ')}" for role, count in roles.items())
    return f"{counts} ({fingerprint})" if fingerprint and counts else counts


def _command(run: Run) -> str:
    """The command that makes the run again, as it was recorded, and every setting it ran with."""
    recorded, settings = run.info.get("command"), run.info.get("arguments")
    line = shlex.join(str(word) for word in recorded) if isinstance(recorded, list) else recorded
    shown = f"<pre><code>{text(line)}</code></pre>" if isinstance(line, str) and line else ""
    if isinstance(settings, dict) and settings:
        rows = "".join(f"<div><dt>{text(k)}</dt><dd>{text(_setting(v))}</dd></div>" for k, v in settings.items())
        shown += f'<details><summary>all settings</summary><dl class="facts">{rows}</dl></details>'
    return shown


def _setting(value: Any) -> str:
    return "–" if value is None else str(value).lower() if isinstance(value, bool) else _words(value)


def _run_sections(run: Run, budget: int, seen: dict[str, str]) -> list[tuple[str, str, str]]:
    """(anchor, title, HTML) of what one run folder has to tell."""
    found = [
        ("cells", "Architecture", _cells(run, seen)),
        ("alphas", "How the search decided", _drawn(lambda: _alphas(run))),
        ("population", "Population", _population(run)),
        ("fields", "Effective receptive field", _fields(run)),
        ("curves", "Loss and AP", _drawn(lambda: curves.curve_section(run.metrics))),
        ("detections", "Detections", _drawn(lambda: pictures.picture_section(run, budget)) if budget else ""),
        ("categories", "Average precision", tables.categories(run.eval) if run.eval else ""),
        ("masks", "Average precision of masks", _masks(run)),
        ("cost", "Cost", tables.cost(run)),
    ]
    return [part for part in found if part[2]]


def _population(run: Run) -> str:
    return population.population_section(run.evolution, population.metric_of(run.info.get("verb")))


def _masks(run: Run) -> str:
    found = (run.eval or {}).get("masks")
    return tables.categories(found) if isinstance(found, dict) else ""


def _drawn(make: Any) -> str:
    try:
        return str(make())
    except ImportError as error:
        return f'<p class="note">Left out, as {text(error.name)} is not installed: pip install {text(error.name)}.</p>'


def _cells(run: Run, seen: dict[str, str]) -> str:
    if run.card is None:
        return ""
    genotype = run.card.get("genotype", run.card)
    key = json.dumps(genotype, sort_keys=True)
    name = f"<b>{text(run.card.get('name', run.card.get('method', 'the card')))}</b>"
    settings = _words(run.card.get("settings"))
    told = f'<p class="note">{name}{": " if settings else ""}{text(settings)}</p>'
    if key in seen:
        return f'<p class="note">{name}: the same architecture as under “{text(seen[key])}”, drawn there.</p>'
    seen[key] = run.name.replace("-", " ")
    if layers := dilations.intensities(genotype):
        return told + dilations.intensity_bars(layers)
    if path := strides.stride_path(genotype):
        return told + strides.stride_figure(path)
    if rows := operations.rows_of(run.card):
        return told + operations.operation_figure(rows)
    if stages := blocks.stages_of(run.card):
        return told + blocks.path_figure(stages)
    cells = graph.find_cells({"genotype": genotype})
    if not cells:
        shown = json.dumps(genotype, indent=1)
        shown = shown if len(shown) <= 6000 else shown[:6000] + "\n…"
        return (
            f"{told}<details open><summary>the genotype as the card has it</summary><pre>{text(shown)}</pre></details>"
        )
    streams = {graph.transformation(edge.op).stream for nodes in cells.values() for node in nodes for edge in node}
    words = {"std": "standard 3×3", "sep": "separable 3×3", "other": "other"}
    colors = [(words[stream], f"var(--{stream})") for stream in words if stream in streams]
    figures = []
    for group, nodes in cells.items():
        inputs = _inputs(run.card.get("method"), group)
        drawing = graph.cell_svg(nodes, f"Cell of group {group}", inputs[0])
        figures.append(figure(legend(colors) + drawing, f"<b>Group {text(group)}</b>{inputs[1]}"))
    note = (
        "Numbered discs are nodes, each the sum of its edges; ×2 means two such units in a row, dil the dilation of "
        "one more, RF the receptive field, which is also the width of the line."
    )
    return f'{told}{grid(figures)}<p class="note">{note}</p>'


def _inputs(method: Any, group: str) -> tuple[tuple[str, str], str]:
    if method == "fad" and group == "box":
        return ("FPN (0)", "FPN (1)"), ": both inputs of its first cell are the pyramid"
    if method == "fad" and group == "cls":
        return ("box (0)", "FPN (1)"), ": its first cell reads the box feature and the pyramid"
    if method == "fad":
        return ("RoI (0)", "RoI (1)"), ": both inputs of its first cell are the pooled map of a box"
    return ("input 0", "input 1"), ""


def _fields(run: Run) -> str:
    content = run.erf
    return "" if content is None else _drawn(lambda: receptive_field.field_section(content))


def _alphas(run: Run) -> str:
    if run.info.get("verb") == "search nats" or dilations.intensities((run.card or {}).get("genotype")):
        return dilations.searched_dilations(run.alphas, run.info.get("choices"))
    if operations.is_search(run) or run.screening is not None:
        return operations.score_section(run)
    histories = alphas.histories(run.alphas)
    cells = graph.find_cells({"genotype": (run.card or {}).get("genotype")})
    shown = [
        alphas.group_figures(group, history, choice_names(run, group, len(history[-1][1][0])), cells.get(group))
        for group, history in histories.items()
    ]
    # Kind by kind, so that the groups stand side by side.
    return "".join(grid(part) for part in zip(*shown, strict=True))


def choice_names(run: Run, group: str, width: int) -> list[str] | None:
    """The names of the ``width`` columns of the alphas, if recorded; a last ``none`` may be left out."""
    card = run.card or {}
    for place in (run.info, run.info.get("arguments"), card.get("settings"), card.get("source")):
        for key in ("choices", "transformations"):
            names = place.get(key) if isinstance(place, dict) else None
            names = names.get(group) if isinstance(names, dict) else names
            if isinstance(names, list) and all(isinstance(name, str) for name in names):
                if len(names) in (width, width - 1):
                    return [*names, "none"][:width]
    return None


def _deviations(run: Run) -> str:
    """The deviations recorded by the run and its sub-runs, each once, with where it holds if that is not everywhere."""
    owners: dict[str, list[str]] = {}
    having = [part for part in run.all() if isinstance(part.info.get("deviations"), list)]
    for part in having:
        for entry in part.info["deviations"]:
            owners.setdefault(_words(entry), []).append("" if part is run else part.name)
    items = []
    for words, names in owners.items():
        where = "" if "" in names or len(names) == len(having) else f" <small>({text(', '.join(names))})</small>"
        items.append(f"<li>{text(words)}{where}</li>")
    if items:
        return f"<ul>{''.join(items)}</ul>"
    return '<p class="note">None recorded.</p>' if having else ""
