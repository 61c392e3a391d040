"""Every detector with a searched part compiles as one graph, up to what depends on data; so does what follows, once the
boxes are chosen."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from nasdet.arch import Card, load_card
from nasdet.detectors import DETECTORS, TWO_STAGE, WITH_MASKS
from nasdet.spaces.assemble import ModelConfig, build_model
from nasdet.spaces.fad import FADSpace, FADStack
from nasdet.spaces.nats import NATSSpace

SIZE = (64, 96)
# A searched backbone fits every detector, searched towers those that have towers; plain: tests/detectors.
PARTS = [(name, "nats") for name in DETECTORS] + [(name, "fad") for name in DETECTORS if name not in TWO_STAGE]


def nats_card() -> Card:
    return NATSSpace(backbone="resnet50", width=0.125, channel_groups=2).random(random.Random(1))


def mask_card() -> Card:
    return FADSpace(groups=("mask",)).random(random.Random(0), settings={"channels": 12, "inner_channels": 6})


def build(name: str, part: str) -> Any:
    backbone = "resnet50" if part == "nats" else "resnet18"
    settings: dict[str, Any] = {"backbone": backbone, "width": 0.125, "norm": "gn", "tower_convs": 1}
    settings["levels"] = 2 if part == "fad" else 5  # searched towers take seconds a level to trace
    config = ModelConfig(
        detector=name,
        num_classes=3,
        fpn_channels=12,
        inner_channels=6,
        cells=1,
        towers=load_card("fad-paper").to_json() if part == "fad" else "plain",
        backbone_card=nats_card().to_json() if part == "nats" else None,
        mask_trunk=mask_card().to_json() if part == "fad mask" else None,
        options={"hidden": 32} if name in TWO_STAGE else {},
        **settings,
    )
    torch.manual_seed(0)
    return build_model(config).eval()


@pytest.mark.parametrize(("name", "part"), PARTS, ids=["-".join(pair) for pair in PARTS])
@torch.no_grad()
def test_no_graph_breaks(name: str, part: str) -> None:
    model, images = build(name, part), torch.randn(1, 3, 64, 96)
    torch.compiler.reset()
    outputs = torch.compile(model, fullgraph=True, backend="eager")(images)
    for key, levels in model(images).items():
        for value, wanted in zip(outputs[key], levels, strict=True):
            torch.testing.assert_close(value, wanted)


@pytest.fixture
def pyramid() -> list[torch.Tensor]:
    return [torch.randn(2, 12, SIZE[0] // stride, SIZE[1] // stride) for stride in (4, 8, 16, 32, 64)]


def fixed_boxes(count: int) -> torch.Tensor:
    corner = torch.rand(count, 2) * 40
    return torch.cat([corner, corner + 2 + torch.rand(count, 2) * 20], dim=1)


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("name", TWO_STAGE)
@torch.no_grad()
def test_box_stages_on_given_proposals(name: str, pyramid: list[torch.Tensor]) -> None:
    stage, proposals, sizes = build(name, "plain").boxes, [fixed_boxes(9), fixed_boxes(5)], [SIZE, (40, 70)]
    torch.compiler.reset()
    found = torch.compile(stage.predict, fullgraph=True, backend="eager")(pyramid, proposals, sizes)
    wanted = stage.predict(pyramid, proposals, sizes)
    assert wanted[0].shape == (14, 4) and len(wanted[2]) == 2
    for value, expected in zip([*found[:2], *found[2]], [*wanted[:2], *wanted[2]], strict=True):
        torch.testing.assert_close(value, expected)


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("part", ["plain", "fad mask"])
@pytest.mark.parametrize("name", WITH_MASKS)
@torch.no_grad()
def test_mask_stages_on_given_detections(name: str, part: str, pyramid: list[torch.Tensor]) -> None:
    stage = build(name, part).masks
    assert isinstance(stage.head.trunk, FADStack) == (part == "fad mask")
    counts = (4, 3)
    given = [
        {"boxes": fixed_boxes(n), "scores": torch.rand(n), "labels": torch.randint(0, 3, (n,))} for n in counts
    ]
    torch.compiler.reset()
    found = torch.compile(stage.complete, fullgraph=True, backend="eager")(pyramid, given)
    for image, wanted in zip(found, stage.complete(pyramid, given), strict=True):
        assert image.keys() == wanted.keys() >= {"mask_logits"}
        for key, value in wanted.items():
            torch.testing.assert_close(image[key], value)
