"""RoIAlign of 1,000 clustered RoIs, over four levels and over one, against torchvision (where installed)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from op_race import FORWARD, PHASES, TRAINING, Call, Contestant, OpBench, Setting, Target
from rivals import pooler, torchvision_contestant
from scenes import pyramid, regions
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nasdet._cases import Case, Inputs
from nasdet._dispatch import OPS
from nasdet.ops.roi_align import multilevel_roi_align, roi_align

CHANNELS, ROIS, SIZE, SAMPLING = 256, 1000, 7, 2
SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)
LAYOUTS = {"nhwc": "channels_last", "nchw": "contiguous"}
MAIN = tuple(f"pooler-{layout}" for layout in LAYOUTS)
OUTPUT_BYTES = 4 * ROIS * CHANNELS * SIZE * SIZE  # 50 MB; the four maps have 92 MB
EXTRA_BYTES = 4 * 2**20  # what the op may need beside its output: nothing of the size of a map


def _pooler(name: str, layout: str, *, rois: int = ROIS, size: int = SIZE, sampling: int = SAMPLING) -> Case:
    def make(inputs: Inputs) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        boxes = regions(Inputs(device=inputs.device), rois)
        options = {"output_size": size, "spatial_scales": SCALES, "sampling_ratio": sampling}
        return (pyramid(inputs, CHANNELS, LAYOUTS[layout]), boxes), options

    return Case(f"pooler-{layout}{name}", make, large=True)


def _single(layout: str) -> Case:
    def make(inputs: Inputs) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        options = {"output_size": SIZE, "spatial_scale": SCALES[1], "sampling_ratio": SAMPLING}
        features = pyramid(inputs, CHANNELS, LAYOUTS[layout])[1]
        return ([features], regions(Inputs(device=inputs.device), ROIS)), options

    return Case(f"roi_align-{layout}", make, large=True)


def _work(setting: Setting, phase: str) -> tuple[int, float]:
    """Least bytes: the output, and in training its gradient and that of every map; how much of the maps is read depends
    on the boxes. Operations, where the number of samples is fixed: 4 products and 4 sums per sample and channel."""
    maps, rois = setting.maps, setting.arguments[1]
    size, sampling = setting.options["output_size"], setting.options["sampling_ratio"]
    values = len(rois) * maps[0].shape[1] * size**2
    moved, flops = values * maps[0].element_size(), 8.0 * values * max(sampling, 0) ** 2
    return (moved, flops) if phase == FORWARD else (2 * moved + sum(x.nbytes for x in maps), 2 * flops)


def _of_list(call: Call) -> Call:
    """``roi_align`` of the one map in a list: the races hand maps over in lists."""
    return lambda features, rois, **options: call(features[0], rois, **options)


def _piecewise(call: Call) -> Call:
    """The reference on 64 RoIs at a time, nothing kept for the backward: its samples of 1,000 would take gigabytes."""
    exact = functools.partial(call, backend="reference")

    def run(features: list[Tensor], rois: Tensor, **options: Any) -> Tensor:
        return torch.cat([checkpoint(exact, features, part, use_reentrant=False, **options) for part in rois.split(64)])

    return run


def _bench(op: str, call: Call, cases: list[Case], rival: Call, **options: Any) -> OpBench:
    return OpBench(
        OPS[op],
        (
            Contestant("nasdet", lambda: call),
            Contestant("nasdet, 2 threads", lambda: call, devices=("cpu",), cases=MAIN, threads=2),
            torchvision_contestant(rival),
            Contestant(
                "reference", lambda: functools.partial(call, backend="reference"), cases=("pooler-nhwc-10-rois",)
            ),
        ),
        cases=cases,
        file="roi_align",
        reference=_piecewise(call),
        work=_work,
        repeatable=True,
        **options,
    )


def _promises() -> list[Target]:
    factors = {"pooler-nhwc": {FORWARD: 10.0, TRAINING: 10.0}, "pooler-nchw": {FORWARD: 6.0, TRAINING: 10.0}}
    targets = [
        Target("nasdet", phase, "torchvision", factor, cases=(case,))
        for case, by_phase in factors.items()
        for phase, factor in by_phase.items()
    ]
    targets += [Target("nasdet", phase, "torchvision", 3.0, cases=MAIN[:1], device="cuda") for phase in PHASES]
    targets += [Target("nasdet, 2 threads", phase, "nasdet", 1.7, cases=MAIN) for phase in PHASES]
    most = OUTPUT_BYTES + EXTRA_BYTES
    targets += [Target("nasdet", FORWARD, quantity="peak_memory", at_most=most, cases=MAIN)]
    return [*targets, Target("nasdet", FORWARD, "torchvision", 1.0, cases=("pooler-nhwc-10-rois",))]


POOLER = _bench(
    "multilevel_roi_align",
    multilevel_roi_align,
    [
        *(_pooler("", layout) for layout in LAYOUTS),
        *(_pooler("-adaptive", layout, sampling=0) for layout in LAYOUTS),
        _pooler("-14x14", "nhwc", size=14),
        _pooler("-10-rois", "nhwc", rois=10),
    ],
    pooler,
    targets=_promises(),
)
SINGLE = _bench(
    "roi_align",
    _of_list(roi_align),
    [_single(layout) for layout in LAYOUTS],
    lambda ops: _of_list(functools.partial(ops.roi_align, aligned=False)),
    targets=[Target("nasdet", phase, "torchvision", 6.0) for phase in PHASES],
)
ROWS = [
    pytest.param(bench, case, dtype, phase, contestant.name, id=f"{case.id}-{dtype}-{phase}-{contestant.name}")
    for bench in (POOLER, SINGLE)
    for case in bench.large_cases()
    for dtype in (("fp32", "bf16") if case.id in MAIN else ("fp32",))
    for phase in PHASES
    for contestant in bench.contestants
    if contestant.enters(case)
]


@pytest.mark.parametrize(("bench", "case", "dtype", "phase", "contestant"), ROWS)
def test_roi_align(
    op_row: Callable[..., None], bench: OpBench, case: Case, dtype: str, phase: str, contestant: str
) -> None:
    op_row(bench, case, dtype, phase, contestant)
