"""Instance masks: from M x M probabilities in boxes to pictures, and to COCO's run-length encoding.

:func:`paste_to_rle` is what evaluation uses: a compiled kernel that never makes the picture. :func:`paste_masks` and
:func:`encode_rle` are the same in plain PyTorch and numpy, and its reference.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

CONVENTIONS = ("torchvision", "detectron2")
_FAR = 2.0**61  # as in the kernel: beyond it int64 arithmetic on sizes could overflow


def native_why_not() -> str | None:
    """Why the compiled kernel is not there, or None."""
    try:
        _kernel()
    except (ImportError, AttributeError) as error:
        return f"nasdet._C cannot be used: {error}"
    return None


def _kernel() -> Callable[..., list[dict[str, Any]]]:
    from nasdet import _C  # type: ignore[attr-defined]  # a compiled module, absent in the portable wheel

    kernel: Callable[..., list[dict[str, Any]]] = _C.paste_to_rle
    return kernel


def paste_to_rle(
    masks: Tensor | np.ndarray,
    boxes: Tensor | np.ndarray,
    size: Sequence[int],
    threshold: float = 0.5,
    *,
    from_logits: bool = True,
    convention: str = "torchvision",
    backend: str = "auto",
    threads: int | None = None,
) -> list[dict[str, Any]]:
    """Paste masks into a picture and run-length encode them: ``[{"size": [H, W], "counts": bytes}, ...]``.

    Same bytes as ``pycocotools.mask.encode`` of ``paste_masks(...) > threshold`` (``>=`` for ``"detectron2"``), without
    the ``n x H x W`` pixels. Memory: a few KB per thread, and the result.

    Args:
        masks: ``[n, M, M]`` of a floating dtype (computed in float32), of any device: logits, of which the sigmoid is
            taken, or with ``from_logits=False`` probabilities. A pixel that blends a NaN is not set, be its weight 0.
        boxes: ``[n, 4]`` x1, y1, x2, y2 in pixels of the picture. They may reach beyond it, and lie outside. A box with
            a coordinate that is not finite gives an empty mask, and so does one turned inside out or without area, but
            for torchvision's rule, by which a side of less than a pixel still takes in the pixel that it lies in.
        size: ``(H, W)`` of the picture, fewer than 2^31 pixels.
        threshold: of the probability, between 0 and 1.
        convention: how pixels meet the box, see :func:`paste_masks`.
        backend: ``"native"`` (``nasdet._C``), ``"reference"`` (PyTorch and numpy) or ``"auto"``: native where it is.
        threads: at most so many; by default ``torch.get_num_threads()``. They do not change the result.

    Raises:
        TypeError: masks or boxes that are no floating-point tensor or array.
        ValueError: shapes, a size, threshold, convention, backend or threads out of range; native asked for and absent.
    """
    masks, boxes, (height, width) = _checked(masks, boxes, size, convention)
    limit = _limit(threshold, convention)
    if not 0 < limit < 1:
        raise ValueError(f"threshold must be between 0 and 1, got {threshold}")
    if backend not in ("auto", "native", "reference"):
        raise ValueError(f"backend must be 'auto', 'native' or 'reference', got {backend!r}")
    threads = torch.get_num_threads() if threads is None else threads
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    reason = native_why_not() if backend != "reference" else "not asked for"
    if reason is not None and backend == "native":
        raise ValueError(f"backend must be one that is here, got 'native': {reason}")
    if from_logits:
        masks = masks.sigmoid()
    if reason is None:
        continuous = convention == "detectron2"
        return _kernel()(masks.numpy(), boxes.numpy(), height, width, limit, continuous, min(threads, 256))
    # One at a time: a hundred pictures of 800 x 1333 float32 would take 430 MB.
    return [
        encode_rle(_paste(mask, box, (height, width), convention).numpy() > limit)
        for mask, box in zip(masks, boxes, strict=True)
    ]


def _limit(threshold: float, convention: str) -> float:
    """The float32 that a value must exceed: for detectron2's ``>=`` the one below the threshold."""
    limit = np.float32(threshold)
    return float(np.nextafter(limit, np.float32(-1)) if convention == "detectron2" else limit)


def paste_masks(
    masks: Tensor | np.ndarray, boxes: Tensor | np.ndarray, size: Sequence[int], convention: str = "torchvision"
) -> Tensor:
    """Bilinear paste of ``[n, M, M]`` values into ``[n, 4]`` boxes: float32 ``[n, H, W]`` on the CPU, 0 outside.

    ``"torchvision"``: the mask gets a border of zeros and the box grows with it, ``half = (x2 - x1) / 2 * (M + 2) /
    M`` about its centre; its corners are truncated to integers ``a`` and ``b``, both included, and pixel ``x`` reads
    the padded mask at ``s = (M + 2) / max(b - a + 1, 1) * (x - a + 1/2) - 1/2`` (``paste_masks_in_image`` with its
    padding of 1). ``"detectron2"``: pixel ``x`` reads at ``s = (x + 1/2 - x1) / (x2 - x1) * M - 1/2`` with zeros
    around the mask.

    The value is ``h0 * (1 - v) + h1 * v`` with ``h = l * (1 - u) + r * u`` within both mask rows, ``u`` and ``v`` the
    fractions of ``s``; every operation rounds to float32, none is fused. ``torch.nn.functional.interpolate`` orders and
    fuses them by CPU and version: its values differ in the last bits.
    """
    masks, boxes, picture = _checked(masks, boxes, size, convention)
    result = torch.zeros(len(masks), *picture, dtype=torch.float32)
    for mask, box, canvas in zip(masks, boxes, result, strict=True):
        canvas.copy_(_paste(mask, box, picture, convention))
    return result


