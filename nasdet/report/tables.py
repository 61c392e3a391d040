"""The parts of the page that are tables: the comparison, the cost, AP by category."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nasdet.report.curves import step_seconds
from nasdet.report.markup import amount, bar, duration, memory, percent, signed, table, text, tiles
from nasdet.report.read import Run, number


def comparison(demo: Mapping[str, Any]) -> str:
    """The rows of a ``demo.json`` as a table, what it says, and how far it can be trusted."""
    rows = demo["rows"]
    if not rows:
        return '<p class="note">The comparison has no rows yet.</p>'
    precisions = [number(row.get("AP")) for row in rows]
    best = max((value for value in precisions if value is not None), default=None)
    body = []
    for row, precision in zip(rows, precisions, strict=True):
        shown = f"<b>{percent(precision)}</b>" if precision is not None and precision == best else percent(precision)
        spread = number(row.get("AP_std"))
        shown += f" ± {100 * spread:.1f}" if spread is not None else ""
        tint = "var(--c0)" if precision == best else "var(--c5)"
        body.append(
            [
                text(row.get("name", "?")),
                shown + bar((precision or 0) / best if best and best > 0 else 0, tint),
                percent(row.get("AP50")),
                amount(row.get("parameters")),
                amount(row.get("macs")),
                duration(row.get("train_seconds")),
            ]
        )
    head = ["", "AP", "AP50", "parameters", "MACs", "training"]
    parts = [table(head, body, kind="result"), f'<p class="verdict">{_verdict(rows)}</p>']
    budget = demo.get("budget")
    if isinstance(budget, dict) and budget:
        told = ", ".join(f"{text(str(key).replace('_', ' '))} {text(_plain(value))}" for key, value in budget.items())
        parts.append(f'<p class="note">Budget, the same for every row: {told}.</p>')
    notes = demo.get("notes")
    notes = [notes] if isinstance(notes, str) else notes
    if isinstance(notes, list) and notes:
        parts.append("<ul>" + "".join(f"<li>{text(note)}</li>" for note in notes) + "</ul>")
    return "".join(parts)


def _verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the table says about the searched net, and what it cannot say."""
    scored = [(str(row.get("name", "?")), number(row.get("AP"))) for row in rows]
    known = [(name, 100 * value) for name, value in scored if value is not None]
    sentences = []
    searched = next(((name, value) for name, value in known if "search" in name.lower()), None)
    if searched is not None:
        rest = [(name, value) for name, value in known if name != searched[0]]
        others = [f"{signed(searched[1] - value)} AP against {text(name)}" for name, value in rest]
        if others:
            sentences.append(f"{text(searched[0])}: {', '.join(others)}.")
    seeds = [number(row.get("seeds")) or 1 for row in rows]
    if max(seeds) <= 1:
        sentences.append(
            "Every row is one training run with one seed. Runs that differ in nothing but the seed also differ in AP, "
            "and more so the shorter the training and the smaller the test set: the order of rows that lie close "
            "together is not evidence. Repeat with other seeds before believing it."
        )
    else:
        sentences.append(f"Means over {min(seeds):g} to {max(seeds):g} seeds; differences within the spread are noise.")
    return " ".join(sentences)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(entry)}" for key, entry in value.items())
    if isinstance(value, list):
        return " x ".join(str(entry) for entry in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def cost(run: Run) -> str:
    """Parameters and MACs by part, time per step and peak memory; empty when none of it was recorded."""
    facts = []
    seconds = number(run.info.get("seconds_per_step"))
    step = duration(seconds) if seconds is not None else step_seconds(run.metrics)
    if step:
        facts.append(("per step", step))
    if (peak := number(run.info.get("peak_memory"))) is not None:
        facts.append(("peak memory", memory(peak)))
    return tiles(facts) + (_parts(run.cost) if run.cost and run.cost["parts"] else "")


def _parts(content: Mapping[str, Any]) -> str:
    parts = content["parts"]
    totals = {key: sum(number(part.get(key)) or 0 for part in parts) for key in ("parameters", "macs")}

    def cell(part: Mapping[str, Any], key: str, color: str) -> str:
        value = number(part.get(key))
        share = (value or 0) / totals[key] if totals[key] else 0.0
        return f"{amount(value)} <small>{100 * share:.0f} %</small>{bar(share, color)}"

    columns = (("parameters", "var(--c0)"), ("macs", "var(--c1)"))
    rows = [[text(part.get("name", "?")), *(cell(part, key, color) for key, color in columns)] for part in parts]
    rows.append(["<b>total</b>", *(f"<b>{amount(totals[key])}</b>" for key in ("parameters", "macs"))])
    size = content.get("size")
    at = f" at {text(size[0])} × {text(size[1])} pixels" if isinstance(size, list) and len(size) == 2 else ""
    head = ["part", "parameters", "MACs"]
    caption = f"By part{at}; MACs are multiply-accumulates of convolutions and matrix products for one picture."
    return table(head, rows, caption, "cost")


def categories(content: Mapping[str, Any]) -> str:
    """The summary figures of an ``eval.json`` and AP by category, the best first; empty without any."""
    keys = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
    names = [key for key in keys if number(content.get(key)) is not None]
    shown = tiles((name, percent(content[name])) for name in names)
    found = content.get("per_category")
    rows = [(str(name), value) for name, value in found.items()] if isinstance(found, dict) else []
    known = [(name, value) for name, share in rows if (value := number(share)) is not None]
    if not known:
        return shown
    known.sort(key=lambda row: -row[1])
    highest = max(value for _, value in known)
    items = "".join(
        f"<li><span>{text(name)}</span>{bar(value / highest if highest > 0 else 0.0)}<b>{percent(value)}</b></li>"
        for name, value in known
    )
    return f'{shown}<p class="note">AP by category, the best first.</p><ol class="categories">{items}</ol>'
