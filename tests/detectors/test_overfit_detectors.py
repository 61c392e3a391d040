"""Every detector's loss falls on two drawn pictures: a few steps, so that nothing is left unconnected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nasdet.detectors import DETECTORS

SIZE = (64, 64)
BOXES = [[[6, 8, 30, 26], [34, 30, 60, 62]], [[12, 10, 54, 50]]]
# A cascade's later stages get more to learn as the earlier ones improve, so its loss falls later.
STEPS = dict.fromkeys(DETECTORS, 40) | {"cascade_rcnn": 60}


@pytest.mark.parametrize("name", DETECTORS)
def test_the_loss_falls(name: str, make_target: Callable) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"width": 0.25, "fpn_channels": 64, "norm": "gn", "tower_convs": 1}
    if "rcnn" in name:
        options |= {"hidden": 64, "samples": 16, "rpn": {"limit": (64, 32), "samples": 64}}
    else:
        options |= {"tower_norm": "gn", "levels": 3}
    model = DETECTORS[name]("resnet18", 3, **options)
    images = torch.randn(2, 3, *SIZE) * 0.2
    targets = [make_target(boxes, list(range(len(boxes))), SIZE) for boxes in BOXES]
    for image, boxes in zip(images, BOXES, strict=True):
        for label, (x1, y1, x2, y2) in enumerate(boxes):
            image[label, y1:y2, x1:x2] += 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    totals = []
    for _ in range(STEPS[name]):
        losses = model.loss(model(images), targets)
        optimizer.zero_grad()
        total = torch.stack(list(losses.values())).sum()
        total.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        totals.append(float(total.detach()))
    first, last = sum(totals[:4]) / 4, sum(totals[-4:]) / 4
    assert last < 0.5 * first, [round(value, 2) for value in totals]
