"""A hundred 28 x 28 masks of an 800 x 1333 image to COCO's run-length encoding, against pasting and pycocotools."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from op_race import FORWARD, Call, Contestant, OpBench, Target
from scenes import HEIGHT, WIDTH, clustered_boxes
from torch import Tensor

from nasdet._cases import Case, Inputs
from nasdet._dispatch import Op
from nasdet.detectors.parts.paste import native_why_not, paste_to_rle

pytest.importorskip("pycocotools.mask")
SIZE = (HEIGHT, WIDTH)
COUNT, SIDE = 100, 28
THREADS = "nasdet, 2 threads"


def _scene(inputs: Inputs) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    """Probabilities of blobs with soft edges, in boxes as a detector gives them."""
    boxes = clustered_boxes(inputs, COUNT)
    y = (torch.arange(SIDE) + 0.5) / SIDE - 0.5
    distance = (y[:, None] ** 2 + y**2).sqrt() - 0.4
    bumps = F.interpolate(inputs.randn(COUNT, 1, 6, 6).float(), size=(SIDE, SIDE), mode="bicubic")[:, 0]
    return ((4 * bumps - 20 * distance).sigmoid(), boxes.float()), {}


def _packed(rles: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
    """Encodings as tensors, which the race can compare: all bytes, and how many each has."""
    counts = [rle["counts"] for rle in rles]
    whole = torch.frombuffer(bytearray(b"".join(counts)), dtype=torch.uint8)
    return whole, torch.tensor([len(text) for text in counts])


def _profiles(results: list[Tensor]) -> list[Tensor]:
    """How many pixels each mask has in each column and row: a pixel that rounding turns over moves them little."""
    from pycocotools import mask as coco_mask

    whole, lengths = results
    profiles = []
    for part in torch.split(whole, lengths.tolist()):
        mask = coco_mask.decode({"size": list(SIZE), "counts": part.numpy().tobytes()})
        profiles.append(numpy.concatenate((mask.sum(0), mask.sum(1))))
    return [torch.from_numpy(numpy.stack(profiles).astype(numpy.float32))]


def _native(masks: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    return _packed(paste_to_rle(masks, boxes, SIZE, from_logits=False, backend="native"))


def _reference(masks: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    return _packed(paste_to_rle(masks, boxes, SIZE, from_logits=False, backend="reference"))


def _pasted(masks: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """torchvision's rule in PyTorch, the lean way: one mask at a time, no stack of a hundred images."""
    from pycocotools import mask as coco_mask

    padded = F.pad(masks[:, None], (1, 1, 1, 1))
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * ((SIDE + 2) / SIDE)
    centre = (boxes[:, 2:] + boxes[:, :2]) * 0.5
    corners = torch.cat((centre - half, centre + half), dim=1).to(torch.int64)
    rles = []
    for mask, (x0, y0, x1, y1) in zip(padded, corners.tolist(), strict=True):
        wanted = (max(y1 - y0 + 1, 1), max(x1 - x0 + 1, 1))
        grown = F.interpolate(mask[None], size=wanted, mode="bilinear")[0, 0]
        top, left, bottom, right = max(y0, 0), max(x0, 0), min(y1 + 1, HEIGHT), min(x1 + 1, WIDTH)
        canvas = numpy.zeros(SIZE, dtype=numpy.uint8, order="F")
        canvas[top:bottom, left:right] = (grown[top - y0 : bottom - y0, left - x0 : right - x0] > 0.5).numpy()
        rles.append(coco_mask.encode(canvas))
    return _packed(rles)


def _torchvision() -> Call:
    """What torchvision's Mask R-CNN and its evaluation script do."""
    from pycocotools import mask as coco_mask
    from torchvision.models.detection.roi_heads import paste_masks_in_image

    def call(masks: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        chosen = paste_masks_in_image(masks[:, None], boxes, SIZE)[:, 0] > 0.5
        pixels = chosen.numpy().astype(numpy.uint8)
        return _packed([coco_mask.encode(numpy.asfortranarray(mask)) for mask in pixels])

    return call


CASE = Case(f"paste_masks-{COUNT}x{SIDE}", _scene, large=True)
BENCH = OpBench(
    Op("paste_masks", _native, _reference, (), (), lambda *_: 4),
    (
        Contestant("nasdet", lambda: _native, devices=("cpu",)),
        Contestant(THREADS, lambda: _native, devices=("cpu",), threads=2),
        Contestant("PyTorch + pycocotools", lambda: _pasted, devices=("cpu",)),
        Contestant("torchvision + pycocotools", _torchvision, devices=("cpu",), may_fail=True, library="torchvision"),
    ),
    targets=(
        Target("nasdet", FORWARD, "PyTorch + pycocotools", 10.0),
        Target("nasdet", FORWARD, "torchvision + pycocotools", 10.0),
        Target("nasdet", FORWARD, quantity="peak_memory", at_most=4e6),
    ),
    cases=(CASE,),
    file="paste_masks",
    comparable=_profiles,
    repeatable=True,
)


@pytest.mark.skipif(native_why_not() is not None, reason=str(native_why_not()))
@pytest.mark.parametrize("contestant", [contestant.name for contestant in BENCH.contestants])
def test_paste_masks(benchmark: Any, op_row: Callable[..., None], bench_device: str, contestant: str) -> None:
    if bench_device != "cpu":
        benchmark.skipped = True
        pytest.skip(f"masks are pasted on the CPU, not on {bench_device}")
    op_row(BENCH, CASE, "fp32", FORWARD, contestant)
