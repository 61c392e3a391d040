"""ModelConfig and the detector it stands for."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nasdet.arch import Card, load_card
from nasdet.detectors import FCOS, Pyramid, RetinaNet
from nasdet.detectors.towers import PlainTowers
from nasdet.spaces import SPACES, space_class
from nasdet.spaces.assemble import ModelConfig, build_model, build_part, searched_fields
from nasdet.spaces.fad import FADSpace, FADStack, FADTower
from nasdet.spaces.fad.cells import Edge
from nasdet.spaces.nats import NATSSpace

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


@pytest.mark.parametrize(("detector", "made"), [("fcos", FCOS), ("retinanet", RetinaNet)])
@pytest.mark.parametrize(("towers", "kind"), [("plain", PlainTowers), (CARD, FADTower)], ids=["plain", "fad"])
def test_towers_and_a_training_step(towers: Any, kind: type, detector: str, made: type) -> None:
    model: Any = build_model(ModelConfig(**SMALL, detector=detector, towers=towers, inner_channels=6))
    assert isinstance(model, made) and isinstance(model.towers, kind)
    target = {"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}
    losses = model.loss(model(torch.randn(1, 3, 64, 64)), [target])
    total = torch.stack(list(losses.values())).sum()
    total.backward()
    assert bool(total.isfinite())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.towers.parameters())


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
    own = build_part(ModelConfig(**SMALL, towers=CARD), "towers")
    ours = build_part(ModelConfig(**SMALL, towers=CARD, inner_channels=6, cells=1), "towers")
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
    "steps of levels": ({"levels": 99}, "levels must be at most 16, got 99"),
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


MASK = FADSpace(groups=("mask",)).random(random.Random(0), settings={"channels": 12, "inner_channels": 6}).to_json()
NATS = NATSSpace(width=0.125, channel_groups=2).random(random.Random(0)).to_json()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"towers": MASK}, "towers must be a card of towers, got 'fad-random' .fad., one of mask_trunk"),
        ({"towers": NATS}, "towers must be a card of towers, got 'nats-random' .nats., one of backbone"),
        ({"mask_trunk": CARD}, "mask_trunk must be a card of mask_trunk, got 'fad-paper' .fad., one of towers"),
        ({"backbone_card": CARD}, "backbone_card must be a card of backbone, got 'fad-paper' .fad., one of towers"),
        ({"mask_trunk": MASK}, "mask_trunk must be plain for fcos, which has no mask_trunk, got 'fad-random'"),
        ({"towers": CARD, "detector": "mask_rcnn"}, "towers must be plain for mask_rcnn, which has no towers"),
    ],
)
def test_cards_stand_where_they_belong(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModelConfig(**SMALL, **fields)


def test_searched_fields_leave_everything_else_plain() -> None:
    before = ModelConfig(**SMALL, towers=CARD, backbone_card=NATS)
    assert before.card == Card.from_json(CARD)
    after = replace(before, detector="mask_rcnn", **searched_fields(Card.from_json(MASK)))
    assert (after.towers, after.backbone_card, after.card) == ("plain", None, Card.from_json(MASK))
    assert replace(after, **searched_fields(None)).card is None


@pytest.mark.parametrize("detector", ["mask_rcnn", "mask_scoring_rcnn"])
def test_a_mask_trunk_takes_its_place(detector: str) -> None:
    small: dict[str, Any] = {**SMALL, "detector": detector, "options": {"hidden": 16}}
    config = ModelConfig(**small, mask_trunk=MASK, inner_channels=9, cells=1)
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    model: Any = build_model(config)
    trunk = model.masks.head.trunk
    assert isinstance(trunk, FADStack) and len(trunk.group.cells) == 1 and trunk.out_channels == 12
    assert {edge.squeeze.out_channels for edge in trunk.modules() if isinstance(edge, Edge)} == {9}
    supernet = FADSpace("subset1", groups=("mask",)).supernet(12, 6)
    assert build_model(ModelConfig(**small), mask_trunk=supernet).masks.head.trunk is supernet  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", [None, "reference"], ids=["fastest", "reference"])
@pytest.mark.parametrize("detector", ["mask_rcnn", "mask_scoring_rcnn"])
def test_a_searchable_mask_trunk_learns_and_stands_pictures_without_objects(detector: str, backend: str | None) -> None:
    supernet = FADSpace(groups=("mask",)).supernet(12, 6, backend=backend)
    small: dict[str, Any] = {**SMALL, "detector": detector, "options": {"hidden": 16}}
    model: Any = build_model(ModelConfig(**small), mask_trunk=supernet)
    (alphas,) = FADSpace.arch_parameters(supernet)
    boxes, masks = torch.tensor([[8.0, 8.0, 40.0, 40.0]]), torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[:, 8:30, 8:40] = True
    some = {"boxes": boxes, "labels": torch.tensor([1]), "masks": masks}
    none = {"boxes": boxes[:0], "labels": torch.zeros(0, dtype=torch.int64), "masks": masks[:0]}
    for target in (some, none):
        model.zero_grad()
        losses = model.loss(model(torch.randn(1, 3, 64, 64)), [target])
        torch.stack(list(losses.values())).sum().backward()
        assert all(bool(value.isfinite()) for value in losses.values())
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in supernet.parameters())
        assert alphas.grad is not None and bool((alphas.grad != 0).all()) == (target is some)
    found = model.eval().detect(model(torch.randn(1, 3, 64, 64)), [(64, 64)])
    assert found[0]["mask_logits"].shape[1:] == (28, 28)


def test_spaces_by_name() -> None:
    assert space_class("fad") is FADSpace
    assert all(space_class(method).method == method for method in SPACES)
    with pytest.raises(ValueError, match="method must be one of detnas, fad, .*, got 'nope'"):
        space_class("nope")


class Rungs(nn.Module):
    """A backbone that is a pyramid by itself, with two maps of one stride."""

    pyramid = True

    def __init__(self, **made_with: Any) -> None:
        super().__init__()
        self.made_with = made_with
        self.strides = {"a": 8, "b": 16, "c": 16}
        self.channels = dict.fromkeys(self.strides, 6)
        self.conv = nn.Conv2d(3, 6, 1)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.conv(images)
        return {name: x[:, :, ::stride, ::stride] for name, stride in self.strides.items()}


@pytest.mark.parametrize("detector", ["fcos", "retinanet"])
def test_a_maker_takes_the_backbones_place_and_its_pyramid_gets_no_other(detector: str) -> None:
    model: Any = build_model(ModelConfig(**SMALL, detector=detector), backbone=Rungs)
    assert isinstance(model.backbone, Rungs) and model.backbone.made_with["norm"] == "gn"
    assert not list(model.neck.parameters()) and model.strides == (8, 16, 16)
    outputs = model(torch.randn(1, 3, 64, 64))
    assert [tuple(level.shape[-2:]) for level in next(iter(outputs.values()))] == [(8, 8), (4, 4), (4, 4)]


def test_a_pyramid_has_one_number_of_channels_and_strides_that_do_not_fall() -> None:
    with pytest.raises(ValueError, match="channels must be one number for all of .*, got"):
        Pyramid({"a": 4, "b": 8}, {"a": 8, "b": 16})
    with pytest.raises(ValueError, match="strides must not fall, got"):
        Pyramid({"a": 4, "b": 4}, {"a": 16, "b": 8})


def test_a_card_of_another_part_is_no_backbone() -> None:
    with pytest.raises(ValueError, match=r"backbone must be a card of body, got 'fad-paper' \(fad\), one of towers"):
        ModelConfig(backbone=CARD)
    card = load_card("detnasnet")
    assert searched_fields(card)["backbone"] == card.to_json()
    config = ModelConfig(backbone=card.to_json())
    assert config.card == card and ModelConfig.from_json(config.to_json()) == config


def hit_pieces(*parts: str, **settings: Any) -> dict[str, Any]:
    whole = load_card("hit-detector")
    return Card(
        "hit", "pieces", {part: whole.genotype[part] for part in parts}, {**whole.settings, **settings}
    ).to_json()


def test_a_card_of_several_parts_together() -> None:
    card = load_card("hit-detector")
    config = ModelConfig(detector="faster_rcnn", norm="bn", **searched_fields(card))
    assert config.card == card and ModelConfig.from_json(config.to_json()) == config
    with torch.device("meta"):
        model = build_model(config)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert counts == {"backbone": 13_881_848, "neck": 2_715_952, "rpn": 593_935, "boxes": 9_932_181}


def test_some_parts_of_a_card_beside_plain_ones() -> None:
    small = SMALL | {"backbone": "resnet18", "fpn_channels": 256, "detector": "faster_rcnn"}
    with torch.device("meta"):
        head: Any = build_model(ModelConfig(**small, detector_card=hit_pieces("head")))
        body: Any = build_model(ModelConfig(**small | {"width": 1.0}, detector_card=hit_pieces("backbone")))
    assert head.boxes.head.trunk.out_channels == 512 and type(head.neck).__name__ == "FPN"
    assert body.backbone.channels == {"c2": 48, "c3": 96, "c4": 256}
    assert type(body.boxes.head.trunk).__name__ == "BoxTrunk"


HIT_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "another kind": ({"detector": "fcos"}, "detector_card must be of backbone, neck, towers for fcos, got head"),
    "two backbones": (
        {"backbone": load_card("detnasnet").to_json()},
        "backbone must have one card, got 'pieces' as detector_card besides another",
    ),
    "another width": (
        {"detector_card": hit_pieces("head"), "fpn_channels": 64},
        "fpn_channels must be the 256 of 'pieces', got 64",
    ),
}


@pytest.mark.parametrize(("changes", "message"), HIT_FAULTS.values(), ids=HIT_FAULTS)
def test_parts_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    whole = {"detector": "faster_rcnn", "detector_card": hit_pieces("backbone", "neck", "head")}
    with pytest.raises(ValueError, match=message):
        ModelConfig(**whole | changes)
