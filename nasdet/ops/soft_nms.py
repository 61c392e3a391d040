"""``soft_nms``: suppression that lowers the scores of overlapping boxes instead of dropping them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nasdet import _dispatch
from nasdet._cases import Case, Inputs
from nasdet._library import LIBRARY
from nasdet.ops._checks import checked_number
from nasdet.ops._suppression import (
    above,
    checked_boxes,
    checked_classes,
    clustered,
    in_layout,
    iou_with,
    need_data,
)

METHODS = ("linear", "gaussian", "naive")  # by the raw op's number


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    min_score: float = 1e-3,
    method: str = "linear",
    *,
    idxs: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Select the box with the highest score, multiply the others' scores with a weight of their IoU with it, repeat.

    The weight is ``1 - IoU`` where ``IoU > iou_threshold`` (``"linear"``), ``exp(-IoU^2 / sigma)`` everywhere
    (``"gaussian"``), or 0 where ``IoU > iou_threshold`` (``"naive"``: as ``nms``); else 1, also where the IoU is 0/0.
    Boxes whose score is or falls below ``min_score`` are out. Bodla et al. 2017, "Soft-NMS: Improving Object Detection
    With One Line of Code", Fig. 2 and Eqs. 3 and 5 (whose linear form also lowers at an IoU equal to the threshold).

    Args:
        boxes: ``[N, 4]``: x1, y1, x2, y2; float32, float64, float16 or bfloat16, any strides. Computed in float32
            (float64 for float64); the IoU is compared with the threshold as ``nms`` does.
        scores: ``[N]``, a float dtype; with another dtype than the boxes' both are taken in the wider of the two.
            Highest first, ties by index, NaN before all others.
        iou_threshold: of ``"linear"`` and ``"naive"``.
        sigma: of ``"gaussian"``, above 0.
        min_score: boxes with a lower score are dropped; a NaN score is not lower.
        method: ``"linear"``, ``"gaussian"`` or ``"naive"``.
        idxs: ``[N]`` integer classes: only boxes of one class lower each other. None for one class.
        backend: ``"cpp"``, ``"cuda"`` or ``"reference"``; the best that can run when None.

    Returns:
        ``(keep, scores)``: int64 indices in the order of selection, and their lowered scores, falling (for scores
        >= 0), in the dtype of the input. Not differentiable: neither has a gradient. Meta tensors raise, as the size
        depends on the data; for ``torch.compile(fullgraph=True)`` see ``nms``.

    Raises:
        TypeError: not floating-point tensors, ``idxs`` is no integer tensor, or a setting is no number. ValueError:
        wrong shapes, devices or settings.
    """
    boxes, scores, iou_threshold = checked_boxes(boxes, scores, iou_threshold, 0)
    idxs = None if idxs is None else checked_classes(idxs, scores)
    if method not in METHODS:
        raise ValueError(f"method must be one of {list(METHODS)}, got {method!r}")
    sigma, min_score = checked_number("sigma", sigma), checked_number("min_score", min_score)
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    if min_score != min_score:
        raise ValueError("min_score must be a number, got nan")
    settings = (METHODS.index(method), iou_threshold, sigma, min_score)
    return _dispatch.choose("soft_nms", backend, boxes).run(boxes, scores, idxs, *settings)


def _reference(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None,
    method: int,
    iou_threshold: float,
    sigma: float,
    min_score: float,
) -> tuple[Tensor, Tensor]:
    need_data(boxes)
    arithmetic = torch.float64 if boxes.dtype == torch.float64 else torch.float32
    rows, current = boxes.detach().to(arithmetic), scores.detach().to(arithmetic, copy=True)
    keep = [torch.zeros(0, dtype=torch.int64, device=boxes.device)]
    left = torch.arange(len(boxes), device=boxes.device)
    left = left[~(current < min_score)]
    while left.numel():
        best = left[current[left].argmax()][None]  # the first of the highest; NaN is the highest
        keep.append(best)
        left = left[left != best]
        iou = iou_with(rows[best][None], rows[left][None])[0]
        if METHODS[method] == "gaussian":
            weight = torch.exp(-(iou * iou) / sigma).nan_to_num(nan=1.0)
        else:
            lowered = 1 - iou if METHODS[method] == "linear" else torch.zeros_like(iou)
            weight = torch.where(above(iou, iou_threshold), lowered, 1.0)
        if classes is not None:
            weight = torch.where(classes[left] == classes[best], weight, 1.0)
        weighted = torch.where((weight == 0) & ~current[left].isnan(), 0.0, current[left] * weight)
        current[left] = weighted
        left = left[~(weighted < min_score)]
    order = torch.cat(keep)
    return order, current[order].to(scores.dtype)


