"""``nms``, ``batched_nms``, ``nms_padded``: greedy suppression of one class, of many, and of static shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nasdet import _dispatch
from nasdet._cases import Case, Inputs
from nasdet._checks import plain_int
from nasdet._library import LIBRARY
from nasdet.ops._suppression import (
    above,
    checked_boxes,
    checked_classes,
    clustered,
    in_layout,
    iou_with,
    need_data,
    wrong_boxes,
)

MOST_PLACES = 2**31  # of nms_padded, per image


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, *, backend: str | None = None) -> Tensor:
    """Keep the best box, drop every box that overlaps it by more than the threshold, and so on with the rest.

    A box is dropped when its IoU with a better kept box is *greater than* ``iou_threshold``, where
    ``IoU = intersection / union`` in float32 (float64 for float64 boxes). Boxes go by descending score, ties by
    index, NaN scores first. An IoU of 0/0 (boxes without area) is NaN and drops nothing, as does a NaN or infinite
    coordinate. This is torchvision's order and rule, bit for bit; as there, the CPU compares the IoU with the
    threshold in float64, CUDA with the threshold rounded to float32 (float32 and 16-bit boxes).

    Args:
        boxes: ``[N, 4]``: x1, y1, x2, y2 in any unit; float32, float64, float16 or bfloat16 (16-bit boxes are
            computed in float32), any strides.
        scores: ``[N]``, a float dtype; with another dtype than the boxes' both are taken in the wider of the two.
        iou_threshold: below 0 boxes without overlap drop each other too; from 1 on nothing is dropped.
        backend: ``"cpp"``, ``"cuda"`` or ``"reference"``; the best that can run when None.

    Returns:
        int64 indices of the kept boxes, best first; ``[0]`` for no boxes. Integers have no gradient. The size depends
        on the data: meta tensors raise, CUDA waits for the count, and ``torch.compile(fullgraph=True)`` needs
        ``torch._dynamo.config.capture_dynamic_output_shape_ops`` (``nms_padded`` is free of all three).

    Raises:
        TypeError: not floating-point tensors, or the threshold is no number. ValueError: wrong shapes or devices, or a
        NaN threshold.
    """
    boxes, scores, iou_threshold = checked_boxes(boxes, scores, iou_threshold, 0)
    return _dispatch.choose("nms", backend, boxes).run(boxes, scores, None, iou_threshold)


def batched_nms(
    boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float, *, backend: str | None = None
) -> Tensor:
    """``nms`` within each class: boxes of different classes never drop each other. One call, whatever the classes.

    torchvision moves the classes apart by adding ``idxs * (boxes.max() + 1)`` to the coordinates when there are few
    boxes, which merges classes at negative coordinates and rounds differently with large offsets; with more boxes it
    loops over the classes, and its order among equal scores is not stable. Here only boxes of one class are compared,
    on the coordinates given: the same kept set as its loop, in the order of ``nms``.

    Args:
        boxes: ``[N, 4]`` as for ``nms``.
        scores: ``[N]`` as for ``nms``.
        idxs: ``[N]``, the class of each box: any integers, negative ones too; int64 is taken as it is.
        iou_threshold: as for ``nms``.
        backend: as for ``nms``.

    Returns:
        int64 indices of the kept boxes of all classes, by descending score, ties by index.

    Raises:
        TypeError, ValueError: as ``nms``; TypeError: ``idxs`` is no integer tensor.
    """
    boxes, scores, iou_threshold = checked_boxes(boxes, scores, iou_threshold, 0)
    idxs = checked_classes(idxs, scores)
    return _dispatch.choose("batched_nms", backend, boxes).run(boxes, scores, idxs, iou_threshold)


def nms_padded(
    boxes: Tensor,
    scores: Tensor,
    iou_threshold: float,
    max_out: int,
    *,
    idxs: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The first ``max_out`` boxes of ``nms`` (``batched_nms`` with ``idxs``), in tensors of static shape.

    Nothing waits for the device, the call records into CUDA graphs, exports, and has a ``torch.vmap`` rule.

    Args:
        boxes: ``[..., N, 4]``; every index of the leading dimensions is an image of its own. Else as for ``nms``.
        scores: ``[..., N]``.
        iou_threshold: as for ``nms``.
        max_out: places for kept boxes per image, at least 0 and below 2**31.
        idxs: ``[..., N]`` integer classes; None for one class.
        backend: as for ``nms``.

    Returns:
        ``(index, count)``: int64 ``[..., max_out]``, best first and -1 in the places that are left over, and int64
        ``[...]``, how many are taken.

    Raises:
        TypeError: as ``batched_nms``. ValueError: as ``nms``, or ``max_out`` outside of its range.
    """
    if not isinstance(boxes, Tensor) or boxes.dim() < 2:
        raise wrong_boxes(boxes, "(..., N, 4)")
    boxes, scores, iou_threshold = checked_boxes(boxes, scores, iou_threshold, boxes.dim() - 2)
    idxs = None if idxs is None else checked_classes(idxs, scores)
    max_out = plain_int(max_out)
    if isinstance(max_out, bool) or not isinstance(max_out, (int, torch.SymInt)):
        raise TypeError(f"max_out must be an int, got {type(max_out).__name__}")
    if max_out < 0:
        raise ValueError(f"max_out must be at least 0, got {max_out}")
    if not torch.compiler.is_compiling() and max_out >= MOST_PLACES:  # a compiler may not know
        raise ValueError(f"max_out must be below 2**31, got {max_out}")
    run = _dispatch.choose("nms_padded", backend, boxes).run
    if boxes.dim() == 3:
        return run(boxes, scores, idxs, iou_threshold, max_out)
    leading = boxes.shape[:-2]
    images = leading.numel()  # spelt out: -1 is ambiguous where N is 0
    index, count = run(
        boxes.reshape(images, *boxes.shape[-2:]),
        scores.reshape(images, scores.shape[-1]),
        None if idxs is None else idxs.reshape(images, idxs.shape[-1]),
        iou_threshold,
        max_out,
    )
    return index.reshape(*leading, max_out), count.reshape(leading)


