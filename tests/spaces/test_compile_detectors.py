"""Every detector with a searched part compiles as one graph, up to what depends on data."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from nasdet.arch import Card, load_card
from nasdet.detectors import DETECTORS
from nasdet.spaces.assemble import ModelConfig, build_model
from nasdet.spaces.nats import NATSSpace

TWO_STAGE = [name for name in DETECTORS if "rcnn" in name]
# A searched backbone fits every detector, searched towers those that have towers; plain: tests/detectors.
PARTS = [(name, "nats") for name in DETECTORS] + [(name, "fad") for name in DETECTORS if name not in TWO_STAGE]


def nats_card() -> Card:
    return NATSSpace(backbone="resnet50", width=0.125, channel_groups=2).random(random.Random(1))


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
