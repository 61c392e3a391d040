"""Whole detectors on ResNet-50 at 800 x 1333: inference and a training step, against reference ops and torchvision.

``-k "fcos and inference"`` and the like select; ``--bench-detector-rounds 1 --bench-detector-size 192x256`` is a trial.
torchvision's are taken channels_last too: as they come they are as fast or slower.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
from rivals import TORCHVISION_DETECTORS
from step_race import time_target

DETECTORS = ("fcos", "retinanet", "faster_rcnn", "mask_rcnn", "cascade_rcnn", "mask_scoring_rcnn")
OURS: dict[str, Any] = {"library": "nasdet", "accelerated": False, "backend": None}
PLAIN = "nasdet, not accelerated"
CONTESTANTS: dict[str, dict[str, Any]] = {
    "nasdet": OURS | {"accelerated": True},
    PLAIN: OURS,
    "nasdet, reference ops": OURS | {"backend": "reference"},
    "torchvision": OURS | {"library": "torchvision"},
}
PHASES = ("inference", "training step")
AIM = 1.5  # times as fast as torchvision


def absent(contestant: str, detector: str, images: int) -> str | None:
    """Why a contestant does not take part, or None."""
    if contestant == PLAIN and images > 1:
        return "measured at 1 image"
    if contestant != "torchvision":
        return None
    if detector not in TORCHVISION_DETECTORS:
        return f"torchvision has no {detector}"
    return None if importlib.util.find_spec("torchvision") else "torchvision is not installed"


def contestants_of(detector: str, phase: str, images: int) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """Who takes part, and whose results each one's must be: inference finds what torchvision finds, where it takes
    part; losses are compared among ours."""
    names = [name for name in CONTESTANTS if absent(name, detector, images) is None]
    judge = "torchvision" if phase == "inference" and "torchvision" in names else "nasdet, reference ops"
    twins = {name: judge for name in names if name not in (judge, "torchvision")}
    return {name: CONTESTANTS[name] for name in names}, twins


def complete(info: dict[str, Any], outcome: Any) -> None:
    info["images_per_s"] = info["images"] / info["median_s"]
    if info["contestant"] == "nasdet" and info["case"].partition(",")[0] in TORCHVISION_DETECTORS:
        info["targets"] = time_target(info, "torchvision", AIM)


@pytest.mark.parametrize("contestant", CONTESTANTS)
@pytest.mark.parametrize("images", (1, 2), ids=("1-image", "2-images"))
@pytest.mark.parametrize("phase", PHASES, ids=("inference", "training"))
@pytest.mark.parametrize("detector", DETECTORS)
def test_detector(
    benchmark: Any,
    request: pytest.FixtureRequest,
    step_row: Callable[..., None],
    detector: str,
    phase: str,
    images: int,
    contestant: str,
) -> None:
    if reason := absent(contestant, detector, images):
        benchmark.skipped = True
        pytest.skip(reason)
    option = request.config.getoption
    size = [int(side) for side in str(option("--bench-detector-size")).split("x")]
    contestants, twins = contestants_of(detector, phase, images)
    options = {"worker": "detector_worker.py", "detector": detector, "phase": phase, "images": images, "size": size}
    case = f"{detector}, {images} image{'s' if images > 1 else ''}"
    what = {"bench": "detectors", "case": case, "phase": phase, "images": images}
    what |= {"setting": {"backbone": "resnet50", "size": size}, "rounds": int(option("--bench-detector-rounds"))}
    step_row(contestants, twins, contestant, options, **what, add=complete)
