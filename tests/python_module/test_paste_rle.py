"""Masks into pictures: the kernel against its reference, the reference against PyTorch's own sampling, RLE by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nasdet
from nasdet.detectors.parts.paste import CONVENTIONS, encode_rle, native_why_not, paste_masks, paste_to_rle
from nasdet.measure.memory import peak_memory

coco_mask = pytest.importorskip("pycocotools.mask")
REASON = native_why_not()
native = pytest.mark.skipif(REASON is not None, reason=str(REASON))
SIDES = (14, 28, 56)
SMALL = ((1, 1), (1, 90), (64, 1), (37, 53), (120, 200), (201, 99))
NAN, INF = float("nan"), float("inf")


def spans(kind: str, length: int, rng: np.random.Generator) -> tuple[float, float]:
    """Where a box of a kind begins and ends on an axis of so many pixels."""
    width = {"tiny": 3 * rng.random() ** 3, "huge": length * 10 ** (1 + 4 * rng.random())}.get(kind, 0.0)
    width = width or length * (0.05 + 0.9 * rng.random())
    start = rng.random() * (length - width)
    if kind == "huge":
        start = -width * rng.random()
    elif kind == "outside":
        away = 2 + 0.2 * width + length * rng.random()  # the box grows by a seventh, and truncates towards 0
        start = length + away if rng.random() < 0.5 else -width - away
    elif kind == "partly outside":
        start = -width * rng.random() if rng.random() < 0.5 else length - width * rng.random()
    elif kind == "integer":
        start, width = float(round(start)), float(round(width))
    end = start + width
    return (end, start) if kind == "inverted" and rng.random() < 0.7 else (start, end)


KINDS = ("inside", "integer", "partly outside", "outside", "tiny", "huge", "inverted", "empty", "not finite")


def draw_box(kind: str, size: tuple[int, int], rng: np.random.Generator) -> list[float]:
    (x1, x2), (y1, y2) = (spans(kind, length, rng) for length in size[::-1])
    box = [x1, y1, x2, y2]
    if kind == "empty":
        axis = int(rng.integers(2))
        box[axis + 2] = box[axis]
    elif kind == "not finite":
        box[int(rng.integers(4))] = (NAN, INF, -INF, 3e38)[int(rng.integers(4))]
    return box


def draw_masks(count: int, side: int, generator: torch.Generator, smooth: bool = True) -> Tensor:
    if not smooth:
        return 2 * torch.randn(count, side, side, generator=generator)
    coarse = 5 * torch.randn(count, 1, 5, 5, generator=generator)
    return F.interpolate(coarse, size=(side, side), mode="bilinear")[:, 0].contiguous()


def oracle(probabilities: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float, convention: str) -> list[Any]:
    """The reference paste of one mask after the other, and pycocotools' encoder."""
    found = []
    limit = torch.tensor(threshold)
    for mask, box in zip(probabilities, boxes, strict=True):
        pasted = paste_masks(mask[None], box[None], size, convention)[0]
        chosen = pasted >= limit if convention == "detectron2" else pasted > limit
        rle = coco_mask.encode(np.asfortranarray(chosen.numpy().astype(np.uint8)))
        found.append({"size": list(rle["size"]), "counts": rle["counts"]})
    return found


@native
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_pasting_and_encoding(kind: str, convention: str) -> None:
    rng, generator, filled = np.random.default_rng(len(kind)), torch.Generator().manual_seed(1), 0
    for trial in range(60):
        size, side = SMALL[trial % len(SMALL)], SIDES[trial % 3]
        box = torch.tensor([draw_box(kind, size, rng)], dtype=torch.float32)
        logits = draw_masks(1, side, generator, smooth=trial % 4 > 0)
        got = paste_to_rle(logits, box, size, convention=convention, backend="native")
        assert got == oracle(logits.sigmoid(), box, size, 0.5, convention), (trial, box.tolist())
        assert got == paste_to_rle(logits, box, size, convention=convention, backend="reference")
        filled += int(coco_mask.area(got[0])) > 0
    if kind == "outside":
        assert filled == 0
    elif convention == "torchvision" or kind not in ("empty", "not finite"):
        assert filled > 0


