"""``nasdet report RUN``: one HTML page about a run."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write one self-contained HTML page about a run"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb to its parser."""
    parser.description = (
        "Write one self-contained HTML page about a run: its architecture, alphas over time, loss and AP curves, "
        "detections on images, cost, and deviations from the paper. A section is there when its file is, so the page "
        "can be made at any time, also while the run is going on. The page needs no network and no other file."
    )
    parser.add_argument(
        "folder",
        metavar="RUN",
        type=Path,
        help="folder of a search, training or demo; subfolders that hold a run.json are told on the same page",
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the page (default: RUN/report.html)")


def run(folder: Path, out: Path | None = None) -> int:
    """Write the page and print its path."""
    from nasdet.report import write_report

    print(write_report(folder, out))
    return 0
