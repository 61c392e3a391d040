"""One training step of a path: within the supernet that shares its weights, against the path's net alone.

What a one-shot search pays for its supernet: choosing the path, and looking after the weights that take no part. The
papers' spaces in a RetinaNet, a published net as the path, two images a step.
"""

from __future__ import annotations

from typing import Any

import pytest
from rows import race_once, replay
from step_race import run_workers, step_info, step_threads

SETTING: dict[str, Any] = {"norm": "bn", "detector": "retinanet"}
CASES: dict[str, dict[str, Any]] = {
    "DetNAS small, 416x416": {"card": "detnas-coco-retinanet-300m", "config": SETTING, "size": [416, 416]},
    "MSNAS R18, 384x384": {"card": "msnas-r18-1", "config": SETTING, "size": [384, 384]},
}
CONTESTANTS: dict[str, dict[str, Any]] = {"nasdet supernet": {"supernet": True}, "net alone": {"supernet": False}}
TWINS = {"nasdet supernet": "net alone"}
OVERHEAD = 1.05


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("case", CASES)
def test_path_step(
    benchmark: Any,
    request: pytest.FixtureRequest,
    races: dict[Any, Any],
    bench_machine: dict[str, Any],
    bench_device: str,
    case: str,
    contestant: str,
) -> None:
    option = request.config.getoption
    rounds, threads = int(option("--bench-step-rounds")), step_threads(int(option("--bench-step-threads")))
    common = {**CASES[case], "worker": "path_worker.py", "images": 2, "device": bench_device, "threads": threads}
    outcome = race_once(races, ("path", case), lambda: run_workers(CONTESTANTS, common, TWINS, rounds))
    info = step_info(
        outcome,
        contestant,
        bench="path_step",
        case=case,
        phase="training step",
        images=2,
        setting={"card": CASES[case]["card"]},
        environment={**bench_machine, "threads": threads},
    )
    if contestant in TWINS:
        ratio = info["speedup_over"][TWINS[contestant]]
        target = {"quantity": "time", "over": TWINS[contestant], "at_least": 1 / OVERHEAD}
        info["targets"] = [target | {"ratio": ratio, "met": ratio >= 1 / OVERHEAD}]
    replay(benchmark, f"path step {case}", outcome.race.seconds[contestant], info)
