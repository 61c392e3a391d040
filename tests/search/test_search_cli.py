"""The verbs ``search`` and ``arch``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nasdet.arch import load_card
from nasdet.cli import arch, search, search_fad, search_hit, search_options
from nasdet.data import write_digits

Call = Callable[..., int]


def test_list(capsys: pytest.CaptureFixture[str], call: Call) -> None:
    assert call(arch, "list") == 0
    assert "fad-paper" in capsys.readouterr().out
    assert call(arch, "list", "--json") == 0
    assert {card["name"] for card in json.loads(capsys.readouterr().out)} >= {"fad-paper", "fad-alternative"}


def test_info_gives_the_published_counts(capsys: pytest.CaptureFixture[str], call: Call) -> None:
    assert call(arch, "info", "fad-paper", "--size", "800x1280", "--json") == 0
    info: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert (info["subnet"]["parameters"], info["macs_per_location"], info["locations"]) == (
        4_169_498,
        4_143_360,
        21_330,
    )
    assert info["total"]["parameters"] == sum(part["parameters"] for part in info["parts"])
    assert {part["name"] for part in info["parts"]} >= {"backbone", "neck", "towers", "head"}


def test_info_in_words(capsys: pytest.CaptureFixture[str], call: Call) -> None:
    assert call(arch, "info", "fad-alternative", "--size", "64x96", "--backbone", "resnet18", "--classes", "10") == 0
    out = capsys.readouterr().out
    assert "box node 4 = std2+dil2(3) + std1+dil2(2)" in out and "at 64x96, 10 classes, resnet18 in fcos" in out


@pytest.mark.parametrize("size", ["800", "800x", "0x32", "axb", "1x2x3"])
def test_bad_info_size(size: str, call: Call) -> None:
    with pytest.raises(ValueError, match="size must be HEIGHTxWIDTH in pixels"):
        call(arch, "info", "fad-paper", "--size", size)


def test_search_sizes() -> None:
    assert search_options.parse_size("416x693") == (416, 693)
    assert search_options.parse_size("96") == (96, 160)
    for text in ("", "x", "0", "100x50", "1.5"):
        with pytest.raises(ValueError, match="size must"):
            search_options.parse_size(text)


@pytest.mark.parametrize(
    ("words", "norm"),
    [
        ([], "gn"),
        (["--weights", "mix.pt"], None),
        (["--screen-weights", "half.pt"], None),
        (["--weights", "mix.pt", "--norm", "gn"], "gn"),
    ],
    ids=["random", "joint", "screening", "given"],
)
def test_a_presets_norm_is_for_random_weights(
    words: list[str], norm: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(search_hit, "run", lambda settings, *_, **__: seen.update(settings) or [])
    monkeypatch.setattr(search, "open_divided", lambda *_, **__: SimpleNamespace(skipped={}))
    call(search, "hit", "--data", str(tmp_path), "--out", str(tmp_path / "run"), "--preset", "tiny", *words)
    assert seen.get("norm") == norm


def test_search_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str], call: Call) -> None:
    pytest.importorskip("sklearn", reason="the digits data set is made from scikit-learn's")
    data = write_digits(tmp_path / "digits", train=6, val=2, size=(64, 64))
    words = [
        "fad",
        "--data",
        str(data),
        "--out",
        str(tmp_path / "run"),
        "--preset",
        "tiny",
        "--steps",
        "2",
        "--batch",
        "1",
    ]
    words += ["--size", "64x64", "--width", "0.125", "--fpn-channels", "12", "--inner-channels", "6", "--workers", "0"]
    words += ["--space", "sep", "--levels", "2", "--no-repshare"]
    assert call(search, *words) == 0
    out = capsys.readouterr().out
    card = load_card(tmp_path / "run" / "card.json")
    assert str(tmp_path / "run" / "card.json") in out and f"({card.genotype['box'][0][0][1]})" in out
    assert json.loads((tmp_path / "run" / "run.json").read_text())["arguments"]["repshare"] is False
    with pytest.raises(ValueError, match="already holds a run"):
        call(search, *words)
    assert call(search, *words, "--resume") == 0
    assert load_card(tmp_path / "run" / "card.json") == card
    words[words.index("--out") + 1] = str(tmp_path / "unmirrored")
    assert call(search, *words, "--no-flip") == 0
    assert "--preset tiny --size 64x64\n" in out
    assert "--preset tiny --size 64x64 --no-flip\n" in capsys.readouterr().out


def test_every_option_of_the_configuration_is_reachable() -> None:
    from nasdet.engine.search import FADSearchConfig

    for preset in search_fad.PRESETS.values():
        FADSearchConfig(**preset)
    parser = argparse.ArgumentParser()
    search.configure(parser)
    given = vars(parser.parse_args(["fad", "--data", "d", "--out", "o"]))
    taken = {"method", "data", "out", "resume", "preset", "size", "no_repshare", "no_decouple", "weights", "device"}
    left = set(given) - taken - {"backend", "skip_bad"}
    assert left <= set(FADSearchConfig.__dataclass_fields__), "every option left over is a field"


TINY = "--preset tiny --steps 2 --batch 1 --size 64x64 --width 0.125 --fpn-channels 12 --workers 0 --no-flip"


@pytest.mark.parametrize(
    ("words", "detector", "found"),
    [
        ("fad --detector mask_rcnn --part mask_trunk --space sep --inner-channels 6", "mask_rcnn", "mask node 4 = "),
        ("fad --detector retinanet --space sep --inner-channels 6", "retinanet", "cls node 4 = "),
        ("nats --detector faster_rcnn --channel-groups 2", "faster_rcnn", "layer4.2.conv2: "),
    ],
    ids=["a mask head", "RetinaNet's towers", "a backbone in two stages"],
)
def test_detectors_are_chosen(
    words: str, detector: str, found: str, folder: Path, tmp_path: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    method, *rest = words.split()
    assert call(search, method, "--data", folder, "--out", tmp_path, *rest, *TINY.split()) == 0
    assert found in capsys.readouterr().out
    assert json.loads((tmp_path / "run.json").read_text())["arguments"]["detector"] == detector
    assert json.loads((tmp_path / "model.json").read_text())["detector"] == detector


def test_info_of_the_published_net_in_retinanet(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(arch, "info", "fad-paper", "--detector", "retinanet", "--json") == 0
    info: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert info["total"]["parameters"] == 33_039_732
    parts = {part["name"]: part["parameters"] for part in info["parts"]}
    assert info["subnet"]["parameters"] == parts["towers"] + parts["cls_logits"] + parts["box_pred"]
    with pytest.raises(ValueError, match="towers must be plain for mask_rcnn, which has no towers, got 'fad-paper'"):
        call(arch, "info", "fad-paper", "--detector", "mask_rcnn")
