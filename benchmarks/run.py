"""Runs the benchmark files one by one, each in a pytest of its own, and records what each measured as it ends.

    python benchmarks/run.py [--out FOLDER] [--bench NAME]... [--minutes N] [--results FOLDER] [-- PYTEST OPTIONS]

Whatever fails or is stopped later, rows that were measured stay: in ``FOLDER/<bench>.json``, as pytest-benchmark writes
it, and in the result files. The tables are written at the end. The exit status is 1 when a row failed, when the time
was up, or when nothing was measured.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tables
from record import record

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results"
PYTEST = ("-q", "-p", "no:cacheprovider", "--benchmark-sort=name", "--benchmark-columns=median,iqr,rounds")
PASSED, NONE_CHOSEN = 0, 5  # exit statuses of pytest; 5: no test was selected, by -k and the like
TO_STOP = 60.0  # seconds that a stopped pytest has to write what it measured


@dataclass
class Run:
    """What became of one benchmark file."""

    name: str
    status: int | None  # pytest's; None: stopped, or not begun
    measured: bool = False

    @property
    def failed(self) -> bool:
        return self.status not in (PASSED, NONE_CHOSEN)

    def __str__(self) -> str:
        if self.status is None:
            return f"{self.name}: out of time{', recorded in part' if self.measured else ''}"
        verdict = {PASSED: "passed", NONE_CHOSEN: "nothing chosen"}.get(self.status, f"failed, status {self.status}")
        return f"{self.name}: {verdict}{'' if self.measured else ', nothing measured'}"


def names(folder: Path = FOLDER) -> list[str]:
    return sorted(path.stem.removeprefix("bench_") for path in folder.glob("bench_*.py"))


def pytest_command(name: str, target: Path, options: Sequence[str]) -> list[str]:
    file = str(FOLDER / f"bench_{name}.py")
    return [sys.executable, "-m", "pytest", file, *PYTEST, f"--benchmark-json={target}", *options]


def run_one(command: Sequence[str], seconds: float | None) -> int | None:
    """The exit status; None when the time was up. Whatever ends this wait, it does not outlive it."""
    with subprocess.Popen(command) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                _interrupt(process)


def _interrupt(process: subprocess.Popen[bytes]) -> None:
    """Interrupted, pytest saves what it has."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(TO_STOP)
    except subprocess.TimeoutExpired:
        process.kill()


def keep(target: Path, results: Path) -> bool:
    """Record the rows of a finished run; whether there were any."""
    if not target.is_file() or not target.stat().st_size:
        return False
    try:
        for path in record(target, results):
            print(path)
    except (ValueError, KeyError) as error:  # of a run that was killed as it wrote, or has no row of this project
        sys.stderr.write(f"run: {error}\n")
        return False
    return True


def run_all(
    chosen: Sequence[str],
    out: Path,
    results: Path,
    minutes: float | None,
    options: Sequence[str],
    command: Callable[[str, Path, Sequence[str]], Sequence[str]] = pytest_command,
) -> list[Run]:
    """``command`` makes the command line of a benchmark from its name, its JSON file and pytest's options."""
    out.mkdir(parents=True, exist_ok=True)
    until = None if minutes is None else time.monotonic() + 60 * minutes
    runs = []
    for name in chosen:
        target = out / f"{name}.json"
        target.unlink(missing_ok=True)  # what an earlier run left is not what this one measured
        left = None if until is None else until - time.monotonic()
        if left is not None and left <= 0:
            runs.append(Run(name, None))
            continue
        status = run_one(command(name, target, options), left)
        runs.append(Run(name, status, keep(target, results)))
    return runs


def main(arguments: list[str] | None = None) -> int:
    given = sys.argv[1:] if arguments is None else arguments
    split = given.index("--") if "--" in given else len(given)
    parser = argparse.ArgumentParser(description="Run the benchmarks file by file, and record each as it ends.")
    parser.add_argument("--out", type=Path, default=FOLDER.parent / ".benchmarks", help="folder of pytest's JSON files")
    parser.add_argument("--bench", action="append", choices=names(), help="one of the files, more by repetition (all)")
    parser.add_argument("--minutes", type=float, help="stop after so long")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    options = parser.parse_args(given[:split])
    chosen = options.bench or names()
    runs = run_all(chosen, options.out.resolve(), options.results, options.minutes, given[split + 1 :])
    written = tables.main([]) if options.results == RESULTS else 0  # the tables are of the project's own results
    print("\n".join(map(str, runs)))
    return int(any(run.failed for run in runs) or not any(run.measured for run in runs) or written != 0)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # begun in the background, it and its own would ignore it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # and what was started ends too
    sys.exit(main())
