"""Writes the tables of the results: all into docs/benchmarks.md, short ones between the markers of README.md and
docs/your-detector.md and docs/multi_dilation_conv.md.

python benchmarks/tables.py            # rewrite
python benchmarks/tables.py --check    # exit status 1 when one is out of date
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from summary import convolutions, headline, ratios
from table_parts import (
    Row,
    by_environment,
    cells,
    machine_and_versions,
    race_name,
    races,
    result_files,
    seconds,
    size,
    with_rule,
)

from nasdet._files import write_atomic

FOLDER = Path(__file__).resolve().parent
README = FOLDER.parent / "README.md"
PAGE = FOLDER.parent / "docs" / "benchmarks.md"
GUIDE = FOLDER.parent / "docs" / "your-detector.md"
THEORY = FOLDER.parent / "docs" / "multi_dilation_conv.md"
SOURCE = (
    "`make bench`, `make bench-rivals` and `make bench-gpu` repeat and rewrite these. Times on a GPU are the device's: "
    "the host queues each call while the device is kept waiting."
)
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
TITLES = {
    "mixed_dilation_conv2d": "`mixed_dilation_conv2d`: NATS's set C (five dilations; nine at 512 channels)",
    "grouped_dilation_conv2d": "`grouped_dilation_conv2d`: a dilation per slice of the output channels",
    "depthwise_conv2d": "`depthwise_conv2d`: a kernel per channel, against PyTorch's grouped convolution",
    "mix": "`mix`: 12 maps into one",
    "norm_act_mix": "`norm_act_mix`: group norm, ReLU and sum of 12 maps",
    "nms": "NMS of clustered boxes, IoU threshold 0.5; `batched_nms` and `nms_padded` with 80 classes",
    "roi_align": "RoIAlign, 256 channels of an 800 x 1333 image: 1,000 RoIs, 7 x 7, 2 x 2 samples, strides 4 to 32",
    "paste_masks": "100 masks of 28 x 28 to the run lengths of an 800 x 1333 image",
    "detectors": "Detectors on ResNet-50, pictures of 800 x 1333 to detections, or to changed weights",
    "search_step": "One FAD search step at 416 x 416 px (alphas, then weights)",
    "supernet_nats": "One NATS search step of ResNet-50, set C, 16 channel groups (weights, then alphas)",
    "supernet_hit": "A step of a Hit-Detector supernet's part, by how it holds its candidates' maps until backward",
    "path_step": "One training step of a path, two pictures: within the supernet, and the net alone",
}
# Of an op of maps the tensors alone: how many holes a heap has is malloc's doing. A step has its process to itself, and
# of RoIAlign and NMS the resident set shows that nothing large is allocated beside the tensors either.
RESIDENT = (
    "detectors",
    "search_step",
    "supernet_nats",
    "path_step",
    "nms",
    "roi_align",
    "paste_masks",
    "mixed_dilation_conv2d",
    "grouped_dilation_conv2d",
    "depthwise_conv2d",
)

# Shares of measured peaks beside the times; of matrix products where an op consists of them.
SHARES = {"copy_share": "copy peak used", "matrix_share": "matrix peak used"}
MATRIX = ("mixed_dilation_conv2d", "grouped_dilation_conv2d")
PRECISIONS = {"fp32": "float32", "tf32": "TF32", "bf16": "bfloat16"}


def render(results: Path) -> str:
    """Markdown of all results: per machine, environment and benchmark a line per race, a column per contestant.

    Raises ValueError when there is no result file.
    """
    sections = []
    for machine in sorted(path for path in results.glob("*") if path.is_dir()):
        for files in by_environment(result_files(machine)):
            sections.append("\n\n".join([_heading(files), *(_table(name, rows) for name, rows in files.items())]))
    if not sections:
        raise ValueError(f"{results}: results must hold at least one file, got none (run `make bench` first)")
    return "\n\n".join(sections)


def _heading(files: dict[str, list[Row]]) -> str:
    rows = [row for part in files.values() for row in part]
    newest = max(rows, key=lambda row: row["date"])
    peaks = newest["environment"]["peaks"]
    commits = ", ".join(sorted({row["environment"]["commit"] for row in rows}))
    return (
        f"{machine_and_versions(rows)}, {newest['date']}, commit {commits}. Measured on the same machine: copy"
        f" {peaks['copy_bytes_per_s'] / 1e9:.1f} GB/s, {_matrix_peaks(peaks)}."
        " Medians of interleaved rounds; in brackets how many times faster nasdet is (median of the ratios within each"
        " round), with freed memory kept for the next call, as a caching allocator does. Memory: peak of the tensors"
        " beyond the inputs; *resident*: of the process."
    )


def _matrix_peaks(peaks: dict[str, Any]) -> str:
    """Older results have the one in float32 alone."""
    rates = peaks.get("matrix_flops_per_s", {"fp32": peaks["fma_flops_per_s"]})
    return ", ".join(f"{PRECISIONS[name]} matrix product {rate / 1e9:.0f} GFLOP/s" for name, rate in rates.items())


def _table(name: str, rows: list[Row]) -> str:
    threads = sorted({row["environment"]["threads"] for row in rows})
    title = (
        f"**{TITLES.get(name, f'`{name}`')}**, {' or '.join(map(str, threads))} thread{'s' if threads != [1] else ''}"
    )
    backends = sorted({row["backend"] for row in rows if "backend" in row})
    title += f"; nasdet by {' and '.join(f'`{backend}`' for backend in backends)}" if backends else ""
    parts = [title, _times(name, rows), _memory(rows, resident=name in RESIDENT)]
    kept = _targets(rows)
    return "\n\n".join(part for part in [*parts, kept] if part)


def _contestants(rows: list[Row]) -> list[str]:
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    return sorted(names, key=lambda name: not name.startswith("nasdet"))


def _times(name: str, rows: list[Row]) -> str:
    names = _contestants(rows)
    offered = SHARES if name in MATRIX else {"copy_share": SHARES["copy_share"]}
    shares = {share: label for share, label in offered.items() if any(_share(row, share) is not None for row in rows)}
    lines = [cells(["time", *names, *shares.values()])]
    for key, race in races(rows).items():
        ours = _own(race)
        line = [race_name(key)]
        for contestant in names:
            row = race.get(contestant)
            ratio = ours["speedup_over"].get(contestant) if ours and row else None
            line.append("" if row is None else seconds(row["median_s"]) + (f" ({ratio:.2f}x)" if ratio else ""))
        used = [_share(ours, share) if ours else None for share in shares]
        lines.append(cells([*line, *("" if share is None else f"{100 * share:.0f} %" for share in used)]))
    return with_rule(lines)


def _share(row: Row, share: str) -> float | None:
    """Of the machine's measured peak. Of its matrix products on a GPU alone: on the CPU some of the library's
    algorithms take fewer operations than are counted."""
    if share == "matrix_share" and row["environment"]["device"] == "cpu":
        return None
    return row.get(share)


def _memory(rows: list[Row], resident: bool) -> str:
    names = _contestants(rows)
    lines = [cells(["peak memory", *names])]
    for key, race in races(rows).items():
        kinds = dict.fromkeys(kind for row in race.values() for kind in row["peak_memory"])
        for kind in kinds:
            plain, _, what = kind.partition(", ")
            if what == "resident" and not resident:
                continue
            phase = key[2] if plain == "step" else plain
            label = f"{race_name((key[0], key[1], phase))}{what and f', *{what}*'}"
            peaks = [race[name]["peak_memory"].get(kind) if name in race else None for name in names]
            lines.append(cells([label, *("" if peak is None else size(peak) for peak in peaks)]))
    return with_rule(lines)


def _targets(rows: list[Row]) -> str:
    lines = []
    for row in rows:
        race = race_name((row["case"], row["dtype"], row["phase"]))
        for target in row["targets"]:
            verdict = "met" if target["met"] else "**missed**"
            lines.append(f"- {row['contestant']}, {race}: {_promise(target)}: {verdict}")
    if not lines:
        return ""
    met = sum("**missed**" not in line for line in lines)
    summary = f"<summary>Promises: {met} of {len(lines)} met</summary>"
    return "\n".join(["<details>" + summary, "", *lines, "", "</details>"])


def _promise(target: dict[str, Any]) -> str:
    """What was measured, and what was promised: a ratio to a rival, or a limit."""
    if "within" in target:
        return f"{target['quantity']} off by {target['off']:.0%}; promised within {target['within']:.0%}"
    kept = target["quantity"] == "kept_memory"
    memory = target["quantity"].endswith("memory")
    if target["quantity"] == "matrix_share":
        found = target["absent"] if "absent" in target else f"{target['value']:.0%} of the measured matrix peak"
        return f"{found}; promised {target['at_least']:.0%}"
    if "at_most" in target:
        unit, when = (size, " kept for backward" if kept else " at the peak") if memory else (seconds, "")
        return f"{unit(target['value'])}{when}; promised at most {unit(target['at_most'])}"
    what = ("less memory kept" if kept else "less peak memory") if memory else "faster"
    promised = f"promised {target['at_least']:g}x"
    if "absent" in target:
        return f"not compared with {target['over']} ({target['absent']}); {promised}"
    return f"{target['ratio']:.2f}x {what} than {target['over']}; {promised}"


def _own(race: dict[str, Row]) -> Row | None:
    """The row that the ratios of a race belong to: the library's own."""
    return next((race[name] for name in ("nasdet", "RepShare, nasdet") if name in race), None)


