from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from nasdet.detectors import FPN, PlainTowers
from nasdet.detectors.norm import group_count, group_norm, norm_layer

CHANNELS = {"c3": 8, "c4": 16, "c5": 24}
STRIDES = {"c3": 8, "c4": 16, "c5": 32}


def _maps(height: int = 97, width: int = 70) -> dict[str, torch.Tensor]:
    return {name: torch.randn(2, CHANNELS[name], -(-height // s), -(-width // s)) for name, s in STRIDES.items()} | {
        "c2": torch.randn(1)
    }


@pytest.mark.parametrize(("levels", "names"), [(0, "p3 p4 p5"), (1, "p3 p4 p5 p6"), (2, "p3 p4 p5 p6 p7")])
@pytest.mark.parametrize("source", ["p5", "c5"])
def test_levels_have_their_strides(levels: int, names: str, source: str) -> None:
    neck = FPN(CHANNELS, STRIDES, 12, extra_levels=levels, extra_source=source)
    result = neck(_maps())
    assert list(result) == names.split() == list(neck.strides) == list(neck.channels)
    for name, level in result.items():
        stride = 2 ** int(name[1:])
        assert neck.strides[name] == stride
        assert level.shape == (2, neck.channels[name], -(-97 // stride), -(-70 // stride))


def test_values_follow_the_formula() -> None:
    torch.manual_seed(0)
    neck, maps = FPN(CHANNELS, STRIDES, 12), _maps(96, 64)
    m5 = neck.lateral[2](maps["c5"])
    m4 = neck.lateral[1](maps["c4"]) + m5.repeat_interleave(2, 2).repeat_interleave(2, 3)
    m3 = neck.lateral[0](maps["c3"]) + m4.repeat_interleave(2, 2).repeat_interleave(2, 3)
    p5 = neck.output[2](m5)
    p6 = neck.extra[0](p5)
    expected = [neck.output[0](m3), neck.output[1](m4), p5, p6, neck.extra[1](F.relu(p6))]
    for value, wanted in zip(neck(maps).values(), expected, strict=True):
        torch.testing.assert_close(value, wanted)
    on_c5 = FPN(CHANNELS, STRIDES, 12, extra_source="c5")
    torch.testing.assert_close(on_c5(maps)["p6"], on_c5.extra[0](maps["c5"]))


def test_pooled_extra_levels_have_no_weights() -> None:
    neck, plain = (FPN(CHANNELS, STRIDES, 12, extra_levels=count, extra_source="pool") for count in (2, 0))
    assert {n: p.shape for n, p in neck.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}
    levels = neck(_maps())
    assert torch.equal(levels["p6"], levels["p5"][..., ::2, ::2])
    assert torch.equal(levels["p7"], levels["p6"][..., ::2, ::2])


def test_names_and_order_of_the_backbone_do_not_matter() -> None:
    neck = FPN({"deep": 6, "fine": 4}, {"deep": 8, "fine": 4}, 5, extra_levels=0)
    result = neck({"deep": torch.randn(1, 6, 4, 4), "fine": torch.randn(1, 4, 8, 8), "other": torch.randn(1)})
    assert {name: tuple(level.shape) for name, level in result.items()} == {"p2": (1, 5, 8, 8), "p3": (1, 5, 4, 4)}


@pytest.mark.parametrize(
    ("channels", "strides", "options", "text"),
    [
        ({}, {}, {}, "must name the same maps"),
        ({"a": 1}, {"b": 8}, {}, "must name the same maps"),
        ({"a": 1, "b": 1}, {"a": 8, "b": 32}, {}, "each twice the one before"),
        ({"a": 1}, {"a": 12}, {}, "powers of two"),
        (CHANNELS, STRIDES, {"extra_source": "p6"}, "extra_source must be"),
        (CHANNELS, STRIDES, {"extra_levels": -1}, "extra_levels >= 0"),
    ],
)
def test_bad_arguments(channels: dict, strides: dict, options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        FPN(channels, strides, 8, **options)


@pytest.mark.parametrize(
    ("channels", "groups"), [(256, 32), (96, 32), (64, 32), (48, 24), (40, 20), (16, 16), (33, 11), (37, 1), (1, 1)]
)
def test_group_count_is_the_largest_divisor(channels: int, groups: int) -> None:
    assert group_count(channels) == groups == group_norm(channels).num_groups
    assert not any(channels % more == 0 for more in range(groups + 1, 33) if more <= channels)


def test_group_count_refuses_nothing() -> None:
    with pytest.raises(ValueError, match="must be positive, got 0"):
        group_count(0)
    with pytest.raises(ValueError, match="norm must be one of"):
        norm_layer("batch", 8)


def test_group_norm_of_one_value_per_group_is_the_bias() -> None:
    norm = group_norm(16)
    torch.nn.init.constant_(norm.bias, 0.5)
    torch.testing.assert_close(norm(torch.randn(1, 16, 1, 1)), torch.full((1, 16, 1, 1), 0.5), rtol=0, atol=1e-3)
    x = torch.randn(2, 16, 3, 5)
    torch.testing.assert_close(norm(x), F.group_norm(x, 16, norm.weight, norm.bias))


@pytest.mark.parametrize("norm", ["gn", "bn"])
def test_towers_are_separate_and_keep_the_shape(norm: str) -> None:
    towers = PlainTowers(40, convs=2, norm=norm)
    assert (towers.box_channels, towers.cls_channels) == (40, 40)
    x = torch.randn(2, 40, 5, 7)
    box, cls = towers(x)
    assert box.shape == cls.shape == x.shape and bool((box >= 0).all()) and not torch.equal(box, cls)
    box.sum().backward()
    assert all(p.grad is None for p in towers.cls.parameters())
    assert all(p.grad is not None for p in towers.box.parameters())


def test_plain_towers_of_the_paper() -> None:
    with torch.device("meta"):
        towers = PlainTowers()
    assert sum(p.numel() for p in towers.parameters()) == 8 * (256 * 256 * 9 + 256 + 2 * 256)
    with pytest.raises(ValueError, match="channels and convs must be positive"):
        PlainTowers(64, convs=0)
