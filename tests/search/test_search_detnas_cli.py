"""``nasdet search detnas``, and its card in ``train`` and ``arch info``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nasdet.arch import load_card
from nasdet.cli import arch, report, search, search_detnas, train
from nasdet.engine.search_detnas import DetNASSearchConfig
from nasdet.spaces.assemble import ModelConfig

Call = Callable[..., int]
SMALL = ["--preset", "tiny", "--steps", "2", "--batch", "2", "--size", "64x64", "--workers", "0", "--no-flip"]
SMALL += ["--fpn-channels", "12", "--levels", "3", "--tower-convs", "1"]
FEW = ["--population", "2", "--parents", "1", "--generations", "1", "--recalibration-images", "2", "--val-images", "2"]


def test_search_resume_retrain_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], call: Call
) -> None:
    run = tmp_path / "run"
    words = ["detnas", "--data", folder, "--out", run, *SMALL, *FEW]
    assert call(search, *words) == 0
    card = load_card(run / "card.json")
    out = capsys.readouterr().out
    assert str(run / "card.json") in out and "AP 0.0" in out and "nasdet train --card" in out
    assert f"stage 1 (16 channels): {card.genotype[0]}\n" in out
    with pytest.raises(ValueError, match="already holds a run"):
        call(search, *words)
    assert call(search, *words, "--resume") == 0 and load_card(run / "card.json") == card

    luck = [*words[:3], "--out", tmp_path / "luck", *SMALL, *FEW, "--algorithm", "random", "--supernet", run]
    assert call(search, *luck, "--seed", "1") == 0
    assert load_card(tmp_path / "luck" / "card.json").source["algorithm"] == "random"

    assert call(train, "--card", run / "card.json", "--data", folder, "--out", tmp_path / "net", *SMALL) == 0
    model = ModelConfig.load(tmp_path / "net" / "model.json")
    assert model.card == card and model.backbone == card.to_json()
    assert load_card(tmp_path / "net" / "card.json") == card
    with pytest.raises(ValueError, match="backbone must be left out, as detnas-tiny-fcos-seed0 is one, got 'res"):
        call(train, "--card", run / "card.json", "--data", folder, "--out", tmp_path / "x", "--backbone", "resnet18")
    assert call(report, run) == 0 and (run / "report.html").stat().st_size > 10_000

    capsys.readouterr()
    assert call(arch, "info", run / "card.json", "--size", "224x224", "--json") == 0
    info = json.loads(capsys.readouterr().out)
    space = DetNASSearchConfig(space="tiny").search_space()
    assert (info["method"], info["backbone"]) == ("detnas", card.name)
    assert info["subnet"]["macs"] == space.macs(card.genotype)


def test_every_option_of_the_configuration_is_reachable() -> None:
    for preset in search_detnas.PRESETS.values():
        DetNASSearchConfig(**preset)
    parser = argparse.ArgumentParser()
    search.configure(parser)
    given = set(vars(parser.parse_args(["detnas", "--data", "d", "--out", "o"])))
    taken = {"method", "data", "out", "resume", "preset", "size", "weights", "device", "skip_bad"}
    fields = set(DetNASSearchConfig.__dataclass_fields__)
    assert given - taken <= fields, "every option left over is a field"
    ours = {"short_side", "long_side", "momentum", "weight_decay", "decay", "warmup_steps", "channels_last"}
    assert fields - given == ours, "these are the paper's throughout, or given as --size"


def test_limits_that_cannot_be_met(folder: Path, tmp_path: Path, call: Call) -> None:
    with pytest.raises(ValueError, match="macs must be at most 1000, reachable are 8963472 to 14732928"):
        call(search, "detnas", "--data", folder, "--out", tmp_path / "run", *SMALL, "--max-macs", "1000")
    assert not (tmp_path / "run").exists()


def test_help(capsys: pytest.CaptureFixture[str], call: Call) -> None:
    with pytest.raises(SystemExit) as stopped:
        call(search, "detnas", "--help")
    said = " ".join(capsys.readouterr().out.split())
    assert stopped.value.code == 0 and "40 : 40, 20 % random" in said and "torchrun --nproc-per-node 8" in said
