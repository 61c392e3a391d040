from __future__ import annotations

from typing import Any

import pytest
import torch

from nasdet.detectors import BACKBONES, ResNet
from nasdet.detectors.resnet import BLOCKS
from nasdet.measure import count, total

# torchvision's published totals with the 1000-class classifier, and entries of its state dicts.
PUBLISHED = {18: (11_689_512, 122), 34: (21_797_672, 218), 50: (25_557_032, 320), 101: (44_549_160, 626)}


def _torchvision_names(depth: int) -> set[str]:
    """The names in torchvision's state dict, spelt out from its naming scheme."""
    counters = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    names = {"conv1.weight", *(f"bn1.{c}" for c in counters)}
    convs = 2 if depth < 50 else 3
    for stage, blocks in enumerate(BLOCKS[depth][1], start=1):
        for block in range(blocks):
            head = f"layer{stage}.{block}."
            for conv in range(1, convs + 1):
                names |= {f"{head}conv{conv}.weight", *(f"{head}bn{conv}.{c}" for c in counters)}
            if block == 0 and (stage > 1 or depth >= 50):
                names |= {f"{head}downsample.0.weight", *(f"{head}downsample.1.{c}" for c in counters)}
    return names


@pytest.mark.parametrize("depth", sorted(BLOCKS))
def test_parameters_and_names_are_torchvisions(depth: int) -> None:
    with torch.device("meta"):
        model = ResNet(depth)
    classifier = model.channels["c5"] * 1000 + 1000
    assert sum(p.numel() for p in model.parameters()) + classifier == PUBLISHED[depth][0]
    assert set(model.state_dict()) == _torchvision_names(depth)
    assert len(model.state_dict()) + 2 == PUBLISHED[depth][1]


