"""One training step of a path: within the supernet that shares its weights, against the path's net alone.

What a one-shot search pays for its supernet: choosing the path, and looking after the weights that take no part. The
papers' spaces in a RetinaNet, a published net as the path, two images a step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from step_race import time_target

SETTING: dict[str, Any] = {"norm": "bn", "detector": "retinanet"}
CASES: dict[str, dict[str, Any]] = {
    "DetNAS small, 416x416": {"card": "detnas-coco-retinanet-300m", "config": SETTING, "size": [416, 416]},
    "MSNAS R18, 384x384": {"card": "msnas-r18-1", "config": SETTING, "size": [384, 384]},
}
CONTESTANTS: dict[str, dict[str, Any]] = {"nasdet supernet": {"supernet": True}, "net alone": {"supernet": False}}
TWINS = {"nasdet supernet": "net alone"}
OVERHEAD = 1.05


def keep_promise(info: dict[str, Any], outcome: Any) -> None:
    if alone := TWINS.get(info["contestant"]):
        info["targets"] = time_target(info, alone, 1 / OVERHEAD)


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("case", CASES)
def test_path_step(step_row: Callable[..., None], case: str, contestant: str) -> None:
    options = {**CASES[case], "worker": "path_worker.py", "images": 2}
    what = {"bench": "path_step", "case": case, "phase": "training step", "images": 2}
    setting = {"card": CASES[case]["card"]}
    step_row(CONTESTANTS, TWINS, contestant, options, **what, setting=setting, add=keep_promise)
