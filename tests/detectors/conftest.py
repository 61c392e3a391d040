"""Targets for the detectors' tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

Target = dict[str, Tensor]


def _target(
    boxes: Sequence[Sequence[float]],
    labels: Sequence[int],
    size: tuple[int, int] = (96, 96),
    crowds: Sequence[int] = (),
) -> Target:
    rows = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    masks = torch.zeros(len(rows), *size, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, rows.round().long().tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    crowd = torch.zeros(len(rows), dtype=torch.bool)
    crowd[list(crowds)] = True
    return {"boxes": rows, "labels": torch.tensor(labels, dtype=torch.int64), "iscrowd": crowd, "masks": masks}


@pytest.fixture(scope="session")
def make_target() -> Callable[..., Target]:
    """``make_target(boxes, labels, size, crowds)``: a target whose masks fill their boxes."""
    return _target