@native
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("size", [(800, 1333), (2000, 3000)], ids=["800x1333", "2000x3000"])
def test_large_pictures(size: tuple[int, int], side: int) -> None:
    rng, generator = np.random.default_rng(side), torch.Generator().manual_seed(side)
    kinds = ("inside", "partly outside", "huge", "tiny")
    boxes = torch.tensor([draw_box(kind, size, rng) for kind in kinds], dtype=torch.float32)
    logits = draw_masks(len(kinds), side, generator)
    assert paste_to_rle(logits, boxes, size, backend="native") == oracle(
        logits.sigmoid(), boxes, size, 0.5, CONVENTIONS[0]
    )


@native
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("threshold", [0.5, 0.3, 0.05, 1 - 2**-24])
def test_values_on_a_knife_edge(threshold: float, convention: str) -> None:
    """Neighbours differ from the threshold by a few units in the last place: rounding decides every pixel."""
    generator = torch.Generator().manual_seed(5)
    ulps = torch.randint(-3, 4, (8, 14, 14), generator=generator)
    ulps[4:] = ulps[4:].clamp(max=0)  # none above it: only rounding sets a pixel
    probabilities = (torch.tensor(threshold).view(torch.int32) + ulps.int()).view(torch.float32)
    boxes = torch.tensor([[3.0, 2.0, 40.0, 60.0], [-7.3, 0.4, 99.1, 44.4]]).repeat(4, 1)
    options: dict[str, Any] = {"from_logits": False, "convention": convention, "threshold": threshold}
    got = paste_to_rle(probabilities, boxes, (70, 90), backend="native", **options)
    assert got == oracle(probabilities, boxes, (70, 90), threshold, convention)
    areas = coco_mask.area(got) / 6300
    assert 0.05 < areas[:4].min() and len(got[0]["counts"]) > 250  # ragged, not all or nothing


@native
@pytest.mark.parametrize("values", [(0.0, 1.0), (1.0, 1.0), (-2.0, 3.0), (0.0, 1e30), (0.4999, INF)], ids=str)
def test_masks_of_two_values(values: tuple[float, float]) -> None:
    pick = torch.rand(6, 28, 28, generator=torch.Generator().manual_seed(2)) < 0.5
    masks = torch.where(pick, values[0], values[1])
    boxes = torch.tensor([[2.0, 3.0, 25.5, 80.0], [10.0, 10.0, 90.0, 30.0], [-50.0, -50.0, 300.0, 300.0]]).repeat(2, 1)
    got = paste_to_rle(masks, boxes, (90, 100), from_logits=False, backend="native")
    assert got == oracle(masks, boxes, (90, 100), 0.5, "torchvision")


def test_a_pixel_that_blends_a_nan_is_not_set() -> None:
    logits = torch.full((1, 14, 14), 9.0)
    logits[0, 6, 4] = NAN
    # The box grows by 16 / 14 to 32 pixels: two for each of the 16 rows and columns of the padded mask.
    box = torch.tensor([[10.0, 10.0, 37.5, 37.5]])
    rles = {backend: paste_to_rle(logits, box, (60, 60), backend=backend) for backend in backends()}
    whole = paste_to_rle(torch.full((1, 14, 14), 9.0), box, (60, 60), backend="reference")
    for rle in rles.values():
        lost = coco_mask.decode(whole[0]).astype(int) - coco_mask.decode(rle[0])
        rows, columns = (np.flatnonzero(lost.any(axis)) for axis in (1, 0))
        corner = int(23.75 - 13.75 * 16 / 14)
        assert lost.min() == 0 and lost.sum() == 16
        assert rows.tolist() == [corner + 13 + i for i in range(4)]  # 2 * 7 - 1 .. 2 * 7 + 2
        assert columns.tolist() == [corner + 9 + i for i in range(4)]
    assert paste_to_rle(torch.full((1, 14, 14), NAN), box, (60, 60)) == [encode_rle(np.zeros((60, 60), dtype=bool))]


def backends() -> list[str]:
    return ["reference"] if REASON else ["reference", "native"]


