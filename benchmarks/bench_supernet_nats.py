"""One NATS search step (weights, then alphas): the fused mixed convolution against its reference.

The paper's setting: ResNet-50, set C in 16 channel groups, ImageNet-style norms and frozen stages, an image a step; on
FCOS with an FPN of 256 channels. ``--bench-large-step`` adds the paper's picture size, padded to 800 x 1216.
"""

from __future__ import annotations

from typing import Any

import pytest
from rows import race_once, replay
from step_race import run_workers, step_info, step_threads

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
    benchmark: Any,
    request: pytest.FixtureRequest,
    races: dict[Any, Any],
    bench_machine: dict[str, Any],
    bench_device: str,
    case: str,
    contestant: str,
) -> None:
    option = request.config.getoption
    if case == LARGE and not option("--bench-large-step"):
        benchmark.skipped = True
        pytest.skip("only with --bench-large-step")
    rounds, threads = int(option("--bench-step-rounds")), step_threads(int(option("--bench-step-threads")))
    sizes = {**setting(option("--bench-step-scale")), "size": list(SIZES[case])}
    common = {**sizes, "space": "nats", "images": 1, "device": bench_device, "threads": threads}
    outcome = race_once(races, ("supernet", case), lambda: run_workers(CONTESTANTS, common, TWINS, rounds))
    info = step_info(
        outcome,
        contestant,
        bench="supernet_nats",
        case=f"1x3x{case}",
        phase="w step + alpha step",
        images=1,
        setting=sizes,
        environment={**bench_machine, "threads": threads},
    )
    replay(benchmark, f"NATS step {case}", outcome.race.seconds[contestant], info)
