"""``depthwise_conv2d`` against PyTorch's grouped convolution, in NCHW and in oneDNN's own NHWC."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from op_race import DTYPES, FORWARD, PHASES, TRAINING, Contestant, OpBench, Setting, Target
from torch import Tensor
from torch.nn import functional as F

from nasdet._cases import Case
from nasdet.ops._dilation import Pair, pair
from nasdet.ops.depthwise_conv2d import OP, checked_padding, depthwise_conv2d


def eager(x: Tensor, weight: Tensor, stride: int | Pair, padding: int | Pair | str, dilation: int | Pair) -> Tensor:
    """What a user writes."""
    dilations = pair("dilation", dilation)
    paddings = checked_padding(padding, weight.shape[-1], dilations)
    return F.conv2d(x, weight, None, pair("stride", stride), paddings, dilations, x.shape[1])


def _least_work(setting: Setting, phase: str) -> tuple[int, float]:
    """Each map moved once; a product and a sum per tap and result."""
    x, weight, stride, *_ = setting.pristine
    sh, sw = pair("stride", stride)
    results = x.shape[0] * x.shape[1] * -(-x.shape[2] // sh) * -(-x.shape[3] // sw)
    moved = x.nbytes + results * x.element_size() + weight.nbytes
    flops = 2.0 * results * weight[0].numel()
    return (moved, flops) if phase == FORWARD else (3 * moved, 3 * flops)


LARGE = [case for case in OP.cases if case.large]
NCHW = [case.id for case in LARGE if case.id.endswith("-nchw")]
NHWC = [case.id for case in LARGE if case.id.endswith("-nhwc")]
BENCH = OpBench(
    OP,
    (
        Contestant("nasdet", lambda: depthwise_conv2d),
        # PyTorch 2.13's bfloat16 weight gradient of a grouped convolution is wrong on some CPUs.
        Contestant("eager", lambda: eager, may_fail=True),
    ),
    [
        *(Target("nasdet", phase, "eager", 10.0, cases=NCHW) for phase in PHASES),
        *(Target("nasdet", phase, "eager", 1 / 1.05, cases=NHWC, dtypes=DTYPES) for phase in PHASES),
        *(
            Target(
                "nasdet",
                phase,
                "eager",
                5.0,
                cases=[f"c256-50x84-k5-dilation-4-{layout}" for layout in ("nchw", "nhwc")],
            )
            for phase in (FORWARD, TRAINING)
        ),
    ],
    work=_least_work,
    repeatable=True,
)


@pytest.mark.parametrize("contestant", [contestant.name for contestant in BENCH.contestants])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", LARGE, ids=lambda case: case.id)
def test_depthwise_conv2d(op_row: Callable[..., None], case: Case, dtype: str, phase: str, contestant: str) -> None:
    op_row(BENCH, case, dtype, phase, contestant)
