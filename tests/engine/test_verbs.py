from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import numpy
import pytest
import torch
from PIL import Image

from nasdet.arch import load_card, save_card
from nasdet.cli import detect, evaluate
from nasdet.cli import train as train_verb
from nasdet.cli.splits import open_divided, placed
from nasdet.data import DataError, Split, open_data, write_digits
from nasdet.detectors import BACKBONES
from nasdet.engine import step as step_module
from nasdet.engine.checkpoint import LAST, load_checkpoint, load_weights, save_checkpoint
from nasdet.engine.train import TrainConfig
from nasdet.spaces.assemble import ModelConfig
from nasdet.spaces.msnas import MSNASSpace
from nasdet.spaces.nats import NATSSpace

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
    [
        ("fcos", "shufflenet_v2_20", False),
        ("faster_rcnn", "mobilenet_v2", True),
        ("retinanet", "resnet34", True),
        pytest.param("mask_rcnn", "shufflenet_v2_40_3_8g", False, marks=pytest.mark.slow),
        pytest.param("cascade_rcnn", "resnext101_64x4d", False, marks=pytest.mark.slow),
    ],
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
    options = {"skip_bad": False, "seed": 0}
    folder = open_divided(digits, placed(card), split=None, **options)
    assert folder.split == Split.load(search / "split.json") and folder.split.seed == 5
    config = train_verb.model_config(card, folder, {}, None, beside=True)
    assert (config.fpn_channels, config.backbone, config.num_classes) == (32, "resnet18", 10)
    assert train_verb.model_config(card, folder, {}, None, beside=False).fpn_channels == 256
    (search / "cards").mkdir()
    place = str(shutil.copy(card, search / "cards" / "2.json"))
    assert train_verb.model_config(place, folder, {}, None, beside=True) == config
    assert open_divided(digits, placed(place), split=None, **options).split == folder.split
    other = write_digits(tmp_path / "other", train=6, val=3, size=(64, 96), seed=1)
    assert open_divided(other, placed(card), split=None, **options).split.seed == 0
    with pytest.raises(DataError, match="annotations changed"):
        open_divided(other, placed(card), split=search / "split.json", **options)


def test_detnas_is_retrained_as_in_its_paper(digits):
    folder = open_data(digits)
    model = train_verb.model_config("detnasnet", folder, {}, digits / "x.pth", beside=True)
    assert (model.detector, model.norm, model.frozen_stages) == ("faster_rcnn", "sync_bn", 0)
    assert model.options == {"box_head": "4conv1fc", "head_norm": "sync_bn"}
    config = train_verb.train_config("detnasnet", folder, model.detector, {}, paper=True)
    assert (config.steps, config.batch) == (90_000, 16)
    rates = [config.schedule().at(step) for step in (0, 250, 500, 59_999, 60_000, 80_000)]
    assert rates == pytest.approx([0.02 / 3, 0.04 / 3, 0.02, 0.02, 0.002, 0.0002])
    fewer = train_verb.train_config("detnasnet", folder, "retinanet", {"batch": 8}, paper=True)
    assert fewer.schedule().lr == 0.005


def test_msnas_is_retrained_as_in_its_paper(digits):
    folder = open_data(digits)
    model = train_verb.model_config("msnas-r18-1", folder, {}, None, beside=True)
    assert (model.detector, model.norm, model.frozen_stages) == ("faster_rcnn", "sync_bn", 0)
    assert model.options == {"box_head": "2conv1fc", "head_norm": "sync_bn"}
    config = train_verb.train_config("msnas-r18-1", folder, model.detector, {"batch": 2}, paper=True)
    assert (config.steps, config.warmup_steps, config.schedule().lr) == (48 * 3, 3, 0.0025), "3 steps an epoch"
    config = train_verb.train_config("msnas-r18-1", folder, model.detector, {"steps": 4800}, paper=True)
    rates = [config.schedule().at(step) for step in (0, 50, 100, 4199, 4200, 4699, 4700)]
    assert config.batch == 32 and rates == pytest.approx([0.00125, 0.020625, 0.04, 0.04, 0.004, 0.004, 0.0004])
    given = {"lr": 0.1, "warmup_steps": 7, "milestones": (0.5,), "batch": 3}
    config = train_verb.train_config("msnas-r18-1", folder, model.detector, given, paper=True)
    assert {name: getattr(config, name) for name in given} == given and config.steps == 48 * 2
    tiny = {name: value for name, value in train_verb.PRESETS["tiny"].items() if hasattr(TrainConfig, name)}
    assert train_verb.train_config("msnas-r18-1", folder, "fcos", tiny, paper=False) == TrainConfig(**tiny)


