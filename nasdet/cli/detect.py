"""``nasdet detect``: find objects in pictures and draw them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

HELP = "find objects in pictures with a trained run, and draw them"

_DESCRIPTION = """\
Detect objects in your own pictures with the model of a training run. Writes a copy of each picture with the boxes,
class names and scores drawn on it, and detections.json with the figures. The pictures themselves are not touched.
"""

_EPILOG = """\
examples:
  nasdet detect runs/plain picture.jpg --out found
  nasdet detect runs/plain a.jpg b.png holiday/ --out found --threshold 0.5
  nasdet detect runs/plain holiday/ --out found --skip-bad        go on past pictures that cannot be read

found/ gets picture.detections.jpg for each picture (in folders, pictures so named are passed over), and
detections.json: for each picture its file, width, height and detections, best first, each with category, score and box
[x1, y1, x2, y2] in pixels of the picture as stored, and from a detector of masks its mask as COCO run-length encoding.
"""

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
DRAWING = ".detections.jpg"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb to its parser."""
    parser.description, parser.epilog = _DESCRIPTION, _EPILOG
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("folder", metavar="RUN", type=Path, help="folder of a training run")
    add("images", metavar="IMAGE", type=Path, nargs="+", help="picture, or a folder of pictures")
    add("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    add("--threshold", type=float, default=0.3, metavar="X", help="leave out detections that score less (0.3)")
    add("--device", metavar="DEVICE", help="such as cuda:0 or cpu (default: a GPU when there is one)")
    add("--skip-bad", action="store_true", help="go on past a missing or unreadable picture")


def run(
    *,
    folder: Path,
    images: Sequence[Path],
    out: Path,
    threshold: float = 0.3,
    device: str | None = None,
    skip_bad: bool = False,
) -> int:
    """Detect on every picture, write the drawings and detections.json, and print one line for each picture."""
    from nasdet._files import write_json
    from nasdet.data import DataError
    from nasdet.engine.distributed import local_device
    from nasdet.engine.evaluate import load_run
    from nasdet.engine.layout import place_model

    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in 0..1, got {threshold}")
    if (out / "run.json").is_file():  # whose detections.json are those of its test part
        raise ValueError(f"out must be a folder of its own, got the run {out}")
    paths, where = pictures(images), local_device(device)
    model, config = load_run(folder, where)
    place_model(model, where)
    names = list(config.categories) or [str(label) for label in range(config.num_classes)]
    found: list[dict[str, Any]] = []
    skipped: list[dict[str, str]] = []
    targets: set[Path] = set()
    try:
        for path in paths:
            try:
                entry, drawing = _detect(model, path, names, (config.short_side, config.long_side), threshold, where)
            except DataError as error:
                if not skip_bad:
                    raise
                skipped.append({"file": str(path), "reason": str(error)})
                print(f"skipped: {error}", file=sys.stderr)
                continue
            target = _target(out, path, targets)
            _save(drawing, target)
            found.append(entry | {"drawing": target.name})
            print(f"{path}: {_words(entry['detections'])} -> {target}")
    finally:  # what was found until a bad picture or Ctrl-C is kept, as its drawings are
        if found:
            facts = {"run": str(folder), "threshold": threshold}
            write_json(out / "detections.json", facts | {"images": found, "skipped": skipped})
    if not found:
        raise ValueError(f"no picture could be read, {len(skipped)} skipped")
    return 0


def pictures(paths: Sequence[Path]) -> list[Path]:
    """The files, and for a folder the pictures in it by name, without drawings of this verb."""
    found = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            continue
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        inside = [file for file in inside if not file.name.endswith(DRAWING)]
        if not inside:
            raise ValueError(f"{path}: no picture in this folder ({', '.join(SUFFIXES)})")
        found += inside
    return found


def _detect(
    model: Any, path: Path, names: Sequence[str], size: tuple[int, int], threshold: float, device: torch.device
) -> tuple[dict[str, Any], Any]:
    import random

    import torch
    from PIL import Image

    from nasdet.data import Resize, collate, read_image
    from nasdet.engine.evaluate import detect_batch
    from nasdet.report.draw import draw_detections

    image = read_image(path)
    height, width = image.shape[-2:]
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64), "area": torch.zeros(0)}
    target = {**empty, "iscrowd": torch.zeros(0, dtype=torch.bool), "size": (height, width)}
    batch = collate([Resize(*size)(image, target, random.Random(0))])
    (detection,) = detect_batch(model, batch, device=device)
    masks = detection.pop("masks", None)
    sure = detection["scores"] >= threshold
    detection = {key: value[sure] for key, value in detection.items()}
    rows: list[dict[str, Any]] = [
        {"category": names[label], "score": round(score, 4), "box": [round(value, 2) for value in box]}
        for label, score, box in zip(*(detection[key].tolist() for key in ("labels", "scores", "boxes")), strict=True)
    ]
    if "mask_scores" in detection:
        for row, score in zip(rows, detection["mask_scores"].tolist(), strict=True):
            row["mask_score"] = round(score, 4)
    if masks is not None:
        masks = [mask for mask, kept in zip(masks, sure.tolist(), strict=True) if kept]
        for row, mask in zip(rows, masks, strict=True):
            row["mask"] = {"size": mask["size"], "counts": mask["counts"].decode("ascii")}
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    scale = max(1.0, 480 / max(height, width))  # type on a thumbnail would cover what it names
    found = (detection["boxes"], detection["labels"], detection["scores"])
    drawing = draw_detections(picture, *found, names, scale=scale, masks=masks)
    return {"file": str(path), "width": width, "height": height, "detections": rows}, drawing


def _target(out: Path, path: Path, taken: set[Path]) -> Path:
    """A file of its own for each picture, also when two have one name."""
    target, number = out / f"{path.stem}{DRAWING}", 2
    while target in taken:
        target, number = out / f"{path.stem}-{number}{DRAWING}", number + 1
    taken.add(target)
    return target


def _save(drawing: Any, target: Path) -> None:
    from nasdet._files import write_atomic

    write_atomic(target, lambda file: drawing.save(file, "JPEG", quality=92))


def _words(detections: Sequence[dict[str, Any]]) -> str:
    """``3 person, 1 dog``."""
    counts: dict[str, int] = {}
    for detection in detections:
        counts[detection["category"]] = counts.get(detection["category"], 0) + 1
    listed = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return ", ".join(f"{count} {name}" for name, count in listed) or "nothing"
