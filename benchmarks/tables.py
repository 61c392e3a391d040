"""Writes the tables of the results: all into docs/benchmarks.md, the short form between README.md's markers.

python benchmarks/tables.py            # rewrite
python benchmarks/tables.py --check    # exit status 1 when README.md is out of date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from nasdet._files import read_json, write_atomic

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parent / "README.md"
PAGE = FOLDER.parent / "docs" / "benchmarks.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
ORDER = ("mix", "norm_act_mix", "search_step")
TITLES = {
    "mix": "`mix`: 12 maps into one",
    "norm_act_mix": "`norm_act_mix`: group norm, ReLU and sum of 12 maps",
    "search_step": "One FAD search step at 416 x 416 px (alphas, then weights)",
}
SHAPES = {"fpn-p3": "2x96x100x152", "fpn-p4": "2x256x50x76", "fpn-p3-nhwc": "2x96x100x152 channels_last"}

Row = dict[str, Any]


def render(results: Path) -> str:
    """Markdown of all results: per machine and benchmark one table, a line per race, a column per contestant.

    Raises ValueError when there is no result file.
    """
    machines = sorted(path for path in results.glob("*") if path.is_dir())
    sections = []
    for machine in machines:
        files = {path.stem: read_json(path) for path in sorted(machine.glob("*.json"))}
        names = sorted(files, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
        if names:
            sections.append("\n\n".join([_heading(files), *(_table(name, files[name]["rows"]) for name in names)]))
    if not sections:
        raise ValueError(f"{results}: results must hold at least one file, got none (run `make bench` first)")
    return "\n\n".join(sections)


def headline(results: Path) -> str:
    """The short form: per race of an op how much faster the library is than its rivals, and how much less memory a
    training step of it takes; per search step its time and memory. One table per machine."""
    sections = []
    for machine in sorted(path for path in results.glob("*") if path.is_dir()):
        files = {path.stem: read_json(path) for path in sorted(machine.glob("*.json"))}
        rows = [row for name in ORDER if name in files for row in files[name]["rows"]]
        lines = [_cells(["", "time", "against eager", "against torch.compile", "memory against eager"])]
        for name in [name for name in ORDER if name in files]:
            for key, race in _races(files[name]["rows"]).items():
                best = race.get("nasdet overwrite_inputs") or race.get("nasdet")
                if best is not None and "eager" in race:
                    lines.append(_cells([f"`{name}` {_race_name(key)}", *_against(best, race)]))
        if len(lines) > 1:
            env = max(rows, key=lambda row: row["date"])["environment"]
            place = env["cpu"] + f" ({env['isa']})" if env["device"] == "cpu" else env["device"]
            sections.append(f"**{place}**, one thread, PyTorch {env['torch']}:\n\n" + _with_rule(lines))
        sections += [_table(name, files[name]["rows"]) for name in ("search_step",) if name in files]
    if not sections:
        raise ValueError(f"{results}: results must hold at least one file, got none (run `make bench` first)")
    return "\n\n".join(sections)


def _against(best: Row, race: dict[str, Row]) -> list[str]:
    """Ratios of medians, and of the tensors alive at the peak of the phase."""
    cells = [_seconds(best["median_s"])]
    for rival in ("eager", "torch.compile"):
        cells.append(f"{race[rival]['median_s'] / best['median_s']:.1f}x faster" if rival in race else "")
    ours, theirs = (row["peak_memory"].get(best["phase"], 0) for row in (best, race["eager"]))
    return [*cells, f"{theirs / ours:.1f}x less" if ours else ""]


def _heading(files: dict[str, Any]) -> str:
    rows = [row for content in files.values() for row in content["rows"]]
    newest = max(rows, key=lambda row: row["date"])
    env = newest["environment"]
    peaks = env["peaks"]
    place = env["cpu"] + f" ({env['isa']})" if env["device"] == "cpu" else env["device"]
    commits = ", ".join(sorted({row["environment"]["commit"] for row in rows}))
    return (
        f"**{place}**, PyTorch {env['torch']}, {newest['date']}, commit {commits}. Measured on the same machine: copy"
        f" {peaks['copy_bytes_per_s'] / 1e9:.1f} GB/s, float32 matrix product"
        f" {peaks['fma_flops_per_s'] / 1e9:.0f} GFLOP/s."
        " Medians of interleaved rounds; in brackets how many times faster nasdet is (median of the ratios within each"
        " round). Memory: peak of the tensors beyond the inputs; *resident*: of the process."
    )


def _table(name: str, rows: list[Row]) -> str:
    threads = sorted({row["environment"]["threads"] for row in rows})
    title = (
        f"**{TITLES.get(name, f'`{name}`')}**, {' or '.join(map(str, threads))} thread{'s' if threads != [1] else ''}"
    )
    parts = [title, _times(rows), _memory(rows, resident=name == "search_step")]
    kept = _targets(rows)
    return "\n\n".join(part for part in [*parts, kept] if part)


def _races(rows: list[Row]) -> dict[tuple[str, str, str], dict[str, Row]]:
    races: dict[tuple[str, str, str], dict[str, Row]] = {}
    for row in rows:
        races.setdefault((row["case"], row["dtype"], row["phase"]), {})[row["contestant"]] = row
    return races


def _contestants(rows: list[Row]) -> list[str]:
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    return sorted(names, key=lambda name: not name.startswith("nasdet"))


def _times(rows: list[Row]) -> str:
    names = _contestants(rows)
    lines = [_cells(["time", *names, "copy peak used"])]
    for key, race in _races(rows).items():
        ours = _own(race)
        cells = [_race_name(key)]
        for name in names:
            row = race.get(name)
            ratio = ours["speedup_over"].get(name) if ours and row else None
            cells.append("" if row is None else _seconds(row["median_s"]) + (f" ({ratio:.2f}x)" if ratio else ""))
        share = ours.get("copy_share") if ours else None
        lines.append(_cells([*cells, "" if share is None else f"{100 * share:.0f} %"]))
    return _with_rule(lines)


def _memory(rows: list[Row], resident: bool) -> str:
    """Of an op the tensors alone: how many holes a heap has is malloc's doing. A step has its process to itself."""
    names = _contestants(rows)
    lines = [_cells(["peak memory", *names])]
    for key, race in _races(rows).items():
        kinds = dict.fromkeys(kind for row in race.values() for kind in row["peak_memory"])
        for kind in kinds:
            plain, _, of_process = kind.partition(", ")
            if of_process and not resident:
                continue
            label = f"{_race_name((key[0], key[1], plain))}{', *resident*' if of_process else ''}"
            lines.append(_cells([label, *(_megabytes(race.get(name), kind) for name in names)]))
    return _with_rule(lines)