def test_nats_is_retrained_as_in_its_paper(digits, tmp_path):
    card = str(save_card(NATSSpace().random(Random(0)), tmp_path / "card.json"))
    coco = SimpleNamespace(train=lambda: range(118_287))
    config = train_verb.train_config(card, coco, "faster_rcnn", {}, paper=True)
    epoch = 7393
    assert (config.batch, config.steps) == (16, 13 * epoch)
    steps = (0, 250, 500, 8 * epoch - 1, 8 * epoch, 11 * epoch - 1, 11 * epoch)
    rates = [config.schedule().at(step) for step in steps]
    assert rates == pytest.approx([0.02 / 3, 0.04 / 3, 0.02, 0.02, 0.002, 0.002, 0.0002]), "0.00125 per image"
    assert (config.optimizer, config.momentum, config.weight_decay, config.clip) == ("sgd", 0.9, 1e-4, None)
    assert train_verb.train_config(card, coco, "mask_rcnn", {"batch": 8}, paper=True).schedule().lr == 0.01
    assert train_verb.train_config(card, coco, "retinanet", {}, paper=True).schedule().lr == 0.01
    short = train_verb.train_config(card, coco, "faster_rcnn", {"steps": 1300}, paper=True)
    assert [short.schedule().at(step) for step in (130, 799, 800, 1100)] == pytest.approx([0.02, 0.02, 0.002, 0.0002])
    given = {"batch": 2, "lr": 0.5, "warmup_steps": 3}
    assert train_verb.train_config(card, coco, "faster_rcnn", given, paper=True).schedule().at(3) == 0.5
    folder = open_data(digits)
    for beside in (True, False):
        model = train_verb.model_config(card, folder, {}, digits / "x.pth", beside=beside)
        assert (model.detector, model.norm, model.options) == ("faster_rcnn", "sync_bn", {})
    ModelConfig(detector="fcos").save(tmp_path / "model.json")
    assert train_verb.model_config(card, folder, {}, None, beside=False).detector == "fcos", "that of its search"


def test_a_searched_backbone_keeps_its_norm_and_its_detector(digits, tmp_path):
    folder, card = open_data(digits), str(tmp_path / "card.json")
    encoder, head = load_card("msnas-r18-1"), {"box_head": "2conv1fc", "head_norm": "bn", "hidden": 8}
    save_card(encoder, card)
    own = {"backbone": encoder.to_json(), "norm": "bn", "frozen_stages": 1, "options": head}
    ModelConfig(detector="cascade_rcnn", **own).save(tmp_path / "model.json")

    def found(settings, weights=None, beside=True):
        model = train_verb.model_config(card, folder, settings, weights, beside=beside)
        return model.detector, model.norm, model.frozen_stages, model.options

    assert found({}) == ("cascade_rcnn", "bn", 0, head), "nothing random is frozen"
    assert found({}, digits / "x.pth") == ("cascade_rcnn", "bn", 1, head)
    assert found({"detector": "faster_rcnn"}) == ("faster_rcnn", "bn", 0, head)
    assert found({"detector": "retinanet"}) == ("retinanet", "bn", 0, {})
    given = {"norm": "gn", "frozen_stages": 2, "box_head": "2fc"}
    assert found(given) == ("cascade_rcnn", "gn", 2, {"box_head": "2fc", "head_norm": "gn", "hidden": 8})
    assert found({"norm": "gn", "head_norm": "none"})[3]["head_norm"] is None
    recipe = {"box_head": "2conv1fc", "head_norm": "sync_bn"}
    assert found({}, beside=False) == ("cascade_rcnn", "sync_bn", 0, recipe)
    assert found({"norm": "frozen_bn"}, beside=False) == ("cascade_rcnn", "frozen_bn", 0, recipe)
    ModelConfig(**own | {"norm": "frozen_bn", "options": {}}).save(tmp_path / "model.json")
    assert found({})[:2] == ("fcos", "sync_bn") and found({}, digits / "x.pth")[:2] == ("fcos", "frozen_bn")


def test_box_heads_are_chosen_where_there_are_any(digits, tmp_path):
    folder = open_data(digits)
    settings = {"detector": "faster_rcnn", "box_head": "4conv1fc"}
    model = train_verb.model_config("plain", folder, settings, None, beside=True)
    assert (model.options, model.norm) == ({"box_head": "4conv1fc"}, "gn")
    words = ["--data", digits, "--out", tmp_path / "run", *shlex.split(SMALL), "--head-norm", "gn"]
    with pytest.raises(ValueError, match="head_norm must be left out for fcos, which has no box head, got 'gn'"):
        verb(train_verb, *words)
    with pytest.raises(ValueError, match="box_head must be left out, as hit-detector has a box head, got '2fc'"):
        train_verb.model_config("hit-detector", folder, {"box_head": "2fc"}, None, beside=True)
    assert not (tmp_path / "run").exists()


