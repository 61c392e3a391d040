"""Random cases of every operator against float64 references: ``make fuzz SEED=0 MINUTES=10``.

    python tests/fuzz/fuzz.py --seed 0 --seconds 600                      # 20,000 cases of every op, or fewer in time
    python tests/fuzz/fuzz.py --op nms --seed 0 --index 123               # one case again

A case depends on its seed, op and index alone. Exit status: 0 all cases right; 1 a case failed; 2 too little time.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from convolutions import fuzz_depthwise_conv2d, fuzz_grouped_dilation_conv2d, fuzz_mixed_dilation_conv2d
from drawing import Draw
from losses_and_sums import fuzz_mix, fuzz_norm_act_mix, fuzz_sigmoid_focal_loss
from overlaps import fuzz_box_iou, fuzz_generalized_box_iou
from pooling import fuzz_multilevel_roi_align, fuzz_roi_align
from suppression import fuzz_batched_nms, fuzz_nms, fuzz_nms_padded, fuzz_soft_nms
from tqdm import tqdm

from nasdet import _library

FUZZERS: dict[str, Callable[[Draw], None]] = {
    "roi_align": fuzz_roi_align,
    "multilevel_roi_align": fuzz_multilevel_roi_align,
    "nms": fuzz_nms,
    "batched_nms": fuzz_batched_nms,
    "nms_padded": fuzz_nms_padded,
    "soft_nms": fuzz_soft_nms,
    "sigmoid_focal_loss": fuzz_sigmoid_focal_loss,
    "mix": fuzz_mix,
    "norm_act_mix": fuzz_norm_act_mix,
    "mixed_dilation_conv2d": fuzz_mixed_dilation_conv2d,
    "grouped_dilation_conv2d": fuzz_grouped_dilation_conv2d,
    "depthwise_conv2d": fuzz_depthwise_conv2d,
    "box_iou": fuzz_box_iou,
    "generalized_box_iou": fuzz_generalized_box_iou,
}
BATCH = 100  # cases of one task
THREADS = (1, 1, 1, 3)  # of the cases in turns


@dataclass(frozen=True)
class Batch:
    """Cases ``first .. first + count - 1`` of an op: how many were run until ``deadline``, and the first failure."""

    op: str
    count: int
    failure: str = ""


def run_case(seed: int, op: str, index: int, backend: str) -> str:
    """What is wrong with one case, with what it was; empty if nothing is."""
    draw = Draw(seed, op, index, backend)
    before, threads = torch.get_num_threads(), THREADS[index % len(THREADS)]
    try:
        torch.set_num_threads(threads)
        FUZZERS[op](draw)
    except Exception:  # also what an op raises where it should not
        facts = "".join(f"\n  {name}: {value}" for name, value in draw.notes.items())
        what = f"{op}, seed {seed}, case {index}, backend {backend}, threads {threads}"
        return f"{what}{facts}\n{traceback.format_exc(limit=-4)}"
    finally:
        torch.set_num_threads(before)
    return ""


def run_batch(seed: int, op: str, first: int, count: int, backend: str, deadline: float) -> Batch:
    """The cases of a batch until one fails or time is up; ``deadline`` by ``time.time``, the same in every process."""
    for index in range(first, first + count):
        if time.time() > deadline:
            return Batch(op, index - first)
        if failure := run_case(seed, op, index, backend):
            return Batch(op, index - first + 1, failure)
    return Batch(op, count)


def _batches(ops: Sequence[str], cases: int) -> Iterator[tuple[str, int, int]]:
    """All ops in turns, so that a short time is spread over them."""
    for first in range(0, cases, BATCH):
        for op in ops:
            yield op, first, min(BATCH, cases - first)


def fuzz(seed: int, seconds: float, ops: Sequence[str], cases: int, jobs: int, backend: str) -> int:
    """Run ``cases`` of each op within ``seconds``; the exit status."""
    deadline = time.time() + seconds
    done = dict.fromkeys(ops, 0)
    failures: dict[str, str] = {}
    with (
        ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool,
        tqdm(total=cases * len(ops), desc=f"fuzz, seed {seed}", unit="case", disable=None) as progress,
    ):
        tasks = [pool.submit(run_batch, seed, *batch, backend, deadline) for batch in _batches(ops, cases)]
        for task in as_completed(tasks):
            batch = task.result()
            done[batch.op] += batch.count
            progress.update(batch.count)
            if batch.failure and batch.op not in failures:
                failures[batch.op] = batch.failure
                progress.write(batch.failure, file=sys.stderr)
    for op in ops:
        print(f"{op:22s} {done[op]:7,d} cases{'   FAILED' if op in failures else ''}")
    for failure in failures.values():
        op, seed_text, case, *_ = failure.splitlines()[0].split(", ")
        again = f"--op {op} --seed {seed_text.split()[1]} --index {case.split()[1]}"
        print(f"failed: {op}; once more: python tests/fuzz/fuzz.py {again}")
    if failures:
        return 1
    if short := [op for op in ops if done[op] < cases]:
        print(f"time was up before {cases:,} cases of {', '.join(short)}: give more time or fewer cases")
        return 2
    return 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare random cases of the operators with float64 references.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600.0, help="time limit of the whole run (600)")
    parser.add_argument("--cases", type=int, default=20000, help="of every op (20,000)")
    parser.add_argument("--op", choices=FUZZERS, action="append", help="only this one; may be repeated")
    parser.add_argument("--index", type=int, help="only this case")
    parser.add_argument("--jobs", type=int, default=0, help="processes (0: all processors)")
    parser.add_argument("--backend", default="cpp", choices=("cpp", "reference"))
    options = parser.parse_args(arguments)
    if options.backend == "cpp" and (reason := _library.why_not("cpu")):
        sys.stderr.write(f"fuzz: the compiled operators are missing: {reason}\n")
        return 2
    ops = options.op or list(FUZZERS)
    if options.index is not None:
        failures = [run_case(options.seed, op, options.index, options.backend) for op in ops]
        print("\n".join(failure for failure in failures if failure) or "right")
        return int(any(failures))
    jobs = options.jobs or len(os.sched_getaffinity(0))
    return fuzz(options.seed, options.seconds, ops, options.cases, jobs, options.backend)


if __name__ == "__main__":
    sys.exit(main())
