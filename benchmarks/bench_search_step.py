"""One FAD search step (alphas, then weights): RepShare against unshared, fused ops against their references.

The paper's setting: FCOS with ResNet-50 and an FPN of 256 channels, c' = 96, one cell a group; 416 x 416 px.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

SETTING: dict[str, Any] = {"backbone": "resnet50", "fpn_channels": 256, "inner_channels": 96, "size": 416}
CONTESTANTS: dict[str, dict[str, Any]] = {
    "RepShare, nasdet": {"repshare": True, "backend": None},
    "RepShare, reference": {"repshare": True, "backend": "reference"},
    "unshared, nasdet": {"repshare": False, "backend": None},
    "unshared, reference": {"repshare": False, "backend": "reference"},
}
TWINS = {"RepShare, nasdet": "RepShare, reference", "unshared, nasdet": "unshared, reference"}


def setting(scale: float) -> dict[str, Any]:
    """The paper's setting, its widths times ``scale``."""
    widths = {name: max(12, round(SETTING[name] * scale)) for name in ("fpn_channels", "inner_channels")}
    return {**SETTING, **widths}


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("images", (1, 4))
def test_search_step(
    request: pytest.FixtureRequest, bench_device: str, step_row: Callable[..., None], images: int, contestant: str
) -> None:
    option = request.config.getoption
    rounds = int(option("--bench-step-rounds"))
    if images > 1 and bench_device == "cpu":
        rounds = max(1, rounds // 3)
    sizes = setting(option("--bench-step-scale"))
    case = f"{images} images" if images > 1 else "1 image"
    what = {"bench": "search_step", "case": case, "phase": "alpha step + w step", "images": images}
    options = {**sizes, "space": "fad", "images": images}
    step_row(CONTESTANTS, TWINS, contestant, options, **what, setting=sizes, rounds=rounds)
