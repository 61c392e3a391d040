"""ModelConfig and the detector it stands for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nasdet.arch import load_card
from nasdet.detectors.towers import PlainTowers
from nasdet.spaces import SPACES, space_class
from nasdet.spaces.assemble import ModelConfig, build_model, build_towers
from nasdet.spaces.fad import FADSpace, FADTower

SMALL: dict[str, Any] = {
    "backbone": "resnet18",
    "width": 0.125,
    "fpn_channels": 12,
    "levels": 3,
    "norm": "gn",
    "num_classes": 2,
    "categories": ["a", "b"],
    "short_side": 64,
    "long_side": 64,
}
CARD = load_card("fad-paper").to_json()


@pytest.mark.parametrize("towers", ["plain", CARD], ids=["plain", "fad"])
def test_json_round_trip_builds_the_same_model(towers: Any, tmp_path: Path) -> None:
    config = ModelConfig(**SMALL, towers=towers, inner_channels=6, cells=1)
    again = ModelConfig.load(config.save(tmp_path / "model.json"))
    assert again == config and json.loads((tmp_path / "model.json").read_text()) == config.to_json()
    models: list[dict[str, torch.Tensor]] = []
    for one in (config, again):
        torch.manual_seed(0)
        models.append(build_model(one).state_dict())
    assert models[0].keys() == models[1].keys()
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


@pytest.mark.parametrize(("towers", "kind"), [("plain", PlainTowers), (CARD, FADTower)], ids=["plain", "fad"])
def test_towers_and_a_training_step(towers: Any, kind: type) -> None:
    model: Any = build_model(ModelConfig(**SMALL, towers=towers, inner_channels=6))
    towers = model.towers
    assert isinstance(towers, kind)
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    losses = model.loss(model(torch.randn(1, 3, 64, 64)), [target])
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in model.towers.parameters())


def test_a_supernet_takes_the_towers_place() -> None:
    supernet = FADSpace("subset1").supernet(12, 6)
    model: Any = build_model(ModelConfig(**SMALL), towers=supernet)
    assert model.towers is supernet
    assert [tuple(t.shape) for t in model(torch.randn(1, 3, 64, 64))["cls"]] == [
        (1, 2, 8, 8),
        (1, 2, 4, 4),
        (1, 2, 2, 2),
    ]


def test_inner_channels_and_cells_stand_in_for_the_card() -> None:
    own = build_towers(ModelConfig(**SMALL, towers=CARD))
    ours = build_towers(ModelConfig(**SMALL, towers=CARD, inner_channels=6, cells=1))
    assert isinstance(own, FADTower) and isinstance(ours, FADTower)
    assert (len(own.box.cells), len(ours.box.cells)) == (2, 1)
    shapes = [tower.state_dict()["box.cells.0.edges.0_2.squeeze.weight"].shape for tower in (own, ours)]
    assert shapes == [(96, 12, 1, 1), (6, 12, 1, 1)]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "detector": ({"detector": "yolo"}, "detector must be one of fcos.*, got 'yolo'"),
    "backbone": ({"backbone": "vgg"}, "backbone must be one of .*resnet50.*, got 'vgg'"),
    "norm": ({"norm": "ln"}, "norm must be one of .*, got 'ln'"),
    "width": ({"width": 0}, "width must be a positive number, got 0"),
    "nan": ({"width": float("nan")}, "width must be a positive number, got nan"),
    "levels": ({"levels": 0}, "levels must be a positive integer, got 0"),
    "classes": ({"num_classes": True}, "num_classes must be a positive integer, got True"),
    "categories": ({"categories": ["a"]}, r"categories must be 2 names \(num_classes\), got 1"),
    "a-name": ({"categories": "ab"}, "categories must be a list of names, got 'ab'"),
    "sides": ({"short_side": 65}, "long_side must be at least short_side 65, got 64"),
    "towers": ({"towers": "fad"}, "towers must be 'plain' or a card's JSON, got 'fad'"),
    "card": ({"towers": {**CARD, "schema_version": 3}}, "schema_version must be 1, got 3"),
    "frozen": ({"frozen_stages": -1}, "frozen_stages must be a non-negative integer, got -1"),
    "cells": ({"cells": 0}, "cells must be a positive integer, got 0"),
}


@pytest.mark.parametrize(("changes", "words"), BAD.values(), ids=BAD)
def test_bad_configurations(changes: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        ModelConfig(**{**SMALL, **changes})


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**ModelConfig(**SMALL).to_json(), "towrs": "plain"}))
    with pytest.raises(ValueError, match="model keys must be among .*, got 'towrs'") as caught:
        ModelConfig.load(path)
    assert str(path) in str(caught.value)
    path.write_text("[]")
    with pytest.raises(TypeError, match="model must be an object, got list"):
        ModelConfig.load(path)


def test_a_card_that_is_no_tower() -> None:
    card = FADSpace(groups=("mask",)).derive(FADSpace(groups=("mask",)).supernet(12, 6))
    with pytest.raises(
        ValueError, match="towers must be a card with the groups box and cls, got 'fad-searched' with mask"
    ):
        build_towers(ModelConfig(**SMALL, towers=card.to_json()))


def test_spaces_by_name() -> None:
    assert space_class("fad") is FADSpace
    assert all(space_class(method).method == method for method in SPACES)
    with pytest.raises(ValueError, match="method must be one of fad.*, got 'nope'"):
        space_class("nope")
