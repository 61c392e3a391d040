from __future__ import annotations

import math

import pytest
import torch

from nasdet.detectors.parts.codec import PLAIN_CODEC, BoxCodec

WEIGHTS = [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0), (30.0, 30.0, 15.0, 15.0)]


def _boxes(count: int) -> torch.Tensor:
    corner = torch.rand(count, 2, dtype=torch.float64) * 100
    return torch.cat([corner, corner + 1 + torch.rand(count, 2, dtype=torch.float64) * 50], dim=1)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_decoding_undoes_encoding(weights: tuple[float, float, float, float]) -> None:
    codec, anchors, boxes = BoxCodec(weights), _boxes(50), _boxes(50)
    torch.testing.assert_close(codec.decode(anchors, codec.encode(anchors, boxes)), boxes)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_no_deltas_give_the_anchor(weights: tuple[float, float, float, float]) -> None:
    anchors = _boxes(7)
    torch.testing.assert_close(BoxCodec(weights).decode(anchors, torch.zeros_like(anchors)), anchors)
    torch.testing.assert_close(BoxCodec(weights).encode(anchors, anchors), torch.zeros_like(anchors))


def test_one_box_by_hand() -> None:
    # From centre (5, 5), 10 x 10 to centre (10, 5), 20 x 10.
    deltas = BoxCodec((10, 10, 5, 5)).encode(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([[0.0, 0, 20, 10]]))
    torch.testing.assert_close(deltas, torch.tensor([[5.0, 0.0, 5 * math.log(2), 0.0]]))


def test_growth_is_limited_and_shrinking_is_not() -> None:
    anchor = torch.tensor([[0.0, 0, 16, 16]])
    wild = PLAIN_CODEC.decode(anchor, torch.tensor([[0.0, 0, 1e9, -1e9]]))
    torch.testing.assert_close(wild[:, 2] - wild[:, 0], torch.tensor([1000.0]))
    assert float(wild[0, 3] - wild[0, 1]) == 0.0


def test_any_leading_dimensions() -> None:
    anchors, boxes = _boxes(6).view(2, 3, 4), _boxes(6).view(2, 3, 4)
    deltas = PLAIN_CODEC.encode(anchors, boxes)
    torch.testing.assert_close(deltas.view(6, 4), PLAIN_CODEC.encode(anchors.view(6, 4), boxes.view(6, 4)))
    assert PLAIN_CODEC.decode(anchors[:0], deltas[:0]).shape == (0, 3, 4)