@pytest.mark.parametrize("backend", backends())
def test_a_box_of_the_masks_own_size_copies_it(backend: str) -> None:
    mask = torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(0))
    mask[0, 3, 4:9] = 0.5
    box = torch.tensor([[6.25, 11.25, 33.75, 38.75]])  # 27.5 * 30 / 28 about (20, 25): pixels 5..34 and 10..39
    pasted = paste_masks(mask, box, (50, 45))
    assert torch.equal(pasted[0, 11:39, 6:34], mask[0])
    assert pasted.sum() == pytest.approx(float(mask.sum()), rel=1e-6)
    (rle,) = paste_to_rle(mask, box, (50, 45), from_logits=False, backend=backend)
    expected = np.zeros((50, 45), dtype=np.uint8)
    expected[11:39, 6:34] = mask[0] > 0.5
    assert np.array_equal(coco_mask.decode(rle), expected) and not expected[14, 10:15].any()


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(
    ("convention", "threshold", "columns"),
    [
        # One set mask pixel, twice enlarged: quarters and three quarters of it, and a quarter is not above a quarter.
        ("torchvision", 0.25, [2, 3]),
        ("torchvision", 0.2499, [1, 2, 3, 4]),
        ("detectron2", 0.25, [1, 2, 3, 4]),
        ("detectron2", 0.2501, [2, 3]),
        ("torchvision", 0.75, []),
        ("detectron2", 0.75, [2, 3]),
    ],
)
def test_a_value_at_the_threshold(convention: str, threshold: float, columns: list[int], backend: str) -> None:
    mask = torch.ones(1, 1, 1)
    # torchvision: grown threefold to columns 0..5, two for each of the 3 padded mask pixels, and to rows -1..1.
    places = {"torchvision": [2.1, -0.4, 3.85, 0.4], "detectron2": [2.0, -0.5, 4.0, 1.5]}
    box = torch.tensor([places[convention]])
    (rle,) = paste_to_rle(mask, box, (1, 8), threshold, from_logits=False, convention=convention, backend=backend)
    assert np.flatnonzero(coco_mask.decode(rle)[0]).tolist() == columns


def by_interpolate(mask: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """torchvision's rule through PyTorch's own resize, for a box whose grown form meets the picture."""
    side = mask.shape[-1]
    half = (box[2:] - box[:2]) * 0.5 * ((side + 2) / side)
    centre = (box[2:] + box[:2]) * 0.5
    (x0, y0), (x1, y1) = (corner.to(torch.int64).tolist() for corner in (centre - half, centre + half))
    wanted = (max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1))
    grown = F.interpolate(F.pad(mask, (1, 1, 1, 1))[None, None], size=wanted, mode="bilinear")[0, 0]
    canvas = torch.zeros(size)
    top, left, bottom, right = max(y0, 0), max(x0, 0), min(y1 + 1, size[0]), min(x1 + 1, size[1])
    canvas[top:bottom, left:right] = grown[top - y0 : bottom - y0, left - x0 : right - x0]
    return canvas


def by_grid_sample(mask: Tensor, box: Tensor, size: tuple[int, int]) -> Tensor:
    """detectron2's rule through PyTorch's own sampling, in float64."""
    x1, y1, x2, y2 = box.double().unbind()
    y = (torch.arange(size[0]).double() + 0.5 - y1) / (y2 - y1) * 2 - 1
    x = (torch.arange(size[1]).double() + 0.5 - x1) / (x2 - x1) * 2 - 1
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[None]
    return F.grid_sample(mask.double()[None, None], grid, align_corners=False)[0, 0].float()


@pytest.mark.parametrize(("convention", "rule"), [(CONVENTIONS[0], by_interpolate), (CONVENTIONS[1], by_grid_sample)])
@pytest.mark.parametrize("kind", ["inside", "integer", "partly outside", "tiny"])
def test_the_reference_follows_pytorchs_own_sampling(kind: str, convention: str, rule: Callable[..., Tensor]) -> None:
    rng, generator, seen = np.random.default_rng(3), torch.Generator().manual_seed(3), 0.0
    for trial in range(25):
        size, side = SMALL[3 + trial % 3], SIDES[trial % 3]
        box = torch.tensor(draw_box(kind, size, rng), dtype=torch.float32)
        mask = draw_masks(1, side, generator).sigmoid()
        expected, got = rule(mask[0], box, size), paste_masks(mask, box[None], size, convention)[0]
        # A sampling place carries a few roundings of its size, at most the picture's over the box's times M.
        slope = float(side / (box[2:] - box[:2]).min() * max(size))
        assert (got - expected).abs().max() < 2**-21 * max(side, slope)
        near = (expected - 0.5).abs() < 2**-21 * max(side, slope)
        assert torch.equal((got > 0.5)[~near], (expected > 0.5)[~near])
        seen += float(got.sum())
    assert seen > 5


