"""``mmcv.ops`` by name, argument order and defaults. mmcv itself is not needed.

What differs from mmcv, on purpose:

- Every function takes float32, float64, float16 and bfloat16 on CPU and CUDA (mmcv: NMS in float32 only, soft NMS on
  the CPU only, focal loss on CUDA only).
- ``batched_nms`` compares boxes of one class only, at any coordinates and any number of boxes; ``nms_cfg["type"]`` is
  a name out of a list and is never evaluated. ``split_thr`` has no effect: nothing is split.
- With ``offset=1`` a box ends at ``x2 + 1, y2 + 1``, added once to the coordinate rather than to each difference.
- ``sigmoid_focal_loss`` counts a background row (target C) with weight 1 where mmcv reads ``weight[C]``, which is out
  of bounds; its mean over no rows is 0.
- ``pool_mode="max"`` is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nasdet import ops

__all__ = ["RoIAlign", "batched_nms", "nms", "roi_align", "sigmoid_focal_loss", "soft_nms"]

Array = Any  # a tensor or a numpy array; results are of the same kind as the boxes
_MISSING: Any = object()


def nms(
    boxes: Array,
    scores: Array,
    iou_threshold: float = _MISSING,
    offset: int = 0,
    score_threshold: float = 0,
    max_num: int = -1,
    *,
    iou_thr: float = _MISSING,
) -> tuple[Array, Array]:
    """Non-maximum suppression over all boxes: drops a box whose IoU with a better kept one is above the threshold.

    Args:
        boxes: ``[N, 4]`` as (x1, y1, x2, y2), tensor or numpy array.
        scores: ``[N]``, of the same kind.
        iou_threshold: the largest overlap that two kept boxes may have; ``iou_thr`` is its older name.
        offset: 0, or 1 where ``x2`` and ``y2`` are the last pixels inside: a side is then ``x2 - x1 + 1`` long.
        score_threshold: only boxes with a higher score take part, if above 0.
        max_num: at most so many boxes, if above 0.

    Returns:
        ``(dets, inds)``: ``[K, 5]`` kept boxes with their scores, best first, and int64 ``[K]`` their rows; numpy
        arrays for numpy boxes.

    Raises:
        TypeError: not tensors or arrays, no threshold. ValueError: shapes, dtypes, offset, a NaN threshold.
    """
    threshold = _alias("iou_threshold", iou_threshold, "iou_thr", iou_thr)
    tensor, values = _as_tensors(boxes, scores)
    inds = _kept(tensor, values, None, threshold, offset, score_threshold, max_num)
    dets = torch.cat((tensor[inds], values[inds, None].to(tensor.dtype)), dim=1)
    return _like(boxes, dets, inds)


def soft_nms(
    boxes: Array,
    scores: Array,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = "linear",
    offset: int = 0,
    *,
    iou_thr: float = _MISSING,
) -> tuple[Array, Array]:
    """Soft-NMS: lowers the scores of overlapping boxes instead of dropping them. Bodla et al., 2017.

    Args:
        boxes: ``[N, 4]`` as (x1, y1, x2, y2), tensor or numpy array.
        scores: ``[N]``, of the same kind.
        iou_threshold: overlaps up to it leave the score alone (not used by ``"gaussian"``); older name ``iou_thr``.
        sigma: width of the Gaussian.
        min_score: a box whose score falls below is dropped.
        method: ``"linear"``, ``"gaussian"`` or ``"naive"`` (plain NMS).
        offset: 0 or 1, as in :func:`nms`.

    Returns:
        ``(dets, inds)`` in the order of selection: ``[K, 5]`` boxes with their lowered scores, int64 ``[K]`` rows.

    Raises:
        TypeError: not tensors or arrays. ValueError: shapes, dtypes, method, offset.
    """
    threshold = iou_threshold if iou_thr is _MISSING else iou_thr
    tensor, values = _as_tensors(boxes, scores)
    ends = _with_offset(tensor, offset)
    inds, lowered = ops.soft_nms(ends, values, threshold, sigma=sigma, min_score=min_score, method=method)
    dets = torch.cat((tensor[inds], lowered[:, None].to(tensor.dtype)), dim=1)
    return _like(boxes, dets, inds)


def batched_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    nms_cfg: Mapping[str, Any] | None,
    class_agnostic: bool = False,
) -> tuple[Tensor, Tensor]:
    """NMS or Soft-NMS within each class, as a configuration says.

    Args:
        boxes: ``[N, 4]`` as (x1, y1, x2, y2).
        scores: ``[N]``.
        idxs: int64 ``[N]``, the class of each box.
        nms_cfg: ``type`` (``"nms"``, the default, or ``"soft_nms"``), ``iou_threshold`` (or ``iou_thr``), ``max_num``,
            ``class_agnostic``, ``split_thr`` (no effect), and the other arguments of :func:`nms` or :func:`soft_nms`;
            None sorts by score and drops nothing.
        class_agnostic: all boxes are one class; the configuration's entry goes before.

    Returns:
        ``(dets, keep)``: ``[K, 5]`` boxes with their (lowered) scores, best first, and int64 ``[K]`` rows.

    Raises:
        TypeError: an unknown entry, no threshold. ValueError: an unknown type; shapes, dtypes.
    """
    if nms_cfg is None:
        order = torch.sort(scores, descending=True, stable=True)
        return torch.cat((boxes[order.indices], order.values[:, None].to(boxes.dtype)), dim=1), order.indices
    cfg = dict(nms_cfg)
    classes = None if cfg.pop("class_agnostic", class_agnostic) else idxs
    kind, _ = cfg.pop("type", "nms"), cfg.pop("split_thr", None)
    allowed = {"nms": {"score_threshold"}, "soft_nms": {"sigma", "min_score", "method"}}
    if kind not in allowed:
        raise ValueError(f"nms_cfg['type'] must be one of {sorted(allowed)}, got {kind!r}")
    if unknown := sorted(set(cfg) - allowed[kind] - {"iou_threshold", "iou_thr", "offset", "max_num"}):
        raise TypeError(f"nms_cfg must have entries of {kind} only, got {unknown}")
    given, older = cfg.pop("iou_threshold", _MISSING), cfg.pop("iou_thr", _MISSING)
    if kind == "soft_nms" and given is _MISSING and older is _MISSING:
        given = 0.3
    threshold = _alias("iou_threshold", given, "iou_thr", older)
    offset, max_num = cfg.pop("offset", 0), cfg.pop("max_num", -1)
    if kind == "soft_nms":
        ends = _with_offset(boxes, offset)
        keep, values = ops.soft_nms(ends, scores, threshold, idxs=classes, **cfg)
        if max_num > 0:
            keep, values = keep[:max_num], values[:max_num]
    else:
        keep = _kept(boxes, scores, classes, threshold, offset, cfg.get("score_threshold", 0), max_num)
        values = scores[keep]
    return torch.cat((boxes[keep], values[:, None].to(boxes.dtype)), dim=1), keep


def roi_align(
    input: Tensor,
    rois: Tensor,
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = 0,
    pool_mode: str = "avg",
    aligned: bool = True,
) -> Tensor:
    """RoIAlign with mmcv's order and defaults: :func:`nasdet.ops.roi_align`, ``aligned=True`` if nothing is said.

    Args:
        input: ``[N, C, H, W]``.
        rois: ``[K, 5]`` as (batch index, x1, y1, x2, y2) in image pixels.
        output_size: bins, an int or (height, width).
        spatial_scale: feature pixels per image pixel.
        sampling_ratio: samples per bin and axis; 0 or less: as many as the bin has pixels.
        pool_mode: ``"avg"``.
        aligned: shift by half a pixel, so that pixel centres lie at integers.

    Returns:
        ``[K, C, height, width]`` in ``input``'s dtype.

    Raises:
        ValueError: another ``pool_mode``, shapes, a batch index out of range (CPU). TypeError: dtypes.
    """
    _check_pool_mode(pool_mode)
    return ops.roi_align(input, rois, output_size, spatial_scale, sampling_ratio, aligned)


class RoIAlign(nn.Module):
    """Module of :func:`roi_align`. ``out_size`` and ``sample_num`` are the older names of the first and third argument.

    ``use_torchvision`` is accepted and has no effect: both forms give the same values.
    """

    def __init__(
        self,
        output_size: int | Sequence[int] = _MISSING,
        spatial_scale: float = 1.0,
        sampling_ratio: int = 0,
        pool_mode: str = "avg",
        aligned: bool = True,
        use_torchvision: bool = False,
        *,
        out_size: int | Sequence[int] = _MISSING,
        sample_num: int = _MISSING,
    ) -> None:
        super().__init__()
        _check_pool_mode(pool_mode)
        size = _alias("output_size", output_size, "out_size", out_size)
        self.output_size = (size, size) if isinstance(size, int) else tuple(size)
        self.spatial_scale = float(spatial_scale)
        self.sampling_ratio = int(sampling_ratio if sample_num is _MISSING else sample_num)
        self.pool_mode = pool_mode
        self.aligned = aligned
        self.use_torchvision = use_torchvision

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """``input [N, C, H, W]`` and ``rois [K, 5]`` to ``[K, C, *output_size]``."""
        return ops.roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, pool_mode={self.pool_mode}, aligned={self.aligned}"
        )


def sigmoid_focal_loss(
    input: Tensor,
    target: Tensor,
    gamma: float = 2.0,
    alpha: float = 0.25,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Focal loss on class indices; ``gamma`` stands before ``alpha``. Lin et al., 2017, Eq. 5.

    ``-alpha (1 - p)^gamma log p`` in the column of the row's class, ``-(1 - alpha) p^gamma log(1 - p)`` in the others,
    ``p = sigmoid(input)``.

    Args:
        input: logits ``[N, C]``.
        target: int64 ``[N]`` in ``0..C``; C (or any index without a column) is background.
        gamma: the focusing exponent.
        alpha: weight of the positive column, in [0, 1].
        weight: ``[C]``; row n counts ``weight[target[n]]`` times, a background row once.
        reduction: ``"none"`` (``[N, C]``), ``"sum"``, or ``"mean"``: the sum divided by N, not by N * C.

    Raises:
        TypeError: target is not int64. ValueError: shapes, alpha, reduction.
    """
    if input.ndim != 2:
        raise ValueError(f"input must have shape (N, C), got {tuple(input.shape)}")
    if target.dtype != torch.int64:
        raise TypeError(f"target must be an int64 tensor of class indices, got {target.dtype}")
    if target.shape != input.shape[:1]:
        raise ValueError(f"target must have shape {tuple(input.shape[:1])}, got {tuple(target.shape)}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction must be 'none', 'mean' or 'sum', got {reduction!r}")
    rows, classes = input.shape
    if weight is not None and weight.shape != (classes,):
        raise ValueError(f"weight must have shape ({classes},), got {tuple(weight.shape)}")
    one_hot = (target[:, None] == torch.arange(classes, device=input.device)).to(input.dtype)
    if weight is None or classes == 0:
        loss = ops.sigmoid_focal_loss(input, one_hot, alpha, gamma, "none" if reduction == "none" else "sum")
    else:
        positive = (target >= 0) & (target < classes)
        of_row = torch.where(positive, weight[target.clamp(0, classes - 1)], 1).to(input.dtype)
        loss = ops.sigmoid_focal_loss(input, one_hot, alpha, gamma, "none") * of_row[:, None]
        loss = loss if reduction == "none" else loss.sum()
    return loss / max(rows, 1) if reduction == "mean" else loss