LIBRARY.define(
    "soft_nms(Tensor boxes, Tensor scores, Tensor? classes, int method, float iou_threshold, float sigma, "
    "float min_score) -> (Tensor, Tensor)"
)


@torch.library.register_fake("nasdet::soft_nms")
def _fake(boxes: Tensor, scores: Tensor, classes: Tensor | None, *settings: Any) -> tuple[Tensor, Tensor]:
    kept = torch.library.get_ctx().new_dynamic_size(min=0)
    return boxes.new_empty([kept], dtype=torch.int64), scores.new_empty([kept])


def _not_differentiable(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


def _no_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("nasdet::soft_nms is not differentiable")


torch.library.register_autograd("nasdet::soft_nms", _no_backward, setup_context=_not_differentiable)


def _run_compiled(boxes: Tensor, scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    # Detached: torch.func has no rule for the autograd formula that says that neither result has a gradient.
    return torch.ops.nasdet.soft_nms(boxes.detach(), scores.detach(), *rest)


def _boxes(boxes: Tensor, *_: Any) -> Tensor:
    return boxes


def _case(
    name: str, count: int, method: str, layout: str = "contiguous", classes: int = 0, large: bool = False, **more: Any
) -> Case:
    def make(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        boxes, scores = clustered(inputs, count)
        idxs = torch.randint(classes or 1, (count,), generator=inputs.generator).to(inputs.device)
        boxes, scores = in_layout(boxes, layout), in_layout(scores, layout)
        return (boxes, scores), {"method": method, **more, **({"idxs": idxs} if classes else {})}

    return Case(name, make, large=large)


def _degenerate(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Duplicates, boxes without area, inverted, infinite and NaN ones, equal and low scores."""
    nan, inf = float("nan"), float("inf")
    square, flat = [8.0, 8.0, 24.0, 24.0], [8.0, 8.0, 8.0, 24.0]
    odd = [[24.0, 8.0, 8.0, 24.0], [24.0, 24.0, 8.0, 8.0], [nan, 8.0, 24.0, 24.0], [-inf, 8.0, 24.0, 24.0]]
    rows = [*[square] * 3, flat, flat, *odd, [8.0, 8.0, 25.0, 24.0], [0.0] * 4, [9.0, 9.0, 24.0, 24.0]]
    scores = [0.5, 0.5, 0.25, 0.75, 0.75, 0.5, 0.5, 1.0, 0.5, 2.0, 0.0, 0.375]
    boxes = torch.tensor(rows).to(inputs.dtype).to(inputs.device)
    return (boxes, torch.tensor(scores).to(inputs.dtype).to(inputs.device)), {}


def _reference_of_public(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return soft_nms(*args, **kwargs, backend="reference")


OP = _dispatch.register(
    _dispatch.Op(
        name="soft_nms",
        call=soft_nms,
        reference=_reference_of_public,
        backends=(
            _dispatch.compiled_backend("cpp", "soft_nms", _run_compiled, _boxes, differentiable=False),
            _dispatch.compiled_backend("cuda", "soft_nms", _run_compiled, _boxes, differentiable=False),
            _dispatch.reference_backend(_reference),
        ),
        reduce_len=lambda boxes, *_: len(boxes),  # factors of a score, each rounded
        cases=(
            _case("linear", 50, "linear"),
            _case("gaussian", 50, "gaussian", sigma=0.4),
            _case("naive", 60, "naive", iou_threshold=0.5),
            _case("classes", 60, "linear", classes=4),
            _case("classes-gaussian", 60, "gaussian", classes=3, min_score=0.05),
            _case("sliced", 33, "linear", layout="sliced", iou_threshold=0.0),
            _case("transposed", 35, "gaussian", layout="transposed"),
            _case("one", 1, "linear"),
            _case("none-survives", 20, "linear", min_score=2.0),
            _case("negative-threshold", 20, "naive", iou_threshold=-1.0),
            _case("negative-threshold-zeros", 20, "naive", iou_threshold=-1.0, min_score=0.0),
            _case("empty", 0, "linear"),
            Case("degenerate", _degenerate),
            _case("thousand", 1000, "linear", large=True),
            _case("thousand-gaussian", 1000, "gaussian", large=True),
        ),
    )
)
