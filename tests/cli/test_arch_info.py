"""``nasdet arch info`` for cards, every detector and every backbone; the names that the help promises."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from nasdet.arch import load_card, save_card
from nasdet.cli import main, names
from nasdet.detectors import BACKBONES, DETECTORS, WITH_MASKS

SMALL = ["--size", "64x96", "--classes", "3"]


@pytest.fixture
def info(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """``info(*arguments)``: what ``nasdet arch info --json`` says."""

    def call(*arguments: str) -> dict[str, Any]:
        assert main(["arch", "info", *arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return call


def test_a_card_whose_width_is_no_number_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    card = load_card("fad-paper")
    path = save_card(replace(card, settings=card.settings | {"width": "0.25"}), tmp_path / "card.json")
    assert main(["arch", "info", str(path), *SMALL]) == 2
    assert "width must be a positive number, got '0.25'" in capsys.readouterr().err


def parts(found: dict[str, Any], what: str = "macs") -> dict[str, int]:
    return {part["name"]: part[what] for part in found["parts"]}


@pytest.mark.parametrize("name", DETECTORS)
def test_every_detector(info: Callable[..., dict[str, Any]], name: str) -> None:
    found = info("--detector", name, "--backbone", "resnet18", "--width", "0.25", *SMALL)
    assert (found["detector"], found["backbone"], found["card"]) == (name, "resnet18", None)
    assert found["total"]["macs"] == sum(parts(found).values()) and min(parts(found).values()) > 0
    assert list(parts(found))[:2] == ["backbone", "neck"]
    assert (found.get("proposals"), found.get("detections")) == (
        1000 if "rcnn" in name else None,
        100 if name in WITH_MASKS else None,
    )
    if "rcnn" in name:
        assert "subnet" not in found
    else:
        subnet = sum(macs for part, macs in parts(found).items() if part not in ("backbone", "neck"))
        assert found["subnet"]["macs"] == subnet == found["macs_per_location"] * found["locations"]


@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_alone_and_in_a_detector(info: Callable[..., dict[str, Any]], name: str) -> None:
    alone = info(name, "--width", "0.25", "--size", "64x96", "--norm", "frozen_bn")
    assert list(parts(alone)) == ["stem", "c2", "c3", "c4", "c5"] and alone["backbone"] == name
    inside = info("--detector", "fcos", "--backbone", name, "--width", "0.25", *SMALL)
    assert inside["parts"][0] == {"name": "backbone", **{k: alone["total"][k] for k in ("parameters", "macs")}}


def test_published_counts(info: Callable[..., dict[str, Any]]) -> None:
    assert info("resnet50", "--size", "224x224")["total"] == {
        "name": "total",
        "parameters": 25_557_032 - 2_049_000,
        "macs": 4_087_136_256,
    }
    assert info("--backbone", "shufflenet_v2_20", "--size", "224x224")["total"]["macs"] == 262_705_856
    assert info("--detector", "fcos")["total"]["macs"] == 204_486_740_480
    retinanet = info("--detector", "retinanet")
    assert retinanet["total"]["parameters"] == 33_786_804
    assert retinanet["macs_per_location"] == 8 * 256 * 256 * 9 + 9 * 84 * 256 * 9
    faster = info("--detector", "faster_rcnn", "--size", "800x1200", "--norm", "bn")
    assert faster["total"]["parameters"] == 41_757_156 and round(faster["total"]["macs"] / 1e9, 1) == 194.5


def test_boxes_count_in_their_stages(info: Callable[..., dict[str, Any]]) -> None:
    base = ["--detector", "mask_rcnn", "--backbone", "shufflenet_v2_x0_5", *SMALL]
    found, fewer = info(*base), info(*base, "--proposals", "100", "--detections", "10")
    assert (fewer["proposals"], fewer["detections"]) == (100, 10)
    for name, macs in parts(found).items():
        assert macs == parts(fewer)[name] * (10 if name in ("boxes", "masks") else 1), name


def test_norm_makes_the_parameters(info: Callable[..., dict[str, Any]]) -> None:
    frozen, learnt = (info("--detector", "fcos", *SMALL, "--norm", norm) for norm in ("frozen_bn", "bn"))
    assert parts(learnt, "parameters")["backbone"] - parts(frozen, "parameters")["backbone"] == 2 * 26_560


def test_a_card_in_another_detector(info: Callable[..., dict[str, Any]]) -> None:
    found = info("fad-paper", "--detector", "retinanet", "--backbone", "mobilenet_v2")
    assert (found["card"], found["method"], found["detector"]) == ("fad-paper", "fad", "retinanet")
    assert list(parts(found)) == ["backbone", "neck", "towers", "cls_logits", "box_pred"]
    assert found["subnet"]["parameters"] > info("--detector", "retinanet")["subnet"]["parameters"] / 2


def test_a_searched_backbone_is_in_the_detector_of_its_paper(info: Callable[..., dict[str, Any]]) -> None:
    found = info("detnas-coco-fpn-300m", *SMALL)
    assert (found["detector"], found["backbone"]) == ("faster_rcnn", "detnas-coco-fpn-300m")
    plain = info("--detector", "faster_rcnn", "--backbone", "shufflenet_v2_20", *SMALL)
    more = 4 * (256 * 256 * 9 + 2 * 256) - (1024 * 1024 + 1024)  # four convolutions with norms for a layer of 1024
    assert parts(found, "parameters")["boxes"] - parts(plain, "parameters")["boxes"] == more


def test_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["arch", "info", "--detector", "faster_rcnn", "--backbone", "shufflenet_v2_40", *SMALL]) == 0
    text = capsys.readouterr().out
    assert "at 64x96, 3 classes, shufflenet_v2_40 in faster_rcnn, 1,000 proposals" in text
    assert "rpn" in text and "subnet" not in text and "detections" not in text
    assert main(["arch", "info", "mobilenet_v2", "--size", "224x224"]) == 0
    text = capsys.readouterr().out
    assert "at 224x224, mobilenet_v2" in text and "279,423,872" in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "there must be something to count: a card, --detector or --backbone"),
        (["resnet51"], "fad-alternative, fad-paper, hit-detector, msnas-r18-1, "),
        (["none.json"], "name must be a card's JSON file or one of"),
        (["--backbone", "resnet51"], "backbone must be one of resnet18"),
        (["--detector", "fcos", "--backbone", "resnet51"], "backbone must be one of resnet18"),
        (["--detector", "yolo"], "detector must be one of fcos"),
        (["resnet50", "--backbone", "resnet18"], "backbone must be given once, got resnet50 and resnet18"),
        (["detnasnet", "--backbone", "resnet18"], "backbone must be left out, as detnasnet is one, got 'resnet18'"),
        (["--detector", "fcos", "--proposals", "10"], "proposals must be left out for fcos"),
        (["--detector", "faster_rcnn", "--detections", "10"], "detections must be left out for faster_rcnn"),
        (["--detector", "mask_rcnn", "--detections", "0"], "detections must be positive, got 0"),
        (["mobilenet_v2", "--norm", "ln"], "norm must be one of"),
        (["mobilenet_v2", "--size", "224"], "size must be HEIGHTxWIDTH in pixels, got '224'"),
    ],
    ids=" ".join,
)
def test_bad_arguments(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["arch", "info", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nasdet arch: ") and text in error and error.count("\n") == 1


def expanded(text: str) -> list[str]:
    """``"a{b,c}, d"`` as ``["ab", "ac", "d"]``."""
    found = []
    for word in text.replace(", ", " ").split():
        pieces = [piece.split(",") for piece in word.replace("}", "{").split("{")]
        found += ["".join(choice) for choice in product(*pieces)]
    return found


def test_help_names_what_there_is() -> None:
    assert expanded(names.DETECTORS) == list(DETECTORS)
    assert expanded(names.BACKBONES) == list(BACKBONES)


@pytest.mark.parametrize("verb", [["train"], ["search", "fad"], ["arch", "info"]], ids=" ".join)
def test_help_has_the_names(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*verb, "--help"])
    text = "".join(capsys.readouterr().out.split())
    assert names.BACKBONES.replace(" ", "") in text
