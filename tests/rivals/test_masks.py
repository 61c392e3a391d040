"""Pasted masks against torchvision's: the same pixels, but where its float32 sums round to the other side of 0.5."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from nasdet.detectors.parts.paste import encode_rle, native_why_not, paste_masks, paste_to_rle

SIZES = ((1, 1), (48, 64), (333, 200), (480, 640))
ROUNDING = 2e-6  # torchvision's resize orders and fuses its sums by CPU and version


@pytest.fixture(scope="module")
def roi_heads() -> Any:
    return importlib.import_module("torchvision.models.detection.roi_heads")


def scene(count: int, side: int, size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logits, and boxes that reach into the picture: torchvision fails on those wholly to its left or above it."""
    length = torch.tensor(size[::-1]).float()
    middle = torch.rand(count, 2, generator=generator) * length
    half = 0.5 + 0.7 * length * torch.rand(count, 2, generator=generator) ** 3
    coarse = 4 * torch.randn(count, 1, 6, 6, generator=generator)
    logits = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic")[:, 0]
    return logits, torch.cat((middle - half, middle + half), dim=1)


@pytest.mark.parametrize("side", [14, 28, 56])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pixels_are_torchvisions(roi_heads: Any, size: tuple[int, int], side: int) -> None:
    generator = torch.Generator().manual_seed(side)
    logits, boxes = scene(40, side, size, generator)
    theirs = roi_heads.paste_masks_in_image(logits.sigmoid()[:, None], boxes, size)[:, 0]
    ours = paste_masks(logits.sigmoid(), boxes, size)
    assert (ours - theirs).abs().max() < ROUNDING
    clear = (theirs - 0.5).abs() > ROUNDING
    assert torch.equal((ours > 0.5)[clear], (theirs > 0.5)[clear]) and (~clear).sum() <= 10
    decided = clear.flatten(1).all(1)
    assert decided.sum() >= 35
    for backend in ["reference"] + ["native"] * (native_why_not() is None):
        rles = paste_to_rle(logits, boxes, size, backend=backend)
        for index in decided.nonzero().flatten().tolist():
            assert rles[index] == encode_rle((theirs[index] > 0.5).numpy())


def test_results_of_a_mask_rcnn(roi_heads: Any) -> None:
    """From the head's logits of every class to torchvision's picture-sized masks, by its own post-processing."""
    transform = importlib.import_module("torchvision.models.detection.transform").GeneralizedRCNNTransform
    generator = torch.Generator().manual_seed(0)
    logits, boxes = scene(30, 28, (96, 128), generator)
    every = torch.stack((-logits, logits, 0.5 * logits), dim=1)
    labels = torch.randint(0, 3, (30,), generator=generator)
    (probabilities,) = roi_heads.maskrcnn_inference(every, [labels])
    found = [{"boxes": boxes, "labels": labels, "masks": probabilities}]
    stage = transform(96, 128, [0.0] * 3, [1.0] * 3).eval()
    (theirs,) = stage.postprocess(found, [(96, 128)], [(480, 640)])
    rles = paste_to_rle(every[torch.arange(30), labels], theirs["boxes"], (480, 640))
    pictures = theirs["masks"][:, 0]
    decided = ((pictures - 0.5).abs() > ROUNDING).flatten(1).all(1)
    assert decided.sum() >= 25
    for index in decided.nonzero().flatten().tolist():
        assert rles[index] == encode_rle((pictures[index] > 0.5).numpy())
