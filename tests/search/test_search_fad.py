"""A FAD search on a real, small data folder: its run folder, its resumption, what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from nasdet.arch import load_card
from nasdet.data import DataFolder, DetectionDataset, Split, TestSplitError, open_data, write_digits
from nasdet.engine.checkpoint import load_checkpoint
from nasdet.engine.records import read_lines
from nasdet.engine.search import FADSearchConfig, deviations, search_fad
from nasdet.search.gradient import Bilevel
from nasdet.spaces.assemble import ModelConfig, build_model
from nasdet.spaces.fad import FADSpace

CONFIG = FADSearchConfig(
    steps=6,
    batch=2,
    short_side=64,
    long_side=64,
    lr=0.01,
    arch_lr=0.05,
    space="subset1",
    backbone="resnet18",
    width=0.125,
    fpn_channels=12,
    levels=2,
    inner_channels=6,
    workers=0,
    log_every=2,
    checkpoint_every=2,
    seed=3,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn", reason="the digits data set is made from scikit-learn's")
    return write_digits(tmp_path_factory.mktemp("data") / "digits", train=8, val=2, size=(64, 64))


@pytest.fixture(scope="module")
def data(folder: Path) -> DataFolder:
    return open_data(folder)


@pytest.fixture(scope="module")
def whole(data: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    search_fad(CONFIG, data, out, progress=False)
    return out


def records(out: Path, name: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(out / name)]


def test_run_folder(whole: Path, data: DataFolder) -> None:
    run = json.loads((whole / "run.json").read_text())
    assert (run["verb"], run["status"], run["seed"]) == ("search fad", "done", 3)
    assert run["choices"] == ["std1", "std2", "sep1", "sep2", "none"]
    assert any("pyramid levels: 2; the paper: 5" in line for line in run["deviations"])
    assert Split.load(whole / "split.json") == data.split
    assert [line["step"] for line in records(whole, "metrics.jsonl")] == [2, 4, 6]
    assert {"loss", "arch_loss", "loss_cls", "loss_box", "loss_centerness", "lr"} <= set(
        records(whole, "metrics.jsonl")[0]
    )
    alphas = records(whole, "alphas.jsonl")
    assert [line["step"] for line in alphas] == [0, 2, 4, 6]
    assert {group: (len(rows), len(rows[0])) for group, rows in alphas[-1]["alphas"].items()} == {
        "box": (9, 5),
        "cls": (9, 5),
    }
    moved = torch.tensor(alphas[-1]["alphas"]["box"]) - torch.tensor(alphas[0]["alphas"]["box"])
    assert float(moved.abs().max()) > 0.05


def test_card_is_the_decoded_alphas_and_builds(whole: Path) -> None:
    from nasdet.spaces.fad import SUBSETS, decode

    card = load_card(whole / "card.json")
    FADSpace("subset1").check(card)
    assert card.genotype == decode(records(whole, "alphas.jsonl")[-1]["alphas"], SUBSETS["subset1"])
    assert card.settings == {"channels": 12, "inner_channels": 6, "cells": 2, "space": "subset1"}
    config = ModelConfig.load(whole / "model.json")
    assert config.card == card and config.num_classes == 10
    parts = json.loads((whole / "cost.json").read_text())["parts"]
    assert sum(part["parameters"] for part in parts) == sum(p.numel() for p in build_model(config).parameters())


@pytest.mark.parametrize("at", [1, 3, 5], ids=lambda at: f"killed-in-step-{at}")
def test_resume_equals_never_stopped(
    at: int, whole: Path, data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Bilevel.step

    def killed(self: Bilevel, index: int, *losses: Any) -> Any:
        if index == at:
            raise RuntimeError("killed")
        return step(self, index, *losses)

    with monkeypatch.context() as patch:
        patch.setattr(Bilevel, "step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            search_fad(CONFIG, data, tmp_path, progress=False)
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["status"], run["error"]) == ("failed", "killed") and not (tmp_path / "card.json").exists()
    torch.manual_seed(99)
    search_fad(CONFIG, data, tmp_path, resume=True, progress=False)
    for name in ("metrics.jsonl", "alphas.jsonl"):
        assert records(tmp_path, name) == records(whole, name)
    for name in ("card.json", "model.json", "cost.json", "split.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    ours, theirs = (load_checkpoint(out / "checkpoints" / "last.pt")["state"] for out in (tmp_path, whole))
    assert ours["model"].keys() == theirs["model"].keys()
    assert all(torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())


def test_seed_decides(data: DataFolder, whole: Path, tmp_path: Path) -> None:
    search_fad(dataclasses.replace(CONFIG, steps=2, seed=4), data, tmp_path, progress=False)
    assert records(tmp_path, "alphas.jsonl")[0] != records(whole, "alphas.jsonl")[0]


def test_a_run_is_not_overwritten(data: DataFolder, whole: Path) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="already holds a run"):
        search_fad(CONFIG, data, whole, progress=False)
    with pytest.raises(ValueError, match="arch_lr: 0.05 -> 0.1"):
        search_fad(dataclasses.replace(CONFIG, arch_lr=0.1), data, whole, resume=True, progress=False)
    assert before == {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}


def test_a_run_keeps_its_split(folder: Path, whole: Path) -> None:
    with pytest.raises(ValueError, match="split.json: split must be the run's own"):
        search_fad(CONFIG, open_data(folder, seed=1), whole, resume=True, progress=False)


class Cheating(DataFolder):
    """A folder whose search parts are test images."""

    def search_val(self) -> DetectionDataset:
        return self.test()


class Mislabelled(DataFolder):
    """Test images that call themselves something else."""

    def search_train(self) -> DetectionDataset:
        part = self.test()
        part.role = "search-train"
        return part


@pytest.mark.parametrize("kind", [Cheating, Mislabelled])
def test_test_images_are_refused(kind: type[DataFolder], data: DataFolder, tmp_path: Path) -> None:
    fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(DataFolder)}
    with pytest.raises(TestSplitError, match="choosing an architecture on the test split is refused"):
        search_fad(CONFIG, kind(**fields), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_one_process(data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="search fad must run in one process, got 2"):
        search_fad(CONFIG, data, tmp_path, progress=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"arch_lr": float("nan")}, "arch_lr must be a positive number, got nan"),
        ({"space": "everything"}, "subset must be one of"),
        ({"score": "best"}, "score must be 'softmax' or 'alpha', got 'best'"),
        ({"name": "a/b"}, "name must be letters"),
    ],
)
def test_bad_settings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **changes)


def test_deviations_tell_everything_that_differs(data: DataFolder) -> None:
    paper = deviations(FADSearchConfig(), data, True)
    assert len(paper) == 6 and any("VOC 2012" in line for line in paper), "ours by design, and the data"
    ours = deviations(dataclasses.replace(CONFIG, repshare=False, decouple=False, amp=True), data, False)
    for words in (
        "steps: 6; the paper: 17500",
        "no representation sharing",
        "no decoupling",
        "bfloat16",
        "random backbone",
    ):
        assert any(words in line for line in ours), words
