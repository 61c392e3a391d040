"""A balanced random choice of positives and negatives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from nasdet.detectors.parts.matcher import BACKGROUND, match_boxes
from nasdet.detectors.parts.objects import Objects


def sample(matches: Tensor, count: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
    """Up to ``count`` places of ``matches`` ``[A]`` (see :func:`match_boxes`): positives and negatives, int64 each.

    At most ``count * positive_fraction`` (rounded down) positives; negatives fill what is left, as far as there are
    any. Both are in random order, drawn from torch's global generator of the device. Ignored places are never drawn.
    """
    if count < 1 or not 0 <= positive_fraction <= 1:
        raise ValueError(f"count must be positive and positive_fraction in [0, 1], got {count} and {positive_fraction}")
    positive = _draw((matches >= 0).nonzero()[:, 0], int(count * positive_fraction))
    negative = _draw((matches == BACKGROUND).nonzero()[:, 0], count - len(positive))
    return positive, negative


def _draw(places: Tensor, count: int) -> Tensor:
    return places[torch.randperm(len(places), device=places.device)[:count]]


class Samples(NamedTuple):
    """Labelled boxes per image: ``boxes`` ``[R, 4]``, ``labels`` (0 background, class + 1) and which of the image's
    objects each is matched with (0 for background), both int64 ``[R]``."""

    boxes: list[Tensor]
    labels: list[Tensor]
    matches: list[Tensor]

    def positives(self) -> Samples:
        """Those that are matched with an object."""
        kept = [labels > 0 for labels in self.labels]
        return Samples(*([value[keep] for value, keep in zip(values, kept, strict=True)] for values in self))


@torch.no_grad()
def label_proposals(proposals: Sequence[Tensor], batch: Sequence[Objects], iou: float) -> Samples:
    """All proposals, each with the object that it overlaps most if by at least ``iou``."""
    labels, matches = [], []
    for boxes, objects in zip(proposals, batch, strict=True):
        match = match_boxes(boxes, objects.boxes, iou, iou)
        matches.append(match.clamp(min=0))
        found = objects.labels[match[match >= 0]] + 1
        labels.append(torch.zeros_like(match).masked_scatter(match >= 0, found))
    return Samples(list(proposals), labels, matches)


@torch.no_grad()
def sample_proposals(
    proposals: Sequence[Tensor],
    batch: Sequence[Objects],
    size: tuple[int, int],
    iou: float,
    count: int,
    positive_fraction: float,
) -> Samples:
    """A balanced choice (see :func:`sample`) of each image's proposals and objects, positives first.

    An image with neither gives its whole canvas of ``size`` (h, w): every layer of a head then sees something.
    """
    height, width = size
    candidates = [
        torch.cat([boxes, objects.boxes])
        if len(boxes) + len(objects.boxes)
        else boxes.new_tensor([[0.0, 0.0, width, height]])
        for boxes, objects in zip(proposals, batch, strict=True)
    ]
    every = label_proposals(candidates, batch, iou)
    drawn = [torch.cat(sample(labels - 1, count, positive_fraction)) for labels in every.labels]
    return Samples(*([value[index] for value, index in zip(values, drawn, strict=True)] for values in every))
