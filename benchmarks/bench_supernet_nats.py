"""One NATS search step (weights, then alphas): the fused mixed convolution against its reference.

The paper's setting: ResNet-50, set C in 16 channel groups, ImageNet-style norms and frozen stages, an image a step; on
FCOS with an FPN of 256 channels. ``--bench-large-step`` adds the paper's picture size, padded to 800 x 1216.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

SIZES: dict[str, tuple[int, int]] = {"416x416": (416, 416), "800x1216": (800, 1216)}
LARGE = "800x1216"
CONTESTANTS: dict[str, dict[str, Any]] = {"nasdet": {"backend": None}, "reference": {"backend": "reference"}}
TWINS = {"nasdet": "reference"}


def setting(scale: float) -> dict[str, Any]:
    """The paper's backbone and the pyramid, their widths times ``scale``."""
    return {"backbone": "resnet50", "width": scale, "fpn_channels": max(12, round(256 * scale))}


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("case", SIZES)
def test_supernet_nats(
    benchmark: Any, request: pytest.FixtureRequest, step_row: Callable[..., None], case: str, contestant: str
) -> None:
    option = request.config.getoption
    if case == LARGE and not option("--bench-large-step"):
        benchmark.skipped = True
        pytest.skip("only with --bench-large-step")
    sizes = {**setting(option("--bench-step-scale")), "size": list(SIZES[case])}
    options = {**sizes, "space": "nats", "images": 1}
    what = {"bench": "supernet_nats", "case": f"1x3x{case}", "phase": "w step + alpha step", "images": 1}
    step_row(CONTESTANTS, TWINS, contestant, options, **what, setting=sizes)