def test_a_retraining_goes_on_where_it_stopped(digits, tmp_path, monkeypatch):
    space = MSNASSpace(blocks=4, channels=8)
    save_card(space.random(Random(0), "small"), tmp_path / "card.json")
    words = ["--data", digits, "--card", tmp_path / "card.json", "--batch", 2, "--steps", 3, "--size", "64x64"]
    words += ["--checkpoint-every", 1, "--workers", 0, "--device", "cpu", "--box-head", "2fc"]
    assert verb(train_verb, *words, "--out", tmp_path / "whole") == 0
    told = json.loads((tmp_path / "whole" / "run.json").read_text())["arguments"]
    assert (told["warmup"], told["warmup_steps"], told["milestones"]) == ("linear", 1, [42 / 48, 47 / 48])
    model = ModelConfig.load(tmp_path / "whole" / "model.json")
    assert model.options == {"box_head": "2fc", "head_norm": "sync_bn"} and model.norm == "sync_bn"
    clip, calls = step_module.clip_gradients, iter(range(10))

    def crash(*arguments):
        if next(calls) == 2:
            raise RuntimeError("killed")
        return clip(*arguments)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(step_module, "clip_gradients", crash)
        verb(train_verb, *words, "--out", tmp_path / "killed")
    assert verb(train_verb, *words, "--out", tmp_path / "killed", "--resume") == 0
    whole, killed = (load_weights(tmp_path / name / LAST) for name in ("whole", "killed"))
    assert all(torch.equal(killed[name], value) for name, value in whole.items())


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
    assert before == after and after["step"] == 2
    assert verb(evaluate, run, "--workers", 0, "--device", "cpu", "--split", "search-val") == 0
    assert capsys.readouterr().out.startswith("search-val: 3 images")
    assert (run / "eval-search-val.json").is_file() and (run / "detections-search-val.json").is_file()


def test_eval_of_an_unfinished_run_says_after_how_many_steps(run, tmp_path, capsys):
    begun = shutil.copytree(run, tmp_path / "begun")
    next(begun.glob("weights.*")).unlink()
    checkpoint = load_checkpoint(begun / LAST)
    save_checkpoint(begun / LAST, checkpoint | {"step": 1})
    assert verb(evaluate, begun, "--workers", 0, "--device", "cpu") == 0
    assert json.loads((begun / "eval.json").read_text())["step"] == 1


def test_what_is_no_training_run_is_refused_in_one_line(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "search")
    (other / "run.json").write_text('{"verb": "search fad"}')
    told = f"{other} is a search; train its card first: nasdet train --card {other / 'card.json'}"
    for words in ((evaluate, other), (detect, other, picture(tmp_path / "x.png"), "--out", tmp_path / "out")):
        with pytest.raises(ValueError, match=re.escape(told)):
            verb(*words, "--device", "cpu")
    (other / "run.json").write_text("[]")
    with pytest.raises(ValueError, match=r"run\.json: must be a JSON object, got a list"):
        verb(evaluate, other, "--device", "cpu")


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


def test_detect_keeps_what_it_found_before_a_bad_picture(run, tmp_path):
    good, bad = picture(tmp_path / "a.png"), tmp_path / "b.jpg"
    bad.write_text("no picture")
    with pytest.raises(DataError, match=r"b\.jpg"):
        verb(detect, run, good, bad, "--out", tmp_path / "out", "--device", "cpu")
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [entry["file"] for entry in found["images"]] == [str(good)] and found["skipped"] == []


def test_detect_passes_over_its_own_drawings(run, tmp_path):
    image = picture(tmp_path / "a.png")
    for _ in range(2):
        assert verb(detect, run, tmp_path, "--out", tmp_path, "--device", "cpu") == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.detections.jpg", "a.png", "detections.json"]
    found = json.loads((tmp_path / "detections.json").read_text())
    assert [entry["file"] for entry in found["images"]] == [str(image)]


def test_detect_refuses_nonsense(run, tmp_path):
    image = picture(tmp_path / "x.png")
    with pytest.raises(ValueError, match="threshold must be in 0..1"):
        verb(detect, run, image, "--out", tmp_path / "out", "--threshold", 2)
    before = (run / "detections.json").read_bytes()
    with pytest.raises(ValueError, match="out must be a folder of its own, got the run"):
        verb(detect, run, image, "--out", run, "--device", "cpu")
    assert (run / "detections.json").read_bytes() == before
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no picture in this folder"):
        verb(detect, run, tmp_path / "empty", "--out", tmp_path / "out", "--device", "cpu")
    with pytest.raises(FileNotFoundError, match="not the folder of a training run"):
        verb(detect, tmp_path, image, "--out", tmp_path / "out")
