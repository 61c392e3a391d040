"""``mixed_dilation_conv2d`` and ``grouped_dilation_conv2d`` at NATS's shapes, against PyTorch's convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from op_race import DTYPES, FORWARD, PHASES, TRAINING, Call, Contestant, OpBench, Setting, Target, compiled
from torch import Tensor

from nasdet._cases import Case
from nasdet._dispatch import OPS
from nasdet.ops._dilation import Pair, pair, same_conv2d
from nasdet.ops.grouped_dilation_conv2d import grouped_dilation_conv2d
from nasdet.ops.mixed_dilation_conv2d import mixed_dilation_conv2d

MIXED, GROUPED = OPS["mixed_dilation_conv2d"], OPS["grouped_dilation_conv2d"]
CHANNELS = (128, 256, 512)
SHAPES = {c: (f"c{c}-n1", f"c{c}-n2") for c in CHANNELS}
HALVES = ("c128-n1", "c256-n1", "x101-stage-3", "batch-8-small-maps")  # the cases that are run in bfloat16 as well

Dilations = Sequence[int | Pair]


def eager(x: Tensor, weight: Tensor, mix: Tensor, dilations: Dilations, stride: Any = 1, groups: int = 1) -> Tensor:
    """The mixture as the paper writes it: a convolution per dilation, then the weighted sum of the maps."""
    columns = mix.to(x.dtype).repeat_interleave(weight.shape[1] // mix.shape[1], dim=1)
    total = None
    for dilation, kernel, column in zip(dilations, weight, columns, strict=True):
        y = same_conv2d(x, kernel, pair("dilation", dilation), pair("stride", stride), groups)
        term = y * column[:, None, None]
        total = term if total is None else total + term
    assert total is not None
    return total


def eager_folded(
    x: Tensor, weight: Tensor, mix: Tensor, dilations: Dilations, stride: Any = 1, groups: int = 1
) -> Tensor:
    """The same with the weights of the mixture taken into the kernels: fewer passes over maps, as many convolutions."""
    columns = mix.to(x.dtype).repeat_interleave(weight.shape[1] // mix.shape[1], dim=1)
    total = None
    for dilation, kernel in zip(dilations, weight * columns[:, :, None, None, None], strict=True):
        y = same_conv2d(x, kernel, pair("dilation", dilation), pair("stride", stride), groups)
        total = y if total is None else total + y
    assert total is not None
    return total


def plain(
    x: Tensor, weight: Tensor, dilations: Dilations, splits: Sequence[int], stride: Any = 1, groups: int = 1
) -> Tensor:
    """One convolution of the same cost with the first of the dilations for all channels: the yardstick."""
    return same_conv2d(x, weight, pair("dilation", dilations[0]), pair("stride", stride), groups)


def _forced(call: Call, algorithm: str) -> Call:
    return lambda *arguments: call(*arguments, algorithm=algorithm)


def _exact(*arguments: Any) -> Tensor:
    return grouped_dilation_conv2d(*arguments, precision="exact")


def _split_and_concatenated(*arguments: Any) -> Tensor:
    return GROUPED.reference(*arguments)


def _least_work(setting: Setting, phase: str) -> tuple[int, float]:
    """Each map and weight moved once; operations of the direct form: the union of the taps for the mixture."""
    x, weight, *rest = setting.arguments
    mixed = weight.dim() == 5
    dilations, stride, groups = (rest[1], rest[2], rest[3]) if mixed else (rest[0], rest[2], rest[3])
    channels, fan, kernel = weight.shape[-4], weight.shape[-3], weight.shape[-1]
    sh, sw = pair("stride", stride)
    pixels = x.shape[0] * -(-x.shape[2] // sh) * -(-x.shape[3] // sw)
    taps = len(union_of_taps(dilations, kernel)) if mixed else kernel**2
    moved = x.nbytes + pixels * channels * x.element_size() + weight.nbytes
    flops = 2.0 * pixels * channels * fan * taps
    assert fan * groups == x.shape[1]
    return (moved, flops) if phase == FORWARD else (3 * moved, 3 * flops)


def union_of_taps(dilations: Dilations, kernel: int) -> set[Pair]:
    """The places that the kernels of all dilations read, relative to the output's."""
    steps = range(-(kernel // 2), kernel // 2 + 1)
    return {(i * d[0], j * d[1]) for d in (pair("dilation", d) for d in dilations) for i in steps for j in steps}


def _times(contestant: str, over: str, forward: Sequence[float], training: Sequence[float]) -> list[Target]:
    """Promises per width, in both batch sizes."""
    return [
        Target(contestant, phase, over, factor, cases=SHAPES[c])
        for phase, factors in ((FORWARD, forward), (TRAINING, training))
        for c, factor in zip(CHANNELS, factors, strict=True)
    ]


def _never_slower(over: str, cases: Sequence[str]) -> list[Target]:
    return [Target("nasdet", phase, over, 1.0, cases=cases, dtypes=DTYPES) for phase in PHASES]


ALL = tuple(case for cases in SHAPES.values() for case in cases)
MIXED_BENCH = OpBench(
    MIXED,
    (
        Contestant("nasdet", lambda: mixed_dilation_conv2d),
        Contestant("nasdet, 2 threads", lambda: mixed_dilation_conv2d, devices=("cpu",), cases=ALL, threads=2),
        Contestant("nasdet direct", lambda: _forced(mixed_dilation_conv2d, "direct"), devices=("cpu",)),
        # PyTorch 2.13's bfloat16 weight gradient of a grouped convolution is wrong on some CPUs.
        Contestant("eager", lambda: eager, may_fail=True),
        Contestant("eager, folded kernels", lambda: eager_folded, may_fail=True),
        Contestant("torch.compile", lambda: compiled(eager), may_fail=True, devices=("cuda",)),
    ),
    [
        *_times("nasdet", "eager", (8.0, 6.0, 3.8), (10.0, 7.5, 5.5)),
        *_times("nasdet", "eager, folded kernels", (8.0, 6.0, 3.8), (10.0, 7.5, 5.5)),
        *_times("nasdet, 2 threads", "nasdet", (1.7,) * 3, (1.7,) * 3),
        *(Target("nasdet", TRAINING, "eager", 3.0, "resident_memory", cases=SHAPES[c]) for c in CHANNELS),
        *_never_slower("eager", ("c128-stride-2", "x101-stage-3", "batch-8-small-maps", "c128-n1-nchw")),
        *_never_slower("eager, folded kernels", ("c128-stride-2", "x101-stage-3", "batch-8-small-maps")),
        *(Target("nasdet", phase, "eager", 1.0, cases=ALL, dtypes=("bf16",)) for phase in PHASES),
        *(
            Target("nasdet", TRAINING, rival, factor, device="cuda", cases=SHAPES[c], dtypes=("bf16",))
            for c in CHANNELS[:2]
            for rival, factor in (("eager", 3.0), ("torch.compile", 2.0))
        ),
    ],
    work=_least_work,
)
GROUPED_BENCH = OpBench(
    GROUPED,
    (
        Contestant("nasdet", lambda: grouped_dilation_conv2d),
        Contestant("nasdet, 2 threads", lambda: grouped_dilation_conv2d, devices=("cpu",), cases=ALL, threads=2),
        Contestant("nasdet exact", lambda: _exact, devices=("cpu",)),
        Contestant("split and concatenated", lambda: _split_and_concatenated),
        Contestant("one convolution", lambda: plain, same=False),
    ),
    [
        *_times("nasdet", "one convolution", (1.75, 2.0, 1.8), (1.7, 1.7, 1.7)),
        *_times("nasdet, 2 threads", "nasdet", (1.7,) * 3, (1.7,) * 3),
        *(
            Target("nasdet", FORWARD, "one convolution", factor, cases=(f"plain-c{c}",))
            for c, factor in zip(CHANNELS, (2.5, 2.8, 2.3), strict=True)
        ),
        *_never_slower("split and concatenated", ("x101-stage-3",)),
        *(
            Target("nasdet", FORWARD, "one convolution", 1 / 1.15, device="cuda", cases=SHAPES[c], dtypes=("bf16",))
            for c in CHANNELS[:2]
        ),
    ],
    work=_least_work,
)
ROWS = [
    pytest.param(
        bench, case, dtype, phase, contestant.name, id=f"{bench.name}-{case.id}-{dtype}-{phase}-{contestant.name}"
    )
    for bench in (MIXED_BENCH, GROUPED_BENCH)
    for case in bench.large_cases()
    for dtype in (("fp32", "bf16") if case.id in HALVES else ("fp32",))
    for phase in PHASES
    for contestant in bench.contestants
    if contestant.enters(case)
]


@pytest.mark.parametrize(("bench", "case", "dtype", "phase", "contestant"), ROWS)
def test_dilation_conv(
    op_row: Callable[..., None], bench: OpBench, case: Case, dtype: str, phase: str, contestant: str
) -> None:
    op_row(bench, case, dtype, phase, contestant)
