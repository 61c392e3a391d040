"""torchvision's classifiers and our backbones with the same weights: the same names, the same maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nasdet.detectors import BACKBONES, load_backbone_weights

LEVELS = ("c2", "c3", "c4", "c5")
# Where each level ends in torchvision's module.
MOBILENET = ("features.3", "features.6", "features.13", "features.17")
SHUFFLENET = ("maxpool", "stage2", "stage3", "stage4")
RESNET = ("layer1", "layer2", "layer3", "layer4")
SHUFFLENETS = [f"shufflenet_v2_{kind}" for kind in ("x0_5", "x1_0", "x1_5", "x2_0")]
CASES = [
    *((name, SHUFFLENET, 1.0) for name in SHUFFLENETS),
    *(("mobilenet_v2", MOBILENET, width) for width in (1.0, 0.5, 0.35, 1.4)),
    *((name, RESNET, 1.0) for name in ("resnet18", "resnext50_32x4d", "resnext101_64x4d", "resnext101_32x8d")),
]


def pictures() -> Tensor:
    return torch.rand(2, 3, 70, 97, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def rival_of(name: str, width: float) -> Any:
    """torchvision's net with random weights and running statistics that are not the initial ones."""
    from torchvision import models

    options = {"width_mult": width} if name == "mobilenet_v2" else {}
    rival = getattr(models, name)(weights=None, **options).double().train()
    with torch.no_grad():
        rival(pictures())
    return rival.eval()


def maps_of(rival: Any, ends: tuple[str, ...]) -> dict[str, Tensor]:
    maps: dict[str, Tensor] = {}
    for level, end in zip(LEVELS, ends, strict=True):
        rival.get_submodule(end).register_forward_hook(lambda _, __, y, level=level: maps.update({level: y.clone()}))
    with torch.no_grad():
        rival(pictures())
    return maps


@pytest.mark.parametrize(("name", "ends", "width"), CASES, ids=lambda value: value if isinstance(value, str) else "")
def test_the_same_maps_from_the_same_file(name: str, ends: tuple[str, ...], width: float, tmp_path: Path) -> None:
    rival = rival_of(name, width)
    torch.save(rival.state_dict(), tmp_path / "net.pth")
    ours = BACKBONES[name](width=width).double().eval()
    load_backbone_weights(ours, tmp_path / "net.pth")
    with torch.no_grad():
        found = ours(pictures())
    expected = maps_of(rival, ends)
    assert list(found) == list(expected) == list(LEVELS)
    for level, value in expected.items():
        torch.testing.assert_close(found[level], value, rtol=1e-9, atol=1e-12)
        assert float(value.abs().max()) > 1e-6
    classifier = [key for key in rival.state_dict() if key.startswith(ours.unused_weights)]
    assert set(rival.state_dict()) - set(classifier) == set(ours.state_dict()) and classifier


@pytest.mark.parametrize("name", ["mobilenet_v2", "shufflenet_v2_x1_0"])
def test_the_same_gradients(name: str) -> None:
    """In training mode, through the batch norms' statistics, into every parameter."""
    rival = rival_of(name, 1.0).train()
    ours = BACKBONES[name]().double().train()
    ours.load_state_dict({key: value for key, value in rival.state_dict().items() if key in ours.state_dict()})
    end = MOBILENET[-1] if name == "mobilenet_v2" else SHUFFLENET[-1]
    maps: list[Tensor] = []
    rival.get_submodule(end).register_forward_hook(lambda _, __, y: maps.append(y))
    rival(pictures())
    for last in (maps[0], ours(pictures())["c5"]):
        (last * torch.linspace(-1, 1, last.numel(), dtype=last.dtype).view_as(last)).sum().backward()
    wanted = {key: p.grad for key, p in rival.named_parameters() if p.grad is not None}
    gradients = {key: p.grad for key, p in ours.named_parameters()}
    assert gradients.keys() == wanted.keys()
    largest = max(gradient.norm() for gradient in wanted.values())
    for key, gradient in gradients.items():
        distance = (gradient - wanted[key]).norm()
        assert distance <= 1e-8 * wanted[key].norm() + 1e-12 * largest, f"{key}: {distance} of {wanted[key].norm()}"