@pytest.mark.parametrize("norm", ["bn", "frozen_bn", "sync_bn", "gn"])
@pytest.mark.parametrize("depth", [18, 50])
def test_maps_match_their_description(depth: int, norm: str) -> None:
    model = ResNet(depth, width=0.25, norm=norm)
    maps = model(torch.randn(1, 3, 70, 97))
    assert list(maps) == ["c2", "c3", "c4", "c5"] == list(model.strides) == list(model.channels)
    for name, stride in {"c2": 4, "c3": 8, "c4": 16, "c5": 32}.items():
        assert model.strides[name] == stride
        assert maps[name].shape == (1, model.channels[name], -(-70 // stride), -(-97 // stride))


@pytest.mark.parametrize(
    ("depth", "width", "channels"),
    [(18, 0.25, [16, 32, 64, 128]), (18, 0.1, [8, 16, 24, 48]), (50, 0.5, [128, 256, 512, 1024])],
)
def test_width_rounds_to_eights(depth: int, width: float, channels: list[int]) -> None:
    assert list(ResNet(depth, width=width).channels.values()) == channels


def test_bottleneck_stride_placement() -> None:
    ours, caffe = ResNet(50, width=0.25), ResNet(50, width=0.25, stride_in_1x1=True)
    for name in ("layer2.0", "layer3.0", "layer4.0"):
        assert ours.get_submodule(name).conv1.stride == (1, 1) and ours.get_submodule(name).conv2.stride == (2, 2)
        assert caffe.get_submodule(name).conv1.stride == (2, 2) and caffe.get_submodule(name).conv2.stride == (1, 1)


@pytest.mark.parametrize("frozen", range(6))
def test_frozen_stages_do_not_move(frozen: int) -> None:
    torch.manual_seed(0)
    model = ResNet(18, width=0.125, frozen_stages=frozen).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    loss = torch.stack([level.mean() for level in model(torch.randn(2, 3, 32, 32)).values()]).sum()
    if frozen < 5:
        loss.backward()
    assert loss.requires_grad == (frozen < 5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad.add(0.1))
    prefixes = [("conv1.", "bn1."), ("layer1.",), ("layer2.",), ("layer3.",), ("layer4.",)]
    for index, prefix in enumerate(prefixes):
        names = [name for name in before if name.startswith(prefix) and "downsample" not in name]
        changed = [not torch.equal(before[name], model.state_dict()[name]) for name in names]
        assert not any(changed) if index < frozen else all(changed)
    assert model.get_submodule("bn1").training == (frozen == 0)
    assert model.eval().train().get_submodule("layer4").training == (frozen < 5)


def test_stages_after_the_last_output_are_not_built() -> None:
    model = ResNet(18, width=0.25, outputs=["c4", "c3"])
    assert list(model.channels) == ["c3", "c4"] and not hasattr(model, "layer4")
    assert list(model(torch.randn(1, 3, 32, 32))) == ["c3", "c4"]


def test_frozen_norm_has_no_parameters_and_equals_batch_norm_in_evaluation() -> None:
    torch.manual_seed(0)
    trained = ResNet(18, width=0.25, norm="bn")
    for _ in range(2):
        trained(torch.randn(2, 3, 64, 64))
    frozen = ResNet(18, width=0.25, norm="frozen_bn")
    frozen.load_state_dict(trained.state_dict())
    assert not any("bn" in name or "downsample.1" in name for name, _ in frozen.named_parameters())
    images = torch.randn(2, 3, 64, 64)
    expected = trained.eval()(images)
    for name, level in frozen.train()(images).items():
        torch.testing.assert_close(level, expected[name])


def test_channels_last_stays() -> None:
    model = ResNet(18, width=0.25, norm="gn")
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    for name, level in model(images.to(memory_format=torch.channels_last)).items():
        assert level.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(level, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"depth": 20}, "depth must be one of"),
        ({"width": 0}, "width must be positive"),
        ({"width": float("nan")}, "width must be positive"),
        ({"norm": "ln"}, "norm must be one of bn, frozen_bn, sync_bn, gn, got 'ln'"),
        ({"outputs": ("c6",)}, "outputs must be names among"),
        ({"outputs": "c5"}, "outputs must be names among"),
        ({"outputs": ()}, "outputs must be names among"),
        ({"frozen_stages": 6}, "frozen_stages must be in 0..5, got 6"),
        ({"groups": 0}, "groups and width_per_group must be positive"),
        ({"groups": 32, "width_per_group": 4}, "1 and 64 without bottlenecks .depth 18., got 32 and 4"),
    ],
    ids=str,
)
def test_bad_arguments(arguments: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        ResNet(**{"depth": 18, "width": 0.25, **arguments})


@pytest.mark.parametrize(
    ("depth", "kind", "parameters", "macs"),
    [
        (50, "32x4d", 25_028_904, 4_228_431_872),
        (101, "32x4d", 44_177_704, 7_967_948_800),
        (101, "32x8d", 88_791_336, 16_411_967_488),
        (101, "64x4d", 83_455_272, 15_458_222_080),
    ],
    ids=["x50", "x101-32x4d", "x101-32x8d", "x101-64x4d"],
)
def test_resnext_has_published_costs_and_torchvisions_names(depth: int, kind: str, parameters: int, macs: int) -> None:
    """torchvision's totals with the classifier's 2,049,000; MACs at 224 x 224 without its 2 M: 4.23, 16.41, 15.46 G."""
    groups, width = map(int, kind.removesuffix("d").split("x"))
    with torch.device("meta"):
        model = BACKBONES[f"resnext{depth}_{kind}"]()
    assert sum(p.numel() for p in model.parameters()) + 2048 * 1000 + 1000 == parameters
    assert total(count(model, torch.empty(1, 3, 224, 224, device="meta"))).macs == macs
    assert set(model.state_dict()) == _torchvision_names(depth)
    for stage in range(1, 5):
        conv: Any = model.get_submodule(f"layer{stage}.1.conv2")
        channels = groups * width * 2 ** (stage - 1)
        assert (conv.in_channels, conv.out_channels, conv.groups) == (channels, channels, groups)
    assert model.channels == {"c2": 256, "c3": 512, "c4": 1024, "c5": 2048}


def test_narrow_resnext_runs() -> None:
    model = BACKBONES["resnext50_32x4d"](width=0.25)
    assert model.get_submodule("layer1.0.conv2").weight.shape == (32, 1, 3, 3)
    assert model(torch.randn(1, 3, 64, 64))["c5"].shape == (1, 512, 2, 2)
