"""Masks on pictures: tinted where they are, outlined, beneath the boxes; whatever form they come in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nasdet.detectors.parts.paste import encode_rle
from nasdet.report.draw import class_color, draw_detections

GREY = 128
BOX = [20.0, 30.0, 80.0, 70.0]


def picture() -> Image.Image:
    return Image.new("RGB", (120, 90), (GREY, GREY, GREY))


def disc(cx: float = 50.0, cy: float = 50.0, radius: float = 14.0) -> np.ndarray:
    y, x = np.mgrid[:90, :120]
    return (x - cx) ** 2 + (y - cy) ** 2 <= radius**2


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def draw(masks: Any, boxes: Any = (BOX,), labels: Any = (3,), **options: Any) -> np.ndarray:
    return pixels(draw_detections(picture(), list(boxes), list(labels), masks=masks, **options))


def test_the_mask_is_tinted_and_outlined_and_nothing_else_changes() -> None:
    mask = disc()
    plain, drawn = draw(None), draw([mask])
    changed = (plain != drawn).any(axis=2)
    assert np.array_equal(changed, mask)
    inner = disc(radius=12.0)
    tint = np.round(GREY + 0.4 * (np.array(class_color(3)) - GREY))
    assert np.abs(drawn[inner] - tint).max() <= 1
    edge = mask & ~(np.roll(mask, 1, 0) & np.roll(mask, -1, 0) & np.roll(mask, 1, 1) & np.roll(mask, -1, 1))
    assert (drawn[edge] == class_color(3)).all()


@pytest.mark.parametrize("form", ["array", "tensor", "uint8", "rle", "rle of str"])
def test_every_form_gives_the_same(form: str) -> None:
    mask = disc()
    encoded = encode_rle(mask)
    forms = {"array": mask, "tensor": torch.from_numpy(mask), "uint8": mask.astype(np.uint8), "rle": encoded}
    forms["rle of str"] = {**encoded, "counts": encoded["counts"].decode()}
    if form.startswith("rle"):
        pytest.importorskip("pycocotools")
    assert np.array_equal(draw([forms[form]]), draw([mask]))


def test_a_mask_at_the_border_has_its_edge_there() -> None:
    whole = np.ones((90, 120), dtype=bool)
    drawn = draw([whole], boxes=[[40.0, 40.0, 60.0, 60.0]])
    assert (drawn[0] == class_color(3)).all() and (drawn[:, -1] == class_color(3)).all()
    assert not (drawn[1, 1:-1] == class_color(3)).all(axis=1).any()


def test_boxes_lie_on_top_and_the_surest_mask_too() -> None:
    boxes, masks = [[10.0, 10.0, 100.0, 80.0], BOX], [disc(42), disc(58)]
    drawn = draw(masks, boxes, [0, 3], scores=[0.9, 0.5])
    assert tuple(drawn[10, 60]) == class_color(0)
    under = draw([masks[1]], [BOX], [3], scores=[0.5])
    band = np.abs(np.arange(90)[:, None] - 51) < 3  # between the labels at the top and the bottom of the box
    both, right = band & disc(42, radius=11) & disc(58, radius=11), band & disc(58, radius=11) & ~disc(42, radius=16)
    expected = under[both] + 0.4 * (np.array(class_color(0)) - under[both])
    assert both.sum() > 8 and np.abs(drawn[both] - expected).max() <= 1.5
    assert np.array_equal(drawn[right], under[right])


def test_scale_threshold_and_empty_masks() -> None:
    drawn = draw([disc()], scale=2.0)
    plain = draw(None, scale=2.0)
    wanted = disc().repeat(2, 0).repeat(2, 1)
    assert np.array_equal((drawn != plain).any(axis=2), wanted)
    assert np.array_equal(draw([disc()], scores=[0.2], threshold=0.5), pixels(picture()))
    assert np.array_equal(draw([np.zeros((90, 120), dtype=bool)]), draw(None))
    assert np.array_equal(draw([], boxes=[], labels=[]), pixels(picture()))


def test_bad_masks_are_one_clear_error() -> None:
    with pytest.raises(ValueError, match=r"masks must have one entry per box \(1\), got 2"):
        draw([disc(), disc()])
    with pytest.raises(ValueError, match=r"masks must have shape \(90, 120\), that of the picture, got \(120, 90\)"):
        draw([disc().T])
