"""``nasdet data``: make the built-in data set, or check a folder of your own."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nasdet.data import DataFolder, DetectionDataset

HELP = "make the built-in digits data set, or check a data folder"

_EPILOG = """\
examples:
  nasdet data digits --out data/digits      a small detection set, made on the spot, no download
  nasdet data digits --classification --out data/digit_classes       one digit to a picture, for nasdet pretrain
  nasdet data check data/digits             is this folder fit for training? what is in it?
  nasdet data check data/coco --skip-bad    count what is broken instead of stopping at it

A data folder is in COCO's layout
  annotations/instances_train*.json  annotations/instances_val*.json  train*/  val*/
or in PASCAL VOC's, with its 20 classes (annotations of your own classes: as COCO)
  JPEGImages/  Annotations/  ImageSets/Main/
"""

_DIGITS = """\
Real handwritten digits from scikit-learn, in random ink over crops of its two photographs: 10 classes, 1 to 8 objects
of 10 to 100 pixels per image, some images with none, boxes and masks. Written as a COCO folder; with --classification
one large digit to a picture, in folders train/CLASS and val/CLASS. The same arguments give the same files; a folder
that already holds exactly this set is left alone, one that holds anything else is refused.
"""

_DIGITS_EPILOG = """\
examples:
  nasdet data digits --out data/digits
  nasdet data digits --out data/large --train 2000 --val 500 --size 320x480 --seed 1
  nasdet data digits --classification --out data/digit_classes
"""

_CHECK = """\
Reads every annotation and decodes every image of a COCO or VOC folder. Stops at the first problem, naming the file and
the record (exit code 1), or with --skip-bad drops bad records and counts them. Then prints images and objects per class
and size, and the split that a search would use: search-train fits weights, search-val chooses the architecture, test is
kept for the final number and never chosen by.
"""

_CHECK_EPILOG = """\
examples:
  nasdet data check data/digits
  nasdet data check data/coco --masks --skip-bad --json > report.json

sizes as in COCO: small < 32^2 <= medium <= 96^2 < large, in pixels of area.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``nasdet data``."""
    raw = argparse.RawDescriptionHelpFormatter
    parser.epilog, parser.formatter_class = _EPILOG, raw
    verbs = parser.add_subparsers(dest="action", metavar="digits | check", required=True)

    digits = verbs.add_parser(
        "digits", help="make the digits data set", description=_DIGITS, epilog=_DIGITS_EPILOG, formatter_class=raw
    )
    digits.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to make")
    digits.add_argument(
        "--classification", action="store_true", help="pictures of one digit, in a folder for each class"
    )
    digits.add_argument("--train", type=int, metavar="N", help="training images (400; for classification 2000)")
    digits.add_argument("--val", type=int, metavar="N", help="validation images (200; for classification 500)")
    digits.add_argument(
        "--size", type=_size, metavar="HxW", help="height x width in pixels (192x256; for classification 32x32)"
    )
    digits.add_argument("--seed", type=int, default=0, metavar="S", help="of everything random (default: %(default)s)")

    check = verbs.add_parser(
        "check", help="check a data folder", description=_CHECK, epilog=_CHECK_EPILOG, formatter_class=raw
    )
    check.add_argument("path", type=Path, metavar="DIR", help="COCO or VOC folder")
    check.add_argument("--skip-bad", action="store_true", help="drop bad records and images, and count them")
    check.add_argument("--masks", action="store_true", help="check masks too (COCO)")
    check.add_argument("--seed", type=int, default=0, metavar="S", help="seed of the split (default: %(default)s)")
    check.add_argument("--json", action="store_true", dest="as_json", help="print one JSON object")


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be HxW, as in 192x256, got {text!r}")
    return int(match[1]), int(match[2])


def run(*, action: str, **arguments: Any) -> int:
    """Run ``nasdet data digits`` or ``nasdet data check``; 0 when all is well, 1 for bad data or a refused folder."""
    try:
        return digits(**arguments) if action == "digits" else check(**arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def digits(
    *,
    out: Path,
    train: int | None = None,
    val: int | None = None,
    size: tuple[int, int] | None = None,
    seed: int = 0,
    classification: bool = False,
) -> int:
    """Make the digits data set at ``out`` and say what is there; None: the defaults of the set's kind."""
    from nasdet.data import ClassificationFolder, open_data, write_digit_classes, write_digits

    given = {name: value for name, value in (("train", train), ("val", val), ("size", size)) if value is not None}
    settings: dict[str, Any] = {"seed": seed, **given}
    if classification:
        folder = ClassificationFolder(write_digit_classes(out, **settings))
        print(f"train: {len(folder.train())} images, test: {len(folder.test())}, {len(folder.categories)} classes")
        print(f"next: nasdet pretrain --backbone resnet18 --data {quote(str(out))} --out RUN --preset tiny --no-flip")
        return 0
    write_digits(out, **settings)
    folder_of_boxes = open_data(out)
    for name, dataset in _annotated(folder_of_boxes).items():
        print(f"{name}: {len(dataset)} images, {_count(dataset)['objects']} objects, {dataset.annotation}")
    print(f"next: nasdet data check {quote(str(out))}")
    return 0


