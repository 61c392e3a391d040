"""The rival itself, and inputs for both. Where torchvision is absent these tests are skipped with the reason."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "rivals" in item.path.parts:
            item.add_marker(pytest.mark.needs("torchvision", "cpp"))


@pytest.fixture
def tv() -> Any:
    """``torchvision.ops``."""
    return importlib.import_module("torchvision.ops")


def make_boxes(kind: str, count: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """``[count, 4]`` boxes: clustered as a detector's are, or degenerate in one way."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    centres = uniform(max(count // 8, 1), 2) * 600
    middle = centres[(uniform(count) * len(centres)).long()] + 12 * (uniform(count, 2) - 0.5)
    size = 8 + 120 * uniform(count, 2) ** 2
    boxes = torch.cat((middle - size / 2, middle + size / 2), 1)
    if kind == "identical":
        boxes = boxes[:1].expand(count, 4).clone() if count else boxes
    elif kind == "integer":  # few values: many ties of overlap, some exactly at a threshold
        corner = (uniform(count, 2) * 6).floor()
        boxes = torch.cat((corner, corner + 1 + (uniform(count, 2) * 5).floor()), 1)
    elif kind == "no-area":
        flat = uniform(count) < 0.5
        boxes[flat, 2] = boxes[flat, 0]
    elif kind == "inverted":
        turned = uniform(count) < 0.4
        boxes[turned] = boxes[turned][:, [2, 3, 0, 1]]
    elif kind == "not-finite":
        pick = (uniform(count, 4) * 12).long()
        boxes = torch.where(pick == 0, torch.nan, torch.where(pick == 1, torch.inf, boxes))
    elif kind == "huge":
        boxes *= 1e6
    else:
        assert kind == "clustered", kind
    return boxes.to(dtype)


BOX_KINDS = ("clustered", "identical", "integer", "no-area", "inverted", "not-finite", "huge")


@pytest.fixture(params=BOX_KINDS)
def draw_boxes(request: pytest.FixtureRequest) -> Callable[..., Tensor]:
    """``draw_boxes(count, generator, dtype)`` of each kind in turn."""
    return lambda count, generator, dtype=torch.float32: make_boxes(request.param, count, generator, dtype)


@pytest.fixture
def clustered() -> Callable[..., Tensor]:
    return lambda count, generator, dtype=torch.float32: make_boxes("clustered", count, generator, dtype)
