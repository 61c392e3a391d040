"""FAD's published parameters and MACs (ECCV 2020, tables 3 and 5), in millions and billions, on the meta device."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nasdet.arch import Card, load_card
from nasdet.detectors import ResNet, build_fcos, build_mask_rcnn, build_mask_scoring_rcnn, build_retinanet, countable
from nasdet.measure import count, total
from nasdet.spaces.fad import FADSpace

TRUNK = 4 * (256 * 256 * 9 + 256)  # the plain mask head's convolutions before the deconvolution


def cost(build: Callable[..., Any], depth: int = 50, **options: Any) -> tuple[int, int]:
    """Parameters and MACs at 800 x 1280, the backbone's stride where the papers' pretrained weights have it."""
    with torch.device("meta"):
        model = build(f"resnet{depth}", 80, norm="frozen_bn", **options)
        outputs = tuple(model.backbone.strides)
        model.backbone = ResNet(depth, norm="frozen_bn", outputs=outputs, stride_in_1x1=True)
    costs = total(count(countable(model), torch.empty(1, 3, 800, 1280, device="meta")))
    return costs.parameters, costs.macs


@pytest.mark.parametrize(
    ("build", "depth", "published"),
    [
        pytest.param(build_fcos, 50, ((32.2, 201), (31.5, 185)), id="FCOS R50"),
        pytest.param(build_fcos, 101, ((51.2, 277), (50.4, 261)), id="FCOS R101"),
        pytest.param(build_retinanet, 50, ((33.8, 234), (33.0, 218)), id="RetinaNet R50"),
        pytest.param(build_retinanet, 101, ((52.7, 310), (52.0, 294)), id="RetinaNet R101"),
    ],
)
def test_towers(build: Callable[..., Any], depth: int, published: tuple[tuple[float, int], ...]) -> None:
    """Parameters exactly. The paper's counter also charges norms, biases and activations, which ours does not.

    One figure each explains all four rows: 1.35 G with plain towers, 1.8 G with FAD's, whose many narrow
    convolutions have more outputs.
    """
    towers = FADSpace.build(load_card("fad-paper"))
    for (millions, billions), rest, module in zip(published, (1.35e9, 1.8e9), (None, towers), strict=True):
        parameters, macs = cost(build, depth, towers=module)
        assert round(parameters / 1e6, 1) == millions
        assert round((macs + rest) / 1e9) == billions


def test_what_towers_save_in_retinanet() -> None:
    """33.8 -> 33.0 M and 234 -> 218 G; predictors, of 9 anchors a cell here, are not the module's."""
    plain, searched = (cost(build_retinanet, towers=t) for t in (None, FADSpace.build(load_card("fad-paper"))))
    assert (searched[0], plain[0] - searched[0]) == (33_039_732, 747_072)
    assert round((plain[1] - searched[1]) / 1e9, 2) == 16.45


# Cells with eight standard and five or six separable units.
CELLS = (("std3", "std3", "std2", "sep2", "sep2", "sep1"), ("std3", "std3", "std2", "sep2", "sep2", "sep2"))


def mask_trunk(edges: tuple[str, ...]) -> nn.Module:
    """The mask trunk of two such cells, c' = 96; where its edges begin does not matter here."""
    nodes = [[[edges[2 * node], 0], [edges[2 * node + 1], 1]] for node in range(3)]
    with torch.device("meta"):
        return FADSpace.build(Card("fad", "mask", {"mask": nodes}), 256, 96, 2)


# maker, depth, and published millions without and with FAD
MASKS = {
    "Mask R-CNN R50": (build_mask_rcnn, 50, (44.3, 44.4)),
    "Mask R-CNN R101": (build_mask_rcnn, 101, (63.3, 63.4)),
    "Mask Scoring R-CNN R50": (build_mask_scoring_rcnn, 50, (60.7, 60.8)),
    "Mask Scoring R-CNN R101": (build_mask_scoring_rcnn, 101, (79.6, 79.7)),
}


@pytest.mark.parametrize(("build", "depth", "published"), MASKS.values(), ids=MASKS)
def test_mask_heads(build: Callable[..., Any], depth: int, published: tuple[float, float]) -> None:
    """The paper does not show the mask head that it found; trunks of eight standard units a cell give its counts.

    Parameters exactly. Its MACs are 2 G more than the plain trunk's in all four rows, so 1 to 3 before rounding, with
    norms, biases and activations; these have 1.0 and 1.4 G of convolutions more at 100 detections.
    """
    plain = cost(build, depth)
    assert round(plain[0] / 1e6, 1) == published[0]
    for edges, more in zip(CELLS, (1.01, 1.41), strict=True):
        parameters, macs = cost(build, depth, mask_trunk=mask_trunk(edges))
        assert round(parameters / 1e6, 1) == published[1]
        assert round((macs - plain[1]) / 1e9, 2) == more


def test_the_published_counts_pin_the_mask_heads_standard_units() -> None:
    """All four rows together leave 2.42 to 2.46 M for two cells at c' = 96: eight standard units in each, no other."""
    plain = (44_347_573, 63_287_477, 60_688_902, 79_628_806)
    fits = []
    for standard, separable in itertools.product(range(19), repeat=2):
        units = standard * (96 * 96 * 9 + 3 * 96) + separable * (96 * 9 + 96 * 96 + 3 * 96)
        edges, joints = 6 * (2 * 256 * 96 + 96 + 256), (768 * 256 + 3 * 256) + (768 * 256 + 256)
        trunk = 2 * (edges + units) + joints
        counts = [round((whole - TRUNK + trunk) / 1e6, 1) for whole in plain]
        if counts == [44.4, 63.4, 60.8, 79.7] and 6 <= standard + separable <= 18:
            fits.append((standard, separable))
    assert fits == [(8, 5), (8, 6)]
    for edges_of_cell, (standard, separable) in zip(CELLS, fits, strict=True):
        assert sum(int(edge[-1]) for edge in edges_of_cell if edge.startswith("std")) == standard
        assert sum(int(edge[-1]) for edge in edges_of_cell if edge.startswith("sep")) == separable
    assert round(TRUNK / 2**20, 2) == 2.25, "the paper's mask head of 2.25 M is the plain one, counted in 2^20"