def check(*, path: Path, skip_bad: bool = False, masks: bool = False, seed: int = 0, as_json: bool = False) -> int:
    """Check every record and image of the folder ``path`` and report what is in it."""
    from nasdet.data import open_data

    folder = open_data(path, seed=seed, skip_bad=skip_bad, masks=masks)
    if not skip_bad:  # opening with skip_bad has decoded them already
        for dataset in _annotated(folder).values():
            dataset.verify_images()
    report = describe(folder)
    print(json.dumps(report, indent=1) if as_json else _text(report))
    return 0


def describe(folder: DataFolder) -> dict[str, Any]:
    """What ``nasdet data check`` reports, as plain data."""
    split = folder.split
    examples = {reason: text for d in _annotated(folder).values() for reason, text in d.skipped_examples.items()}
    return {
        "path": str(folder.path),
        "layout": folder.layout,
        "categories": list(folder.categories),
        "data": {name: _count(dataset) for name, dataset in _annotated(folder).items()},
        "split": {
            "search_train": len(split.search_train),
            "search_val": len(split.search_val),
            "test": len(split.test),
            "seed": split.seed,
            "sha256": split.sha256,
        },
        "skipped": folder.skipped,
        "skipped_examples": examples,
    }


def _annotated(folder: DataFolder) -> dict[str, DetectionDataset]:
    return {"train": folder.trainval} | ({} if folder.testset is None else {"test": folder.testset})


def _count(dataset: DetectionDataset) -> dict[str, Any]:
    per_class = [0] * len(dataset.categories)
    sizes = {"small": 0, "medium": 0, "large": 0}
    crowds = 0
    for picture in dataset.pictures:
        for label, area, iscrowd in zip(picture.labels.tolist(), picture.area, picture.iscrowd, strict=True):
            per_class[label] += 1
            sizes["small" if area < 32**2 else "medium" if area <= 96**2 else "large"] += 1
            crowds += int(iscrowd)
    return {
        "images": len(dataset),
        "images_without_objects": sum(not len(picture.labels) for picture in dataset.pictures),
        "objects": sum(per_class),
        "crowd_or_difficult": crowds,
        "per_size": sizes,
        "per_class": dict(zip(dataset.categories, per_class, strict=True)),
    }


def _text(report: dict[str, Any]) -> str:
    lines = [f"{report['path']}: {report['layout'].upper()} folder, {len(report['categories'])} categories"]
    for name, counts in report["data"].items():
        sizes = ", ".join(f"{number} {size}" for size, number in counts["per_size"].items())
        lines.append(
            f"{name}: {counts['images']} images ({counts['images_without_objects']} without objects), "
            f"{counts['objects']} objects ({sizes}; {counts['crowd_or_difficult']} crowd or difficult)"
        )
    width = max(map(len, report["categories"]))
    parts = list(report["data"].values())
    lines += [f"  {'class':{width}} " + "".join(f"{name:>9}" for name in report["data"])]
    for category in report["categories"]:
        lines.append(f"  {category:{width}} " + "".join(f"{counts['per_class'][category]:9}" for counts in parts))
    split = report["split"]
    lines.append(
        f"split (seed {split['seed']}): {split['search_train']} search-train, {split['search_val']} search-val, "
        f"{split['test']} test; sha256 {split['sha256']}"
    )
    for reason, number in sorted(report["skipped"].items()):
        lines.append(f"skipped {number} x {reason}; first: {report['skipped_examples'][reason]}")
    if not report["skipped"]:
        lines.append("no problem found")
    return "\n".join(lines)
