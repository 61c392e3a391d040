"""``sigmoid_focal_loss``: RetinaNet's anchors, against eager PyTorch, torch.compile and torchvision."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from op_race import DTYPES, FORWARD, PHASES, TRAINING, Contestant, OpBench, Setting, Target, compiled
from rivals import torchvision_contestant
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from nasdet._cases import Case, Inputs
from nasdet.ops.sigmoid_focal_loss import OP, sigmoid_focal_loss

ANCHORS = (2, 76725, 80)


def eager(inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: str) -> Tensor:
    """What a user writes."""
    p = torch.sigmoid(inputs)
    right = p * targets + (1 - p) * (1 - targets)
    entropy = binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    loss = (alpha * targets + (1 - alpha) * (1 - targets)) * (1 - right) ** gamma * entropy
    return loss if reduction == "none" else loss.sum()


def _case(name: str, shape: tuple[int, ...], reduction: str = "none", gamma: float = 2.0) -> Case:
    def make(inputs: Inputs) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        # As at the start of training: logits about -4.6, one anchor in fifty positive.
        x = inputs.randn(*shape, shift=-4.6)
        t = (torch.rand(shape, generator=inputs.generator) < 0.02).to(x.device, x.dtype)
        return (x, t, 0.25, gamma, reduction), {}

    return Case(name, make, large=True)


def _least_bytes(setting: Setting, phase: str) -> tuple[int, None]:
    """Logits and targets are read, and losses written; in training once more, with gradients instead of losses."""
    x, _, _, _, reduction = setting.pristine
    per_value = reduction == "none"
    maps = 2 + per_value + (0 if phase == FORWARD else 3 + per_value)
    return maps * x.nbytes, None


LARGE = [
    _case("2x76725x80", ANCHORS),
    _case("2x76725x80 sum", ANCHORS, "sum"),
    _case("2x76725x80 sum, gamma 1.5", ANCHORS, "sum", 1.5),
]
BENCH = OpBench(
    dataclasses.replace(OP, differentiable=(0,)),  # nobody trains the targets
    (
        Contestant("nasdet", lambda: sigmoid_focal_loss),
        Contestant("eager", lambda: eager),
        Contestant("torch.compile", lambda: compiled(eager), may_fail=True),
        torchvision_contestant(lambda ops: ops.sigmoid_focal_loss),
    ),
    [
        Target("nasdet", phase, rival, factor, cases=[case.id for case in LARGE])
        for phase in (FORWARD, TRAINING)
        for rival, factor in {"eager": 5.0, "torchvision": 5.0, "torch.compile": 1.0}.items()
    ],
    work=_least_bytes,
    cases=[*LARGE, _case("100 sum", (100,), "sum")],
    repeatable=True,
)


@pytest.mark.parametrize("contestant", [contestant.name for contestant in BENCH.contestants])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", BENCH.cases, ids=lambda case: case.id)
def test_sigmoid_focal_loss(op_row: Callable[..., None], case: Case, dtype: str, phase: str, contestant: str) -> None:
    op_row(BENCH, case, dtype, phase, contestant)
