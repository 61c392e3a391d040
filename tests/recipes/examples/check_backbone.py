"""The new backbone is counted, and every detector learns on it."""

from __future__ import annotations

import torch

from nasdet.cli import main
from nasdet.detectors import BACKBONES, DETECTORS
from nasdet.spaces.assemble import ModelConfig, build_model

assert main(["arch", "info", "pooled", "--size", "64x64", "--json"]) == 0
maps = BACKBONES["pooled"](width=0.5)(torch.randn(1, 3, 65, 96))
assert [tuple(level.shape[1:]) for level in maps.values()] == [(16, 17, 24), (32, 9, 12), (64, 5, 6), (128, 3, 3)]
for detector in DETECTORS:
    config = ModelConfig(detector=detector, backbone="pooled", width=0.5, fpn_channels=16, norm="gn", num_classes=2)
    model = build_model(config)
    target = {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]),
        "labels": torch.tensor([1]),
        "masks": torch.ones(1, 64, 64, dtype=torch.bool),
    }
    losses = model.loss(model(torch.randn(1, 3, 64, 64)), [target])
    torch.stack(list(losses.values())).sum().backward()
    assert all(parameter.grad is not None for parameter in model.get_submodule("backbone").parameters())
print("learns")
