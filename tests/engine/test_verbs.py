from __future__ import annotations

import argparse
import json
import shlex
import shutil
from dataclasses import replace

import numpy
import pytest
import torch
from PIL import Image

from nasdet.arch import load_card
from nasdet.cli import detect, evaluate
from nasdet.cli import train as train_verb
from nasdet.data import DataError, Split, open_data, write_digits
from nasdet.detectors import BACKBONES
from nasdet.spaces.assemble import ModelConfig

pytest.importorskip("sklearn")
pytest.importorskip("pycocotools")

SMALL = "--preset tiny --width 0.125 --fpn-channels 8 --levels 3 --tower-convs 1 --size 64x96 --steps 2 --batch 2"


def parse(module, words):
    parser = argparse.ArgumentParser(prog="nasdet verb")
    module.configure(parser)
    return vars(parser.parse_args(words))


def verb(module, *words):
    return module.run(**parse(module, [str(word) for word in words]))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits") / "set", train=6, val=3, size=(64, 96))


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "plain"
    words = [*shlex.split(SMALL), "--workers", 0, "--device", "cpu"]
    assert verb(train_verb, "--data", digits, "--out", out, *words) == 0
    return out


@pytest.mark.parametrize(
    ("module", "name"), [(train_verb, "train"), (evaluate, "eval"), (detect, "detect")], ids=["train", "eval", "detect"]
)
def test_help_is_right(module, name):
    parser = argparse.ArgumentParser(prog=f"nasdet {name}")
    module.configure(parser)
    text = parser.format_help()
    assert module.HELP[0].islower() and "examples:" in text and max(map(len, text.splitlines())) <= 120
    shown = [line for line in text.splitlines() if f"nasdet {name} " in line and line.startswith("  ")]
    examples = [line.strip().split("   ")[0] for line in shown]
    assert len(examples) >= 3
    for line in examples:
        words = shlex.split(line.split(" > ")[0])
        parser.parse_args(words[words.index(name) + 1 :])


def test_train_prints_what_it_does_and_where_it_lies(digits, run, capsys):
    words = [*shlex.split(SMALL), "--workers", 0, "--device", "cpu", "--resume"]
    assert verb(train_verb, "--data", digits, "--out", run, *words) == 0
    text = capsys.readouterr().out
    assert "6 images to train on, 3 to test" in text and "plain towers" in text and "AP50" in text
    assert "2 steps of 2 images, learning rate 0.003" in text and str(run) in text


@pytest.mark.parametrize(
    ("detector", "backbone", "pretrained"),
    [("fcos", "shufflenet_v2_20", False), ("faster_rcnn", "mobilenet_v2", True)],
)
def test_train_and_eval_on_other_backbones(detector, backbone, pretrained, digits, tmp_path, capsys):
    words = [*shlex.split(SMALL), "--detector", detector, "--backbone", backbone, "--workers", 0, "--device", "cpu"]
    if pretrained:
        torch.save(BACKBONES[backbone](width=0.125, norm="bn").state_dict(), tmp_path / "net.pth")
        words += ["--weights", tmp_path / "net.pth"]
    assert verb(train_verb, "--data", digits, "--out", tmp_path / "run", *words) == 0
    assert f"{detector} {backbone} x0.125" in capsys.readouterr().out
    config = ModelConfig.load(tmp_path / "run" / "model.json")
    expected = ("frozen_bn", 2) if pretrained else ("gn", 0)
    assert (config.detector, config.backbone, config.norm, config.frozen_stages) == (detector, backbone, *expected)
    assert verb(evaluate, tmp_path / "run", "--workers", 0, "--device", "cpu", "--json") == 0


def test_preset_options_and_defaults(digits):
    folder = open_data(digits)
    paper = train_verb.model_config("plain", folder, {}, None, beside=True)
    assert (paper.backbone, paper.fpn_channels, paper.short_side, paper.long_side) == ("resnet50", 256, 800, 1333)
    assert (paper.norm, paper.frozen_stages, paper.num_classes) == ("gn", 0, 10)
    pretrained = train_verb.model_config("plain", folder, {}, digits / "x.pth", beside=True)
    assert (pretrained.norm, pretrained.frozen_stages) == ("frozen_bn", 2)
    chosen = train_verb.model_config("fad-paper", folder, {"norm": "bn", "inner_channels": 24}, None, beside=True)
    assert chosen.norm == "bn" and chosen.inner_channels == 24 and chosen.card == load_card("fad-paper")


def test_a_searched_card_brings_its_detector_and_its_split(digits, tmp_path):
    search = tmp_path / "search"
    search.mkdir()
    (search / "card.json").write_text(json.dumps(load_card("fad-paper").to_json()))
    ModelConfig(fpn_channels=32, backbone="resnet18", num_classes=80).save(search / "model.json")
    open_data(digits, seed=5).split.save(search / "split.json")
    card = str(search / "card.json")
    folder = train_verb.open_folder(digits, tmp_path, card, resume=False, skip_bad=False, split=None, seed=0)
    assert folder.split == Split.load(search / "split.json") and folder.split.seed == 5
    config = train_verb.model_config(card, folder, {}, None, beside=True)
    assert (config.fpn_channels, config.backbone, config.num_classes) == (32, "resnet18", 10)
    assert train_verb.model_config(card, folder, {}, None, beside=False).fpn_channels == 256
    other = write_digits(tmp_path / "other", train=6, val=3, size=(64, 96), seed=1)
    options = {"resume": False, "skip_bad": False, "seed": 0}
    assert train_verb.open_folder(other, tmp_path, card, split=None, **options).split.seed == 0
    with pytest.raises(DataError, match="annotations changed"):
        train_verb.open_folder(other, tmp_path, card, split=search / "split.json", **options)