@native
def test_threads_do_not_change_the_result() -> None:
    rng, generator, size = np.random.default_rng(0), torch.Generator().manual_seed(0), (300, 700)
    boxes = torch.tensor([draw_box(KINDS[i % len(KINDS)], size, rng) for i in range(120)], dtype=torch.float32)
    logits = draw_masks(120, 28, generator)
    alone = paste_to_rle(logits, boxes, size, backend="native", threads=1)
    for threads in (2, 7):
        assert paste_to_rle(logits, boxes, size, backend="native", threads=threads) == alone
    assert paste_to_rle(logits, boxes, size) == alone
    order = torch.randperm(120, generator=generator)
    assert paste_to_rle(logits[order], boxes[order], size) == [alone[i] for i in order.tolist()]


@native
def test_the_picture_is_never_made() -> None:
    boxes = torch.tensor([[0.0, 0.0, 3000.0, 2000.0]]).repeat(50, 1)
    probabilities = draw_masks(50, 28, torch.Generator().manual_seed(0)).sigmoid()
    used = peak_memory(
        lambda: paste_to_rle(probabilities, boxes, (2000, 3000), from_logits=False), device="cpu", tensors_only=False
    )
    assert used < 6_000_000  # one mask of bytes; a hundredth of all in float32


@pytest.mark.parametrize("backend", backends())
def test_kinds_of_input(backend: str) -> None:
    logits, boxes = draw_masks(3, 14, torch.Generator().manual_seed(0)), torch.tensor([[1.0, 2, 30, 40]]).repeat(3, 1)
    expected = paste_to_rle(logits, boxes, (45, 35), backend=backend)
    assert [sorted(rle) for rle in expected] == [["counts", "size"]] * 3
    assert expected[0]["size"] == [45, 35] and isinstance(expected[0]["counts"], bytes)
    strided = torch.stack((logits, logits), -1)[..., 0].requires_grad_()
    for masks, places in ((logits.numpy(), boxes.numpy()), (logits.double(), boxes.double()), (strided, boxes)):
        assert paste_to_rle(masks, places, (45, 35), backend=backend) == expected
    assert paste_to_rle(logits.sigmoid(), boxes, (45, 35), from_logits=False, backend=backend) == expected
    assert paste_to_rle(logits[:0], boxes[:0], (45, 35), backend=backend) == []
    assert paste_masks(logits[:0], boxes[:0], (45, 35)).shape == (0, 45, 35)


def test_another_default_dtype_changes_nothing() -> None:
    masks, boxes = torch.rand(2, 9, 9), torch.tensor([[3.3, 4.1, 60.7, 50.2], [1.7, 2.9, 30.1, 40.4]])
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            found.append([paste_masks(masks, boxes, (80, 90), convention=name) for name in CONVENTIONS])
        finally:
            torch.set_default_dtype(torch.float32)
    for ours, expected in zip(*found, strict=True):
        assert ours.dtype == torch.float32 and torch.equal(ours, expected)


def test_without_the_module_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, boxes = draw_masks(2, 14, torch.Generator().manual_seed(0)), torch.tensor([[1.0, 2, 30, 40]]).repeat(2, 1)
    expected = paste_to_rle(logits, boxes, (45, 35))
    monkeypatch.delattr(nasdet, "_C", raising=False)
    monkeypatch.setitem(sys.modules, "nasdet._C", None)
    assert "nasdet._C" in str(native_why_not())
    assert paste_to_rle(logits, boxes, (45, 35)) == expected
    with pytest.raises(ValueError, match="backend must be one that is here, got 'native'"):
        paste_to_rle(logits, boxes, (45, 35), backend="native")


