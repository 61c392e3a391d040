"""``nasdet search msnas``, and its card in ``train``, ``arch info`` and ``report``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nasdet.arch import load_card
from nasdet.cli import arch, report, search, search_msnas, train
from nasdet.engine.search_msnas import MSNASSearchConfig
from nasdet.spaces.assemble import ModelConfig

Call = Callable[..., int]
SMALL = ["--steps", "3", "--batch", "2", "--size", "64x64", "--workers", "0", "--no-flip"]
TINY = ["--preset", "tiny", *SMALL, "--blocks", "4", "--channels", "16", "--rpn-channels", "8", "--tolerance", "0.9"]
TINY += ["--head-channels", "8", "--target-macs", "40e6", "--population", "2", "--parents", "1", "--generations", "1"]
TINY += ["--tuning-steps", "1", "--top", "1", "--detector", "faster_rcnn"]


def test_search_resume_retrain_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], call: Call
) -> None:
    run, net = tmp_path / "run", tmp_path / "net"
    words = ["msnas", "--data", str(folder), "--out", str(run), *TINY]
    assert call(search, *words) == 0
    out, card = capsys.readouterr().out, load_card(run / "card.json")
    assert str(run / "card.json") in out and "heads: 1/" in out and "2 candidates" in out
    assert (card.name, card.settings) == ("msnas-r18-faster_rcnn-seed0", {"channels": 16, "block": "basic"})
    with pytest.raises(ValueError, match="already holds a run"):
        call(search, *words)
    assert call(search, *words, "--resume") == 0 and load_card(run / "card.json") == card

    retrain = ["--card", str(run / "card.json"), "--data", str(folder), *SMALL]
    with pytest.raises(ValueError, match="backbone must be left out, as msnas-r18-faster_rcnn-seed0 is one, got 'res"):
        call(train, *retrain, "--out", str(net), "--backbone", "resnet18")
    assert call(train, *retrain, "--out", str(net)) == 0
    model = ModelConfig.load(net / "model.json")
    assert (model.card, model.detector, model.fpn_channels) == (card, "faster_rcnn", 16)
    assert model.options["box_head"] == "2conv1fc" and model.options["rpn"] == {"hidden": 8}
    other = ["--preset", "tiny", "--detector", "retinanet"]
    assert call(train, *retrain, "--out", str(tmp_path / "other"), *other) == 0
    model = ModelConfig.load(tmp_path / "other" / "model.json")
    assert (model.card, model.detector, model.width, model.fpn_channels) == (card, "retinanet", 1.0, 16)
    assert call(report, str(run)) == 0 and "The path of strides" in (run / "report.html").read_text()

    capsys.readouterr()
    info = ["info", str(run / "card.json"), "--detector", "faster_rcnn", "--size", "64x64", "--json"]
    assert call(arch, *info) == 0
    costs = json.loads(capsys.readouterr().out)
    assert (costs["method"], costs["backbone"]) == ("msnas", card.name)
    assert costs["subnet"]["parameters"] == costs["parts"][0]["parameters"] and costs["parts"][0]["name"] == "backbone"


def test_published_net_in_arch_info(capsys: pytest.CaptureFixture[str], call: Call) -> None:
    assert call(arch, "info", "msnas-r18-1", "--detector", "faster_rcnn", "--size", "832x1280", "--json") == 0
    parts = {part["name"]: part for part in json.loads(capsys.readouterr().out)["parts"]}
    assert (parts["backbone"]["macs"] + parts["rpn"]["macs"]) / 145.45e9 == pytest.approx(1, abs=0.01)


def test_presets_are_settings() -> None:
    assert MSNASSearchConfig(**search_msnas.PRESETS["paper"]) == MSNASSearchConfig()
    tiny = MSNASSearchConfig(**search_msnas.PRESETS["tiny"])
    assert tiny.search_space().size() == 16363


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variant", "r18", "--blocks", "1"], "blocks must be at least 2, got 1"),
        (["--target-macs", "1"], "macs must be within"),
        (["--supernet", "nowhere"], "supernet must be the folder of a run of search msnas, got nowhere: None"),
        (["--size", "64x32"], "size must have its short side first"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_bad_input(words: list[str], message: str, folder: Path, tmp_path: Path, call: Call) -> None:
    with pytest.raises(ValueError, match=message):
        call(search, "msnas", "--data", str(folder), "--out", str(tmp_path / "run"), *TINY, *words)


def test_help_names_every_preset_value() -> None:
    parser = argparse.ArgumentParser()
    search_msnas.configure(parser)
    options: dict[str, Any] = vars(parser.parse_args(["--data", "d", "--out", "o"]))
    fields = MSNASSearchConfig.__dataclass_fields__
    places = {"data", "out", "resume", "preset", "skip_bad", "device", "size"}
    assert set(options) - places <= set(fields) and all(options[name] is None for name in set(options) - places)