def test_train_skips_bad_images_and_says_so(tmp_path, capsys):
    data = write_digits(tmp_path / "set", train=6, val=3, size=(64, 96))
    path = sorted((data / "train").glob("*"))[0]
    path.write_bytes(path.read_bytes()[:200])
    words = [*shlex.split(SMALL), "--workers", 0, "--device", "cpu", "--data", data, "--out", tmp_path / "run"]
    assert verb(train_verb, *words, "--skip-bad") == 0
    assert "5 images to train on, 3 to test, skipped 1 x truncated" in capsys.readouterr().out
    assert sum(json.loads((tmp_path / "run" / "run.json").read_text())["skipped"].values()) == 1


def test_eval_repeats_the_figures_of_training(run, capsys):
    before = json.loads((run / "eval.json").read_text())
    assert verb(evaluate, run, "--workers", 0, "--device", "cpu", "--json") == 0
    after = json.loads(capsys.readouterr().out)
    assert {key: value for key, value in before.items() if key != "step"} == after
    assert verb(evaluate, run, "--workers", 0, "--device", "cpu", "--split", "search-val") == 0
    assert capsys.readouterr().out.startswith("search-val: 3 images")
    assert (run / "eval-search-val.json").is_file() and (run / "detections-search-val.json").is_file()


def test_eval_on_other_data(run, tmp_path, capsys):
    other = write_digits(tmp_path / "other", train=3, val=2, size=(64, 96), seed=1)
    before = (run / "eval.json").read_bytes()
    assert verb(evaluate, run, "--data", other, "--workers", 0, "--device", "cpu") == 0
    assert "test: 2 images" in capsys.readouterr().out and (run / "eval.json").read_bytes() == before
    annotations = next((other / "annotations").glob("*train*"))
    val = next((other / "annotations").glob("*val*"))
    for file in (annotations, val):
        file.write_text(file.read_text().replace('"name":"3"', '"name":"x"').replace('"name": "3"', '"name": "x"'))
    with pytest.raises(ValueError, match="its categories must be those of"):
        verb(evaluate, run, "--data", other, "--device", "cpu")


def picture(path, size=(90, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = numpy.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=numpy.uint8)
    Image.fromarray(noise).save(path)
    return path


def test_detect_draws_and_writes(run, tmp_path, capsys):
    config = ModelConfig.load(run / "model.json")
    eager = tmp_path / "eager"
    replace(config, options={"score_threshold": 0.0}).save(eager / "model.json")
    shutil.copy(next(run.glob("weights.*")), eager)
    first, second = picture(tmp_path / "a" / "x.png"), picture(tmp_path / "b" / "x.jpg", (600, 200))
    out = tmp_path / "found"
    before = first.read_bytes()
    assert verb(detect, eager, first, second.parent, "--out", out, "--threshold", 0, "--device", "cpu") == 0
    found = json.loads((out / "detections.json").read_text())
    assert [entry["file"] for entry in found["images"]] == [str(first), str(second)] and found["skipped"] == []
    assert [entry["drawing"] for entry in found["images"]] == ["x.detections.jpg", "x-2.detections.jpg"]
    assert (found["images"][1]["width"], found["images"][1]["height"]) == (600, 200)
    for entry in found["images"]:
        scores = [detection["score"] for detection in entry["detections"]]
        assert scores and scores == sorted(scores, reverse=True)
        for detection in entry["detections"]:
            x1, y1, x2, y2 = detection["box"]
            assert 0 <= x1 <= x2 <= entry["width"] + 0.01 and 0 <= y1 <= y2 <= entry["height"] + 0.01
    drawn = numpy.asarray(Image.open(out / "x-2.detections.jpg").convert("RGB")).astype(int)
    plain = numpy.asarray(Image.open(second).convert("RGB")).astype(int)
    assert drawn.shape == plain.shape and (abs(drawn - plain).max(axis=2) > 60).sum() > 100
    assert first.read_bytes() == before
    assert "-> " in capsys.readouterr().out
    assert verb(detect, run, first, "--out", out, "--threshold", 1, "--device", "cpu") == 0
    assert "nothing" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["missing", "truncated", "text"])
def test_detect_names_a_bad_picture_and_goes_on_when_told(run, tmp_path, capsys, kind):
    good, bad = picture(tmp_path / "good.png"), tmp_path / "bad.jpg"
    if kind == "truncated":
        picture(bad)
        bad.write_bytes(bad.read_bytes()[:500])
    elif kind == "text":
        bad.write_text("no picture")
    with pytest.raises(DataError, match=r"bad\.jpg"):
        verb(detect, run, bad, good, "--out", tmp_path / "out", "--device", "cpu")
    assert verb(detect, run, bad, good, "--out", tmp_path / "out", "--device", "cpu", "--skip-bad") == 0
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [entry["file"] for entry in found["images"]] == [str(good)]
    assert found["skipped"][0]["file"] == str(bad) and "bad.jpg" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no picture could be read, 1 skipped"):
        verb(detect, run, bad, "--out", tmp_path / "out", "--device", "cpu", "--skip-bad")


def test_detect_refuses_nonsense(run, tmp_path):
    image = picture(tmp_path / "x.png")
    with pytest.raises(ValueError, match="threshold must be in 0..1"):
        verb(detect, run, image, "--out", tmp_path / "out", "--threshold", 2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no picture in this folder"):
        verb(detect, run, tmp_path / "empty", "--out", tmp_path / "out", "--device", "cpu")
    with pytest.raises(FileNotFoundError, match="not the folder of a training run"):
        verb(detect, tmp_path, image, "--out", tmp_path / "out")
