"""The command line: one module per verb, each with ``HELP``, ``configure(parser)`` and a typed ``run(**arguments)``."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

from nasdet.engine.signals import handled

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
    """Run a verb. Exit code 2 and one line on stderr for bad input, 130 and how to go on when interrupted.

    SIGTERM interrupts as Ctrl-C does. Who does not read stdout or stderr (any more) stops nothing.
    """
    with _streams():
        name = "nasdet"
        try:
            with handled(signal.default_int_handler, signal.SIGTERM):
                options = vars(build_parser().parse_args(arguments))
                verb = options.pop("verb")
                name = f"nasdet {verb}"
                module = importlib.import_module(f"nasdet.cli.{VERBS[verb]}")
                _say_what_is_new(options)
                status = int(module.run(**options) or 0)
                sys.stdout.flush()  # while what the disk does not take can still be told
                return status
        except KeyboardInterrupt as error:
            print(f"nasdet: {str(error) or 'interrupted'}", file=sys.stderr)
            return 130
        except (ValueError, TypeError, OSError, RuntimeError, ModuleNotFoundError) as error:
            if "NASDET_TRACEBACK" in os.environ:  # for bug reports
                raise
            print(f"{name}: {error}", file=sys.stderr)
            return 2


def _say_what_is_new(options: Mapping[str, Any]) -> None:
    """That ``--resume`` finds no run, which a mistyped ``--out`` may be the reason of; a new one is what follows."""
    first = os.environ.get("RANK", "0") == "0"
    if first and options.get("resume") and not (options["out"] / "run.json").is_file():
        print(f"nothing to resume in {options['out']}: a new run begins", file=sys.stderr)


@contextlib.contextmanager
def _streams() -> Iterator[None]:
    """Standard output and error that can be written to the end, whatever became of those of the process."""
    with contextlib.ExitStack() as stack:
        for name, redirect in (("stdout", contextlib.redirect_stdout), ("stderr", contextlib.redirect_stderr)):
            stream = getattr(sys, name)  # None where it was closed: `2>&-`
            if stream is None:
                stream = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            patient: Any = _Patient(stream)
            stack.enter_context(redirect(patient))
            stack.callback(patient.end)
        yield


class _Patient:
    """A stream that goes on into nothing once its reader has left (``| head -1``).

    A run of hours must not end for its progress bar, and what is left to print is no error.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except BrokenPipeError:
            self._into_nothing()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except BrokenPipeError:
            self._into_nothing()

    def end(self) -> None:
        """Leave nothing to the interpreter's own flush at its end, which would complain."""
        try:
            self._stream.flush()
        except OSError:
            self._into_nothing()

    def _into_nothing(self) -> None:
        # Under the same number: what the stream still holds has to go somewhere too.
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