def insert(text: str, tables: str, name: str = "README") -> str:
    """``text`` with ``tables`` between the markers. Raises ValueError unless each marker stands there once."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"{name} must hold {BEGIN} and then {END}, once each")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{tables}\n{END}{rest.split(END)[1]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the benchmark tables into README.md and docs/.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a file is out of date")
    parser.add_argument("--results", type=Path, default=FOLDER / "results", help="folder of the result files")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--guide", type=Path, default=GUIDE)
    parser.add_argument("--theory", type=Path, default=THEORY)
    options = parser.parse_args(arguments)
    try:
        old = {path: path.read_text(encoding="utf-8") for path in (options.readme, options.guide, options.theory)}
        old[options.page] = options.page.read_text(encoding="utf-8") if options.page.is_file() else ""
        new = {
            options.readme: insert(old[options.readme], headline(options.results)),
            options.guide: insert(old[options.guide], ratios(options.results), options.guide.name),
            options.theory: insert(old[options.theory], convolutions(options.results), options.theory.name),
            options.page: f"# Benchmarks\n\n{SOURCE}\n\n{render(options.results)}\n",
        }
    except (OSError, ValueError) as error:
        sys.stderr.write(f"tables: {error}\n")
        return 1
    stale = [path for path, text in new.items() if text != old[path]]
    if options.check and stale:
        sys.stderr.write(f"tables: {stale[0].name} is out of date; run python benchmarks/tables.py\n")
        return 1
    for path in stale:
        write_atomic(path, new[path])
    return 0


if __name__ == "__main__":
    sys.exit(main())
