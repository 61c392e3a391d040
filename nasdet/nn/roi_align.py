"""Poolers of detection heads: torchvision's modules over nasdet's operators."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nasdet.ops import multilevel_roi_align, roi_align
from nasdet.ops._roi_reference import levels_of
from nasdet.ops.roi_align import ASSIGNMENTS


class RoIAlign(nn.Module):
    """:func:`nasdet.ops.roi_align` with fixed options; constructor and ``forward(input, rois)`` are torchvision's."""

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool = False,
        *,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned
        self.backend = backend

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        options = (self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)
        return roi_align(input, rois, *options, backend=self.backend)

    def extra_repr(self) -> str:
        names = ("output_size", "spatial_scale", "sampling_ratio", "aligned")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


@dataclass(frozen=True)
class LevelMapper:
    """Which level each box is pooled from: the index, int64, for the boxes ``[L, 4]`` of all images in turn."""

    scales: tuple[float, ...]
    s0: float
    lvl0: int
    policy: int = 0

    def __call__(self, boxlists: Sequence[Tensor]) -> Tensor:
        boxes = torch.cat(list(boxlists))
        boxes = boxes if boxes.dtype == torch.float64 else boxes.float()
        return levels_of(boxes, self.scales, self.policy, self.s0, self.lvl0)


class MultiScaleRoIAlign(nn.Module):
    """:func:`nasdet.ops.multilevel_roi_align` over a dict of maps, with torchvision's signatures and attributes.

    The scale of each map, a power of two, is inferred at the first call from the largest picture, along its longer side
    (where the rounding of a map's size distorts least), and kept in ``scales``.

    Args:
        featmap_names: the maps of ``x`` to pool from; their order is that of ``x``, which has the finest first.
        output_size: ``(height, width)`` of the result, or one number for both.
        sampling_ratio: samples per bin and axis; as many as the bin has pixels when 0 or negative.
        canonical_scale: the size in pixels of a box that is pooled from ``canonical_level``.
        canonical_level: see there; stride ``2**k`` is level ``k``.
        aligned: shift by half a pixel (detectron2's ROIAlignV2).
        assignment: ``"torchvision"`` or ``"detectron2"``: whose rounding of the level.
        backend: of the operator.
    """

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: float = 224,
        canonical_level: int = 4,
        aligned: bool = False,
        assignment: str = "torchvision",
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if assignment not in ASSIGNMENTS:
            raise ValueError(f"assignment must be one of {list(ASSIGNMENTS)}, got {assignment!r}")
        size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
        self.featmap_names = list(featmap_names)
        self.sampling_ratio = sampling_ratio
        self.output_size = size
        self.scales: list[float] | None = None
        self.map_levels: LevelMapper | None = None
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level
        self.aligned = aligned
        self.assignment = assignment
        self.backend = backend

    def forward(
        self, x: Mapping[str, Tensor], boxes: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """``boxes`` (``[L, 4]`` per image, in pixels of the pictures) pooled to ``[sum L, C, height, width]``."""
        features = [x[name] for name in x if name in self.featmap_names]
        if not features:
            raise ValueError(f"x must have one of the maps {self.featmap_names}, got {list(x)}")
        if self.scales is None:
            self.scales = inferred_scales(features, image_shapes)
            self.map_levels = LevelMapper(
                tuple(self.scales), self.canonical_scale, self.canonical_level, ASSIGNMENTS[self.assignment]
            )
        if len(features) != len(self.scales):
            raise ValueError(f"x must have the {len(self.scales)} maps of the first call, got {len(features)}")
        if len(features) == 1:
            options = (self.output_size, self.scales[0], self.sampling_ratio, self.aligned)
            return roi_align(features[0], boxes, *options, backend=self.backend)
        return multilevel_roi_align(
            features,
            boxes,
            self.output_size,
            self.scales,
            self.sampling_ratio,
            self.aligned,
            assignment=self.assignment,
            canonical_scale=self.canonical_scale,
            canonical_level=self.canonical_level,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        names = ("featmap_names", "output_size", "sampling_ratio")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


def inferred_scales(features: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]) -> list[float]:
    """Pixels of each map per pixel of the largest picture, as a power of two.

    Raises ValueError when the two axes of a map tell scales further apart than their rounding explains.
    """
    if not image_shapes:
        raise ValueError("image_shapes must hold one (height, width) per image, got none")
    picture = [max(shape[axis] for shape in image_shapes) for axis in (0, 1)]
    scales = []
    for index, feature in enumerate(features):
        size = feature.shape[-2:]
        if min(size) == 0 or min(picture) == 0:
            raise ValueError(f"map {index} and image_shapes must not be empty, got {tuple(size)} and {picture}")
        exponents = [math.log2(float(size[axis]) / float(picture[axis])) for axis in (0, 1)]
        exponent = round(exponents[int(picture[1] > picture[0])])
        if max(abs(one - exponent) for one in exponents) > 1.5:
            raise ValueError(
                f"map {index} must have one scale on both axes, got {tuple(size)} for pictures of {picture}"
            )
        scales.append(2.0**exponent)
    return scales
