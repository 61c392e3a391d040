"""``nasdet search METHOD``: search an architecture on a data folder."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from shlex import quote
from types import ModuleType
from typing import Any

from nasdet.cli import names, search_classification, search_detnas, search_fad, search_hit, search_msnas, search_nats
from nasdet.cli.search_options import parse_size
from nasdet.cli.splits import open_divided, placed

HELP = "search a detector's architecture on a data folder"

# method -> module with HELP, DESCRIPTION, EPILOG, PRESETS, configure(parser) and run(settings, folder, out, ...), or
# run_alone(data=..., out=..., ...) in the place of the last
METHODS: dict[str, ModuleType] = {
    "fad": search_fad,
    "nats": search_nats,
    "detnas": search_detnas,
    "msnas": search_msnas,
    "hit": search_hit,
    "classification": search_classification,
}
# What is no setting of a method's, and passed on where it has such an option.
_PLACES = ("weights", "device", "backend", "no_repshare", "no_decouple")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb to its parser."""
    parser.description = (
        "Search an architecture: a supernet that holds every choice is trained on one part of the training images, and "
        "chosen from by another part: by gradients (fad, nats, hit), or by evolution over its paths (detnas, msnas; "
        "classification: by accuracy). Test "
        "images are never used. The run folder gets the architecture found (card.json), and everything to resume, "
        "retrain and report."
    )
    methods = parser.add_subparsers(dest="method", required=True, metavar="METHOD")
    for name, module in METHODS.items():
        method = methods.add_parser(
            name,
            help=module.HELP,
            description=module.DESCRIPTION,
            epilog=module.EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.configure(method)


def run(
    method: str,
    data: Path,
    out: Path,
    resume: bool = False,
    preset: str = "paper",
    size: str | None = None,
    skip_bad: bool = False,
    **options: Any,
) -> int:
    """Search, and print the derived architecture and where it lies."""
    from nasdet.arch import load_card
    from nasdet.detectors import WITH_MASKS
    from nasdet.engine.distributed import is_main, restarted
    from nasdet.spaces import is_backbone

    resume = resume or restarted()
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    module = METHODS[method]
    if (run_alone := getattr(module, "run_alone", None)) is not None:  # of another kind of data
        lines = run_alone(data=data, out=out, resume=resume, preset=preset, skip_bad=skip_bad, **options)
        if is_main():
            print("\n".join(lines))
        return 0
    places = {name: options.pop(name) for name in _PLACES if name in options}
    given = {name: value for name, value in options.items() if value is not None}
    if "backbone" in given:
        given["backbone"] = names.backbone_option(given["backbone"])
    settings = {**module.PRESETS[preset], **given}
    if "norm" not in given and (places.get("weights") or given.get("screen_weights")):
        settings.pop("norm", None)  # a preset's is for random weights: what was pretrained has norms already
    if size is not None:
        settings["short_side"], settings["long_side"] = parse_size(size)
    # A resumed run keeps its division of the images, and so does one that takes another's supernet.
    taken = settings.get("supernet")
    stored = (out if resume or taken is None else Path(taken)) / "split.json"
    split = stored if (resume or taken is not None) and stored.is_file() else None
    cards = placed(options.get("backbone")) if split is None else []
    masks = settings.get("detector") in WITH_MASKS
    folder = open_divided(data, cards, split=split, seed=settings.get("seed", 0), skip_bad=skip_bad, masks=masks)
    if folder.skipped and is_main():
        print("skipped: " + ", ".join(f"{number} {reason}" for reason, number in folder.skipped.items()))
    command = ["nasdet", *sys.argv[1:]]
    lines = module.run(settings, folder, out, resume=resume, command=command, **places)
    if is_main():
        for line in lines:
            print(line)
        if not (out / "card.json").is_file():
            return 0
        recipe = "" if preset == "paper" else f" --preset {preset}"
        recipe += f" --size {size}" if recipe and size is not None else ""
        recipe += " --no-flip" if given.get("flip") is False else ""
        # Those of a searched backbone are a supernet's; others fit the net that was found as well.
        if places.get("weights") and not is_backbone(load_card(out / "card.json")):
            recipe += f" --weights {quote(str(places['weights']))}"
        named = f"--card {quote(str(out / 'card.json'))} --data {quote(str(data))}"
        print(f"retrain it:  nasdet train {named} --out RUN{recipe}")
    return 0
