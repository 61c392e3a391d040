"""Random boxes that lie as a detector's do: in clusters around objects, of all sizes, in one image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nasdet._cases import Inputs

HEIGHT, WIDTH = 800, 1333
GRID = 16  # coordinates are multiples of 1/16 px: adding 1,334 px for each of 80 classes rounds nothing away in float32


def clustered_boxes(inputs: Inputs, count: int, per_object: int = 3) -> Tensor:
    """``count`` boxes (x1, y1, x2, y2) in px, float32: about ``per_object`` around each object of a 800 x 1333 image.

    Objects are 16 to 640 px in size, evenly in its logarithm, of aspect ratio 1/2 to 2; the boxes around one differ
    from it by a tenth of its size (standard deviation), in position and in size.
    """
    objects = max(1, count // per_object)
    which = torch.randint(objects, (count,), generator=inputs.generator)
    size = torch.exp(_uniform(inputs, objects) * math.log(640 / 16)) * 16
    ratio = torch.exp((_uniform(inputs, objects) - 0.5) * math.log(2))
    sides = torch.stack([size * ratio, size / ratio], 1)
    centres = torch.stack([_uniform(inputs, objects) * WIDTH, _uniform(inputs, objects) * HEIGHT], 1)
    sides, centres = sides[which], centres[which]
    centres = centres + 0.1 * sides * _normal(inputs, count)
    sides = sides * torch.exp(0.1 * _normal(inputs, count))
    corners = torch.cat([centres - sides / 2, centres + sides / 2], 1)
    corners = torch.minimum(corners.clamp(min=0), torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT]))
    corners = torch.round(corners * GRID) / GRID
    corners[:, 2:] = torch.maximum(corners[:, 2:], corners[:, :2] + 1 / GRID)  # those beyond the border: not empty
    return corners.to(inputs.device)


def distinct_scores(inputs: Inputs, count: int) -> Tensor:
    """``count`` scores in (0, 1), float32, no two alike: the order of equal ones is each library's own."""
    return ((torch.randperm(count, generator=inputs.generator) + 1) / (count + 1)).to(inputs.device)


def class_ids(inputs: Inputs, count: int, classes: int = 80) -> Tensor:
    """A class for each box, int64."""
    return torch.randint(classes, (count,), generator=inputs.generator).to(inputs.device)


def regions(inputs: Inputs, count: int) -> Tensor:
    """RoIs ``[count, 5]`` of one image: batch index 0, then the box."""
    boxes = clustered_boxes(inputs, count)
    return torch.cat([boxes.new_zeros(count, 1), boxes], 1)


def pyramid(inputs: Inputs, channels: int, layout: str) -> list[Tensor]:
    """An FPN's maps of one image, strides 4, 8, 16 and 32, the image padded to a multiple of 32 as detectors do."""
    height, width = (math.ceil(side / 32) * 32 for side in (HEIGHT, WIDTH))
    return [inputs.randn(1, channels, height // s, width // s, layout=layout) for s in (4, 8, 16, 32)]


def _uniform(inputs: Inputs, count: int) -> Tensor:
    return torch.rand(count, generator=inputs.generator)


def _normal(inputs: Inputs, count: int) -> Tensor:
    return torch.randn(count, 2, generator=inputs.generator)
