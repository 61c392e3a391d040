"""``mixed_dilation_conv2d`` and ``grouped_dilation_conv2d`` at NATS's shapes, against PyTorch's convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from op_race import DTYPES, FORWARD, PHASES, TF32, TRAINING, Call, Contestant, OpBench, Setting, Target, compiled
from torch import Tensor

from nasdet._cases import Case, Inputs
from nasdet._dispatch import OPS
from nasdet.ops._dilation import Pair, pair, same_conv2d
from nasdet.ops.grouped_dilation_conv2d import grouped_dilation_conv2d
from nasdet.ops.mixed_dilation_conv2d import mixed_dilation_conv2d

MIXED, GROUPED = OPS["mixed_dilation_conv2d"], OPS["grouped_dilation_conv2d"]
CHANNELS = (128, 256, 512)
SHAPES = {c: (f"c{c}-n1", f"c{c}-n2") for c in CHANNELS}
HALVES = ("c128-n1", "c256-n1", "x101-stage-3", "batch-8-small-maps")  # the cases that are run in other dtypes as well

# On a CUDA device alone: what was promised there, by shapes that fill it. The last has several waves of tiles.
GPU_MAPS = {"c128-n4": (4, 128, 100, 168), "c256-n4": (4, 256, 50, 84), "c256-n32": (32, 256, 50, 84)}
PROMISED, LARGE_N = ("c128-n4", "c256-n4"), "c256-n32"
SPLITS = {128: (64, 16, 16, 16, 16), 256: (112, 48, 32, 32, 32)}
SET_C: tuple[int | Pair, ...] = (1, 2, 3, (1, 3), (3, 1))
# Memory by the number of dilations G: kernels grow with it, what a call takes beside them must not.
BY_DILATIONS = {f"c128-n4-{count}-dilations": tuple(range(1, count + 1)) for count in (2, 4, 8)}
MAP_BYTES = 2 * 4 * 128 * 100 * 168  # one bfloat16 map of these
# Output, the map's gradient, and of all taps together sums in float32, which are cut into as many chunks as fill the
# device: about a map. Three maps, and room for a fourth; the branches of eight dilations alone would be eight.
MOST_MAPS = 4

Dilations = Sequence[int | Pair]


def gpu_case(name: str, shape: Sequence[int], dilations: Dilations, splits: Sequence[int] = ()) -> Case:
    """A channels_last map and kernels to convolve it with: of the grouped form where ``splits`` are given."""

    def make(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        channels, scale = shape[1], (9 * shape[1]) ** -0.5
        x = inputs.randn(*shape, layout="channels_last")
        if splits:
            return (x, inputs.randn(channels, channels, 3, 3, scale=scale), dilations, splits, 1, 1), {}
        mix = torch.stack([inputs.weights(len(dilations)) for _ in range(channels)], dim=1)
        kernels = inputs.randn(len(dilations), channels, channels, 3, 3, scale=scale)
        return (x, kernels, mix, dilations, 1, 1), {}

    return Case(name, make, large=True)


MIXED_ON_GPU = [
    *(gpu_case(name, shape, SET_C) for name, shape in GPU_MAPS.items()),
    *(gpu_case(name, GPU_MAPS["c128-n4"], dilations) for name, dilations in BY_DILATIONS.items()),
]
GROUPED_ON_GPU = [gpu_case(name, shape, SET_C, SPLITS[shape[1]]) for name, shape in GPU_MAPS.items()]


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


ON_GPU: dict[str, Any] = {"device": "cuda", "dtypes": ("bf16",)}


def _on_gpu(phase: str, over: str, factor: float) -> Target:
    return Target("nasdet", phase, over, factor, cases=PROMISED, **ON_GPU)


def _share_of_matrix_peak() -> Target:
    return Target("nasdet", FORWARD, quantity="matrix_share", at_least=0.55, cases=(LARGE_N,), **ON_GPU)


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
        Contestant(
            "eager, folded kernels, 2 threads",
            lambda: eager_folded,
            may_fail=True,
            devices=("cpu",),
            cases=ALL,
            threads=2,
        ),
        # Where it is promised something, and beside the smallest maps: it takes long to compile.
        Contestant(
            "torch.compile",
            lambda: compiled(eager),
            may_fail=True,
            devices=("cuda",),
            cases=("c128-n1", "c256-n1", *GPU_MAPS),
        ),
    ),
    [
        *_times("nasdet", "eager", (8.0, 6.0, 3.8), (10.0, 7.5, 5.5)),
        *_times("nasdet", "eager, folded kernels", (8.0, 6.0, 3.8), (10.0, 7.5, 5.5)),
        *_times("nasdet, 2 threads", "nasdet", (1.7,) * 3, (1.7,) * 3),
        *(Target("nasdet", TRAINING, "eager", 3.0, "resident_memory", cases=SHAPES[c]) for c in CHANNELS),
        *_never_slower("eager", ("c128-stride-2", "x101-stage-3", "batch-8-small-maps", "c128-n1-nchw")),
        *_never_slower("eager, folded kernels", ("c128-stride-2", "x101-stage-3", "batch-8-small-maps")),
        *(Target("nasdet", phase, "eager", 1.0, cases=ALL, dtypes=("bf16",)) for phase in PHASES),
        *(_on_gpu(TRAINING, rival, factor) for rival, factor in (("eager", 3.0), ("torch.compile", 2.0))),
        _share_of_matrix_peak(),
        *(
            Target("nasdet", phase, quantity=quantity, at_most=maps * MAP_BYTES, cases=tuple(BY_DILATIONS), **ON_GPU)
            for phase, quantity, maps in ((TRAINING, "kept_memory", 1.25), (TRAINING, "peak_memory", MOST_MAPS))
        ),
    ],
    work=_least_work,
    cases=[*MIXED.cases, *MIXED_ON_GPU],
)
GROUPED_BENCH = OpBench(
    GROUPED,
    (
        Contestant("nasdet", lambda: grouped_dilation_conv2d),
        Contestant("nasdet, 2 threads", lambda: grouped_dilation_conv2d, devices=("cpu",), cases=ALL, threads=2),
        Contestant("nasdet exact", lambda: _exact, devices=("cpu",)),
        Contestant("split and concatenated", lambda: _split_and_concatenated),
        Contestant("one convolution", lambda: plain, same=False),
        Contestant("one convolution, 2 threads", lambda: plain, same=False, devices=("cpu",), cases=ALL, threads=2),
    ),
    [
        *_times("nasdet", "one convolution", (1.75, 2.0, 1.8), (1.7, 1.7, 1.7)),
        *_times("nasdet, 2 threads", "nasdet", (1.7,) * 3, (1.7,) * 3),
        *(
            Target("nasdet", FORWARD, "one convolution", factor, cases=(f"plain-c{c}",))
            for c, factor in zip(CHANNELS, (2.5, 2.8, 2.3), strict=True)
        ),
        *_never_slower("split and concatenated", ("x101-stage-3",)),
        _on_gpu(FORWARD, "one convolution", 1 / 1.15),
        _share_of_matrix_peak(),
    ],
    work=_least_work,
    cases=[*GROUPED.cases, *GROUPED_ON_GPU],
)
ON_GPU_ALONE = (*GPU_MAPS, *BY_DILATIONS)


def dtypes_of(case: Case, device: str) -> tuple[str, ...]:
    """What a case is raced in on a device: () where it is not for it."""
    if case.id in ON_GPU_ALONE:
        return ("bf16",) if device == "cuda" else ()
    if case.id not in HALVES:
        return ("fp32",)
    return ("fp32", TF32, "bf16") if device == "cuda" else ("fp32", "bf16")


def rows(device: str) -> list[Any]:
    return [
        pytest.param(
            bench, case, dtype, phase, contestant.name, id=f"{bench.name}-{case.id}-{dtype}-{phase}-{contestant.name}"
        )
        for bench in (MIXED_BENCH, GROUPED_BENCH)
        for case in bench.large_cases()
        for dtype in dtypes_of(case, device)
        for phase in PHASES
        for contestant in bench.contestants
        if contestant.enters(case) and device in contestant.devices
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    names = ("bench", "case", "dtype", "phase", "contestant")
    metafunc.parametrize(names, rows(metafunc.config.getoption("--bench-device")))


def test_dilation_conv(
    op_row: Callable[..., None], bench: OpBench, case: Case, dtype: str, phase: str, contestant: str
) -> None:
    op_row(bench, case, dtype, phase, contestant)
