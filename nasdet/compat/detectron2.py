"""detectron2's ``layers`` and ``modeling.poolers`` by name, argument order and defaults. detectron2 is not needed.

What differs from detectron2, on purpose:

- Box coordinates stay float32 beside 16-bit features; detectron2 rounds them to the features' dtype first.
- ``ROIPooler`` pools all levels in one launch, and takes plain ``[N, 4]`` tensors as well as ``Boxes``.
- A batch index outside the batch raises on the CPU and gives zeros on CUDA.
- Of the pooler types, ``"ROIAlign"`` and ``"ROIAlignV2"`` exist; ``"ROIPool"`` and ``"ROIAlignRotated"`` are refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from nasdet import ops
from nasdet.nn.roi_align import RoIAlign

__all__ = ["ROIAlign", "ROIPooler", "batched_nms", "nms"]

nms = ops.nms


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """NMS within each class, on float32 boxes whatever their dtype.

    Args:
        boxes: ``[N, 4]`` as (x1, y1, x2, y2).
        scores: ``[N]``.
        idxs: int64 ``[N]``, the class of each box.
        iou_threshold: a box whose IoU with a better kept one of its class is above it is dropped.

    Returns:
        int64 ``[K]``, the kept rows, best first.

    Raises:
        ValueError, TypeError: as :func:`nasdet.ops.batched_nms`.
    """
    return ops.batched_nms(boxes.float(), scores.float(), idxs, iou_threshold)


class ROIAlign(RoIAlign):
    """RoIAlign of one feature map; ``aligned=True`` (the default here) shifts by half a pixel.

    Args:
        output_size: (height, width) in bins, or an int.
        spatial_scale: feature pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 or less: as many as the bin has pixels.
        aligned: False for the older form without the shift.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        spatial_scale: float,
        sampling_ratio: int,
        aligned: bool = True,
    ) -> None:
        super().__init__(output_size, spatial_scale, sampling_ratio, aligned)

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        """``input [N, C, H, W]`` and ``rois [K, 5]`` (batch index, x1, y1, x2, y2) to ``[K, C, *output_size]``."""
        if not isinstance(rois, Tensor) or rois.ndim != 2 or rois.shape[1] != 5:
            got = tuple(rois.shape) if isinstance(rois, Tensor) else type(rois).__name__
            raise ValueError(f"rois must have shape (K, 5), got {got}")
        return super().forward(input.dequantize() if input.is_quantized else input, rois)


class ROIPooler(nn.Module):
    """RoIAlign over a feature pyramid, each box on the level that fits its size (FPN, Lin et al., 2017, Eq. 1).

    A box of side ``s`` (the square root of its area) goes to level ``floor(canonical_level + log2(s /
    canonical_box_size + 1e-8))``, clamped to the levels there are.

    Args:
        output_size: an int or (height, width) in bins.
        scales: feature pixels per image pixel of each level, largest map first, each half of the one before.
        sampling_ratio: samples per bin and axis; 0 or less: as many as the bin has pixels.
        pooler_type: ``"ROIAlign"`` (no half-pixel shift) or ``"ROIAlignV2"`` (with it).
        canonical_box_size: the side in image pixels of a box that belongs on ``canonical_level``.
        canonical_level: level k has ``2^-k`` feature pixels per image pixel.

    Raises:
        ValueError: another type, scales that are no pyramid of powers of two.
    """

    def __init__(
        self,
        output_size: int | tuple[int, int],
        scales: Sequence[float],
        sampling_ratio: int,
        pooler_type: str,
        canonical_box_size: int = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        aligned = {"ROIAlign": False, "ROIAlignV2": True}.get(pooler_type)
        if aligned is None:
            raise ValueError(f"pooler_type must be 'ROIAlign' or 'ROIAlignV2', got {pooler_type!r}")
        size = (output_size, output_size) if isinstance(output_size, int) else tuple(output_size)
        if len(size) != 2:
            raise ValueError(f"output_size must be an int or a pair of ints, got {output_size!r}")
        if canonical_box_size <= 0:
            raise ValueError(f"canonical_box_size must be above 0, got {canonical_box_size}")
        self.output_size = size
        self.min_level, self.max_level = _levels(scales)
        self.scales = tuple(float(scale) for scale in scales)
        self.sampling_ratio = sampling_ratio
        self.pooler_type = pooler_type
        self.aligned = aligned
        self.canonical_box_size = canonical_box_size
        self.canonical_level = canonical_level

    def forward(self, x: Sequence[Tensor], box_lists: Sequence[Any]) -> Tensor:
        """Pool the boxes of every image.

        Args:
            x: one map ``[N, C, H_l, W_l]`` per scale.
            box_lists: one entry per image: ``Boxes`` (anything with ``.tensor``) or a tensor, ``[K_n, 4]``, in image
                pixels.

        Returns:
            ``[sum of K_n, C, *output_size]`` in the maps' dtype, image after image.

        Raises:
            ValueError: another number of maps than scales, or of box lists than images.
        """
        if isinstance(x, Tensor) or isinstance(box_lists, Tensor):
            raise TypeError("x and box_lists must be lists, got a tensor")
        if len(x) != len(self.scales):
            raise ValueError(f"x must hold {len(self.scales)} maps, one per scale, got {len(x)}")
        if len(box_lists) != x[0].shape[0]:
            raise ValueError(f"box_lists must hold one entry per image, {x[0].shape[0]}, got {len(box_lists)}")
        if len(box_lists) == 0:
            return x[0].new_zeros((0, x[0].shape[1], *self.output_size))
        maps = [m.dequantize() if m.is_quantized else m for m in x]
        boxes = [getattr(entry, "tensor", entry) for entry in box_lists]
        if len(maps) == 1:
            return ops.roi_align(maps[0], boxes, self.output_size, self.scales[0], self.sampling_ratio, self.aligned)
        return ops.multilevel_roi_align(
            maps,
            boxes,
            self.output_size,
            self.scales,
            self.sampling_ratio,
            self.aligned,
            assignment="detectron2",
            canonical_scale=self.canonical_box_size,
            canonical_level=self.canonical_level,
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, scales={self.scales}, sampling_ratio={self.sampling_ratio}, "
            f"pooler_type={self.pooler_type}"
        )


def _levels(scales: Sequence[float]) -> tuple[int, int]:
    """First and last level of a pyramid: scale = 2^-level, one level after the other."""
    if len(scales) == 0 or any(not scale > 0 for scale in scales):
        raise ValueError(f"scales must hold at least one number above 0, got {list(scales)}")
    levels = [-math.log2(scale) for scale in scales]
    if any(abs(level - round(level)) > 1e-6 for level in levels):
        raise ValueError(f"scales must be powers of two, got {list(scales)}")
    whole = [round(level) for level in levels]
    if whole != list(range(whole[0], whole[0] + len(whole))):
        raise ValueError(f"scales must each be half of the one before, got {list(scales)}")
    return whole[0], whole[-1]
