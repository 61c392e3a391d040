"""``torchvision.ops`` by name, argument order and defaults. torchvision itself is not needed.

What differs from torchvision, on purpose:

- ``batched_nms`` compares boxes of one class only. torchvision shifts the classes apart by an offset instead when there
  are few boxes, which lets classes meet at negative coordinates and rounds large coordinates.
- float16 and bfloat16 work on every device, with coordinates and sums in float32; RoIs may stay float32 then.
- A batch index outside the batch raises on the CPU and gives zeros on CUDA; torchvision reads out of bounds.
- RoIAlign keeps channels_last where the input has it; torchvision returns contiguous results only.
- ``box_iou`` and ``generalized_box_iou`` widen before they subtract: 16-bit boxes lose no digits, and unsigned integers
  do not wrap around.
- A RoI with a NaN pools to 0, where torchvision may crash. ``nms`` keeps 0 or 1 boxes in compiled code too.
- ``sigmoid_focal_loss`` has finite gradients for ``gamma`` below 1.
"""

from __future__ import annotations

from nasdet.nn import MultiScaleRoIAlign, RoIAlign
from nasdet.ops import batched_nms, nms, roi_align, sigmoid_focal_loss
from nasdet.ops.boxes import box_iou, generalized_box_iou

__all__ = [
    "MultiScaleRoIAlign",
    "RoIAlign",
    "batched_nms",
    "box_iou",
    "generalized_box_iou",
    "nms",
    "roi_align",
    "sigmoid_focal_loss",
]
