"""The command line: one module per verb, each with ``HELP``, ``configure(parser)`` and a typed ``run(**arguments)``."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence

# verb -> module; a new verb is a module here and one entry
VERBS = {
    "info": "info",
    "data": "data",
    "search": "search",
    "pretrain": "pretrain",
    "train": "train",
    "eval": "evaluate",
    "detect": "detect",
    "report": "report",
    "arch": "arch",
    "measure": "measure",
    "demo": "demo",
}

_EPILOG = """\
begin here:
  nasdet demo --out runs/demo            search, retrain, compare and draw, in minutes on a CPU
  nasdet info                            what can run on this machine, and why the rest can't

step by step:
  nasdet data digits --out digits
  nasdet search fad --data digits --out runs/search --preset tiny
  nasdet train --card runs/search/card.json --data digits --out runs/net --preset tiny --no-flip
  nasdet report runs/net

nasdet VERB --help explains a verb.
"""


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    from nasdet._version import __version__

    parser = argparse.ArgumentParser(
        prog="nasdet",
        description="Architecture searches for object detectors, on fast operators.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nasdet {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, name in VERBS.items():
        module = importlib.import_module(f"nasdet.cli.{name}")
        module.configure(verbs.add_parser(verb, help=module.HELP))
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a verb. Exit code 2 and one line on stderr for bad input, 130 and how to go on when interrupted."""
    options = vars(build_parser().parse_args(arguments))
    verb = options.pop("verb")
    module = importlib.import_module(f"nasdet.cli.{VERBS[verb]}")
    try:
        return int(module.run(**options) or 0)
    except KeyboardInterrupt as error:
        print(f"nasdet: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, ModuleNotFoundError) as error:
        if "NASDET_TRACEBACK" in os.environ:  # for bug reports
            raise
        print(f"nasdet {verb}: {error}", file=sys.stderr)
        return 2
