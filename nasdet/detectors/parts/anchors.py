"""Anchors: boxes of a few sizes and shapes at every cell of a pyramid."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nasdet.detectors.parts.locations import check_convention, pyramid_points


def octave_sizes(strides: Sequence[int], scale: float = 4.0, per_octave: int = 3) -> list[tuple[float, ...]]:
    """``scale * stride * 2^(k / per_octave)`` in whole pixels, rounded down, for k below ``per_octave``, per level.

    For strides 8 to 128 these are RetinaNet's 32, 40, 50 to 512, 645, 812 (Lin et al., 2017, section 4).
    """
    return [tuple(float(int(scale * s * 2 ** (k / per_octave))) for k in range(per_octave)) for s in strides]


class AnchorGenerator:
    """Anchors of each size and shape around every cell of every level; without state on a device.

    ``sizes`` names per level the square roots of the areas, in pixels; ``ratios`` are height over width. A cell's
    anchors go by ratio, then by size; their number is ``per_cell``, the same on every level.

    ``convention="torchvision"`` rounds the corners to whole pixels around the cell's upper left corner and spaces the
    cells as torchvision does (see :func:`pyramid_points`); ``"centre"`` takes exact corners around the cell's centre.
    """

    def __init__(
        self,
        strides: Sequence[int],
        sizes: Sequence[Sequence[float]],
        ratios: Sequence[float] = (0.5, 1.0, 2.0),
        *,
        convention: str = "torchvision",
    ) -> None:
        if len(sizes) != len(strides):
            raise ValueError(f"sizes must have one entry per level ({len(strides)}), got {len(sizes)}")
        if len({len(level) for level in sizes}) != 1 or not sizes[0] or not ratios:
            raise ValueError(f"sizes and ratios must name as many anchors on every level, got {sizes} and {ratios}")
        if min(ratios) <= 0 or min(min(level) for level in sizes) <= 0:
            raise ValueError(f"sizes and ratios must be positive, got {sizes} and {ratios}")
        self.strides = tuple(strides)
        self.sizes = tuple(tuple(float(size) for size in level) for level in sizes)
        self.ratios = tuple(float(ratio) for ratio in ratios)
        self.convention = check_convention(convention)
        self.per_cell = len(self.ratios) * len(self.sizes[0])

    def at_strides(self, strides: Sequence[int]) -> AnchorGenerator:
        """The same anchors on maps of other strides."""
        return AnchorGenerator(strides, self.sizes, self.ratios, convention=self.convention)

    def cell(self, level: int, device: torch.device | str | None = None) -> Tensor:
        """The anchors of one cell of a level, around the origin: float32 ``[per_cell, 4]``."""
        ratios = torch.tensor(self.ratios, device=device)
        sizes = torch.tensor(self.sizes[level], device=device)
        heights = ratios.sqrt()
        width = ((1 / heights)[:, None] * sizes).flatten()
        height = (heights[:, None] * sizes).flatten()
        corners = torch.stack([-width, -height, width, height], dim=1) / 2
        return corners.round() if self.convention == "torchvision" else corners

    def __call__(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Per level float32 ``[H * W * per_cell, 4]``, cell by cell in the order of ``map.flatten(-2)``."""
        points = pyramid_points(maps, self.strides, self.convention)
        return [
            (centres.repeat(1, 2)[:, None] + self.cell(level, centres.device)).reshape(-1, 4)
            for level, centres in enumerate(points)
        ]
