"""What one method found is searched on by another: dilations in a DetNAS backbone, FAD's towers on an MSNAS encoder,
Hit-Detector's neck and head on a DetNAS backbone, and screening over operations that the paper has not."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nasdet.arch import Card, load_card
from nasdet.cli import main
from nasdet.data import DataFolder
from nasdet.engine.screen_hit import screen_hit
from nasdet.engine.search import search_fad
from nasdet.engine.search_hit import search_hit
from nasdet.engine.search_nats import search_nats
from nasdet.nn import GroupedDilationConv2d
from nasdet.spaces import space_class
from nasdet.spaces.assemble import ModelConfig, build_model
from nasdet.spaces.detnas import DetNASSpace
from nasdet.spaces.msnas import MSNASSpace
from nasdet.spaces.nats import NATSSpace, depthwise_convs

Records = Callable[[Path, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def detnas() -> dict[str, Any]:
    return DetNASSpace("tiny").random(random.Random(4), "a-detnas-net").to_json()


@pytest.fixture(scope="module")
def msnas() -> dict[str, Any]:
    space = MSNASSpace(blocks=5, channels=16)
    return space.random(random.Random(4), "an-msnas-encoder").to_json()


@pytest.fixture(scope="module")
def nats_on_detnas(
    detnas: dict[str, Any], cases: dict[str, Any], data: DataFolder, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("nats") / "on detnas"
    config = dataclasses.replace(cases["nats"].config, backbone=detnas, width=1.0)
    search_nats(config, data, out, progress=False)
    return out


def test_dilations_in_a_detnas_backbone(nats_on_detnas: Path, detnas: dict[str, Any], records: Records) -> None:
    """Every depthwise convolution of stages 3 to 5 is searched; the result costs what the net costs."""
    card = load_card(nats_on_detnas / "card.json")
    backbone = DetNASSpace.backbone(Card.from_json(detnas))
    assert set(card.genotype) == set(depthwise_convs(backbone)) and card.name == "nats-A-a-detnas-net-seed3"
    before, after = (line["alphas"] for line in records(nats_on_detnas, "alphas.jsonl")[1::5])
    assert all(torch.tensor(before[name]).ne(torch.tensor(after[name])).all() for name in card.genotype)
    derived = ModelConfig.load(nats_on_detnas / "model.json")
    assert derived.backbone == detnas and derived.backbone_card == card.to_json()
    model, plain = build_model(derived), build_model(dataclasses.replace(derived, backbone_card=None))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    grouped = [module for module in model.modules() if isinstance(module, GroupedDilationConv2d)]
    assert len(grouped) == len(card.genotype)
    fields = json.loads((nats_on_detnas / "erf.json").read_text())
    assert "a-detnas-net" in json.dumps(fields)


def test_that_net_is_built_trained_and_reported(
    nats_on_detnas: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its card alone, and by the command line, which finds the backbone beside it."""
    card = load_card(nats_on_detnas / "card.json")
    alone = NATSSpace.build(card)
    x = torch.randn(1, 3, 64, 64)
    assert [tuple(map_.shape[-2:]) for map_ in alone(x).values()] == [(16, 16), (8, 8), (4, 4), (2, 2)]
    main(["report", str(nats_on_detnas)])
    assert "a-detnas-net" in (nats_on_detnas / "report.html").read_text()
    out = tmp_path / "net"
    options = [
        "--steps",
        "1",
        "--batch",
        "2",
        "--size",
        "64x64",
        "--levels",
        "3",
        "--fpn-channels",
        "12",
        "--workers",
        "0",
    ]
    assert (
        main(["train", "--card", str(nats_on_detnas / "card.json"), "--data", str(folder), "--out", str(out), *options])
        == 0
    )
    assert "a-detnas-net" in capsys.readouterr().out
    assert ModelConfig.load(out / "model.json").backbone_card == card.to_json()
    main(["arch", "info", str(nats_on_detnas / "card.json"), "--size", "64x64"])
    assert "a-detnas-net in faster_rcnn" in capsys.readouterr().out


def test_towers_on_an_msnas_encoder(
    msnas: dict[str, Any], cases: dict[str, Any], data: DataFolder, tmp_path: Path
) -> None:
    config = dataclasses.replace(cases["fad"].config, backbone=msnas, width=1.0)
    card = search_fad(config, data, tmp_path, progress=False)
    derived = ModelConfig.load(tmp_path / "model.json")
    assert derived.backbone == msnas and derived.towers == card.to_json() and derived.fpn_channels == 16
    model: Any = build_model(derived)
    heads = Card.from_json(msnas).genotype["heads"]
    outputs = model.eval()(torch.randn(1, 3, 64, 64))
    assert [map_.shape[-1] for map_ in next(iter(outputs.values()))] == [64 // stride for stride in heads]
    run = json.loads((tmp_path / "run.json").read_text())
    assert "backbone: an-msnas-encoder; the paper: resnet50" in run["deviations"]


def test_neck_and_head_on_a_detnas_backbone(
    detnas: dict[str, Any], cases: dict[str, Any], data: DataFolder, tmp_path: Path
) -> None:
    config = dataclasses.replace(cases["hit"].config, parts=["neck", "head"], backbone=detnas, width=1.0, steps=2)
    card = search_hit(config, data, tmp_path, progress=False)
    assert list(card.genotype) == ["neck", "head"]
    derived = ModelConfig.load(tmp_path / "model.json")
    assert derived.backbone == detnas and derived.detector_card == card.to_json()
    build_model(derived)


def test_screening_over_any_operations(cases: dict[str, Any], data: DataFolder, tmp_path: Path) -> None:
    """A 9x9 and an expansion of 2 are not among the paper's 32."""
    names = ["ir_k9_d1_e2", "sep_k7_d4", "conv_k1_d1"]
    config = dataclasses.replace(
        cases["hit"].config, stage="screen", parts=["neck"], candidates=names, keep=1, removal_epoch=4, width=0.125
    )
    kept = screen_hit(dataclasses.replace(config, backbone="resnet18"), data, tmp_path, progress=False)
    assert len(kept["neck"]) == 1 and kept["neck"][0] in names
    card = load_card(tmp_path / "screen-neck" / "card.json")
    assert set(card.genotype["neck"]) == set(kept["neck"])
    build_model(ModelConfig.load(tmp_path / "screen-neck" / "model.json"))


@pytest.mark.parametrize(
    "name", ["ir_k4_d1_e1", "ir_k3_d1", "sep_k3_d0", "conv_k3_d1_e2", "ir_k03_d1_e1", "pool_k3_d1"]
)
def test_no_operations(name: str) -> None:
    with pytest.raises(ValueError, match=f"operation must be ir_kK_dD_eE, .*, got '{name}'"):
        space_class("hit")(candidates=[name])


def test_a_published_backbone_by_name_on_the_command_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["arch", "info", "--detector", "retinanet", "--backbone", "detnasnet", "--size", "64x64"])
    assert "detnasnet in retinanet" in capsys.readouterr().out
    words = ["search", "nats", "--data", str(folder), "--out", str(tmp_path / "run"), "--backbone", "detnasnet"]
    assert main([*words, "--dilations", "A"]) == 2
    assert "channel_groups must divide the 120 output channels" in capsys.readouterr().err
    assert main([*words[:-1], "no-such-net"]) == 2
    assert "backbone must be one of resnet18" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
