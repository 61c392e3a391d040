"""nms, batched_nms, nms_padded: the rule pair by pair, properties of the kept set, edges, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nasdet.ops import batched_nms, nms, nms_padded
from nasdet.ops._suppression import above, clustered, iou_with
from nasdet.testing import Inputs

NAN, INF = float("nan"), float("inf")
BACKENDS = [pytest.param("cpp", marks=pytest.mark.needs("cpp")), "reference"]
needs_cpp = pytest.mark.needs("cpp")


def scene(count: int, seed: int = 0, **more: Any) -> tuple[Tensor, Tensor]:
    return clustered(Inputs(seed=seed), count, **more)


def wild(count: int, seed: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Boxes of all kinds: tiny, huge, inverted, flat, duplicated, NaN and infinite; scores with ties and NaN."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(count, 2, generator=g, dtype=dtype) * (10.0 ** torch.randint(-2, 4, (1,), generator=g))
    half = torch.rand(count, 2, generator=g, dtype=dtype) * (10.0 ** torch.randint(-2, 4, (1,), generator=g))
    boxes = torch.cat([centre - half, centre + half], 1)
    rows = torch.rand(count, generator=g)
    boxes[rows < 0.05] = boxes[0].clone()
    boxes[(rows > 0.10) & (rows < 0.13)] = boxes[(rows > 0.10) & (rows < 0.13)].flip(1)
    boxes[(rows > 0.15) & (rows < 0.18), 2] = boxes[(rows > 0.15) & (rows < 0.18), 0]
    boxes[(rows > 0.20) & (rows < 0.22), 1] = NAN
    boxes[(rows > 0.25) & (rows < 0.27), 3] = INF
    boxes[(rows > 0.30) & (rows < 0.33)] *= 1e-25
    boxes[(rows > 0.35) & (rows < 0.37)] *= 1e18
    scores = torch.rand(count, generator=g, dtype=dtype)
    scores[(rows > 0.40) & (rows < 0.60)] = 0.5
    scores[rows > 0.98] = NAN
    return boxes, scores


def overlaps(boxes: Tensor, iou_threshold: float) -> Tensor:
    """``[N, N]``: which pairs are above the threshold."""
    return above(iou_with(boxes[:, None], boxes[None]), iou_threshold)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("iou_threshold", [0.0, 0.3, 0.5, 0.9])
def test_kept_boxes_are_apart_and_dropped_ones_have_a_better_neighbour(backend: str, iou_threshold: float) -> None:
    boxes, scores = scene(250, clusters=30)
    keep = nms(boxes, scores, iou_threshold, backend=backend)
    above_threshold = overlaps(boxes, iou_threshold)
    assert not above_threshold[keep][:, keep].fill_diagonal_(False).any()
    dropped = torch.ones(250, dtype=torch.bool)
    dropped[keep] = False
    better = scores[keep][None] >= scores[:, None]
    assert 0 < dropped.sum() and (above_threshold[:, keep] & better).any(1)[dropped].all()
    assert torch.equal(scores[keep], scores[keep].sort(descending=True).values)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("iou_threshold", [-0.5, 0.0, 1e-30, 1e-8, 0.1, 0.5, 0.7, 0.999, 1.0, 1.5, INF, -INF])
def test_wild_boxes_bit_for_bit(dtype: torch.dtype, iou_threshold: float) -> None:
    for seed in range(4):
        boxes, scores = wild(150, seed, dtype)
        idxs = torch.arange(150) % 3 - 1
        assert torch.equal(nms(boxes, scores, iou_threshold), nms(boxes, scores, iou_threshold, backend="reference"))
        expected = batched_nms(boxes, scores, idxs, iou_threshold, backend="reference")
        assert torch.equal(batched_nms(boxes, scores, idxs, iou_threshold), expected)


@needs_cpp
@pytest.mark.parametrize("kind", ["clustered", "wild", "one-far-box", "no-spread", "tiny", "shifted"])
@pytest.mark.parametrize("iou_threshold", [0.0, 0.5])
def test_many_boxes_with_the_table_of_kept_ones(kind: str, iou_threshold: float) -> None:
    """From 1,024 boxes on most pairs are skipped unseen: the kept set must be that of a plain loop."""
    boxes, scores = wild(1500, 3) if kind == "wild" else scene(1500, seed=1, clusters=400, size=30)
    if kind == "one-far-box":
        boxes[7] = torch.tensor([1e30, 1e30, 2e30, 2e30])
    if kind == "no-spread":
        boxes[:, 0], boxes[:, 2] = 3.0, 4.0
    if kind == "tiny":
        boxes = boxes * 1e-22
    if kind == "shifted":
        boxes = boxes + 1e6
    keep = nms(boxes, scores, iou_threshold)
    assert torch.equal(keep, nms(boxes, scores, iou_threshold, backend="reference"))
    assert 20 < len(keep) < 1500


@needs_cpp
def test_threads_do_not_matter() -> None:
    boxes, scores = scene(12000, clusters=3000, size=20)
    idxs = (torch.arange(12000) % 100 < 3).long()  # one class beyond the blockwise limit, one below
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        images = nms_padded(boxes.view(4, 3000, 4), scores.view(4, 3000), 0.5, 2000, idxs=idxs.view(4, 3000))
        first = nms_padded(boxes, scores, 0.5, 1000)
        results.append([nms(boxes, scores, 0.5), batched_nms(boxes, scores, idxs, 0.5), *images, *first])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert torch.equal(results[0][-2], results[0][0][:1000])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_kept_is_kept_again(backend: str) -> None:
    boxes, scores = wild(200, 5)
    keep = nms(boxes, scores, 0.4, backend=backend)
    assert torch.equal(nms(boxes[keep], scores[keep], 0.4, backend=backend), torch.arange(len(keep)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_of_the_boxes_does_not_matter(backend: str) -> None:
    boxes, scores = scene(120, clusters=20)
    scores = torch.randperm(120).float()  # no ties
    shuffle = torch.randperm(120)
    keep = nms(boxes[shuffle], scores[shuffle], 0.5, backend=backend)
    assert torch.equal(shuffle[keep], nms(boxes, scores, 0.5, backend=backend))


CLASSES = {
    "few": lambda n: torch.arange(n) % 4,
    "one": lambda n: torch.full((n,), -5),
    "all-different": lambda n: torch.arange(n),
    "far-apart": lambda n: torch.tensor([-(2**63), 2**63 - 1, 0, 7])[torch.arange(n) % 4],
    "large": lambda n: (torch.arange(n) % 5) * 1_000_003,
    "int32": lambda n: (torch.arange(n) % 4).int(),
    "uint8": lambda n: (torch.arange(n) % 4).to(torch.uint8),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("classes", CLASSES.values(), ids=CLASSES.keys())
@pytest.mark.parametrize("shift", [0.0, -5000.0], ids=["positive", "negative"])
def test_batched_is_nms_of_every_class(backend: str, classes: Any, shift: float) -> None:
    boxes, scores = scene(90, clusters=8)
    boxes, idxs = boxes + shift, classes(90)
    keep = batched_nms(boxes, scores, idxs, 0.5, backend=backend)
    parts = []
    for c in idxs.unique():
        members = (idxs == c).nonzero().flatten()
        parts.append(members[nms(boxes[members], scores[members], 0.5, backend="reference")])
    expected = torch.cat(parts)
    assert torch.equal(keep.sort().values, expected.sort().values)
    assert torch.equal(scores[keep], scores[keep].sort(descending=True).values)


@needs_cpp
def test_names_of_the_classes_do_not_matter() -> None:
    boxes, scores = scene(2000, clusters=50)
    idxs = torch.randint(7, (2000,))
    names = torch.tensor([5, -3, 2**40, 0, 11, -(2**50), 6])
    assert torch.equal(batched_nms(boxes, scores, names[idxs], 0.5), batched_nms(boxes, scores, idxs, 0.5))


@needs_cpp
def test_classes_at_the_scale_of_lvis() -> None:
    """16 images x 1,203 classes, boxes at negative coordinates: an offset per class would merge or distort them."""
    boxes, scores = scene(6000, clusters=200)
    idxs = torch.randint(16 * 1203, (6000,), generator=torch.Generator().manual_seed(0))
    keep = batched_nms(boxes - 2000, scores, idxs, 0.5)
    dropped = torch.ones(6000, dtype=torch.bool)
    dropped[keep] = False
    above_threshold = overlaps(boxes[dropped], 0.5).new_zeros(int(dropped.sum()))
    for row, i in enumerate(dropped.nonzero().flatten().tolist()):
        rivals = keep[(idxs[keep] == idxs[i]) & (scores[keep] >= scores[i])]
        above_threshold[row] = above(iou_with(boxes[i][None, None], boxes[rivals][None]), 0.5).any()
    assert dropped.any() and above_threshold.all()
    first = torch.unique(idxs).numel()
    assert len(keep) >= first
    one, other = (idxs[keep][:, None] == idxs[keep]).triu(1).nonzero().unbind(1)  # kept pairs of one class
    ious = iou_with(boxes[keep][one, None], boxes[keep][other, None])
    assert len(ious) > 100 and not above(ious, 0.5).any()


def test_negative_coordinates_do_not_merge_classes() -> None:
    boxes = torch.tensor([[-100.0, -100, -90, -90]]).repeat(2, 1)
    scores, idxs = torch.tensor([0.9, 0.8]), torch.tensor([0, 1])
    assert batched_nms(boxes, scores, idxs, 0.5).tolist() == [0, 1]
    assert nms(boxes, scores, 0.5).tolist() == [0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [4, 700], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_order_of_scores(backend: str, size: int, dtype: torch.dtype) -> None:
    """Descending, ties by index, -0 ties with 0, NaN first."""
    if size > 100 and backend == "reference":
        size = 60
    boxes = (torch.arange(size * 4).view(size, 4).to(torch.float64) * 4 % 2048).to(dtype)
    values = torch.tensor([0.0, -0.0, 1.5, NAN, -2.0, INF, -INF, 1.5, -NAN, 1e-3])
    scores = values[torch.randint(10, (size,))].to(dtype)
    expected = torch.sort(scores, descending=True, stable=True).indices
    assert torch.equal(nms(boxes, scores, 1.0, backend=backend), expected)


EDGES = {
    # boxes, threshold, kept; scores fall from the first box to the last
    "duplicates": ([[0, 0, 4, 4]] * 3, 0.5, [0]),
    "duplicates at threshold 1": ([[0, 0, 4, 4]] * 3, 1.0, [0, 1, 2]),
    "no area: 0/0 is no overlap": ([[1, 1, 1, 5]] * 3, 0.5, [0, 1, 2]),
    "no area at a negative threshold": ([[1, 1, 1, 5]] * 3, -1.0, [0, 1, 2]),
    "no area, but the other has one": ([[1, 1, 1, 5], [0, 0, 4, 4]], -1.0, [0]),
    "threshold 0 needs an overlap": ([[0, 0, 4, 4], [4, 0, 8, 4], [3, 0, 8, 4]], 0.0, [0, 1]),
    "a negative threshold does not": ([[0, 0, 4, 4], [100, 0, 108, 4]], -0.1, [0]),
    "nan": ([[0, 0, 4, 4], [0, 0, NAN, 4], [0, 0, 4, 4]], 0.5, [0, 1]),
    "nan first": ([[0, NAN, 4, 4], [0, 0, 4, 4], [0, 0, 4, 4]], 0.5, [0, 1]),
    "infinite": ([[-INF, -INF, INF, INF], [-INF, -INF, INF, INF], [0, 0, 4, 4]], 0.5, [0, 1, 2]),
    "infinite at threshold 0": ([[0, 0, INF, 4], [0, 0, 4, 4], [0, 0, INF, 4]], 0.0, [0, 1, 2]),
    "inverted": ([[4, 4, 0, 0], [4, 4, 0, 0], [0, 0, 4, 4]], 0.0, [0, 1, 2]),
    "one side inverted": ([[4, 0, 0, 4], [0, 0, 4, 4], [0, 4, 4, 0]], 0.0, [0, 1, 2]),
    "a chain: what is dropped drops nothing": ([[0, 0, 10, 10], [4, 0, 14, 10], [8, 0, 18, 10]], 0.4, [0, 2]),
    "area beyond the largest number": ([[0, 0, 3e38, 3e38]] * 2, 0.5, [0, 1]),
    "area below the smallest number": ([[0, 0, 1e-30, 1e-30]] * 2, 0.5, [0, 1]),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("rows", "iou_threshold", "kept"), EDGES.values(), ids=EDGES.keys())
def test_edges(backend: str, rows: list[list[float]], iou_threshold: float, kept: list[int]) -> None:
    boxes, scores = torch.tensor(rows, dtype=torch.float32), torch.linspace(0.9, 0.1, len(rows))
    assert nms(boxes, scores, iou_threshold, backend=backend).tolist() == kept


@pytest.mark.parametrize("backend", BACKENDS)
def test_iou_at_the_threshold(backend: str) -> None:
    """3/10: in float32 the quotient is 0.30000001, more than 0.3; in float64 it is 0.3, not more than itself."""
    boxes, scores = torch.tensor([[0.0, 0, 10, 1], [0, 0, 3, 1]]), torch.tensor([0.9, 0.8])
    assert nms(boxes, scores, 0.3, backend=backend).tolist() == [0]
    assert nms(boxes.double(), scores.double(), 0.3, backend=backend).tolist() == [0, 1]
    for exact in (0.5, 0.25):
        boxes[1, 2] = 10 * exact
        assert nms(boxes, scores, exact, backend=backend).tolist() == [0, 1]
        assert nms(boxes, scores, exact - 1e-7, backend=backend).tolist() == [0]


@needs_cpp
def test_quotients_around_the_threshold_are_decided_by_division() -> None:
    """Ratios whose float32 quotient lies within a few ulp of the threshold, where a product could round either way."""
    wide = torch.arange(1000, 3000, dtype=torch.float32)
    for iou_threshold in (0.3, 0.7, 1 / 3, 0.1, 0.95):
        inner = (wide * iou_threshold).round()
        pairs = torch.stack([torch.zeros_like(wide), torch.zeros_like(wide), wide, torch.ones_like(wide)], 1)
        smaller = pairs.clone()
        smaller[:, 2] = inner
        expected = (inner / wide).double() > iou_threshold
        boxes, idxs = torch.cat([pairs, smaller]), torch.arange(2000).repeat(2)
        keep = batched_nms(boxes, torch.linspace(1, 0, 4000), idxs, iou_threshold)
        dropped = torch.ones(4000, dtype=torch.bool)
        dropped[keep] = False
        assert torch.equal(dropped[2000:], expected) and not dropped[:2000].any()
        assert expected.any() and not expected.all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_no_boxes(backend: str, dtype: torch.dtype) -> None:
    boxes, scores, idxs = torch.zeros(0, 4, dtype=dtype), torch.zeros(0, dtype=dtype), torch.zeros(0, dtype=torch.int64)
    for keep in (nms(boxes, scores, 0.5, backend=backend), batched_nms(boxes, scores, idxs, 0.5, backend=backend)):
        assert keep.shape == (0,) and keep.dtype == torch.int64
    index, count = nms_padded(boxes, scores, 0.5, 3, backend=backend)
    assert index.tolist() == [-1, -1, -1] and count.shape == () and count.item() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_out", [0, 1, 7, 60, 100])
@pytest.mark.parametrize("by_class", [False, True], ids=["one-class", "classes"])
def test_padded_holds_the_first_of_nms(backend: str, max_out: int, by_class: bool) -> None:
    boxes, scores = clustered(Inputs(), 3, 60)
    idxs = torch.randint(3, (3, 60)) if by_class else None
    index, count = nms_padded(boxes, scores, 0.5, max_out, idxs=idxs, backend=backend)
    assert index.shape == (3, max_out) and index.dtype == count.dtype == torch.int64 and index.is_contiguous()
    for b in range(3):
        classes = torch.zeros(60, dtype=torch.int64) if idxs is None else idxs[b]
        expected = batched_nms(boxes[b], scores[b], classes, 0.5)[:max_out]
        assert count[b] == len(expected) and torch.equal(index[b, : len(expected)], expected)
        assert (index[b, len(expected) :] == -1).all()


def test_wider_dtype_of_boxes_and_scores() -> None:
    boxes, scores = scene(50)
    expected = nms(boxes.double(), scores.double(), 0.5)
    assert torch.equal(nms(boxes, scores.double(), 0.5), expected)
    half = scores.half()
    assert torch.equal(nms(boxes, half, 0.5), nms(boxes, half.float(), 0.5))
    assert torch.equal(nms(boxes.bfloat16(), half, 0.5), nms(boxes.bfloat16().float(), half.float(), 0.5))


def test_sixteen_bits_are_computed_in_float32() -> None:
    """Areas of 600 x 600 exceed float16."""
    boxes = torch.tensor([[0, 0, 600, 600], [0, 0, 600, 590], [0, 0, 600, 100]], dtype=torch.float16)
    scores = torch.tensor([0.9, 0.8, 0.7], dtype=torch.float16)
    assert nms(boxes, scores, 0.5).tolist() == [0, 2]


BOXES, SCORES = torch.zeros(3, 4), torch.zeros(3)
IDXS = torch.zeros(3, dtype=torch.int64)
WRONG = {
    "a list": (TypeError, "boxes must be a tensor, got list", nms, ([[0, 0, 1, 1]], SCORES, 0.5)),
    "five columns": (
        ValueError,
        r"boxes must have shape \(N, 4\), got \(7, 5\)",
        nms,
        (torch.zeros(7, 5), SCORES, 0.5),
    ),
    "a batch": (ValueError, r"\(N, 4\), got \(1, 3, 4\)", nms, (BOXES[None], SCORES[None], 0.5)),
    "integers": (TypeError, "boxes must be float32, .*, got torch.int64", nms, (BOXES.long(), SCORES, 0.5)),
    "integer scores": (TypeError, "scores must be a float32, .*, got torch.int32", nms, (BOXES, SCORES.int(), 0.5)),
    "fewer scores": (ValueError, r"scores must have shape \(3,\), got \(2,\)", nms, (BOXES, SCORES[:2], 0.5)),
    "scores elsewhere": (ValueError, "scores must be on cpu, got meta", nms, (BOXES, SCORES.to("meta"), 0.5)),
    "nan": (ValueError, "iou_threshold must be a number, got nan", nms, (BOXES, SCORES, NAN)),
    "no threshold": (TypeError, "iou_threshold must be a number, got None", nms, (BOXES, SCORES, None)),
    "threshold of classes": (TypeError, "number, got '0.5'", batched_nms, (BOXES, SCORES, IDXS, "0.5")),
    "bool threshold": (TypeError, "number, got True", nms_padded, (BOXES, SCORES, True, 3)),
    "meta": (ValueError, "boxes must hold data, got a meta", nms, (BOXES.to("meta"), SCORES.to("meta"), 0.5)),
    "float classes": (TypeError, "idxs must be an integer.*float32", batched_nms, (BOXES, SCORES, SCORES, 0.5)),
    "bool classes": (TypeError, "got torch.bool", batched_nms, (BOXES, SCORES, SCORES > 0, 0.5)),
    "fewer classes": (ValueError, r"idxs must .* \(3,\), got \(2,\)", batched_nms, (BOXES, SCORES, IDXS[:2], 0.5)),
    "one box alone": (ValueError, r"\(..., N, 4\), got \(4,\)", nms_padded, (BOXES[0], SCORES[0], 0.5, 3)),
    "negative max_out": (ValueError, "max_out must be at least 0, got -1", nms_padded, (BOXES, SCORES, 0.5, -1)),
    "large max_out": (ValueError, r"max_out must be below 2\*\*31, got", nms_padded, (BOXES, SCORES, 0.5, 2**62)),
    "float max_out": (TypeError, "max_out must be an int, got float", nms_padded, (BOXES, SCORES, 0.5, 2.0)),
}


@pytest.mark.parametrize(("error", "message", "call", "args"), WRONG.values(), ids=WRONG.keys())
def test_errors(error: type[Exception], message: str, call: Any, args: tuple[Any, ...]) -> None:
    with pytest.raises(error, match=message):
        call(*args)


@needs_cpp
def test_raw_op_refuses_what_it_cannot_read() -> None:
    raw = torch.ops.nasdet.nms
    for args in (
        (BOXES[:, :3], SCORES, None, 0.5),
        (BOXES, SCORES.double(), None, 0.5),
        (BOXES.long(), SCORES.long(), None, 0.5),
        (BOXES, SCORES[:2], None, 0.5),
        (BOXES, SCORES, IDXS[:2], 0.5),
        (BOXES, SCORES, IDXS.int(), 0.5),
        (BOXES, SCORES, None, NAN),
    ):
        with pytest.raises(RuntimeError, match="must"):
            raw(*args)
    with pytest.raises(RuntimeError, match="max_out must be at least 0"):
        torch.ops.nasdet.nms_padded(BOXES[None], SCORES[None], None, 0.5, -1)