def _targets(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        for target in row["targets"]:
            what = "less peak memory" if target["quantity"] == "peak_memory" else "faster"
            verdict = "met" if target["met"] else "**missed**"
            race = _race_name((row["case"], row["dtype"], row["phase"]))
            lines.append(
                f"- {row['contestant']}, {race}: {target['ratio']:.2f}x {what}"
                f" than {target['over']}; promised {target['at_least']:g}x: {verdict}"
            )
    if not lines:
        return ""
    met = sum("**missed**" not in line for line in lines)
    summary = f"<summary>Promises: {met} of {len(lines)} met</summary>"
    return "\n".join(["<details>" + summary, "", *lines, "", "</details>"])


def _own(race: dict[str, Row]) -> Row | None:
    """The row that the ratios of a race belong to: the library's own."""
    return next((race[name] for name in ("nasdet", "RepShare, nasdet") if name in race), None)


def _race_name(key: tuple[str, str, str]) -> str:
    case, dtype, phase = key
    return f"{SHAPES.get(case, case)} {dtype}, {phase}"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"


def _megabytes(row: Row | None, kind: str) -> str:
    return "" if row is None or kind not in row["peak_memory"] else f"{row['peak_memory'][kind] / 1e6:,.0f} MB"


def _cells(values: list[str]) -> str:
    return "| " + " | ".join(values) + " |"


def _with_rule(lines: list[str]) -> str:
    columns = lines[0].count("|") - 1
    return "\n".join([lines[0], "|" + " --- |" * columns, *lines[1:]])


def insert(readme: str, tables: str) -> str:
    """The README's text with ``tables`` between the markers. Raises ValueError unless each marker stands there once."""
    if readme.count(BEGIN) != 1 or readme.count(END) != 1 or readme.index(BEGIN) > readme.index(END):
        raise ValueError(f"README must hold {BEGIN} and then {END}, once each")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the benchmark tables into README.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the README is out of date")
    parser.add_argument("--results", type=Path, default=FOLDER / "results", help="folder of the result files")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    try:
        old = options.readme.read_text(encoding="utf-8")
        new = insert(old, headline(options.results))
        page = f"# Benchmarks\n\n`make bench` repeats and rewrites these.\n\n{render(options.results)}\n"
    except (OSError, ValueError) as error:
        sys.stderr.write(f"tables: {error}\n")
        return 1
    old_page = options.page.read_text(encoding="utf-8") if options.page.is_file() else ""
    if options.check and (new != old or page != old_page):
        stale = options.readme if new != old else options.page
        sys.stderr.write(f"tables: {stale.name} is out of date; run python benchmarks/tables.py\n")
        return 1
    for path, before, text in ((options.readme, old, new), (options.page, old_page, page)):
        if text != before:
            write_atomic(path, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
