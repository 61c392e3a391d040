"""Pretraining by classification: what is written, what learns, and that a killed run ends as if never killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_nets import CONFIG, PATHS, Small, SmallSpace, SmallSupernet

from nasdet.cli.pretrain import PRESETS
from nasdet.data import ClassificationFolder, write_digit_classes
from nasdet.detectors import load_backbone_weights
from nasdet.engine import step as step_module
from nasdet.engine.checkpoint import LAST, load_weights
from nasdet.engine.classify import evaluate_classifier
from nasdet.engine.paths import Paths, uniform_draw
from nasdet.engine.pretrain import PretrainConfig, load_classifier, pretrain
from nasdet.engine.records import read_lines
from nasdet.engine.trunks import trunk

TINY = {name: value for name, value in PRESETS["tiny"].items() if name != "width"}


def read(path):
    return json.loads(path.read_text())


def untimed(folder):
    lines = read_lines(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_the_run_folder(run, digit_classes):
    info = read(run / "run.json")
    assert (info["verb"], info["status"], info["net"], info["command"]) == ("pretrain", "done", "small", ["x"])
    assert info["arguments"]["part"] == "train" and Path(info["data"]) == digit_classes.path.resolve()
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "top1" in line] == [4, 6]
    assert [line["lr"] for line in lines if "lr" in line] == pytest.approx([0.05 * (1 - i / 6) for i in (1, 3, 5)])
    found = read(run / "eval.json")
    assert (found["split"], found["step"], found["images"]) == ("test", 6, 20)
    assert 0 <= found["top1"] <= found["top5"] <= 1 and found["top1"] * 20 == round(found["top1"] * 20)
    assert read(run / "classifier.json")["classes"] == list("0123456789")
    assert read(run / "split.json")["sha256"] == digit_classes.split.sha256


def test_weights_are_the_backbones_and_load_strictly(run, digit_classes):
    net = Small()
    load_backbone_weights(net, run / "weights.pt")
    last = load_weights(run / LAST)
    assert all(torch.equal(value, last[f"backbone.{name}"]) for name, value in net.state_dict().items())
    model = load_classifier(run, CONFIG, digit_classes, Small)
    assert not model.training and model.fc.in_features == 12
    found = evaluate_classifier(model, digit_classes.test(), size=24, progress=False)
    assert {name: found[name] for name in ("top1", "top5")} == {
        name: read(run / "eval.json")[name] for name in ("top1", "top5")
    }
    with pytest.raises(ValueError, match="'model' does not fit"):
        load_classifier(run, replace(CONFIG, last=13), digit_classes, Small)


@pytest.mark.parametrize("crash_at", [1, 4, 6], ids=lambda at: f"crash_at_{at}")
@pytest.mark.parametrize("kind", ["backbone", "supernet"])
def test_resumed_equals_never_killed(kind, request, digit_classes, tmp_path, monkeypatch, crash_at):
    whole = request.getfixturevalue("run" if kind == "backbone" else "supernet_run")
    if kind == "backbone":
        arguments = {"backbone": Small, "named": {"net": "small"}}
    else:
        arguments = {"backbone": SmallSupernet, "paths": PATHS}
    calls, clip = iter(range(1, 100)), step_module.clip_gradients

    def crash(*given):
        if next(calls) == crash_at:
            raise RuntimeError("killed")
        return clip(*given)

    monkeypatch.setattr(step_module, "clip_gradients", crash)
    with pytest.raises(RuntimeError, match="killed"):
        pretrain(CONFIG, digit_classes, tmp_path, **arguments, progress=False)
    assert read(tmp_path / "run.json")["status"] == "failed" and not (tmp_path / "weights.pt").exists()
    monkeypatch.setattr(step_module, "clip_gradients", clip)
    pretrain(replace(CONFIG, workers=1), digit_classes, tmp_path, **arguments, progress=False, resume=True)
    for file in (LAST, "weights.pt"):
        expected, result = load_weights(whole / file), load_weights(tmp_path / file)
        assert expected.keys() == result.keys()
        assert all(torch.equal(result[name], value) for name, value in expected.items())
    assert untimed(tmp_path) == untimed(whole)


def test_a_finished_run_is_not_trained_over(run, digit_classes):
    files = ("weights.pt", "eval.json", "metrics.jsonl", str(LAST))
    before = {name: (run / name).read_bytes() for name in files}
    options = {"backbone": Small, "progress": False}
    with pytest.raises(ValueError, match="already holds a run"):
        pretrain(CONFIG, digit_classes, run, **options, named={"net": "small"})
    with pytest.raises(ValueError, match="lr: 0.05 -> 0.5"):
        pretrain(replace(CONFIG, lr=0.5), digit_classes, run, **options, named={"net": "small"}, resume=True)
    with pytest.raises(ValueError, match="net: 'small' -> 'large'"):
        pretrain(CONFIG, digit_classes, run, **options, named={"net": "large"}, resume=True)
    other = ClassificationFolder(digit_classes.path, seed=1)
    with pytest.raises(ValueError, match="split: "):
        pretrain(CONFIG, other, run, **options, named={"net": "small"}, resume=True)
    pretrain(CONFIG, digit_classes, run, **options, named={"net": "small"}, resume=True)
    assert before == {name: (run / name).read_bytes() for name in files}


def test_weights_decay_but_for_norms_and_biases():
    from nasdet.engine.pretrain import _optimizer, make_classifier

    class Data:
        categories = "ab"

    model = make_classifier(CONFIG, Data, Small)
    decayed, spared = _optimizer(CONFIG, model).param_groups
    assert {parameter.dim() for parameter in spared["params"]} == {1} and spared["weight_decay"] == 0
    assert {parameter.dim() for parameter in decayed["params"]} == {2, 4} and decayed["weight_decay"] == 4e-5


def test_a_supernet_learns_the_drawn_path_and_nothing_else(digit_classes, tmp_path, monkeypatch):
    """Weight decay, momentum and gradients touch what is on the path; the other choice stays to the bit."""
    space, seen = SmallSpace(), []
    cards = [space.card("k1", "k3"), space.card("k1", "k3"), space.card("k3", "k3"), space.card("k1", "k1")]
    train = step_module.train_step

    def watched(module, optimizer, *arguments, **options):
        net = module.model.backbone
        before = {name: value.detach().clone() for name, value in net.named_parameters()}
        result = train(module, optimizer, *arguments, **options)
        moved = {name for name, value in net.named_parameters() if not torch.equal(value, before[name])}
        with_gradient = {name for name, value in net.named_parameters() if value.grad is not None}
        assert moved == with_gradient
        seen.append({".".join(name.split(".")[:2]) for name in moved if "stem" not in name})
        return result

    monkeypatch.setattr("nasdet.engine.pretrain.train_step", watched)
    config = replace(CONFIG, steps=4, weight_decay=0.1)
    paths = Paths(lambda step: cards[min(step, 3)])
    pretrain(config, digit_classes, tmp_path, SmallSupernet, paths=paths, progress=False)
    assert seen == [{f"first.{card.genotype[0]}", f"second.{card.genotype[1]}"} for card in cards]


def test_a_supernet_keeps_search_val_back(supernet_run, digit_classes):
    assert read(supernet_run / "run.json")["arguments"]["part"] == "search-train"
    found = read(supernet_run / "eval-search-val.json")
    assert found["images"] == len(digit_classes.search_val()) and not (supernet_run / "eval.json").exists()
    stored, last = load_weights(supernet_run / "weights.pt"), load_weights(supernet_run / LAST)
    assert all(torch.equal(value, last[f"backbone.{name}"]) for name, value in stored.items()), (
        "not the measured path's"
    )


def test_paths_of_a_run_are_drawn_uniformly_from_its_seed():
    draws = [PATHS.draw(step).genotype for step in range(400)]
    assert draws == [uniform_draw(SmallSpace(), 0)(step).genotype for step in range(400)]
    assert draws != [uniform_draw(SmallSpace(), 1)(step).genotype for step in range(400)]
    counts = [draws.count([a, b]) for a in ("k1", "k3") for b in ("k1", "k3")]
    assert min(counts) > 70 and sum(counts) == 400


def test_a_non_finite_loss_is_recorded(digit_classes, tmp_path):
    with pytest.raises(ValueError, match="training stopped at step"):
        pretrain(replace(CONFIG, lr=1e30), digit_classes, tmp_path, Small, progress=False)
    assert read(tmp_path / "run.json")["status"] == "failed" and not (tmp_path / "weights.pt").exists()


@pytest.mark.parametrize(
    "bad",
    [
        {"steps": 0},
        {"batch": 0},
        {"workers": -1},
        {"clip": 0.0},
        {"lr": -1.0},
        {"decay": "x"},
        {"optimizer": "lamb"},
        {"part": "test"},
        {"label_smoothing": 1.0},
        {"last": 0},
        {"size": 0},
        {"jitter": -0.1},
        {"recalibration_images": 0},
    ],
    ids=str,
)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match={"jitter": "strength"}.get(name := next(iter(bad)), name)):
        PretrainConfig(**bad)


def test_the_papers_rate_falls_along_a_straight_line():
    schedule = PretrainConfig().schedule()
    assert [schedule.at(step) for step in (0, 150_000, 299_999)] == pytest.approx([0.5, 0.25, 0.5 / 300_000])


@pytest.mark.slow
def test_it_learns_to_tell_digits_apart(tmp_path):
    """Chance is 10 %, with a standard deviation of 1.3 % over 500 images; the scans and backgrounds are unseen ones."""
    data = ClassificationFolder(write_digit_classes(tmp_path / "set"))
    config = PretrainConfig(**{**TINY, "checkpoint_every": 400, "flip": False, "workers": 0, "device": "cpu"})
    network = trunk(backbone="resnet18", width=0.25)
    out = pretrain(config, data, tmp_path / "run", network.make, named=network.named, progress=False)
    assert read(out / "eval.json")["top1"] > 0.35


PAIR = """
    import sys
    from dataclasses import replace
    from pathlib import Path

    sys.path.insert(0, sys.argv[2])
    from small_nets import CONFIG, PATHS, SmallSupernet

    from nasdet.data import ClassificationFolder
    from nasdet.engine.pretrain import pretrain

    data = ClassificationFolder(sys.argv[1])
    pretrain(replace(CONFIG, steps=4), data, Path(sys.argv[3]), SmallSupernet, paths=PATHS, progress=False)
"""


@pytest.mark.slow
def test_two_processes_train_the_same_paths(digit_classes, tmp_path):
    """Batch norms see each process's own images, so only what does not depend on them can be compared exactly."""
    script, here = tmp_path / "pair.py", Path(__file__).resolve()
    script.write_text(textwrap.dedent(PAIR))
    path = os.pathsep.join([str(here.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(script), str(digit_classes.path), str(here.parent), str(tmp_path / "pair")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-6000:]
    pretrain(replace(CONFIG, steps=4), digit_classes, tmp_path / "alone", SmallSupernet, paths=PATHS, progress=False)
    one, two = load_weights(tmp_path / "alone" / LAST), load_weights(tmp_path / "pair" / LAST)
    first = {name: value for name, value in one.items() if name.endswith("num_batches_tracked")}
    assert first and all(torch.equal(two[name], value) for name, value in first.items()), "the same norms ran"
    summaries = [read(tmp_path / name / "eval-search-val.json") for name in ("alone", "pair")]
    assert summaries[0]["images"] == summaries[1]["images"] == len(digit_classes.search_val())
