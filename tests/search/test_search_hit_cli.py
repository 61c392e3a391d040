"""``nasdet search hit``: its stages, its options, its card in ``train``, and its report."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nasdet.arch import load_card
from nasdet.cli import arch, report, search, search_hit, train
from nasdet.data import write_digits
from nasdet.engine.hit_config import HitSearchConfig
from nasdet.spaces.assemble import ModelConfig

Call = Callable[..., int]
SMALL = ["--preset", "tiny", "--steps", "2", "--batch", "1", "--size", "64x64", "--width", "0.125", "--workers", "0"]
SMALL += ["--fpn-channels", "12", "--no-flip", "--log-every", "1"]
OPERATIONS = ["ir_k3_d1_e1", "sep_k3_d2", "conv_k3_d1"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn", reason="the digits data set is made from scikit-learn's")
    return write_digits(tmp_path_factory.mktemp("data") / "digits", train=6, val=2, size=(64, 64))


def test_screen_search_retrain_report(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], call: Call
) -> None:
    screen, run = tmp_path / "screen", tmp_path / "run"
    words = ["hit", "--data", str(digits), *SMALL]
    screened = [*words, "--stage", "screen", "--keep", "2", "--candidates", *OPERATIONS, "--out", str(screen)]
    assert call(search, *screened) == 0
    out = capsys.readouterr().out
    kept = json.loads((screen / "screening.json").read_text())["kept"]
    assert f"  neck: {' '.join(kept['neck'])}" in out and f"--candidates {screen}" in out and "nasdet train" not in out
    with pytest.raises(ValueError, match="already holds a run"):
        call(search, *screened)
    assert call(search, *screened, "--resume") == 0

    assert call(search, *words, "--candidates", str(screen), "--out", str(run)) == 0
    out, card = capsys.readouterr().out, load_card(run / "card.json")
    assert str(run / "card.json") in out and "head: " in out and "nasdet train --card" in out
    assert card.name == "hit-tiny-faster_rcnn-seed0"
    assert all(set(names) <= set(kept[part]) for part, names in card.genotype.items())

    net = ["--card", run / "card.json", "--data", digits, "--out", tmp_path / "net", "--size", "64x64", "--steps", "2"]
    assert call(train, *net, "--batch", "1", "--workers", "0", "--fpn-channels", "12", "--no-flip") == 0
    model = ModelConfig.load(tmp_path / "net" / "model.json")
    assert (model.detector, model.card) == ("faster_rcnn", card)

    assert call(report, str(run)) == 0 and call(report, str(screen)) == 0
    page = (run / "report.html").read_text()
    assert "The operation of every layer" in page and "Expected cost by part" in page and "backbone 3" in page
    page = (screen / "report.html").read_text()
    assert "Neck: scores of the operations" in page and "1 removed" in page and "What screening kept" in page

    capsys.readouterr()
    assert call(arch, "info", str(run / "card.json"), "--size", "64x96", "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert (info["method"], info["detector"]) == ("hit", "faster_rcnn")


def test_every_option_of_the_configuration_is_reachable() -> None:
    for preset in search_hit.PRESETS.values():
        HitSearchConfig(**preset)
    parser = argparse.ArgumentParser()
    search.configure(parser)
    given = set(vars(parser.parse_args(["hit", "--data", "d", "--out", "o"])))
    taken = {"method", "data", "out", "resume", "preset", "size", "weights", "device", "backend", "skip_bad"}
    fields = set(HitSearchConfig.__dataclass_fields__)
    assert given - taken <= fields, "every option left over is a field"
    ours = {"short_side", "long_side", "momentum", "weight_decay", "warmup_steps", "arch_weight_decay", "channels_last"}
    assert fields - given == ours, "these are the paper's throughout, or given as --size"


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (None, None),
        (["full"], "full"),
        (["conv_k3_d1"], ["conv_k3_d1"]),
        (["conv_k3_d1", "sep_k3_d1"], ["conv_k3_d1", "sep_k3_d1"]),
    ],
    ids=["none", "a-name", "one-operation", "two-operations"],
)
def test_candidates(words: list[str] | None, found: object) -> None:
    assert search_hit.parse_candidates(words) == found


def test_candidates_that_are_no_operations(digits: Path, tmp_path: Path, call: Call) -> None:
    with pytest.raises(ValueError, match="candidates of backbone: operation must be .*, got 'runs/none' at 0"):
        call(search, "hit", "--data", digits, "--out", tmp_path / "run", *SMALL, "--candidates", "runs/none")
    assert not (tmp_path / "run").exists()
