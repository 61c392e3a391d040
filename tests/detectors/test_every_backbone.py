"""What holds for every backbone of the registry, alone and in a detector."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nasdet.detectors import BACKBONES, DETECTORS, load_backbone_weights
from nasdet.detectors.norm import NORMS
from nasdet.spaces.assemble import ModelConfig, build_model

SIZE = (64, 96)
# One of each kind; the rest differ in depth and width.
KINDS = ["resnet18", "resnext50_32x4d", "mobilenet_v2", "shufflenet_v2_x0_5", "shufflenet_v2_20"]
OTHERS = KINDS[2:]


def build(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return BACKBONES[name](**{"width": 0.125, "norm": "gn"} | options)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def test_registry() -> None:
    resnets = [*(f"resnet{depth}" for depth in (18, 34, 50, 101)), "resnext50_32x4d"]
    resnets += [f"resnext101_{kind}" for kind in ("32x4d", "32x8d", "64x4d")]
    shufflenets = [f"shufflenet_v2_{kind}" for kind in ("x0_5", "x1_0", "x1_5", "x2_0", "20", "40", "40_3_8g")]
    assert list(BACKBONES) == [*resnets, "mobilenet_v2", *shufflenets]


@pytest.mark.parametrize("name", BACKBONES)
def test_maps_match_their_description(name: str) -> None:
    """At a size that no stride divides."""
    model = build(name)
    maps = model(torch.randn(1, 3, 70, 97))
    assert list(maps) == ["c2", "c3", "c4", "c5"] == list(model.strides) == list(model.channels)
    for level, stride in {"c2": 4, "c3": 8, "c4": 16, "c5": 32}.items():
        assert model.strides[level] == stride
        assert maps[level].shape == (1, model.channels[level], -(-70 // stride), -(-97 // stride))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", KINDS)
def test_every_norm_and_every_gradient(name: str, norm: str) -> None:
    model = build(name, norm=norm).train()
    maps = model(images())
    torch.stack([level.square().mean() for level in maps.values()]).sum().backward()
    assert all(bool(level.isfinite().all()) for level in maps.values())
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), key
        assert bool((parameter.grad != 0).any()), key
    batch_norms = any("running_mean" in key for key in model.state_dict())
    assert batch_norms == (norm != "gn")


@pytest.mark.parametrize("name", BACKBONES)
def test_parts_make_the_forward_and_hold_everything(name: str) -> None:
    model = build(name, norm="frozen_bn").eval()
    parts = model.parts()
    assert list(parts) == ["stem", "c2", "c3", "c4", "c5"]
    x, expected = images(1), model(images(1))
    for part, modules in parts.items():
        x = modules(x)
        assert part == "stem" or torch.equal(x, expected[part])
    inside = {id(p) for modules in parts.values() for p in modules.parameters()}
    assert inside == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("frozen", range(6))
@pytest.mark.parametrize("name", KINDS)
def test_frozen_stages_do_not_learn(name: str, frozen: int) -> None:
    model = build(name, norm="bn", frozen_stages=frozen).eval().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    maps = model(images())
    for index, modules in enumerate(model.parts().values()):
        assert all(p.requires_grad == (index >= frozen) for p in modules.parameters())
        norms = [m for m in modules.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        assert all(m.training == (index >= frozen) for m in norms)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert bool(moved) == (frozen < 5) and maps["c5"].requires_grad == (frozen < 5)
    assert moved == {key for key in before if "running" in key and _norm_trains(model, key)} | {
        key for key in before if "num_batches" in key and _norm_trains(model, key)
    }


def _norm_trains(model: Any, key: str) -> bool:
    return bool(model.get_submodule(key.rpartition(".")[0]).training)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("level", ["c2", "c4"])
def test_parts_after_the_last_output_are_not_built(name: str, level: str, tmp_path: Path) -> None:
    """And a file of the whole net, classifier and all, fills what is there."""
    whole, short = build(name, norm="bn").eval(), build(name, norm="bn", outputs=(level,)).eval()
    assert list(short.channels) == [level] and len(list(short.parameters())) < len(list(whole.parameters()))
    extra = {f"{prefix}weight": torch.ones(2) for prefix in short.unused_weights if "." in prefix}
    torch.save(whole.state_dict() | extra, tmp_path / "net.pth")
    load_backbone_weights(short, tmp_path / "net.pth")
    assert torch.equal(short(images())[level], whole(images())[level])


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("name", KINDS)
def test_weights_of_batch_norm_load_into_frozen_norm(name: str, ending: str, tmp_path: Path) -> None:
    trained = build(name, norm="bn").train()
    for _ in range(3):
        trained(images())
    path = tmp_path / f"net.{ending}"
    if ending == "pth":
        torch.save(trained.state_dict(), path)
    else:
        pytest.importorskip("safetensors.torch").save_file(trained.state_dict(), path)
    frozen = build(name, norm="frozen_bn").train()
    load_backbone_weights(frozen, path)
    for level, expected in trained.eval()(images()).items():
        torch.testing.assert_close(frozen(images())[level], expected)
    with pytest.raises(ValueError, match="weights do not fit"):
        load_backbone_weights(build(name, norm="gn"), path)


@pytest.mark.parametrize("name", KINDS)
def test_channels_last_is_kept(name: str) -> None:
    model = build(name).double().eval()
    expected = model(images().double())
    model.to(memory_format=torch.channels_last)
    for level, value in model(images().double().to(memory_format=torch.channels_last)).items():
        assert value.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(value, expected[level], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", OTHERS)
def test_compiles_as_one_graph(name: str) -> None:
    model = build(name).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")(images())
    for level, expected in model(images()).items():
        torch.testing.assert_close(compiled[level], expected)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"width": 0}, "width must be positive"),
        ({"width": float("nan")}, "width must be positive"),
        ({"norm": "ln"}, "norm must be one of bn, frozen_bn, sync_bn, gn, got 'ln'"),
        ({"outputs": ("c6",)}, "outputs must be names among c2, c3, c4, c5, got"),
        ({"outputs": "c5"}, "outputs must be names among"),
        ({"outputs": ()}, "outputs must be names among"),
        ({"frozen_stages": 6}, "frozen_stages must be in 0..5, got 6"),
        ({"frozen_stages": -1}, "frozen_stages must be in 0..5, got -1"),
        ({"frozen_stages": 3, "outputs": ("c2",)}, "frozen_stages must be in 0..2, got 3"),
    ],
    ids=str,
)
def test_bad_arguments(name: str, options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        build(name, **options)


def detector(name: str, backbone: str) -> Any:
    torch.manual_seed(0)
    small: dict[str, Any] = {"width": 0.125, "fpn_channels": 16, "norm": "gn", "tower_convs": 1}
    if "rcnn" in name:
        small |= {"hidden": 32, "samples": 64, "rpn": {"limit": (100, 50)}}
    return DETECTORS[name](backbone, 5, score_threshold=0.0, **small)


@pytest.mark.parametrize("backbone", OTHERS)
@pytest.mark.parametrize("name", DETECTORS)
def test_in_every_detector(name: str, backbone: str, make_target: Callable) -> None:
    model = detector(name, backbone)
    targets = [make_target([[4, 6, 40, 50], [30, 10, 90, 60]], [1, 4], SIZE), make_target([], [], SIZE)]
    losses = model.loss(model(images()), targets)
    assert all(bool(value.isfinite()) for value in losses.values()), losses
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert any(bool((p.grad != 0).any()) for p in model.backbone.parameters())
    found = model.eval().detect(model(images()), [SIZE, (40, 70)])
    assert len(found[0]["boxes"]) > 0 and bool(found[0]["boxes"].isfinite().all())


@pytest.mark.parametrize("backbone", BACKBONES)
def test_in_a_model_file(backbone: str, tmp_path: Path) -> None:
    """``model.json`` names it, and builds it again."""
    config = ModelConfig(backbone=backbone, width=0.125, fpn_channels=8, levels=4, num_classes=2, norm="gn")
    config = ModelConfig.load(config.save(tmp_path / "model.json"))
    with torch.device("meta"):
        model = build_model(config)
        outputs = model(torch.empty(1, 3, *SIZE))
    assert [tuple(level.shape[-2:]) for level in outputs["cls"]] == [(8, 12), (4, 6), (2, 3), (1, 2)]
