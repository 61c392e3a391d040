"""box_iou and generalized_box_iou: values by hand and by exact fractions, properties, dtypes, gradients, errors."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor

from nasdet.ops import box_iou, generalized_box_iou

NAN, INF = float("nan"), float("inf")
FUNCTIONS = (box_iou, generalized_box_iou)
Pairwise = Callable[[Tensor, Tensor], Tensor]


def whole(count: int, seed: int) -> Tensor:
    """Boxes with whole coordinates."""
    corners = torch.randint(0, 40, (count, 2, 2), generator=torch.Generator().manual_seed(seed)).sort(1).values
    corners[:, 1] += 1
    return corners.flatten(1)


def exact(a: list[int], b: list[int]) -> tuple[Fraction, Fraction]:
    width, height = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    union = sum((r[2] - r[0]) * (r[3] - r[1]) for r in (a, b)) - width * height
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (max(a[3], b[3]) - min(a[1], b[1]))
    iou = Fraction(width * height, union)
    return iou, iou - Fraction(hull - union, hull)


DTYPES = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.int64: torch.float32,
    torch.int32: torch.float32,
    torch.uint8: torch.float32,
    torch.int8: torch.float32,
}


@pytest.mark.parametrize(("dtype", "result"), DTYPES.items(), ids=str)
def test_values_are_exact_fractions_rounded(dtype: torch.dtype, result: torch.dtype) -> None:
    a, b = whole(9, 0), whole(12, 1)
    iou, giou = box_iou(a.to(dtype), b.to(dtype)), generalized_box_iou(a.to(dtype), b.to(dtype))
    assert iou.dtype == giou.dtype == result and iou.shape == giou.shape == (9, 12)
    wanted = [[exact(r, s) for s in b.tolist()] for r in a.tolist()]
    first = torch.tensor([[float(pair[0]) for pair in row] for row in wanted], dtype=torch.float64)
    second = torch.tensor([[float(pair[1]) for pair in row] for row in wanted], dtype=torch.float64)
    assert torch.equal(iou, first.to(result))  # one division of exact numbers
    torch.testing.assert_close(giou.double(), second, rtol=0, atol=4 * torch.finfo(result).eps)
    assert (iou > 0).any() and (giou < 0).any()


@pytest.mark.parametrize(
    ("dtype", "side"),
    [(torch.int16, 2**15 - 1), (torch.int32, 10**5), (torch.int32, 2**30), (torch.int64, 2**33), (torch.int64, 2**61)],
    ids=str,
)
def test_areas_beyond_every_integer(dtype: torch.dtype, side: int) -> None:
    a, b = [-side, -side, side, side], [-side, -side, 0, 0]
    iou, giou = (function(torch.tensor([a], dtype=dtype), torch.tensor([b, a], dtype=dtype)) for function in FUNCTIONS)
    assert iou.dtype == giou.dtype == torch.float32
    assert iou.tolist() == giou.tolist() == [[0.25, 1.0]]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_properties(function: Pairwise) -> None:
    a, b = whole(20, 2).double(), whole(30, 3).double()
    values = function(a, b)
    assert torch.equal(values, function(b, a).T)
    assert torch.equal(function(a, a).diagonal(), torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(function(a + 7, b + 7), values)
    torch.testing.assert_close(function(a * 3, b * 3), values)
    assert (values <= 1).all() and (values > -1).all() and (generalized_box_iou(a, b) <= box_iou(a, b)).all()


def test_edges() -> None:
    flat, square = torch.tensor([[1.0, 1, 1, 5]]), torch.tensor([[0.0, 0, 4, 4]])
    assert box_iou(flat, flat).isnan().all()  # 0 / 0, no epsilon
    assert box_iou(flat, square).item() == 0 and generalized_box_iou(square, square + 4).item() == -0.5
    assert generalized_box_iou(torch.tensor([[1.0, 1, 1, 1]]), torch.tensor([[1.0, 1, 1, 1]])).isnan().all()
    assert box_iou(torch.tensor([[0.0, 0, NAN, 4]]), square).isnan().all()
    assert box_iou(torch.tensor([[4.0, 4, 0, 0]]), square).item() == 0
    assert box_iou(torch.tensor([[0.0, 0, INF, INF]]), square).item() == 0


@pytest.mark.parametrize("function", FUNCTIONS)
def test_sixteen_bits_do_not_overflow(function: Pairwise) -> None:
    large = torch.tensor([[0, 0, 600, 600], [0, 0, 600, 300]], dtype=torch.float16)
    torch.testing.assert_close(function(large, large), torch.tensor([[1.0, 0.5], [0.5, 1.0]]))
    assert torch.equal(function(large, large.double()), function(large.double(), large.double()))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_empty_and_strided(function: Pairwise) -> None:
    a, b = whole(5, 4).float(), whole(6, 5).float()
    for n, m in ((0, 6), (5, 0), (0, 0)):
        assert function(a[:n], b[:m]).shape == (n, m)
    strided = a.T.contiguous().T
    assert torch.equal(function(strided, b.flip(0).flip(0)), function(a, b))
    assert torch.equal(function(a[:1].expand(3, 4), b), function(a[:1], b).expand(3, 6))
    assert function(a.to("meta"), b.to("meta")).shape == (5, 6)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients(function: Pairwise) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(n, 4, generator=generator, dtype=torch.float64) for n in (4, 5))
    a[:, 2:], b[:, 2:] = a[:, 2:] + 1, b[:, 2:] + 1
    assert torch.autograd.gradcheck(function, (a.requires_grad_(), b.requires_grad_()))
    far = torch.tensor([[50.0, 50, 51, 51]], requires_grad=True)
    function(far, b.detach().float()).sum().backward()
    assert far.grad is not None and bool(far.grad.any()) == (function is generalized_box_iou)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiles(function: Pairwise) -> None:
    torch._dynamo.reset()
    a, b = whole(5, 4).float(), whole(6, 5).float()
    assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(a, b), function(a, b))


ONE = torch.zeros(1, 4)
WRONG: dict[str, tuple[type[Exception], str, tuple[Any, Any]]] = {
    "shape": (ValueError, r"boxes2 must have shape \(N, 4\), got \(2, 5\)", (ONE, torch.zeros(2, 5))),
    "batch": (ValueError, r"boxes1 must have shape \(N, 4\), got \(1, 1, 4\)", (ONE[None], ONE)),
    "list": (TypeError, "boxes1 must be a tensor of real numbers, got list", ([[0, 0, 1, 1]], ONE)),
    "bool": (TypeError, "boxes2 must be a tensor of real numbers, got torch.bool", (ONE, ONE > 0)),
    "device": (ValueError, "boxes2 must be on cpu, got meta", (ONE, ONE.to("meta"))),
}


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("error", "message", "args"), WRONG.values(), ids=WRONG.keys())
def test_errors(function: Any, error: type[Exception], message: str, args: tuple[Any, Any]) -> None:
    with pytest.raises(error, match=message):
        function(*args)
