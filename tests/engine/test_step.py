"""One step of training."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasdet.data.transforms import Batch
from nasdet.engine.step import train_step


class _Mean(nn.Module):
    """A loss of two terms, each a mean over the images."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.unused = nn.Linear(2, 2)

    def forward(self, images: Tensor, targets: Any) -> dict[str, Tensor]:
        found = self.conv(images)
        return {"square": found.square().mean(), "size": 0.1 * found.abs().mean()}


def _batch(images: Tensor) -> Batch:
    sizes = [tuple(images.shape[2:])] * len(images)
    return Batch(images, sizes, [(1.0, 1.0)] * len(images), [{} for _ in images])


@pytest.mark.parametrize("parts", [1, 2, 3, 6])
def test_parts_of_a_batch_are_one_step(parts: int) -> None:
    torch.manual_seed(0)
    images = torch.randn(6, 3, 7, 8)
    module, other = (one := _Mean()), copy.deepcopy(one)
    found = []
    for net, batch in ((module, _batch(images)), (other, [_batch(part) for part in images.chunk(parts)])):
        optimizer = torch.optim.SGD(net.parameters(), lr=9.0, momentum=0.9, weight_decay=0.1)
        found.append(train_step(net, optimizer, batch, 0.5, clip=0.7))
        assert optimizer.param_groups[0]["lr"] == 0.5
    assert found[0].keys() == found[1].keys() == {"loss", "square", "size", "grad_norm"}
    assert found[0]["grad_norm"] > 0.7
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value)
    for mine, theirs in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(theirs, mine)
    assert torch.equal(module.unused.weight, one.unused.weight) and other.unused.weight.grad is None
