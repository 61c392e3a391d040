"""``nasdet measure``: latencies on this device as a table of blocks, and rank correlations of scores."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from nasdet._checks import check_whole
from nasdet.cli import measure_tau
from nasdet.cli.arch_info import parse_size

HELP = "latency of a space's blocks on this device; rank correlation of one-shot and stand-alone scores"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb to its parser."""
    parser.description = (
        "What a search is held to, and whether its scores can be trusted:\n"
        "  latency   times the blocks of a search space here; their sum predicts the latency of every net of it\n"
        "  tau       whether one-shot scores rank nets as training each of them by itself does"
    )
    parser.epilog = (
        "examples:\n"
        "  nasdet measure latency --space detnas-small --out latency.json --threads 1 --check 10\n"
        "  nasdet measure tau scores.csv\n"
        "nasdet measure ACTION --help explains an action."
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _configure_latency(actions.add_parser("latency", help="time the blocks of a search space on this device"))
    measure_tau.configure(actions.add_parser("tau", help=measure_tau.HELP))


def _configure_latency(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time every block of a search space on this device: median milliseconds over rounds that run each block once,\n"
        "one picture, evaluation mode, channels_last. The sum of its blocks predicts a net's latency. Some random\n"
        "nets (--check) are timed whole in the same rounds, and the error of their predictions is reported.\n"
        "\n"
        "The table is written after every round. The same command again measures only what is missing: the rest of an\n"
        "interrupted measurement, more --rounds, more nets to --check; a table of other settings is refused."
    )
    parser.epilog = (
        "examples:\n"
        "  nasdet measure latency --space detnas-small --out latency.json --threads 1 --check 10\n"
        "  nasdet measure latency --space msnas-r18 --size 576x1024 --device cuda:0 --dtype float16 --out gpu.json\n"
        "In a search: table = nasdet.measure.LatencyTable.load(FILE, blocks, size) is a cost of cards, as in\n"
        'Constraint("latency", table, high=80). See docs/measure.md.'
    )
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    names = ", ".join(spaces())
    add("--space", required=True, metavar="NAME", help=names)
    add("--out", required=True, type=Path, metavar="FILE", help="the table, as JSON; continued when it is there")
    add("--size", metavar="HxW", help="picture size in pixels (detnas, hit: 800x1216; msnas: 832x1280)")
    add("--threads", type=int, metavar="N", help="threads of the CPU (default: as many as torch takes)")
    add("--device", metavar="DEVICE", help="such as cuda:0 or cpu (default: a GPU when there is one)")
    add("--dtype", default="float32", metavar="NAME", help="float32, bfloat16 or float16 (float32)")
    add("--clock", metavar="NAME", help="wall, or on a CPU with other work thread (needs --threads 1) (GPU: cuda)")
    add("--rounds", type=int, default=15, metavar="N", help="samples of each block (15)")
    add("--check", type=int, default=5, metavar="N", help="random nets to time whole, 0 for none (5)")
    add("--seed", type=int, default=0, metavar="N", help="of the random nets (0)")
    add("--proposals", type=int, metavar="N", help="of hit: RoIs that the head runs on, as in the search (1000)")
    add("--shuffle", choices=("even_odd", "halves"), help="of detnas: permutation between blocks (even_odd)")
    add("--json", action="store_true", help="print the table and the check as JSON")


def spaces() -> dict[str, Callable[..., Any]]:
    """What can be measured, by name: one more method is one more import and entry."""
    from nasdet.spaces.detnas.latency import DetNASBlocks
    from nasdet.spaces.hit.latency import HitBlocks
    from nasdet.spaces.msnas.latency import MSNASBlocks

    methods: dict[str, Any] = {"detnas": DetNASBlocks, "msnas": MSNASBlocks, "hit": HitBlocks}
    return {
        f"{method}-{variant}": partial(blocks.of, variant)
        for method, blocks in methods.items()
        for variant in blocks.variants
    }


def run(action: str, **arguments: Any) -> int:
    """Measure latencies, or correlate."""
    actions: dict[str, Callable[..., int]] = {"latency": _latency, "tau": measure_tau.run}
    return actions[action](**arguments)


def _latency(
    space: str,
    out: Path,
    size: str | None,
    device: str | None,
    check: int,
    json: bool,
    proposals: int | None,
    shuffle: str | None,
    **options: Any,
) -> int:
    from nasdet.engine.distributed import local_device
    from nasdet.measure import measure_table

    known = spaces()
    if space not in known:
        raise ValueError(f"space must be one of {', '.join(known)}, got {space!r}")
    if proposals is not None and not space.startswith("hit-"):
        raise ValueError(f"proposals must be left out for {space}, whose blocks see whole pictures, got {proposals}")
    if shuffle is not None and not space.startswith("detnas-"):
        raise ValueError(f"shuffle must be left out for {space}, whose blocks have none, got {shuffle!r}")
    ways: dict[str, Any] = {} if shuffle is None else {"shuffle": shuffle}
    if proposals is not None:
        ways["proposals"] = check_whole("proposals", proposals)
    blocks = known[space](**ways)
    pixels = blocks.usual_size if size is None else parse_size(size)
    table = measure_table(blocks, pixels, out, local_device(device), nets=check, after=_tell, **options)
    if json:
        print(_dumps(table))
    else:
        print("\n".join(_lines(table, space, out)))
    return 0


def _tell(done: int, rounds: int) -> None:
    end = "\r" if sys.stderr.isatty() and done < rounds else "\n"
    print(f"round {done} of {rounds}", end=end, file=sys.stderr, flush=True)


def _dumps(table: Any) -> str:
    check = table.check()
    found = None if check is None else {**vars(check), "rank": check.rank and check.rank.to_json()}
    predicts = {"fixed": table.fixed, "places": table.rows, "reachable": table.reachable()}
    return json.dumps({**table.record.to_json(), **predicts, "check": found}, indent=1)


def _lines(table: Any, space: str, out: Path) -> list[str]:
    """The table as text: blocks, what can be reached, and the check."""
    setting = table.setting
    size = "x".join(map(str, setting.size))
    lines = [f"{space} at {size}, in {out}"]
    lines += [f"{setting.device}, {setting.threads} threads, {setting.dtype}, {setting.clock} clock", ""]
    width = max(map(len, table.latencies))
    lines += [f"{'block':<{width}}  {'median':>10}  middle half"]
    lines += [f"{key:<{width}}  {one.ms:>7.3f} ms  {one.iqr:.3f} ms wide" for key, one in table.latencies.items()]
    if reachable := table.reachable():
        lines += ["", f"nets: {reachable[0]:.1f} to {reachable[1]:.1f} ms, {table.fixed:.3f} ms of it for all"]
    if check := table.check():
        width = max(len(name) for name, _, _ in check.nets)
        lines += ["", f"{'whole net':<{width}}  {'predicted':>10}  {'measured':>10}   error"]
        for name, predicted, measured in check.nets:
            error = predicted / measured - 1
            lines.append(f"{name:<{width}}  {predicted:>7.2f} ms  {measured:>7.2f} ms  {error:>+6.1%}")
        lines.append(
            f"error: {check.mean_error:.1%} in the mean, {check.worst_error:.1%} at worst, {check.bias:+.1%} bias"
        )
        if check.rank:
            lines.append(f"ranks: {measure_tau.in_words(check.rank)}")
    return lines