GOOD: dict[str, Any] = {"masks": torch.zeros(2, 14, 14), "boxes": torch.zeros(2, 4), "size": (9, 9)}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"masks": torch.zeros(2, 14, 13)}, ValueError, r"masks must have shape \(n, M, M\), got \(2, 14, 13\)"),
        ({"masks": torch.zeros(2, 0, 0)}, ValueError, r"masks must have shape"),
        ({"masks": torch.zeros(2, 4, 4).int()}, TypeError, "masks must be a floating-point tensor or array, got"),
        ({"masks": [[0.0]]}, TypeError, "masks must be a floating-point tensor or array, got list"),
        ({"boxes": torch.zeros(3, 4)}, ValueError, r"boxes must have shape \(2, 4\), got \(3, 4\)"),
        ({"boxes": torch.zeros(2, 4).long()}, TypeError, "boxes must be a floating-point"),
        ({"size": (0, 9)}, ValueError, r"size must be \(H, W\), positive and fewer than 2\^31 pixels, got \(0, 9\)"),
        ({"size": (2**16, 2**15)}, ValueError, "fewer than 2"),
        ({"size": (9,)}, ValueError, r"size must be \(H, W\)"),
        ({"threshold": 0.0}, ValueError, "threshold must be between 0 and 1, got 0.0"),
        ({"threshold": 1.0}, ValueError, "threshold must be between 0 and 1"),
        ({"threshold": NAN}, ValueError, "threshold must be between 0 and 1"),
        ({"threshold": 1e-60}, ValueError, "threshold must be between 0 and 1"),
        ({"convention": "mmdet"}, ValueError, "convention must be one of torchvision, detectron2, got 'mmdet'"),
        ({"backend": "cuda"}, ValueError, "backend must be 'auto', 'native' or 'reference', got 'cuda'"),
        ({"threads": 0}, ValueError, "threads must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        paste_to_rle(**{**GOOD, **changes})


@native
@pytest.mark.parametrize(
    "change",
    [
        {"masks": np.zeros((2, 3, 4), np.float32)},
        {"masks": np.zeros((2, 3, 3))},
        {"masks": np.zeros((2, 3, 3), np.float32)[:, ::-1]},
        {"boxes": np.zeros((1, 4), np.float32)},
        {"height": 0},
        {"height": 2**31},
        {"threads": 0},
        {"threshold": NAN},
    ],
    ids=["shape", "double", "strided", "boxes", "no rows", "too large", "threads", "threshold"],
)
def test_the_module_itself_never_reads_beyond_its_arrays(change: dict[str, Any]) -> None:
    from nasdet import _C

    good = {"masks": np.zeros((2, 3, 3), np.float32), "boxes": np.zeros((2, 4), np.float32), "height": 4, "width": 5}
    settings = {**good, "threshold": 0.5, "continuous": False, "threads": 1}
    assert len(_C.paste_to_rle(**settings)) == 2
    with pytest.raises((ValueError, TypeError)):
        _C.paste_to_rle(**{**settings, **change})


@pytest.mark.parametrize("shape", [(1, 1), (1, 70), (70, 1), (31, 40), (400, 300)], ids=str)
@pytest.mark.parametrize("share", [0.0, 0.03, 0.5, 1.0])
def test_encode_rle_is_pycocotools(shape: tuple[int, int], share: float) -> None:
    mask = np.random.default_rng(1).random(shape) < share
    expected = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    assert encode_rle(mask) == {"size": list(expected["size"]), "counts": expected["counts"]}
    assert encode_rle(np.asfortranarray(mask)) == encode_rle(mask)
    with pytest.raises(ValueError, match="mask must be bool of shape"):
        encode_rle(mask.astype(np.uint8))


def test_rle_by_hand() -> None:
    mask = np.zeros((3, 4), dtype=bool)
    mask[1:, 1] = mask[0, 2] = True  # columns of 3: runs 4, 3, 5
    assert encode_rle(mask)["counts"] == b"435"
    mask[0, 0] = True  # 0, 1, 3, 3, 5: the last two as 3 - 1 and 5 - 3
    assert encode_rle(mask)["counts"] == b"01322"
    assert encode_rle(np.ones((5, 10), dtype=bool))["counts"] == b"0b1"  # 50 = 18 + 32 * 1: "0" + 18 + 32, "0" + 1
