"""soft_nms: scores lowered step by step, order of selection, methods, classes, edges, errors, compile."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nasdet.ops import nms, soft_nms
from nasdet.ops._suppression import clustered
from nasdet.testing import Inputs

NAN, INF = float("nan"), float("inf")
BACKENDS = [pytest.param("cpp", marks=pytest.mark.needs("cpp")), "reference"]
needs_cpp = pytest.mark.needs("cpp")
METHODS = ("linear", "gaussian", "naive")
# IoU of the first with the second 1/2, with the third 1/4; of the second with the third 1/2
ROWS = torch.tensor([[0.0, 0, 32, 32], [0, 0, 32, 16], [0, 0, 16, 16], [64, 64, 80, 80]])


def scene(count: int, seed: int = 0, **more: Any) -> tuple[Tensor, Tensor]:
    return clustered(Inputs(seed=seed), count, **more)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("method", "settings", "keep", "lowered"),
    [
        ("linear", {}, [0, 3, 1, 2], [0.9, 0.7, 0.8 * 0.5, 0.3 * 0.5]),
        ("linear", {"iou_threshold": 0.2}, [0, 3, 1, 2], [0.9, 0.7, 0.8 * 0.5, 0.3 * 0.75 * 0.5]),
        ("linear", {"iou_threshold": 0.5}, [0, 1, 3, 2], [0.9, 0.8, 0.7, 0.3]),
        ("linear", {"min_score": 0.2}, [0, 3, 1], [0.9, 0.7, 0.4]),
        (
            "gaussian",
            {"sigma": 0.5},
            [0, 3, 1, 2],
            [0.9, 0.7, 0.8 * math.exp(-0.5), 0.3 * math.exp(-0.125) * math.exp(-0.5)],
        ),
        ("gaussian", {"sigma": 100.0}, [0, 1, 3, 2], [0.9, 0.8 * math.exp(-0.0025), 0.7, 0.3 * math.exp(-0.003125)]),
        ("naive", {}, [0, 3, 2], [0.9, 0.7, 0.3]),
        ("naive", {"min_score": 0.0}, [0, 3, 2, 1], [0.9, 0.7, 0.3, 0.0]),
    ],
)
def test_by_hand(backend: str, method: str, settings: dict[str, float], keep: list[int], lowered: list[float]) -> None:
    scores = torch.tensor([0.9, 0.8, 0.3, 0.7])
    order, after = soft_nms(ROWS, scores, method=method, **settings, backend=backend)
    assert order.tolist() == keep and order.dtype == torch.int64
    torch.testing.assert_close(after, torch.tensor(lowered), rtol=1e-6, atol=1e-7)
    assert scores.tolist() == torch.tensor([0.9, 0.8, 0.3, 0.7]).tolist()  # the input is left alone


def by_definition(
    boxes: Tensor, scores: Tensor, idxs: Tensor, method: str, iou_threshold: float, sigma: float, min_score: float
) -> tuple[list[int], list[float]]:
    """The algorithm of the paper with plain numbers."""
    rows, left = boxes.double().tolist(), {i: s for i, s in enumerate(scores.double().tolist()) if s >= min_score}
    classes = idxs.tolist()
    keep, lowered = [], []
    while left:
        best = max(left, key=lambda i: (left[i], -i))
        keep.append(best)
        lowered.append(left.pop(best))
        a = rows[best]
        for i in list(left):
            b = rows[i]
            width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
            if classes[i] != classes[best] or width <= 0 or height <= 0:
                continue
            overlap = width * height
            union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap
            iou = overlap / union
            if method == "gaussian":
                left[i] *= math.exp(-iou * iou / sigma)
            elif iou > iou_threshold:
                left[i] *= 1 - iou if method == "linear" else 0
            if left[i] < min_score:
                del left[i]
    return keep, lowered


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("classes", [1, 7], ids=["one-class", "classes"])
def test_is_the_algorithm_of_the_paper(backend: str, method: str, classes: int) -> None:
    boxes, scores = scene(300 if backend == "cpp" else 80, clusters=12)
    boxes, scores = boxes.double(), scores.double()
    idxs = torch.arange(len(boxes)) % classes * 1000 - 3
    keep, lowered = by_definition(boxes, scores, idxs, method, 0.3, 0.5, 0.01)
    order, after = soft_nms(boxes, scores, min_score=0.01, method=method, idxs=idxs, backend=backend)
    assert order.tolist() == keep and 10 < len(keep)
    torch.testing.assert_close(after, torch.tensor(lowered, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("iou_threshold", [0.0, 0.5, -1.0])
def test_naive_is_nms(backend: str, iou_threshold: float) -> None:
    boxes, scores = scene(120)
    order, after = soft_nms(boxes, scores, iou_threshold, min_score=1e-9, method="naive", backend=backend)
    expected = nms(boxes, scores, iou_threshold)
    assert torch.equal(order, expected) and torch.equal(after, scores[expected])


@needs_cpp
@pytest.mark.parametrize("method", METHODS)
def test_scores_fall_and_never_rise(method: str) -> None:
    boxes, scores = scene(2000, clusters=100)
    order, after = soft_nms(boxes, scores, method=method)
    assert (after[1:] <= after[:-1]).all() and (after <= scores[order]).all() and (after >= 1e-3).all()
    assert torch.unique(order).numel() == len(order) and (after < scores[order]).any() == (method != "naive")


@needs_cpp
@pytest.mark.parametrize("method", METHODS)
def test_long_lists_agree_with_the_reference(method: str) -> None:
    """Enough boxes that those which are out are cleared away several times."""
    boxes, scores = scene(700, seed=4, clusters=40)
    scores[::9] = 0.5
    order, after = soft_nms(boxes, scores, min_score=0.05, method=method)
    expected_order, expected = soft_nms(boxes, scores, min_score=0.05, method=method, backend="reference")
    assert torch.equal(order, expected_order)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_order_of_scores(backend: str) -> None:
    """Highest first, ties by index, NaN before all; NaN is not below the least score and still lowers the others."""
    boxes = torch.tensor([[0.0, 0, 8, 8]]).repeat(7, 1) + 100 * torch.arange(7.0)[:, None]
    boxes[6] = boxes[2]
    scores = torch.tensor([0.5, 0.25, NAN, 0.5, INF, NAN, 0.75])
    for classes in (None, torch.zeros(7, dtype=torch.int64), torch.arange(7) % 2):
        order, after = soft_nms(boxes, scores, idxs=classes, backend=backend)
        assert order.tolist() == [2, 5, 4, 0, 3, 1]
        assert after[2:].tolist() == [INF, 0.5, 0.5, 0.25] and after[:2].isnan().all()


EDGES = {
    "no area": [[1.0, 1, 1, 5]] * 3,
    "inverted": [[4.0, 4, 0, 0]] * 3,
    "nan": [[0.0, NAN, 4, 4]] * 3,
    "infinite": [[-INF, -INF, INF, INF]] * 3,
    "apart": [[0.0, 0, 4, 4], [4, 0, 8, 4], [0, 4, 4, 8]],
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", EDGES.values(), ids=EDGES.keys())
def test_boxes_that_leave_one_another_alone(backend: str, method: str, rows: list[list[float]]) -> None:
    scores = torch.tensor([0.25, 0.75, 0.5])
    order, after = soft_nms(torch.tensor(rows), scores, 0.0, method=method, backend=backend)
    assert order.tolist() == [1, 2, 0] and after.tolist() == [0.75, 0.5, 0.25]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_equal_boxes(backend: str, method: str) -> None:
    """An IoU of 1: weight 0 but for the Gaussian, also for an infinite score."""
    boxes, scores = torch.tensor([[0.0, 0, 4, 4]]).repeat(3, 1), torch.tensor([INF, INF, 0.5])
    order, after = soft_nms(boxes, scores, method=method, min_score=0.0, backend=backend)
    assert order.tolist() == [0, 1, 2]
    wanted = [INF, INF, 0.5 * math.exp(-4)] if method == "gaussian" else [INF, 0.0, 0.0]
    torch.testing.assert_close(after, torch.tensor(wanted))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_no_boxes_and_no_survivors(backend: str, dtype: torch.dtype) -> None:
    for count, min_score in ((0, 1e-3), (5, 2.0)):
        boxes, scores = scene(count)
        order, after = soft_nms(boxes.to(dtype), scores.to(dtype), min_score=min_score, backend=backend)
        assert order.shape == after.shape == (0,) and order.dtype == torch.int64 and after.dtype == dtype


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_sixteen_bits_are_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    boxes, scores = (t.to(dtype) for t in scene(200))
    order, after = soft_nms(boxes, scores, method="gaussian")
    wide_order, wide = soft_nms(boxes.float(), scores.float(), method="gaussian")
    assert torch.equal(order, wide_order) and torch.equal(after, wide.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_differentiable(backend: str) -> None:
    boxes, scores = scene(20)
    boxes.requires_grad_()
    scores.requires_grad_()
    for order, after in (
        soft_nms(boxes, scores, backend=backend),
        soft_nms(boxes, scores, method="gaussian", backend=backend),
    ):
        assert not order.requires_grad and not after.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_take_the_lowered_scores_as_constants(backend: str) -> None:
    boxes, scores = scene(20)

    def total(scores: Tensor) -> Tensor:
        order, after = soft_nms(boxes, scores, backend=backend)
        return (scores[order].square() + after).sum()

    def slope(scores: Tensor) -> Tensor:
        return torch.func.grad(total)(scores).square().sum()

    kept = torch.zeros(20).index_fill(0, soft_nms(boxes, scores)[0], 1.0)
    assert torch.equal(torch.func.grad(total)(scores), 2 * scores * kept)
    assert torch.equal(torch.func.grad(slope)(scores), 8 * scores * kept)


@needs_cpp
def test_raw_op() -> None:
    boxes, scores = scene(20)
    boxes.requires_grad_()
    scores.requires_grad_()
    settings = (0, 0.3, 0.5, 1e-3)
    order, after = torch.ops.nasdet.soft_nms(boxes, scores, None, *settings)
    assert not order.requires_grad and not after.requires_grad
    for classes in (None, torch.arange(20) % 3):
        torch.library.opcheck(torch.ops.nasdet.soft_nms, (boxes, scores, classes, *settings))
    for wrong in ((3, 0.3, 0.5, 0.0), (0, NAN, 0.5, 0.0), (0, 0.3, 0.0, 0.0), (0, 0.3, 0.5, NAN)):
        with pytest.raises(RuntimeError, match="must"):
            torch.ops.nasdet.soft_nms(boxes, scores, None, *wrong)


@needs_cpp
def test_one_compiled_graph_serves_any_number_of_survivors() -> None:
    torch._dynamo.reset()
    boxes, scores = scene(30)

    def step(boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        order, after = soft_nms(boxes, scores, min_score=0.3)
        return boxes[order] * 2, after + 1

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for scale, survivors in ((1.0, None), (0.0, 0), (0.31 / scores.max().item(), None)):
            actual, expected = compiled(boxes, scores * scale), step(boxes, scores * scale)
            assert survivors is None or len(expected[0]) == survivors
            assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert len(expected[0]) == 1


@needs_cpp
def test_threads_do_not_matter() -> None:
    boxes, scores = scene(4000, clusters=300)
    idxs = torch.arange(4000) % 9
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(soft_nms(boxes, scores, method="gaussian", idxs=idxs))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_other_libraries(backend: str) -> None:
    boxes, scores = scene(40)
    expected = soft_nms(boxes, scores, 0.25, 0.5, 0.125, backend=backend)
    for kind in (Fraction, Decimal, np.float64, torch.tensor):
        found = soft_nms(boxes, scores, kind(0.25), kind(0.5), kind(0.125), backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


BOXES, SCORES = torch.zeros(3, 4), torch.zeros(3)
WRONG = {
    "method": (ValueError, r"method must be one of \['linear', 'gaussian', 'naive'\], got 'hard'", {"method": "hard"}),
    "sigma 0": (ValueError, "sigma must be positive, got 0", {"sigma": 0}),
    "sigma nan": (ValueError, "sigma must be positive, got nan", {"sigma": NAN}),
    "no threshold": (TypeError, "iou_threshold must be a number, got None", {"iou_threshold": None}),
    "no sigma": (TypeError, "sigma must be a number, got None", {"sigma": None}),
    "list of least scores": (TypeError, r"min_score must be a number, got \[0.5\]", {"min_score": [0.5]}),
    "two thresholds": (TypeError, "iou_threshold must be a number, got tensor", {"iou_threshold": torch.zeros(2)}),
    "large sigma": (ValueError, "sigma must be a number that fits a float, got a larger int", {"sigma": 10**400}),
    "nan threshold": (ValueError, "iou_threshold must be a number, got nan", {"iou_threshold": NAN}),
    "nan least score": (ValueError, "min_score must be a number, got nan", {"min_score": NAN}),
    "float classes": (TypeError, "idxs must be an integer tensor, got torch.float32", {"idxs": SCORES}),
    "integer boxes": (TypeError, "boxes must be float32", {"boxes": BOXES.long()}),
    "five columns": (ValueError, r"boxes must have shape \(N, 4\), got \(3, 5\)", {"boxes": torch.zeros(3, 5)}),
    "fewer scores": (ValueError, r"scores must have shape \(3,\), got \(2,\)", {"scores": SCORES[:2]}),
}


@pytest.mark.parametrize(("error", "message", "wrong"), WRONG.values(), ids=WRONG.keys())
def test_errors(error: type[Exception], message: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(error, match=message):
        soft_nms(**{"boxes": BOXES, "scores": SCORES, **wrong})
