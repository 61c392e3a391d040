"""DetNAS's steps as typed: a supernet that classifies, the search with its weights, what was found pretrained, and
retrained as a detector."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nasdet.arch import load_card, save_card
from nasdet.cli import main
from nasdet.data import ClassificationFolder, write_digits
from nasdet.engine.checkpoint import load_weights
from nasdet.spaces.assemble import ModelConfig

FEW = ["--preset", "tiny", "--no-flip", "--steps", "2", "--batch", "2", "--workers", "0", "--device", "cpu"]
SMALL = [*FEW, "--size", "64x64", "--fpn-channels", "12", "--levels", "3", "--tower-convs", "1"]
SEARCH = [*SMALL, "--population", "2", "--parents", "1", "--generations", "1", "--val-images", "2"]
SEARCH += ["--recalibration-images", "2"]


def typed(*words: Any) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    pytest.importorskip("pycocotools")
    return write_digits(tmp_path_factory.mktemp("chain") / "digits", train=8, val=2, size=(64, 64))


@pytest.fixture(scope="module")
def paths(digit_classes: ClassificationFolder, digits: Path) -> Path:
    """The supernet, pretrained with the other shuffle than by default."""
    out = digits.parent / "paths"
    shuffled = ["--space", "detnas-tiny", "--shuffle", "halves"]
    assert typed("pretrain", *shuffled, "--data", digit_classes.path, "--out", out, *FEW) == 0
    return out


@pytest.fixture(scope="module")
def searched(paths: Path, digits: Path) -> Path:
    out, weights = digits.parent / "search", paths / "weights.pt"
    options = ["--weights", weights, "--shuffle", "halves"]
    assert typed("search", "detnas", "--data", digits, "--out", out, *SEARCH, *options) == 0
    return out


@pytest.fixture(scope="module")
def found(searched: Path, digit_classes: ClassificationFolder) -> Path:
    out = searched.parent / "found"
    assert typed("pretrain", "--card", searched / "card.json", "--data", digit_classes.path, "--out", out, *FEW) == 0
    return out


def test_a_supernet_is_as_wide_as_its_space_and_says_what_takes_it(
    paths: Path, digit_classes: ClassificationFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    told = json.loads((paths / "classifier.json").read_text())
    assert (told["space"], told["width"], told["shuffle"]) == ("detnas-tiny", 1.0, "halves")
    again = ["--space", "detnas-tiny", "--shuffle", "halves", "--data", digit_classes.path, "--out", paths, *FEW]
    assert typed("pretrain", *again, "--resume") == 0
    said = capsys.readouterr().out
    assert f"next: nasdet search detnas --space tiny --shuffle halves --weights {paths / 'weights.pt'} " in said


def test_a_search_with_another_shuffle_is_refused(
    paths: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = paths / "weights.pt"
    assert typed("search", "detnas", "--data", digits, "--out", tmp_path / "run", *SEARCH, "--weights", weights) == 2
    error = capsys.readouterr().err
    assert f"{weights}: shuffle of DetNASSupernet must be 'halves'" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_what_was_found_is_retrained_from_its_own_weights(
    searched: Path, found: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    card, weights = searched / "card.json", found / "weights.pt"
    train = ["train", "--data", digits, "--weights", weights, *SMALL, "--lr", "0"]
    assert typed(*train, "--card", card, "--out", tmp_path / "net") == 0
    model = ModelConfig.load(tmp_path / "net" / "model.json")
    assert (model.detector, model.norm, model.frozen_stages, model.width) == ("fcos", "sync_bn", 0, 1.0)
    learnt = load_weights(next((tmp_path / "net").glob("weights.*")))
    given = {name: value for name, value in load_weights(weights).items() if name.endswith(("weight", "bias"))}
    assert given and all(torch.equal(learnt[f"backbone.{name}"], value) for name, value in given.items())

    other = load_card(card)
    save_card(replace(other, settings={**other.settings, "shuffle": "even_odd"}), tmp_path / "other.json")
    capsys.readouterr()
    assert typed(*train, "--card", tmp_path / "other.json", "--detector", "fcos", "--out", tmp_path / "no") == 2
    assert f"{weights}: shuffle of ShuffleNetV2 must be 'halves'" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
