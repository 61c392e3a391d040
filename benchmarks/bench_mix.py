"""``mix``: 12 pyramid maps into one, against eager PyTorch and torch.compile. Run by ``make bench``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from op_race import DTYPES, FORWARD, PHASES, TRAINING, Contestant, OpBench, Target, compiled
from torch import Tensor

from nasdet.ops.mix import OP, mix


def eager(xs: list[Tensor], weights: Tensor) -> Tensor:
    """What a user writes."""
    total = weights[0] * xs[0]
    for weight, x in zip(weights[1:], xs[1:], strict=True):
        total = total + weight * x
    return total


def eager_inplace(xs: list[Tensor], weights: Tensor) -> Tensor:
    """The best of eager: one pass per map. Autograd allows it, for no saved value is overwritten."""
    total = weights[0] * xs[0]
    for weight, x in zip(weights[1:], xs[1:], strict=True):
        total.addcmul_(x, weight)
    return total


BENCH = OpBench(
    op=OP,
    contestants=(
        Contestant("nasdet", lambda: mix),
        Contestant("eager", lambda: eager),
        Contestant("eager in place", lambda: eager_inplace),
        Contestant("torch.compile", lambda: compiled(OP.reference), may_fail=True),
        Contestant(
            "torch.compile max-autotune",
            lambda: compiled(OP.reference, "max-autotune-no-cudagraphs"),
            devices=("cuda",),
            may_fail=True,
        ),
    ),
    targets=(
        Target("nasdet", FORWARD, "torch.compile", 1.0),
        Target("nasdet", FORWARD, "eager", 3.0),
        Target("nasdet", TRAINING, "eager", 2.0),
    ),
    flops_per_value={FORWARD: 2, TRAINING: 2 + 3},  # backward: the map's gradient (1), the weight's (2)
)


@pytest.mark.parametrize("contestant", [c.name for c in BENCH.contestants])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BENCH.large_cases(), ids=lambda case: case.id)
def test_mix(op_row: Callable[..., None], case: Any, dtype: str, phase: str, contestant: str) -> None:
    op_row(BENCH, case, dtype, phase, contestant)
