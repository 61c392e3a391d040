"""The short tables: README.md's, and the ratios to torchvision in docs/your-detector.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from table_parts import (
    Race,
    Row,
    cells,
    has_rivals,
    is_plain,
    machine_and_versions,
    peak,
    race_name,
    races,
    result_files,
    seconds,
    size,
    with_rule,
)

# One or two rows per op: the plain float32 case of each, forward and in training.
MAPS = [
    (bench, ("fpn-p3", "fp32", phase)) for bench in ("mix", "norm_act_mix") for phase in ("forward", "forward+backward")
]
DETECTION = [
    ("nms", ("nms-5000", "fp32", "forward")),
    ("nms", ("batched_nms-20000", "fp32", "forward")),
    ("roi_align", ("pooler-nhwc", "fp32", "forward")),
    ("roi_align", ("pooler-nhwc", "fp32", "forward+backward")),
    ("sigmoid_focal_loss", ("2x76725x80 sum", "fp32", "forward+backward")),
]
RIVALS = ("nms", "roi_align", "sigmoid_focal_loss")
DEPTHWISE = [
    (f"c256-50x84-k5{dilation}-{layout}", "fp32", phase)
    for dilation in ("", "-dilation-4")
    for layout in ("nchw", "nhwc")
    for phase in ("forward", "forward+backward")
]
# Whom a convolution is compared with: the fastest of its rivals.
CONVOLUTIONS = {
    "mixed_dilation_conv2d": ("eager", "eager, folded kernels", "torch.compile"),
    "grouped_dilation_conv2d": ("one convolution",),
    "depthwise_conv2d": ("eager",),
}
HEADLINE_CONVOLUTIONS = [
    *((f"c{c}-n1", "fp32", phase) for c in (128, 256, 512) for phase in ("forward", "forward+backward")),
    *((f"c{c}-n4", "bf16", phase) for c in (128, 256) for phase in ("forward", "forward+backward")),
    *((f"plain-c{c}", "fp32", "forward") for c in (128, 256, 512)),
    *DEPTHWISE,
]


def headline(results: Path) -> str:
    """Per processor: how much faster and smaller the ops are than their rivals, and what a search step takes.

    Raises ValueError when there is no result.
    """
    sections = []
    for files in _fullest(results):
        sections += [
            part
            for part in (
                _convolutions(files, HEADLINE_CONVOLUTIONS),
                _maps(files),
                _detection(files),
                _detectors(files),
                _steps(files),
                _supernets(files),
            )
            if part
        ]
    if not sections:
        raise ValueError(f"{results}: results must hold at least one file, got none (run `make bench` first)")
    return "\n\n".join(sections)


def _fullest(results: Path) -> list[dict[str, list[Row]]]:
    """The files of every processor; where it was also held to a narrower instruction set, of the fuller folder."""
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for machine in sorted(path for path in results.glob("*") if path.is_dir()):
        files = result_files(machine)
        if not files:
            continue
        environment = next(iter(files.values()))[0]["environment"]
        key = environment["device"], environment["cpu"]
        if len(files) > len(found.get(key, {})):
            found[key] = files
    return list(found.values())


def convolutions(results: Path) -> str:
    """Every race of the multi-dilation convolutions, per machine; says so where none was measured yet."""
    machines = [result_files(path) for path in sorted(results.glob("*")) if path.is_dir()]
    sections = [
        _convolutions({name: rows for name, rows in files.items() if name != "depthwise_conv2d"}) for files in machines
    ]
    return "\n\n".join(section for section in sections if section) or "No results yet."


def ratios(results: Path) -> str:
    """Every race of the detection ops against torchvision, per machine; says so where none was measured yet."""
    sections = []
    for machine in sorted(path for path in results.glob("*") if path.is_dir()):
        rows = [row for name, rows in result_files(machine).items() if name in RIVALS for row in rows]
        rows = [row for row in rows if has_rivals(row)]
        lines = [_against_torchvision(race_name(key), race) for key, race in races(rows).items() if "nasdet" in race]
        if lines:
            sections.append(f"{_place(rows)}:\n\n" + with_rule([_HEAD, *lines]))
    return "\n\n".join(sections) or "No results with torchvision yet."


_HEAD = cells(["", "nasdet", "torchvision", "", "peak memory nasdet", "torchvision"])


def _place(rows: list[Row]) -> str:
    on_cpu = rows[0]["environment"]["device"] == "cpu"
    threads = " and ".join(map(str, sorted({row["environment"]["threads"] for row in rows})))
    return machine_and_versions(rows) + (f", threads: {threads}" if on_cpu else "")


def _faster(ratio: float, digits: int = 1) -> str:
    return f"**{ratio:.{digits}f}x** faster" if ratio >= 1 else f"**{1 / ratio:.{digits}f}x** slower"


def _against_torchvision(name: str, race: Race) -> str:
    ours, theirs = race["nasdet"], race.get("torchvision")
    own = [name, seconds(ours["median_s"])]
    memory = size(peak(ours))
    if theirs is None:
        return cells([*own, "not offered", "", memory, ""])
    faster = _faster(ours["speedup_over"]["torchvision"])
    return cells([*own, seconds(theirs["median_s"]), faster, memory, size(peak(theirs))])


def _convolutions(files: dict[str, list[Row]], keys: Sequence[tuple[str, str, str]] | None = None) -> str:
    """Times, peak memory and relative L2 errors against float64; a yardstick of other values has no error."""
    others = ["peak memory nasdet", "PyTorch", "error nasdet", "PyTorch"]
    lines = [cells(["", "nasdet", "PyTorch", "", "both on 2 threads", *others])]
    rows: list[Row] = []
    for bench, names in CONVOLUTIONS.items():
        found = races([row for row in files.get(bench, []) if is_plain(row)])
        for key in keys or found:
            race = found.get(key, {})
            rivals = [race[name] for name in names if name in race]
            if "nasdet" not in race or not rivals:
                continue
            ours, theirs = race["nasdet"], min(rivals, key=lambda row: row["median_s"])
            errors = [f"{row['error']:.1e}" if "error" in row else "" for row in (ours, theirs)]
            faster = _faster(ours["speedup_over"][theirs["contestant"]])
            times = [seconds(ours["median_s"]), seconds(theirs["median_s"]), faster, _on_two_threads(race, names)]
            lines.append(cells([f"`{bench}` {race_name(key)}", *times, size(peak(ours)), size(peak(theirs)), *errors]))
            rows += race.values()
    return f"{_place(rows)}:\n\n{with_rule(lines)}" if rows else ""


def _on_two_threads(race: Race, rivals: Sequence[str]) -> str:
    """The ratio to the fastest rival where a race on one thread has contestants on two."""
    ours, times = race.get("nasdet, 2 threads"), {name: race.get(f"{name}, 2 threads") for name in rivals}
    there = [row for row in times.values() if row is not None]
    if ours is None or not there:
        return ""
    return _faster(ours["speedup_over"][min(there, key=lambda row: row["median_s"])["contestant"]])


def _maps(files: dict[str, list[Row]]) -> str:
    """The mixed ops against plain PyTorch; a training step as the searches run it, overwriting its inputs."""
    lines = [cells(["", "time", "against eager", "against torch.compile", "memory against eager"])]
    rows: list[Row] = []
    for bench, key in MAPS:
        race = races([row for row in files.get(bench, []) if is_plain(row)]).get(key, {})
        best = race.get("nasdet overwrite_inputs") or race.get("nasdet")
        if best is not None and "eager" in race:
            lines.append(cells([f"`{bench}` {race_name(key)}", *_against_eager(best, race)]))
            rows += race.values()
    return f"{_place(rows)}:\n\n{with_rule(lines)}" if rows else ""


def _against_eager(best: Row, race: Race) -> list[str]:
    """Ratios of times, and of the tensors alive at the peak of the phase."""
    found = [seconds(best["median_s"])]
    for rival in ("eager", "torch.compile"):
        found.append(_faster(best["speedup_over"][rival]) if rival in race else "")
    ours, theirs = (row["peak_memory"].get(best["phase"], 0) for row in (best, race["eager"]))
    return [*found, f"{theirs / ours:.1f}x less" if ours else ""]


def _detection(files: dict[str, list[Row]]) -> str:
    lines: list[str] = [_HEAD]
    rows: list[Row] = []
    for bench, key in DETECTION:
        race = races([row for row in files.get(bench, []) if has_rivals(row)]).get(key, {})
        if "nasdet" in race and "torchvision" in race:
            lines.append(_against_torchvision(race_name(key), race))
            rows += race.values()
    return f"{_place(rows)}:\n\n{with_rule(lines)}" if rows else ""


def _detectors(files: dict[str, list[Row]]) -> str:
    """A line per detector and number of images: images per second, a training step, and ratios to torchvision."""
    found = races([row for row in files.get("detectors", []) if has_rivals(row)])
    lines = [cells(["800 x 1333 fp32", "inference", "torchvision", "", "training step", "torchvision", ""])]
    rows: list[Row] = []
    for case in dict.fromkeys(key[0] for key in found):
        line = [case]
        for phase in ("inference", "training step"):
            race = found.get((case, "fp32", phase), {})
            ours, theirs = race.get("nasdet"), race.get("torchvision")
            show = _rate if phase == "inference" else _step
            line += [show(row) if row else "" for row in (ours, theirs)]
            line.append(_faster(ours["speedup_over"]["torchvision"], 2) if ours and theirs else "")
            rows += race.values()
        lines.append(cells(line))
    return f"{_place(rows)}:\n\n{with_rule(lines)}" if rows else ""


def _rate(row: Row) -> str:
    return f"{row['images_per_s']:.2f} images/s, {size(row['peak_memory']['step'])}"


def _steps(files: dict[str, list[Row]]) -> str:
    """A line per number of images; times of every contestant with the memory of its tensors."""
    found = races([row for row in files.get("search_step", []) if is_plain(row)])
    if not found:
        return ""
    names = list(dict.fromkeys(name for race in found.values() for name in race))
    lines = [cells(["one FAD search step at 416 x 416 px", *names])]
    for key, race in found.items():
        lines.append(cells([key[0], *(_step(race[name]) if name in race else "" for name in names)]))
    threads = next(iter(next(iter(found.values())).values()))["environment"]["threads"]
    return f"Alphas, then weights, {threads} threads; time and peak memory:\n\n{with_rule(lines)}"


def _supernets(files: dict[str, list[Row]]) -> str:
    """A line per picture size: a NATS step fused and by reference, and their ratios."""
    lines = [cells(["one NATS search step, ResNet-50", "nasdet", "reference", "", ""])]
    found = races([row for row in files.get("supernet_nats", []) if is_plain(row)])
    rows: list[Row] = []
    for key, race in found.items():
        if not {"nasdet", "reference"} <= set(race):
            continue
        ours, theirs = race["nasdet"], race["reference"]
        faster = _faster(ours["speedup_over"]["reference"])
        less = f"{theirs['peak_memory']['step'] / ours['peak_memory']['step']:.1f}x less memory"
        lines.append(cells([key[0], _step(ours), _step(theirs), faster, less]))
        rows += race.values()
    if not rows:
        return ""
    threads = rows[0]["environment"]["threads"]
    return f"Weights, then alphas, {threads} threads; time and peak memory:\n\n{with_rule(lines)}"


def _step(row: Row) -> str:
    return f"{seconds(row['median_s'])}, {size(row['peak_memory']['step'])}"