def _kept(boxes: Tensor, scores: Tensor, classes: Tensor | None, iou_threshold: float) -> tuple[Tensor, Tensor]:
    """The boxes of each image by rank, ``[B, N]``, and which of them stay; no step looks at values or waits."""
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    arithmetic = torch.float64 if boxes.dtype == torch.float64 else torch.float32
    ranked = torch.take_along_dim(boxes, order[..., None], 1).to(arithmetic)
    labels = None if classes is None else torch.take_along_dim(classes, order, 1)
    keep = torch.ones_like(order, dtype=torch.bool)
    later = torch.arange(order.shape[1], device=order.device)
    for i in range(order.shape[1]):
        drop = above(iou_with(ranked[:, i : i + 1], ranked), iou_threshold) & (later > i) & keep[:, i : i + 1]
        keep = keep & ~(drop if labels is None else drop & (labels == labels[:, i : i + 1]))
    return order, keep


def _reference(boxes: Tensor, scores: Tensor, classes: Tensor | None, iou_threshold: float) -> Tensor:
    need_data(boxes)
    order, keep = _kept(boxes[None], scores[None], None if classes is None else classes[None], iou_threshold)
    return order[0, keep[0]]


def _reference_padded(
    boxes: Tensor, scores: Tensor, classes: Tensor | None, iou_threshold: float, max_out: int
) -> tuple[Tensor, Tensor]:
    order, keep = _kept(boxes, scores, classes, iou_threshold)
    place = torch.where(keep, torch.cumsum(keep, 1) - 1, max_out).clamp(max=max_out)
    padded = order.new_full((order.shape[0], max_out + 1), -1).scatter(1, place, order)
    return padded[:, :max_out].contiguous(), keep.sum(1).clamp(max=max_out)


