"""``nasdet search nats``, and its card in ``train`` and ``arch info``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nasdet.arch import load_card
from nasdet.cli import arch, report, search, search_nats, train
from nasdet.data import write_digits
from nasdet.detectors import BACKBONES
from nasdet.engine.search_nats import NATSSearchConfig
from nasdet.spaces.assemble import ModelConfig

Call = Callable[..., int]
SMALL = ["--preset", "tiny", "--steps", "2", "--batch", "1", "--size", "64x64", "--width", "0.125", "--workers", "0"]
SMALL += ["--fpn-channels", "12", "--levels", "3", "--tower-convs", "1", "--no-flip"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn", reason="the digits data set is made from scikit-learn's")
    return write_digits(tmp_path_factory.mktemp("data") / "digits", train=6, val=2, size=(64, 64))


def test_search_resume_retrain_report(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], call: Call
) -> None:
    run = tmp_path / "run"
    weights = tmp_path / "resnet.pt"
    torch.save(BACKBONES["resnet50"](width=0.125, norm="bn").state_dict(), weights)
    words = ["nats", "--data", str(digits), "--out", str(run), "--channel-groups", "4", *SMALL]
    words += ["--weights", str(weights)]
    assert call(search, *words) == 0
    out = capsys.readouterr().out
    # Retraining begins with the same weights, on pictures of the same size.
    assert out.endswith(f" --preset tiny --size 64x64 --no-flip --weights {weights}\n")
    card = load_card(run / "card.json")
    assert str(run / "card.json") in out and "layer4.2.conv2: " in out and "nasdet train --card" in out
    assert card.name == "nats-C-resnet50-seed0" and card.settings["width"] == 0.125
    with pytest.raises(ValueError, match="already holds a run"):
        call(search, *words)
    assert call(search, *words, "--resume") == 0 and load_card(run / "card.json") == card

    assert (
        call(train, "--card", str(run / "card.json"), "--data", str(digits), "--out", str(tmp_path / "net"), *SMALL)
        == 0
    )
    model = ModelConfig.load(tmp_path / "net" / "model.json")
    assert (model.backbone, model.width, model.card, model.towers) == ("resnet50", 0.125, card, "plain")
    assert model.detector == "fcos", "the search's"
    assert load_card(tmp_path / "net" / "card.json") == card
    assert call(report, str(run)) == 0 and (run / "report.html").stat().st_size > 10_000

    capsys.readouterr()
    assert call(arch, "info", str(run / "card.json"), "--size", "64x96", "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["method"], info["backbone"], info["detector"]) == ("nats", "resnet50", "faster_rcnn")
    assert info["subnet"] == info["parts"][0] | {"name": "subnet"} and info["parts"][0]["name"] == "backbone"
    assert call(arch, "info", str(run / "card.json"), "--size", "64x96") == 0
    assert "layer2.0.conv2: " in capsys.readouterr().out


def test_every_option_of_the_configuration_is_reachable() -> None:
    for preset in search_nats.PRESETS.values():
        NATSSearchConfig(**preset)
    parser = argparse.ArgumentParser()
    search.configure(parser)
    given = set(vars(parser.parse_args(["nats", "--data", "d", "--out", "o"])))
    taken = {"method", "data", "out", "resume", "preset", "size", "weights", "device", "backend", "skip_bad"}
    fields = set(NATSSearchConfig.__dataclass_fields__)
    assert given - taken <= fields, "every option left over is a field"
    ours = {"short_side", "long_side", "momentum", "weight_decay", "warmup_steps", "arch_weight_decay", "channels_last"}
    assert fields - given == ours, "these are the paper's throughout, or given as --size"


def test_unknown_methods_are_refused(digits: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="method must be one of fad, nats, .*, classification, got 'none'"):
        search.run("none", digits, tmp_path / "x")
