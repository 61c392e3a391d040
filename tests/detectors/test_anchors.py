from __future__ import annotations

import math

import pytest
import torch

from nasdet.detectors.parts.anchors import AnchorGenerator, octave_sizes
from nasdet.detectors.parts.locations import canvas, pyramid_points
from nasdet.detectors.rpn import rpn_anchors

STRIDES = (8, 16, 32, 64, 128)


def test_retinanet_sizes_are_those_of_the_paper_in_whole_pixels() -> None:
    sizes = octave_sizes(STRIDES)
    assert sizes[0] == (32, 40, 50) and sizes[-1] == (512, 645, 812)
    assert AnchorGenerator(STRIDES, sizes).per_cell == 9


@pytest.mark.parametrize("convention", ["torchvision", "centre"])
def test_area_and_shape_of_a_cell(convention: str) -> None:
    anchors = AnchorGenerator([8], [(32.0, 64.0)], (0.5, 1.0, 2.0), convention=convention)
    cell = anchors.cell(0)
    assert cell.shape == (6, 4)
    torch.testing.assert_close(cell[:, :2], -cell[:, 2:])  # around the origin
    side = cell[:, 2:] - cell[:, :2]
    slack = 1.0 if convention == "torchvision" else 1e-4  # each corner is up to half a pixel off
    for (width, height), ratio, size in zip(side.tolist(), [0.5, 0.5, 1, 1, 2, 2], [32, 64] * 3, strict=True):
        assert abs(width - size / math.sqrt(ratio)) <= slack and abs(height - size * math.sqrt(ratio)) <= slack
    assert torch.equal(cell, cell.round()) == (convention == "torchvision")


def test_order_is_cell_by_cell_then_ratio_then_size() -> None:
    anchors = AnchorGenerator([8, 16], [(8.0, 16.0), (32.0, 64.0)], (1.0, 4.0), convention="centre")
    first, second = anchors([torch.zeros(1, 1, 2, 3), torch.zeros(1, 1, 1, 2)])
    assert first.shape == (2 * 3 * 4, 4) and second.shape == (1 * 2 * 4, 4)
    centres = ((first[:, :2] + first[:, 2:]) / 2).view(2, 3, 4, 2)
    assert centres[1, 2].tolist() == [[20, 12]] * 4  # third column, second row
    assert (first[:4, 2:] - first[:4, :2]).tolist() == [[8, 8], [16, 16], [4, 16], [8, 32]]


def test_spacing_where_a_map_was_rounded_up() -> None:
    # 800 rows at stride 64 are 13: torchvision spaces them by 800 // 13 = 61 pixels, and from the corner.
    maps = [torch.zeros(1, 1, 100, 160), torch.zeros(1, 1, 13, 20)]
    assert canvas(maps, (8, 64)) == (800, 1280) == canvas(maps[::-1], (64, 8))
    theirs = pyramid_points(maps, (8, 64), "torchvision")[1].view(13, 20, 2)
    assert theirs[12, 19].tolist() == [19 * 64, 12 * 61]
    ours = pyramid_points(maps, (8, 64))[1].view(13, 20, 2)
    assert ours[12, 19].tolist() == [19.5 * 64, 12.5 * 64]


def test_rpn_anchors_are_the_papers() -> None:
    anchors = rpn_anchors((4, 8, 16, 32, 64))
    assert anchors.sizes == ((32,), (64,), (128,), (256,), (512,)) and anchors.per_cell == 3


@pytest.mark.parametrize(
    ("arguments", "options", "text"),
    [
        (([8, 16], [(32,)]), {}, r"sizes must have one entry per level \(2\), got 1"),
        (([8, 16], [(32,), (32, 64)]), {}, "as many anchors on every level"),
        (([8], [()]), {}, "as many anchors on every level"),
        (([8], [(32,)], (0.0,)), {}, "must be positive"),
        (([8], [(-1,)]), {}, "must be positive"),
        (([8], [(32,)]), {"convention": "corner"}, "convention must be one of centre, torchvision, got 'corner'"),
    ],
)
def test_bad_anchors(arguments: tuple, options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        AnchorGenerator(*arguments, **options)