LIBRARY.define("nms(Tensor boxes, Tensor scores, Tensor? classes, float iou_threshold) -> Tensor")
LIBRARY.define(
    "nms_padded(Tensor boxes, Tensor scores, Tensor? classes, float iou_threshold, SymInt max_out) -> (Tensor, Tensor)"
)


@torch.library.register_fake("nasdet::nms")
def _fake(boxes: Tensor, scores: Tensor, classes: Tensor | None, iou_threshold: float) -> Tensor:
    kept = torch.library.get_ctx().new_dynamic_size(min=0)
    return boxes.new_empty([kept], dtype=torch.int64)


@torch.library.register_fake("nasdet::nms_padded")
def _fake_padded(
    boxes: Tensor, scores: Tensor, classes: Tensor | None, iou_threshold: float, max_out: int
) -> tuple[Tensor, Tensor]:
    images = boxes.shape[0]
    return boxes.new_empty([images, max_out], dtype=torch.int64), boxes.new_empty([images], dtype=torch.int64)


@torch.library.register_vmap("nasdet::nms_padded")
def _vmap_padded(
    info: Any, in_dims: tuple[Any, ...], boxes: Tensor, scores: Tensor, classes: Tensor | None, *rest: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    def lanes(tensor: Tensor, dim: int | None) -> Tensor:
        return tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    inputs = (boxes, scores) if classes is None else (boxes, scores, classes)
    batched = [lanes(t, dim) for t, dim in zip(inputs, in_dims, strict=False)]
    leading = batched[0].shape[:2]
    folded = [t.reshape(leading.numel(), *t.shape[2:]) for t in batched]
    outputs = torch.ops.nasdet.nms_padded(*folded, *([None] if classes is None else []), *rest)
    index, count = (t.reshape(*leading, *t.shape[1:]) for t in outputs)
    return (index, count), (0, 0)


def _run_compiled(boxes: Tensor, scores: Tensor, classes: Tensor | None, iou_threshold: float) -> Tensor:
    return torch.ops.nasdet.nms(boxes, scores, classes, iou_threshold)


def _run_compiled_padded(
    boxes: Tensor, scores: Tensor, classes: Tensor | None, iou_threshold: float, max_out: int
) -> tuple[Tensor, Tensor]:
    return torch.ops.nasdet.nms_padded(boxes, scores, classes, iou_threshold, max_out)


def _boxes(boxes: Tensor, *_: Any) -> Tensor:
    return boxes


def _backends(raw: str, compiled: Callable[..., Any], reference: Callable[..., Any]) -> tuple[_dispatch.Backend, ...]:
    return (
        _dispatch.compiled_backend("cpp", raw, compiled, _boxes, differentiable=False),
        _dispatch.compiled_backend("cuda", raw, compiled, _boxes, differentiable=False),
        _dispatch.reference_backend(reference),
    )


def _case(
    name: str, count: int, iou_threshold: float = 0.5, layout: str = "contiguous", large: bool = False, **more: Any
) -> Case:
    def make(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        boxes, scores = clustered(inputs, count, **more)
        return (in_layout(boxes, layout), in_layout(scores, layout), iou_threshold), {}

    return Case(name, make, large=large)


def _degenerate(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Duplicates, boxes without area, inverted, infinite and NaN ones, a NaN score, equal scores, both zeros."""
    nan, inf = float("nan"), float("inf")
    square, flat = [8.0, 8.0, 24.0, 24.0], [8.0, 8.0, 8.0, 24.0]
    inverted = [[24.0, 8.0, 8.0, 24.0], [24.0, 24.0, 8.0, 8.0], [8.0, 24.0, 24.0, 8.0]]
    without_end = [[nan, 8.0, 24.0, 24.0], [8.0, 8.0, nan, 24.0], [-inf, 8.0, 24.0, 24.0], [-inf, -inf, inf, inf]]
    rows = [*[square] * 3, flat, flat, *inverted, *without_end, [8.0, 8.0, 25.0, 24.0], [0.0] * 4]
    scores = [0.5, 0.5, nan, 0.75, 0.75, 0.5, 0.5, 0.25, 1.0, 0.5, 0.5, 2.0, -0.0, 0.0]
    boxes = torch.tensor(rows).to(inputs.dtype).to(inputs.device)
    return (boxes, torch.tensor(scores).to(inputs.dtype).to(inputs.device), 0.5), {}


def _at_threshold(iou_threshold: float) -> Case:
    """IoU exactly 1/2, 1/4 and 0 beside one another: not greater than the threshold of that value."""

    def make(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rows = [[0, 0, 32, 32], [0, 0, 32, 16], [0, 0, 16, 16], [32, 0, 64, 32], [0, 0, 32, 17], [1, 0, 32, 32]]
        boxes = torch.tensor(rows).to(inputs.dtype).to(inputs.device)
        scores = torch.linspace(1, 0.5, 6).to(inputs.dtype).to(inputs.device)
        return (boxes, scores, iou_threshold), {}

    return Case(f"at-threshold-{iou_threshold}", make)


_CASES = (
    _case("one", 1),
    _case("hundred", 100),
    _case("sliced", 50, layout="sliced"),
    _case("transposed", 67, 0.25, layout="transposed"),
    _case("spread", 150, 0.25, clusters=150),
    _case("one-survivor", 20, 0.0, clusters=1, jitter=1.0),
    _case("all-survive", 40, 1.0),
    _case("negative-threshold", 30, -0.5),
    _case("empty", 0),
    Case("degenerate", _degenerate),
    _at_threshold(0.5),
    _at_threshold(0.25),
    _at_threshold(0.0),
    *(_case(f"clustered-{n}", n, clusters=n // 10, large=True) for n in (100, 1000, 5000, 20000)),
)


def _with_classes(case: Case, classes: int) -> Case:
    def make(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        (boxes, scores, iou_threshold), kwargs = case.make(inputs)
        idxs = torch.randint(-2, classes - 2, scores.shape, generator=inputs.generator).to(inputs.device)
        return (boxes, scores, idxs, iou_threshold), dict(kwargs)

    return Case(case.id, make, large=case.large)


def _images(
    name: str, images: tuple[int, ...], count: int, max_out: int, classes: int = 0, layout: str = "contiguous"
) -> Case:
    def make(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        boxes, scores = clustered(inputs, *images, count)
        idxs = torch.randint(classes or 1, scores.shape, generator=inputs.generator).to(inputs.device)
        boxes, scores = in_layout(boxes, layout), in_layout(scores, layout)
        return (boxes, scores, 0.5, max_out), {"idxs": idxs} if classes else {}

    return Case(name, make, large=count > 500)


_IMAGES = (
    _images("one-image", (), 40, 30),
    _images("three-images", (3,), 50, 100),
    _images("two-by-two-by-class", (2, 2), 60, 8, classes=3),
    _images("strided", (3,), 33, 20, classes=2, layout="transposed"),
    _images("no-place", (2,), 9, 0),
    _images("no-boxes", (2,), 0, 5),
    _images("no-images", (0,), 7, 5),
    _images("sixteen-images", (16,), 1000, 100, classes=80),
)


def _reference_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return _reference(boxes, scores, None, iou_threshold)


def _reference_batched(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    return _reference(boxes, scores, idxs, iou_threshold)


def _reference_of_padded(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    return nms_padded(*args, **kwargs, backend="reference")


def _register(name: str, call: Callable[..., Any], reference: Callable[..., Any], cases: tuple[Case, ...]) -> None:
    padded = name == "nms_padded"
    compiled, fallback = (_run_compiled_padded, _reference_padded) if padded else (_run_compiled, _reference)
    backends = _backends("nms_padded" if padded else "nms", compiled, fallback)
    _dispatch.register(_dispatch.Op(name, call, reference, backends, cases, reduce_len=lambda *_: 1))


_register("nms", nms, _reference_nms, _CASES)
_register("batched_nms", batched_nms, _reference_batched, tuple(_with_classes(case, 5) for case in _CASES))
_register("nms_padded", nms_padded, _reference_of_padded, _IMAGES)
