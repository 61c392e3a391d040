"""The NMS family on clustered boxes of one image, against torchvision and the reference."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from op_race import FORWARD, Call, Contestant, OpBench, Target
from rivals import padded_loop, torchvision_contestant
from scenes import class_ids, clustered_boxes, distinct_scores
from torch import Tensor

from nasdet._cases import Case, Inputs
from nasdet._dispatch import OPS
from nasdet.ops.nms import batched_nms, nms, nms_padded
from nasdet.ops.soft_nms import soft_nms

COUNTS = (100, 1000, 5000, 20000)
CLASSES = 80
THRESHOLD = 0.5
IMAGES, IMAGE_BOXES, MAX_OUT = 8, 1000, 300
TOO_SLOW = [f"{op}-{count}" for op in ("nms", "batched_nms") for count in (5000, 20000)]  # for timing the reference
# Bytes per box for sorting, a sorted copy and the kept list; a mask of n^2 bits is 2,500 a box at 20,000 boxes.
BYTES_PER_BOX = 200


def _boxes(inputs: Inputs, count: int) -> tuple[Tensor, Tensor]:
    return clustered_boxes(inputs, count), distinct_scores(inputs, count)


def _plain(count: int) -> Case:
    return Case(f"nms-{count}", lambda inputs: ((*_boxes(inputs, count), THRESHOLD), {}), large=True)


def _batched(count: int) -> Case:
    def make(inputs: Inputs) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        return (*_boxes(inputs, count), class_ids(inputs, count, CLASSES), THRESHOLD), {}

    return Case(f"batched_nms-{count}", make, large=True)


def _padded(inputs: Inputs) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    images = [(*_boxes(inputs, IMAGE_BOXES), class_ids(inputs, IMAGE_BOXES, CLASSES)) for _ in range(IMAGES)]
    boxes, scores, idxs = (torch.stack(column) for column in zip(*images, strict=True))
    return (boxes, scores, THRESHOLD, MAX_OUT), {"idxs": idxs}


def _soft(method: str) -> Case:
    return Case(f"soft_nms-{method}-5000", lambda inputs: (_boxes(inputs, 5000), {"method": method}), large=True)


def _by_index(count: int) -> Callable[[list[Tensor]], list[Tensor]]:
    """Kept indices and scores as the score of every box: two scores that rounding swaps swap their places in a list."""

    def dense(results: list[Tensor]) -> list[Tensor]:
        index, scores = results
        return [scores.new_zeros(count).scatter_(0, index, scores)]

    return dense


def _bench(op: str, call: Call, cases: list[Case], *rivals: Contestant, **options: Any) -> OpBench:
    reference = functools.partial(call, backend="reference")
    settings: dict[str, Any] = {"targets": (), "exact": True} | options
    ours = Contestant("nasdet", lambda: call)
    slow = Contestant("reference", lambda: reference, cases=[case.id for case in cases if case.id not in TOO_SLOW])
    return OpBench(
        OPS[op], (ours, *rivals, slow), cases=cases, file="nms", reference=reference, repeatable=True, **settings
    )


def _two_threads(call: Call, case: str) -> Contestant:
    return Contestant("nasdet, 2 threads", lambda: call, devices=("cpu",), cases=(case,), threads=2)


def _faster(factors: Mapping[str, float]) -> list[Target]:
    return [Target("nasdet", FORWARD, "torchvision", factor, cases=(case,)) for case, factor in factors.items()]


def _small(case: str, count: int) -> Target:
    return Target("nasdet", FORWARD, quantity="peak_memory", at_most=BYTES_PER_BOX * count, cases=(case,))


BENCHES = (
    _bench(
        "nms",
        nms,
        [_plain(count) for count in COUNTS],
        _two_threads(nms, "nms-20000"),
        torchvision_contestant(lambda ops: ops.nms),
        targets=[
            *_faster({"nms-100": 1.0, "nms-1000": 8.0, "nms-5000": 8.0, "nms-20000": 8.0}),
            _small("nms-20000", 20000),
        ],
    ),
    _bench(
        "batched_nms",
        batched_nms,
        [_batched(count) for count in COUNTS],
        _two_threads(batched_nms, "batched_nms-20000"),
        torchvision_contestant(lambda ops: ops.batched_nms),
        targets=[
            *_faster({"batched_nms-100": 1.0, "batched_nms-20000": 10.0}),
            _small("batched_nms-20000", 20000),
            Target("nasdet", FORWARD, at_most=0.15e-3, cases=("batched_nms-1000",), device="cuda"),
        ],
    ),
    _bench(
        "nms_padded",
        nms_padded,
        [Case(f"nms_padded-{IMAGES}x{IMAGE_BOXES}", _padded, large=True)],
        torchvision_contestant(padded_loop),
    ),
    _bench(
        "soft_nms",
        soft_nms,
        [_soft("linear"), _soft("gaussian")],
        exact=False,
        comparable=_by_index(5000),
    ),
)
ROWS = [
    pytest.param(bench, case, contestant.name, id=f"{case.id}-{contestant.name}")
    for bench in BENCHES
    for case in bench.large_cases()
    for contestant in bench.contestants
    if contestant.enters(case)
]


@pytest.mark.parametrize(("bench", "case", "contestant"), ROWS)
def test_nms(op_row: Callable[..., None], bench: OpBench, case: Case, contestant: str) -> None:
    op_row(bench, case, "fp32", FORWARD, contestant)
