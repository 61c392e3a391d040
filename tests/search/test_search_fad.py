"""A FAD search on a real, small data folder: what it records, what it finds, in towers and in mask heads."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nasdet.arch import load_card
from nasdet.cli import arch, report, train
from nasdet.data import DataFolder
from nasdet.engine.evaluate import load_run
from nasdet.engine.search import FADSearchConfig, deviations, search_fad
from nasdet.spaces.assemble import ModelConfig
from nasdet.spaces.fad import SUBSETS, FADStack, FADTower, decode

Records = Callable[[Path, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def whole(finished: Callable[[str], Path]) -> Path:
    return finished("fad")


@pytest.fixture(scope="module")
def masks(finished: Callable[[str], Path]) -> Path:
    """A finished search of the mask head of Mask Scoring R-CNN."""
    return finished("fad in a mask head")


def test_records(whole: Path, records: Records) -> None:
    run = json.loads((whole / "run.json").read_text())
    assert run["choices"] == ["std1", "std2", "sep1", "sep2", "none"]
    metrics, alphas = records(whole, "metrics.jsonl"), records(whole, "alphas.jsonl")
    assert [line["step"] for line in metrics] == [2, 4, 6]
    assert {"loss", "arch_loss", "loss_cls", "loss_box", "loss_centerness", "lr"} <= set(metrics[0])
    assert [line["step"] for line in alphas] == [0, 2, 4, 6]
    shapes = {group: (len(rows), len(rows[0])) for group, rows in alphas[-1]["alphas"].items()}
    assert shapes == {"box": (9, 5), "cls": (9, 5)}
    moved = torch.tensor(alphas[-1]["alphas"]["box"]) - torch.tensor(alphas[0]["alphas"]["box"])
    assert float(moved.abs().max()) > 0.05


@pytest.mark.parametrize("place", ["whole", "masks"])
def test_card_is_the_decoded_alphas(place: str, request: pytest.FixtureRequest, records: Records) -> None:
    out: Path = request.getfixturevalue(place)
    card = load_card(out / "card.json")
    assert card.genotype == decode(records(out, "alphas.jsonl")[-1]["alphas"], SUBSETS["subset1"])
    assert card.settings == {"channels": 12, "inner_channels": 6, "cells": 2, "space": "subset1"}


def test_a_mask_head_is_searched_by_its_own_loss(masks: Path, records: Records) -> None:
    run = json.loads((masks / "run.json").read_text())
    metrics, alphas = records(masks, "metrics.jsonl"), records(masks, "alphas.jsonl")
    assert {"arch_loss", "loss_rpn_cls", "loss_box", "loss_mask", "loss_mask_iou"} <= set(metrics[-1])
    assert all(math.isfinite(value) for line in metrics for value in line.values())
    first, last = (torch.tensor(alphas[at]["alphas"]["mask"]) for at in (0, -1))
    assert first.shape == (9, 5) and float((last - first).abs().max()) > 0.05
    text = " ".join(run["deviations"])
    assert "how the paper searches mask heads is not public" in text and "the paper: COCO" in text
    assert "detector: mask_scoring_rcnn; the paper: mask_rcnn" in text
    config = ModelConfig.load(masks / "model.json")
    assert config.towers == "plain" and config.mask_trunk is not None


SMALL = "--preset tiny --size 64x64 --width 0.125 --fpn-channels 12 --inner-channels 6 --steps 2 --batch 2 --workers 0"


@pytest.mark.parametrize(
    ("detector", "levels", "groups", "place"),
    [("retinanet", 1, {"box", "cls"}, "towers"), ("mask_rcnn", 4, {"mask"}, "masks.head.trunk")],
    ids=["retinanet", "mask_rcnn"],
)
def test_other_detectors_are_searched_and_retrained(
    detector: str,
    levels: int,
    groups: set[str],
    place: str,
    cases: dict[str, Any],
    data_with_masks: DataFolder,
    folder: Path,
    records: Records,
    call: Callable[..., int],
    tmp_path: Path,
) -> None:
    search, net = tmp_path / "search", tmp_path / "net"
    config = dataclasses.replace(cases["fad"].config, detector=detector, steps=2, levels=levels)
    card = search_fad(config, data_with_masks, search, progress=False)
    assert set(card.genotype) == groups == set(records(search, "alphas.jsonl")[-1]["alphas"])
    assert math.isfinite(records(search, "metrics.jsonl")[-1]["arch_loss"])
    small = SMALL.split()[2:]  # without a preset the model.json beside the card tells
    call(train, "--card", search / "card.json", "--data", folder, "--out", net, *small, "--no-flip")
    model, trained = load_run(net)
    assert (trained.detector, trained.levels, trained.card) == (detector, levels, load_card(search / "card.json"))
    assert isinstance(model.get_submodule(place), FADTower if place == "towers" else FADStack)
    assert all(math.isfinite(line["loss"]) for line in records(net, "metrics.jsonl") if "loss" in line)
    assert 0 <= json.loads((net / "eval.json").read_text())["AP"] <= 1


def test_seed_decides(run: Callable[..., Any], whole: Path, records: Records, tmp_path: Path) -> None:
    run("fad", tmp_path, change={"steps": 2, "seed": 4})
    assert records(tmp_path, "alphas.jsonl")[0] != records(whole, "alphas.jsonl")[0]


@pytest.mark.parametrize(
    ("words", "detector"),
    [((), "mask_scoring_rcnn"), (("--detector", "mask_rcnn"), "mask_rcnn"), (("--preset", "tiny"), "mask_rcnn")],
    ids=["the search's", "another", "a preset's"],
)
def test_a_searched_mask_head_is_retrained(
    words: tuple[str, ...], detector: str, masks: Path, folder: Path, call: Callable[..., int], tmp_path: Path
) -> None:
    small = SMALL.split()[2:]  # without a preset the model.json beside the card tells
    call(train, "--card", masks / "card.json", "--data", folder, "--out", tmp_path, *small, "--no-flip", *words)
    model, config = load_run(tmp_path)
    trunk: Any = model.get_submodule("masks.head.trunk")
    assert config.detector == detector and config.card == load_card(masks / "card.json")
    assert isinstance(trunk, FADStack) and len(trunk.group.cells) == 2
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert 0 <= figures["masks"]["AP"] <= 1


def test_pages_and_costs_of_a_mask_head(
    masks: Path, call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(report, masks) == 0
    page = (masks / "report.html").read_text()
    assert "<b>Group mask</b>" in page and "both inputs of its first cell are the pooled map of a box" in page
    assert "softmax of the alphas at step 6" in page
    capsys.readouterr()
    words = ("info", masks / "card.json", "--size", "64x96", "--backbone", "resnet18", "--classes", "10")
    assert call(arch, *words, "--json") == 0
    info = json.loads(capsys.readouterr().out)
    parts = {part["name"]: part for part in info["parts"]}
    assert (info["detector"], info["locations"]) == ("mask_rcnn", 19_600) and set(parts) >= {"rpn", "boxes", "masks"}
    assert info["subnet"] == parts["masks"] | {"name": "subnet"} and parts["masks"]["macs"] > 0
    assert call(arch, *words, "--detector", "mask_scoring_rcnn") == 0
    text = capsys.readouterr().out
    assert "mask node 4 = " in text and "10 classes, resnet18 in mask_scoring_rcnn" in text


def test_deviations_tell_everything_that_differs(data: DataFolder, cases: dict[str, Any]) -> None:
    paper = deviations(FADSearchConfig(), data, True)
    assert len(paper) == 6 and any("VOC 2012" in line for line in paper), "ours by design, and the data"
    ours = deviations(dataclasses.replace(cases["fad"].config, repshare=False, decouple=False, amp=True), data, False)
    for words in (
        "steps: 6; the paper: 17500",
        "no representation sharing",
        "no decoupling",
        "bfloat16",
        "random backbone",
    ):
        assert any(words in line for line in ours), words
