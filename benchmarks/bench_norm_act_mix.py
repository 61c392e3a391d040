"""``norm_act_mix``: group norm, ReLU and sum of 12 pyramid maps, against eager PyTorch and torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from op_race import DTYPES, FORWARD, PHASES, TRAINING, Contestant, OpBench, Target, compiled
from torch import Tensor
from torch.nn.functional import group_norm

from nasdet.ops.norm_act_mix import OP, norm_act_mix


def eager(
    xs: list[Tensor], weights: Tensor, gn_weight: Tensor, gn_bias: Tensor, groups: int, normalized: None = None
) -> Tensor:
    """What a user writes."""
    gn_weight, gn_bias = gn_weight.to(xs[0].dtype), gn_bias.to(xs[0].dtype)  # as a model in this dtype has them
    total = weights[0] * torch.relu(group_norm(xs[0], groups, gn_weight[0], gn_bias[0]))
    for p in range(1, len(xs)):
        total = total + weights[p] * torch.relu(group_norm(xs[p], groups, gn_weight[p], gn_bias[p]))
    return total


def eager_inplace(
    xs: list[Tensor], weights: Tensor, gn_weight: Tensor, gn_bias: Tensor, groups: int, normalized: None = None
) -> Tensor:
    """The best of eager: ReLU in place, and the sum by addcmul. Autograd allows both."""
    gn_weight, gn_bias = gn_weight.to(xs[0].dtype), gn_bias.to(xs[0].dtype)
    total = weights[0] * torch.relu_(group_norm(xs[0], groups, gn_weight[0], gn_bias[0]))
    for p in range(1, len(xs)):
        total.addcmul_(torch.relu_(group_norm(xs[p], groups, gn_weight[p], gn_bias[p])), weights[p])
    return total


def _compiled(mode: str | None = None) -> Callable[..., Tensor]:
    return compiled(OP.reference, mode)


BENCH = OpBench(
    op=OP,
    contestants=(
        Contestant("nasdet", lambda: norm_act_mix),
        Contestant(
            "nasdet overwrite_inputs",
            lambda: functools.partial(norm_act_mix, overwrite_inputs=True),
            phases=(TRAINING,),
        ),
        Contestant("eager", lambda: eager),
        Contestant("eager in place", lambda: eager_inplace),
        Contestant("torch.compile", _compiled, may_fail=True),
        Contestant(
            "torch.compile max-autotune",
            lambda: _compiled("max-autotune-no-cudagraphs"),
            devices=("cuda",),
            may_fail=True,
        ),
    ),
    targets=tuple(
        Target(name, TRAINING, over, factor, quantity)
        for name in ("nasdet", "nasdet overwrite_inputs")
        for over, factor, quantity in (
            ("torch.compile", 1.5, "time"),
            ("eager", 3.0, "time"),
            ("eager", 2.0, "peak_memory"),
        )
    )
    + (Target("nasdet", FORWARD, "eager", 2.0, "peak_memory"),),
    # Statistics 3, affine map 2, ReLU 1, weighted sum 2; backward recomputes 5 of these and adds the sums for the
    # weight, scale and bias (2 + 2 + 1), the masked gradient (2) and its projection (4).
    flops_per_value={FORWARD: 8, TRAINING: 8 + 16},
)


@pytest.mark.parametrize("contestant", [c.name for c in BENCH.contestants])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BENCH.large_cases(), ids=lambda case: case.id)
def test_norm_act_mix(op_row: Callable[..., None], case: Any, dtype: str, phase: str, contestant: str) -> None:
    op_row(BENCH, case, dtype, phase, contestant)
