from __future__ import annotations

import itertools
from typing import Any

import numpy
import pytest
from PIL import Image, ImageChops

from nasdet.report.draw import class_color, draw_detections

GREY = (90, 90, 90)


def blank(width: int = 320, height: int = 240, mode: str = "RGB") -> Image.Image:
    return Image.new("RGB", (width, height), GREY).convert(mode)


def same(a: Image.Image, b: Image.Image) -> bool:
    return ImageChops.difference(a.convert("RGB"), b.convert("RGB")).getbbox() is None


def test_box_is_drawn_where_it_is_and_the_picture_is_left_alone() -> None:
    image = blank()
    out = draw_detections(image, [[100, 80, 200, 160]], [3], [0.5], [str(i) for i in range(5)])
    assert same(image, blank()) and out.size == image.size and out is not image
    for spot in ((100, 120), (200, 120), (150, 80), (150, 160)):
        assert out.getpixel(spot) == class_color(3)
    assert out.getpixel((150, 120)) == GREY and out.getpixel((20, 200)) == GREY


def test_scale_moves_the_boxes_with_the_picture() -> None:
    out = draw_detections(blank(), [[100, 80, 200, 160]], [0], scale=2.0)
    assert out.size == (640, 480) and out.getpixel((200, 240)) == class_color(0)
    assert draw_detections(blank(), [], [], scale=0.1).size == (32, 24)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_any_picture_becomes_rgb(mode: str) -> None:
    assert draw_detections(blank(mode=mode), [[5, 5, 50, 50]], [0]).mode == "RGB"


@pytest.mark.parametrize("size", [(1, 1), (2, 300), (3000, 40)], ids=str)
def test_odd_sizes(size: tuple[int, int]) -> None:
    out = draw_detections(blank(*size), [[0, 0, size[0], size[1]]], [0], [0.9], ["a very long name of a category"])
    assert out.size == size


def test_threshold_and_boxes_outside_draw_nothing() -> None:
    boxes = [[10, 10, 60, 60], [400, 10, 500, 60], [-50, -50, -10, -10]]
    assert same(draw_detections(blank(), boxes, [0, 1, 2], [0.2, 0.9, 0.9], threshold=0.3), blank())
    assert not same(draw_detections(blank(), boxes, [0, 1, 2], [0.3, 0.9, 0.9], threshold=0.3), blank())


def test_inverted_and_degenerate_boxes_are_drawn_as_they_lie() -> None:
    straight = draw_detections(blank(), [[10, 60, 60, 100]], [1])
    assert same(draw_detections(blank(), [[60, 100, 10, 60]], [1]), straight)
    draw_detections(blank(), [[10, 10, 10, 10], [0, 0, 0, 240]], [0, 1])


def test_the_surest_is_on_top_whatever_the_order() -> None:
    boxes, scores = [[50, 50, 150, 150], [50, 50, 150, 150]], [0.9, 0.4]
    out = draw_detections(blank(), boxes, [0, 1], scores)
    assert out.getpixel((50, 100)) == class_color(0)
    assert same(out, draw_detections(blank(), boxes[::-1], [1, 0], scores[::-1]))


def test_labels_do_not_cover_each_other() -> None:
    boxes = [[50, 60, 150, 160], [52, 62, 152, 162], [54, 64, 154, 164]]
    together = draw_detections(blank(), boxes, [0, 1, 2], [0.9, 0.8, 0.7])
    for label in range(3):
        color = class_color(label)
        alone = draw_detections(blank(), [boxes[label]], [label], [0.9])
        found, wanted = (int((numpy.asarray(image) == color).all(-1).sum()) for image in (together, alone))
        assert found > 0.6 * wanted


def test_crowd_is_dashed() -> None:
    out = draw_detections(blank(), [[20, 40, 300, 200]], [0], crowd=[True])
    column = [out.getpixel((20, y)) for y in range(60, 190)]
    assert class_color(0) in column and GREY in column


def test_arrays_and_lists_give_the_same() -> None:
    boxes, labels, scores = [[10.5, 30.0, 60.0, 90.0]], [2], [0.75]
    arrays = (numpy.array(boxes, dtype=numpy.float32), numpy.array(labels), numpy.array(scores))
    assert same(draw_detections(blank(), *arrays), draw_detections(blank(), boxes, labels, scores))
    assert same(draw_detections(blank(), numpy.zeros((0, 4)), numpy.zeros(0)), blank())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(boxes=[[0, 0, 1, 1]], labels=[]), r"labels must have one entry per box \(1\), got 0"),
        (dict(boxes=[[0, 0, 1, 1]], labels=[0], scores=[0.1, 0.2]), "scores must have one entry per box"),
        (dict(boxes=[[0, 0, 1]], labels=[0]), r"boxes\[0\] must be four finite numbers"),
        (dict(boxes=[[0, 0, float("nan"), 1]], labels=[0]), r"boxes\[0\] must be four finite numbers"),
        (dict(boxes=[[0, 0, 1, 1]], labels=[2], categories=["a", "b"]), r"labels\[0\] must be in 0..1, got 2"),
        (dict(boxes=[[0, 0, 1, 1]], labels=[-1]), "must be in 0, got -1"),
        (dict(boxes=[], labels=[], scale=0.0), "scale must be a positive number"),
        (dict(boxes=[], labels=[], label_size=0), "label_size must be at least 1"),
    ],
    ids=["labels", "scores", "three", "nan", "category", "negative", "scale", "type"],
)
def test_bad_input_is_one_clear_error(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        draw_detections(blank(), **arguments)


def test_colours_of_neighbours_differ() -> None:
    colors = [class_color(label) for label in range(12)]
    for a, b in itertools.combinations(colors, 2):
        assert sum(abs(x - y) for x, y in zip(a, b, strict=True)) > 40
