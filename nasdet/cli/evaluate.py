"""``nasdet eval``: average precision of a trained run."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from nasdet.cli.splits import with_split

HELP = "average precision of a training run"

_DESCRIPTION = """\
Detect on one part of a data folder with a run's model, and report COCO's average precision (mean over IoU 0.50 to
0.95, at most 100 detections per image), by pycocotools, or by faster-coco-eval where that is installed (same figures).
-1 stands for "there is nothing to find", 0 for "nothing was found". A detector of masks gets the figures of both.
"""

_EPILOG = """\
examples:
  nasdet eval runs/plain                              on the test part of the data it was trained on
  nasdet eval runs/plain --data other/digits          on another folder with the same categories
  nasdet eval runs/plain --json > plain.json

parts: test is the one to report. search-val chose the architecture in a search, and a training run has trained on it:
its figure says how well the model fits, not how good it is.

RUN gets eval.json and detections.json (COCO results); for search-val eval-search-val.json and so on; nothing when
--data is other data than the run's.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb to its parser."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("folder", metavar="RUN", type=Path, help="folder of a training run; unfinished ones have a checkpoint too")
    add("--data", type=Path, metavar="DIR", help="COCO or VOC folder (default: the one of the run)")
    add("--split", choices=("test", "search-val"), default="test", help="part to evaluate on (default: test)")
    add("--batch", type=int, default=4, metavar="N", help="images at a time (4)")
    add("--workers", type=int, default=2, metavar="N", help="processes that read pictures (2)")
    add("--device", metavar="DEVICE", help="such as cuda:0 or cpu (default: a GPU when there is one)")
    add("--amp", action="store_true", help="compute the model in bfloat16")
    add("--skip-bad", action="store_true", help="leave out bad images and records")
    add("--json", action="store_true", dest="as_json", help="print one JSON object")


def run(
    *,
    folder: Path,
    data: Path | None = None,
    split: str = "test",
    batch: int = 4,
    workers: int = 2,
    device: str | None = None,
    amp: bool = False,
    skip_bad: bool = False,
    as_json: bool = False,
) -> int:
    """Evaluate, and print the figures."""
    import torch

    from nasdet.data import Split, open_data
    from nasdet.engine import distributed
    from nasdet.engine.evaluate import evaluate, load_run_at, predicts_masks
    from nasdet.engine.layout import place_model
    from nasdet.engine.runs import read_info

    where = distributed.local_device(device)
    model, config, step = load_run_at(folder, where)
    if data is None:
        recorded = read_info(folder).get("data")
        if recorded is None or not Path(recorded).is_dir():
            raise ValueError(f"{folder}: its data folder is not there ({recorded}): say where with --data DIR")
        data = Path(recorded)
    opened = with_split(open_data(data, skip_bad=skip_bad, masks=predicts_masks(model)), folder / "split.json")
    own = (folder / "split.json").is_file() and opened.split == Split.load(folder / "split.json")
    if tuple(opened.categories) != tuple(config.categories):
        raise ValueError(f"{data}: its categories must be those of {folder}: {', '.join(config.categories[:5])}, ...")
    dataset = opened.test() if split == "test" else opened.search_val()
    with distributed.process_group(where):
        layout = place_model(model, where)
        options: dict[str, Any] = {"batch": batch, "workers": workers, "device": where, "amp": amp}
        options["channels_last"] = layout is torch.channels_last
        size: dict[str, Any] = {"short": config.short_side, "long": config.long_side}
        summary = evaluate(model, dataset, out=folder if own else None, step=step, **options, **size)
        if distributed.is_main():
            print(json.dumps(summary, indent=1) if as_json else table(summary))
    return 0


def table(summary: dict[str, Any]) -> str:
    """The figures as text: the summary, then AP by category, best first."""
    head = f"{summary['split']}: {summary['images']} images, {summary['detections']} detections"
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    lines = [f"{head}, by {summary['backend']}", "  ".join(f"{name} {summary[name]:.4f}" for name in names)]
    if "masks" in summary:
        lines.append("masks: " + "  ".join(f"{name} {summary['masks'][name]:.4f}" for name in names))
    width = max((len(name) for name in summary["per_category"]), default=0)
    for name, value in sorted(summary["per_category"].items(), key=lambda pair: -pair[1]):
        lines.append(f"  {name:{width}}  " + (f"{value:.4f}" if value >= 0 else "none to find"))
    return "\n".join(lines)
