"""Pieces of the result tables: rows grouped into races, their names, units, and markdown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nasdet._files import read_json

Row = dict[str, Any]
Race = dict[str, Row]  # by contestant
ORDER = (
    "mixed_dilation_conv2d",
    "grouped_dilation_conv2d",
    "depthwise_conv2d",
    "mix",
    "norm_act_mix",
    "nms",
    "roi_align",
    "sigmoid_focal_loss",
    "paste_masks",
    "detectors",
    "search_step",
    "supernet_nats",
    "supernet_hit",
    "path_step",
)
_MAPS = {"fpn-p3": "2x96x100x152", "fpn-p4": "2x256x50x76", "fpn-p3-nhwc": "2x96x100x152 channels_last"}
_NMS = {f"{op}-{n}": f"`{op}`, {n:,} boxes" for op in ("nms", "batched_nms") for n in (100, 1000, 5000, 20000)} | {
    "nms_padded-8x1000": "`nms_padded`, 8 x 1,000 boxes",
    "soft_nms-linear-5000": "`soft_nms` linear, 5,000 boxes",
    "soft_nms-gaussian-5000": "`soft_nms` gaussian, 5,000 boxes",
}
_FOCAL = {f"2x76725x80{sum_}": f"`sigmoid_focal_loss` 2x76725x80{sum_}" for sum_ in ("", " sum", " sum, gamma 1.5")}
_ROI = {
    f"{case}-{layout}{variant}": f"`{op}` {layout.upper()}{note}"
    for case, op in (("pooler", "multilevel_roi_align"), ("roi_align", "roi_align"))
    for layout in ("nhwc", "nchw")
    for variant, note in (
        ("", ""),
        ("-adaptive", ", adaptive sampling"),
        ("-14x14", ", 14 x 14"),
        ("-10-rois", ", 10 RoIs"),
    )
}
_SIDES = {128: "100x152", 256: "50x76", 512: "25x38"}
_CONV = {f"c{c}-n{n}": f"{n}x{c}x{sides}" for c, sides in _SIDES.items() for n in (1, 2)} | {
    **{f"plain-c{c}": f"plain 3x3 1x{c}x{sides}" for c, sides in _SIDES.items()},
    "c128-n1-nchw": "1x128x100x152 NCHW",
    "c128-stride-2": "1x128x200x304 stride 2",
    "x101-stage-3": "1x256x100x152 in 32 groups",
    "batch-8-small-maps": "8x64x16x24",
    "c128-n4": "4x128x100x168",
    "c256-n4": "4x256x50x84",
    "c256-n32": "32x256x50x84",
    **{f"c128-n4-{count}-dilations": f"4x128x100x168, {count} dilations" for count in (2, 4, 8)},
}
_MASKS = {"paste_masks-100x28": "paste and encode"}
CASES = _MAPS | _NMS | _ROI | _FOCAL | _CONV | _MASKS | {"100 sum": "`sigmoid_focal_loss` 100 sum"}


def result_files(machine: Path) -> dict[str, list[Row]]:
    """The rows of every benchmark of a machine's folder, in the order of the tables."""
    files = {path.stem: read_json(path)["rows"] for path in machine.glob("*.json")}
    return dict(sorted(files.items(), key=lambda item: (ORDER.index(item[0]) if item[0] in ORDER else 99, item[0])))


def by_environment(files: dict[str, list[Row]]) -> list[dict[str, list[Row]]]:
    """The same files once per environment that they were measured in: without torchvision, and with it."""
    parts = []
    for rival in (False, True):
        part = {name: [row for row in rows if has_rivals(row) is rival] for name, rows in files.items()}
        parts.append({name: rows for name, rows in part.items() if rows})
    return [part for part in parts if part]


def has_rivals(row: Row) -> bool:
    return bool(row["environment"].get("torchvision"))


def is_plain(row: Row) -> bool:
    """Measured without rival libraries, or where there is one environment for everything: on a GPU."""
    return not has_rivals(row) or row["environment"]["device"] != "cpu"


def races(rows: list[Row]) -> dict[tuple[str, str, str], Race]:
    """Rows of one environment by (case, dtype, phase) and contestant."""
    found: dict[tuple[str, str, str], Race] = {}
    for row in rows:
        found.setdefault((row["case"], row["dtype"], row["phase"]), {})[row["contestant"]] = row
    return found


def race_name(key: tuple[str, str, str]) -> str:
    case, dtype, phase = key
    return f"{CASES.get(case, case)} {dtype}, {phase}"


def machine_and_versions(rows: list[Row]) -> str:
    """Where the rows were measured, and with which libraries."""
    env = max(rows, key=lambda row: row["date"])["environment"]
    place = env["cpu"] + f" ({env['isa']})" if env["device"] == "cpu" else env["device"]
    words = [f"**{place}**"]
    for key, label in (("torch", "PyTorch"), ("torchvision", "torchvision")):
        versions = sorted({row["environment"][key] for row in rows if row["environment"].get(key)})
        words += [f"{label} {' and '.join(versions)}"] if versions else []
    return ", ".join(words)


def peak(row: Row) -> int:
    """The peak of a row's phase, with what is taken from malloc beside the tensors, where that is known."""
    memory, phase = row["peak_memory"], row["phase"]
    return int(max(memory[phase], memory.get(f"{phase}, resident", 0)))


def seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms" if value >= 1e-3 else f"{value * 1e6:.0f} us"


def size(value: float) -> str:
    return f"{value / 1e6:,.0f} MB" if value >= 1e6 else f"{value / 1e3:,.0f} kB"


def cells(values: list[str]) -> str:
    return "| " + " | ".join(values) + " |"


def with_rule(lines: list[str]) -> str:
    """A table: the first line is its head."""
    columns = lines[0].count("|") - 1
    return "\n".join([lines[0], "|" + " --- |" * columns, *lines[1:]])