def _checked(
    masks: Tensor | np.ndarray, boxes: Tensor | np.ndarray, size: Sequence[int], convention: str
) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """Both as contiguous float32 on the CPU, and the size as integers."""
    masks, boxes = _float32(masks, "masks"), _float32(boxes, "boxes")
    if masks.dim() != 3 or masks.shape[1] != masks.shape[2] or not masks.shape[1]:
        raise ValueError(f"masks must have shape (n, M, M), got {tuple(masks.shape)}")
    if boxes.shape != (len(masks), 4):
        raise ValueError(f"boxes must have shape ({len(masks)}, 4), got {tuple(boxes.shape)}")
    if len(size) != 2 or min(size) < 1 or math.prod(size) >= 2**31:
        raise ValueError(f"size must be (H, W), positive and fewer than 2^31 pixels, got {tuple(size)}")
    if convention not in CONVENTIONS:
        raise ValueError(f"convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    return masks, boxes, (int(size[0]), int(size[1]))


def _float32(values: Tensor | np.ndarray, name: str) -> Tensor:
    values = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if not isinstance(values, Tensor) or not values.is_floating_point():
        got = values.dtype if isinstance(values, Tensor) else type(values).__name__
        raise TypeError(f"{name} must be a floating-point tensor or array, got {got}")
    return values.detach().to("cpu", torch.float32).contiguous()


def _paste(mask: Tensor, box: Tensor, size: tuple[int, int], convention: str) -> Tensor:
    """One mask ``[M, M]`` in its picture ``[H, W]``."""
    side, canvas = len(mask), torch.zeros(size, dtype=torch.float32)
    axis = _integer_axis if convention == "torchvision" else _continuous_axis
    columns, rows = (axis(box[i], box[i + 2], side, size[1 - i]) for i in (0, 1))
    if columns is None or rows is None:
        return canvas
    padded = mask.new_zeros(side + 3, side + 3)  # two zeros at the far end, so that the last one has a neighbour
    padded[1 : side + 1, 1 : side + 1] = mask
    first, low, left, right = columns
    blend = padded[:, low] * left + padded[:, low + 1] * right
    top, low, upper, lower = rows
    values = blend[low] * upper[:, None] + blend[low + 1] * lower[:, None]
    canvas[top : top + len(values), first : first + values.shape[1]] = values
    return canvas


_Axis = tuple[int, Tensor, Tensor, Tensor]  # first pixel, lower neighbours in the padded mask, weights of both


def _integer_axis(a: Tensor, b: Tensor, side: int, limit: int) -> _Axis | None:
    half = (b - a) * 0.5 * ((side + 2) / side)
    centre = (b + a) * 0.5
    corners = torch.stack((centre - half, centre + half))
    if not bool(corners.isfinite().all()):
        return None
    low, high = corners.clamp(-_FAR, _FAR).to(torch.int64).tolist()
    scale = torch.tensor(side + 2.0, dtype=torch.float32) / torch.tensor(max(high - low + 1, 1)).float()
    first, end = max(low, 0), min(high + 1, limit)
    if first >= end:
        return None
    return first, *_neighbours(scale * ((torch.arange(first, end) - low).float() + 0.5) - 0.5, side)


def _continuous_axis(a: Tensor, b: Tensor, side: int, limit: int) -> _Axis | None:
    size = b - a
    if not bool(torch.stack((a, b, size)).isfinite().all()) or size <= 0:
        return None
    return 0, *_neighbours((torch.arange(limit).float() + 0.5 - a) / size * side + 0.5, side)


def _neighbours(source: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Index of the lower neighbour in the padded mask, its weight and the upper one's, of float32 places in it."""
    source = source.clamp(0, side + 2)
    low = source.to(torch.int64).clamp(max=side + 1)
    fraction = (source - low).clamp(0, 1)
    return low, 1 - fraction, fraction


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO's compressed run-length encoding of a bool mask ``[H, W]``, as ``pycocotools.mask.encode`` gives it.

    Runs of 0 and 1 in turn, beginning with 0, over the columns of the mask. From the fourth on a run is written as its
    difference to the one two before; each number in groups of 5 bits from the lowest, one character from "0" on for
    each, bit 5 saying that more follow.
    """
    if mask.ndim != 2 or mask.dtype != np.bool_:
        raise ValueError(f"mask must be bool of shape (H, W), got {mask.dtype} of {mask.shape}")
    flat = mask.ravel(order="F")
    ends = [*(np.flatnonzero(flat[1:] != flat[:-1]) + 1).tolist(), flat.size]
    runs = [0] * bool(flat.size and flat[0]) + [end - start for start, end in zip([0, *ends], ends, strict=False)]
    text = bytearray()
    for index, run in enumerate(runs):
        _append_number(text, run - runs[index - 2] if index > 2 else run)
    return {"size": list(mask.shape), "counts": bytes(text)}


def _append_number(text: bytearray, value: int) -> None:
    more = True
    while more:
        group, value = value & 31, value >> 5
        more = value != (-1 if group & 16 else 0)
        text.append(48 + group + 32 * more)