def _alias(name: str, value: Any, old_name: str, old: Any) -> Any:
    if (value is _MISSING) == (old is _MISSING):
        raise TypeError(
            f"{name} must be given once (as {name} or {old_name}), got {'none' if value is _MISSING else 'both'}"
        )
    return old if value is _MISSING else value


def _check_pool_mode(pool_mode: str) -> None:
    if pool_mode != "avg":
        raise ValueError(f"pool_mode must be 'avg' (nasdet has no maximum form of RoIAlign), got {pool_mode!r}")


def _as_tensors(boxes: Array, scores: Array) -> tuple[Tensor, Tensor]:
    return _tensor("boxes", boxes), _tensor("scores", scores)


def _tensor(name: str, value: Array) -> Tensor:
    if isinstance(value, np.ndarray):
        return torch.from_numpy(np.ascontiguousarray(value))
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor or a numpy array, got {type(value).__name__}")
    return value


def _like(boxes: Array, dets: Tensor, inds: Tensor) -> tuple[Array, Array]:
    return (dets.numpy(), inds.numpy()) if isinstance(boxes, np.ndarray) else (dets, inds)


def _with_offset(boxes: Tensor, offset: int) -> Tensor:
    if offset not in (0, 1):
        raise ValueError(f"offset must be 0 or 1, got {offset!r}")
    return boxes + boxes.new_tensor([0, 0, 1, 1]) if offset else boxes


def _kept(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None,
    iou_threshold: float,
    offset: int,
    score_threshold: float,
    max_num: int,
) -> Tensor:
    """Rows of the kept boxes, best first."""
    ends, rows = _with_offset(boxes, offset), None
    if score_threshold > 0:
        rows = torch.nonzero(scores > score_threshold).squeeze(1)
        ends, scores = ends[rows], scores[rows]
        classes = None if classes is None else classes[rows]
    if classes is None:
        keep = ops.nms(ends, scores, iou_threshold)
    else:
        keep = ops.batched_nms(ends, scores, classes, iou_threshold)
    keep = keep[:max_num] if max_num > 0 else keep
    return keep if rows is None else rows[keep]
