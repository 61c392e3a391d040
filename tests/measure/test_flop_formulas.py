"""The formulas for torch's counter: the numbers that torch's own convolutions have, of every case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nasdet import nn, ops
from nasdet._cases import Case, Inputs
from nasdet._dispatch import OPS
from nasdet.measure import register_flop_formulas
from nasdet.testing import with_leaves

NAMES = ("mixed_dilation_conv2d", "grouped_dilation_conv2d", "depthwise_conv2d")
CASES = [
    pytest.param(name, case, id=f"{name}-{case.id}") for name in NAMES for case in OPS[name].cases if not case.large
]


@pytest.fixture(autouse=True)
def formulas() -> None:
    register_flop_formulas()


def flops(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize(("name", "case"), CASES)
def test_forward_and_gradients_count_as_the_reference(name: str, case: Case) -> None:
    op = OPS[name]
    args, options = with_leaves(op, case.make(Inputs())[0])[0], case.make(Inputs())[1]

    def train(backend: str) -> tuple[int, int]:
        y = op.call(*args, **options, backend=backend)
        return flops(lambda: op.call(*args, **options, backend=backend)), flops(lambda: y.sum().backward())

    forward, backward = train("cpp")
    expected, _ = train("reference")
    assert forward == expected
    assert backward == 2 * forward  # torch counts a grouped convolution's weight gradient as if it were dense


def test_only_wanted_gradients_count() -> None:
    x, weight = torch.randn(1, 64, 9, 9), torch.randn(2, 64, 64, 3, 3)
    mix = torch.full((2, 64), 0.5)
    once = 2 * 2 * 64 * 64 * 9 * 81
    for leaf, wanted in ((x, 1), (weight, 1), (mix, 1)):
        leaf.requires_grad_()
        y = ops.mixed_dilation_conv2d(x, weight, mix, (1, 2), backend="cpp")
        assert flops(lambda y=y: y.sum().backward()) == wanted * once
        leaf.requires_grad_(False)


def test_an_accelerated_model_counts_as_before() -> None:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(64, 64, 3, padding=1), torch.nn.Conv2d(64, 64, 3, padding=1, groups=64)
    ).eval()
    x = torch.randn(1, 64, 56, 56)
    with torch.no_grad():
        before = flops(lambda: model(x))
        with nn.accelerate(model) as report:
            assert len(report.swapped) == 2
            assert flops(lambda: model(x)) == before
