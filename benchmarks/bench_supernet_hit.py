"""A step of a part of Hit-Detector's supernet, weights' half: all candidates' maps kept, one candidate's at a time, and
two candidates a layer. Peak memory and time, beside the forecast; and the forecast for the paper's 800 x 1200 pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

CASES: dict[str, dict[str, Any]] = {
    "backbone, 8 operations, 224x320": {"part": "backbone", "candidates": "screened", "size": [224, 320]},
    "backbone halved, 32 operations, 128x192": {"part": "backbone", "candidates": "full", "size": [128, 192]},
    "neck, 32 operations, 224x320": {"part": "neck", "candidates": "full", "size": [224, 320]},
    "head, 32 operations, 32 RoIs": {"part": "head", "candidates": "full", "rois": 32},
}
CONTESTANTS: dict[str, dict[str, Any]] = {mode: {"memory": mode} for mode in ("full", "recompute", "sampled")}
TWINS = {"recompute": "full"}  # the other computes something else
WITHIN = 0.15


def add_forecast(info: dict[str, Any], outcome: Any) -> None:
    measured, facts = info["peak_memory"]["step"], outcome.facts[info["contestant"]]
    info["peak_memory"] |= {
        "step, forecast": facts["forecast"],
        "step, forecast at 800x1200, 512 RoIs": facts["forecast_at_the_papers_size"],
    }
    off = abs(facts["forecast"] / measured - 1)
    info["targets"] = [{"quantity": "forecast of memory", "off": off, "within": WITHIN, "met": off <= WITHIN}]


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("case", CASES)
def test_supernet_hit(step_row: Callable[..., None], case: str, contestant: str) -> None:
    options = {**CASES[case], "worker": "hit_worker.py"}
    what = {"bench": "supernet_hit", "case": case, "phase": "step", "images": 1}
    step_row(CONTESTANTS, TWINS, contestant, options, **what, setting=dict(CASES[case]), add=add_forecast)
