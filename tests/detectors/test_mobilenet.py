"""MobileNetV2: torchvision's names and widths, the paper's costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nasdet.detectors import MobileNetV2
from nasdet.detectors.mobilenet import InvertedResidual, divisible
from nasdet.measure import count, total

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _on_meta(**options: Any) -> MobileNetV2:
    with torch.device("meta"):
        return MobileNetV2(**options)


def _torchvision_names() -> set[str]:
    """The names in torchvision's state dict up to ``features.17``, spelt out from its naming scheme."""
    names = {"features.0.0.weight", *(f"features.0.1.{name}" for name in NORM)}
    for block in range(1, 18):
        head, pairs = f"features.{block}.conv.", 1 if block == 1 else 2
        for pair in range(pairs):
            names |= {f"{head}{pair}.0.weight", *(f"{head}{pair}.1.{name}" for name in NORM)}
        names |= {f"{head}{pairs}.weight", *(f"{head}{pairs + 1}.{name}" for name in NORM)}
    return names


@pytest.mark.parametrize(("width", "parameters"), [(1.0, 3_504_872), (0.5, 1_968_680), (1.4, 6_108_776)], ids=str)
def test_parameters_and_names_are_torchvisions(width: float, parameters: int) -> None:
    """torchvision's totals: with the last 1x1 convolution, its norm and the classifier of 1000 classes."""
    model = _on_meta(width=width)
    last = divisible(1280 * max(1.0, width))
    rest = model.channels["c5"] * last + 2 * last + last * 1000 + 1000
    assert sum(p.numel() for p in model.parameters()) + rest == parameters
    assert set(model.state_dict()) == _torchvision_names()


def test_macs_are_the_papers() -> None:
    """Table 4: 300 M at 224 x 224, with the last 1x1 convolution and the classifier."""
    macs = total(count(_on_meta(), torch.empty(1, 3, 224, 224, device="meta"))).macs
    assert macs == 279_423_872
    assert round((macs + 320 * 1280 * 49 + 1280 * 1000) / 1e6, 1) == 300.8


@pytest.mark.parametrize(
    ("width", "stem", "channels"),
    [
        (1.0, 32, [24, 32, 96, 320]),
        (0.75, 24, [24, 24, 72, 240]),
        (0.35, 16, [8, 16, 32, 112]),
        (0.125, 8, [8, 8, 16, 40]),
    ],
    ids=str,
)
def test_width_multiplier(width: float, stem: int, channels: list[int]) -> None:
    """0.35: 11.2 becomes 16, as 8 would lose more than a tenth; 33.6 becomes 32."""
    model = _on_meta(width=width)
    assert model.get_submodule("features.0.0").out_channels == stem
    assert list(model.channels.values()) == channels


@pytest.mark.parametrize(
    ("channels", "expected"), [(1, 8), (8.8, 8), (8.9, 16), (12, 16), (20, 24), (33.6, 32), (44, 48)], ids=str
)
def test_rounding_loses_a_tenth_at_most(channels: float, expected: int) -> None:
    assert divisible(channels) == expected


def test_shortcuts_only_where_shapes_allow() -> None:
    model = _on_meta()
    blocks = {name: block for name, block in model.named_modules() if isinstance(block, InvertedResidual)}
    with_shortcut = [int(name.split(".")[1]) for name, block in blocks.items() if block.shortcut]
    assert len(blocks) == 17 and with_shortcut == [3, 5, 6, 8, 9, 10, 12, 13, 15, 16]


def test_a_block_is_linear_at_its_end() -> None:
    """Without its shortcut a block's output takes both signs; ReLU6 cuts inside."""
    block = InvertedResidual(8, 8, 1, 6, "bn").eval()
    x = torch.randn(1, 8, 6, 6)
    torch.testing.assert_close(block(x) - x, block.conv(x))
    assert bool((block(x) < x).any())
    assert bool((block.conv[:2](100 * x) <= 6).all())


def test_strides_lie_in_the_depthwise_convolutions() -> None:
    strided = [(name, m) for name, m in _on_meta().named_modules() if getattr(m, "stride", 1) == (2, 2)]
    assert [name for name, _ in strided] == ["features.0.0", *(f"features.{n}.conv.1.0" for n in (2, 4, 7, 14))]
    assert all(conv.groups == conv.in_channels for _, conv in strided[1:])
