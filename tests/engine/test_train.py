from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nasdet.data import DataError, open_data, write_digits
from nasdet.engine import step as step_module
from nasdet.engine.checkpoint import LAST, load_weights
from nasdet.engine.evaluate import coco_ap, detect_all, load_run
from nasdet.engine.records import read_lines
from nasdet.engine.runs import sole_writer
from nasdet.engine.train import TrainConfig, train
from nasdet.spaces.assemble import ModelConfig, build_model

pytest.importorskip("sklearn")
pytest.importorskip("pycocotools")

CONFIG = TrainConfig(steps=6, batch=2, lr=0.01, workers=0, log_every=2, checkpoint_every=2, device="cpu", clip=20.0)
TINY = {"backbone": "resnet18", "width": 0.125, "fpn_channels": 8, "levels": 3, "norm": "gn", "tower_convs": 1}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return open_data(write_digits(tmp_path_factory.mktemp("digits") / "set", train=6, val=3, size=(64, 96)))


def model_config(data, **changes):
    sizes = {"short_side": 64, "long_side": 96}
    return ModelConfig(num_classes=10, categories=data.categories, **{**TINY, **sizes, **changes})


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    config = replace(CONFIG, eval_every=4)
    return train(config, digits, model_config(digits), tmp_path_factory.mktemp("run"), progress=False, command=["x"])


def test_the_run_folder(run, digits):
    info = json.loads((run / "run.json").read_text())
    assert (info["verb"], info["status"], info["seed"], info["command"]) == ("train", "done", 0, ["x"])
    assert Path(info["data"]) == digits.path.resolve() and info["seconds"] > 0 and info["peak_memory"] > 2**20
    assert info["arguments"]["steps"] == 6 and "error" not in info
    lines = read_lines(run / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == [2, 4, 6]
    assert [line["step"] for line in lines if "AP" in line] == [4, 6]
    first = next(line for line in lines if "loss" in line)
    assert first["loss"] == pytest.approx(first["loss_cls"] + first["loss_box"] + first["loss_centerness"], rel=1e-5)
    summary = json.loads((run / "eval.json").read_text())
    assert summary["split"] == "test" and summary["step"] == 6
    assert set(summary["per_category"]) == set(digits.categories)
    results = json.loads((run / "detections.json").read_text())
    assert coco_ap(digits.test().ground_truth(), results)["AP"] == pytest.approx(summary["AP"], abs=1e-12)
    assert not (run / "card.json").exists()


def test_the_saved_weights_are_those_of_the_checkpoint_and_load(run):
    exported = load_weights(next(run.glob("weights.*")))
    last = load_weights(run / LAST)
    assert exported.keys() == last.keys() and all(torch.equal(exported[name], last[name]) for name in last)
    model, config = load_run(run)
    assert not model.training and config.short_side == 64
    assert all(torch.equal(value, last[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("crash_at", [1, 4, 6], ids=lambda at: f"crash_at_{at}")
def test_resumed_equals_never_killed(run, digits, tmp_path, monkeypatch, crash_at):
    calls = iter(range(1, 100))
    clip = step_module.clip_gradients

    def crash(*arguments):
        if next(calls) == crash_at:
            raise RuntimeError("killed")
        return clip(*arguments)

    config = replace(CONFIG, eval_every=4)
    monkeypatch.setattr(step_module, "clip_gradients", crash)
    with pytest.raises(RuntimeError, match="killed"):
        train(config, digits, model_config(digits), tmp_path, progress=False)
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"
    monkeypatch.setattr(step_module, "clip_gradients", clip)
    train(replace(config, workers=1), digits, model_config(digits), tmp_path, progress=False, resume=True)
    expected, result = load_weights(run / LAST), load_weights(tmp_path / LAST)
    assert all(torch.equal(result[name], value) for name, value in expected.items())
    assert (tmp_path / "detections.json").read_bytes() == (run / "detections.json").read_bytes()
    assert untimed(tmp_path) == untimed(run)


def untimed(folder):
    lines = read_lines(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_a_finished_run_is_not_trained_over(run, digits):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "tb" not in path.parts}
    with pytest.raises(ValueError, match="already holds a run"):
        train(CONFIG, digits, model_config(digits), run, progress=False)
    with pytest.raises(ValueError, match="learning_rate: 0.01 -> 0.5"):
        train(replace(CONFIG, lr=0.5), digits, model_config(digits), run, progress=False, resume=True)
    with pytest.raises(ValueError, match="model.tower_convs: 1 -> 2"):
        train(CONFIG, digits, model_config(digits, tower_convs=2), run, progress=False, resume=True)
    with pytest.raises(ValueError, match=r"milestones: .* -> \(0\.5,\); warmup_factor: .* -> 0\.1\)"):
        train(replace(CONFIG, milestones=(0.5,), warmup_factor=0.1), digits, model_config(digits), run, resume=True)
    other = open_data(digits.path, seed=1)
    with pytest.raises(ValueError, match="split: "):
        train(CONFIG, other, model_config(digits), run, progress=False, resume=True)
    assert before == {path: path.read_bytes() for path in before}


def test_other_pretrained_weights_are_refused(digits, tmp_path):
    files = []
    for name in ("one", "same", "other"):
        torch.manual_seed(name == "other")
        files.append(tmp_path / f"{name}.pth")
        torch.save(build_model(model_config(digits)).backbone.state_dict(), files[-1])
    config, out = replace(CONFIG, steps=1), tmp_path / "run"
    train(config, digits, model_config(digits), out, progress=False, weights=files[0])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    for weights, words in ((files[2], "weights: '.*' -> '"), (None, "weights: '.*' -> None")):
        with pytest.raises(ValueError, match=f"written by another configuration.*{words}"):
            train(config, digits, model_config(digits), out, progress=False, resume=True, weights=weights)
    with pytest.raises(FileNotFoundError, match=r"lost\.pth: no such"):
        train(config, digits, model_config(digits), out, progress=False, resume=True, weights=tmp_path / "lost.pth")
    assert before == {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    train(config, digits, model_config(digits), out, progress=False, resume=True, weights=files[1])


HOLDER = """
    import os
    import sys
    import time

    from nasdet.engine.runs import sole_writer

    with sole_writer(sys.argv[1]):
        child = os.fork()  # as the processes that read pictures
        if child:
            print(child, flush=True)
        time.sleep(60)
"""


def test_a_folder_has_one_writer_and_a_dead_one_leaves_it(run, digits, tmp_path):
    script = tmp_path / "holder.py"
    script.write_text(textwrap.dedent(HOLDER))
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(script), str(run)]
    holder = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True)
    child = int(holder.stdout.readline())
    try:
        before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        for resume in (False, True):
            with pytest.raises(ValueError, match="is being written by another process"):
                train(replace(CONFIG, eval_every=4), digits, model_config(digits), run, progress=False, resume=resume)
        assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        holder.kill()
        holder.wait(60)
        os.kill(child, 0)
        with sole_writer(run):
            pass
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


def test_a_non_finite_loss_is_recorded(digits, tmp_path):
    with pytest.raises(ValueError, match="training stopped at step"):
        config = replace(CONFIG, lr=1e30, clip=None, warmup="none")
        train(config, digits, model_config(digits), tmp_path, progress=False)
    info = json.loads((tmp_path / "run.json").read_text())
    assert info["status"] == "failed" and "training stopped at step" in info["error"]
    assert not list(tmp_path.glob("weights.*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"num_classes": 3, "categories": ()}, "10 categories"), ({"categories": tuple("abcdefghij")}, "10 categories")],
    ids=["number", "names"],
)
def test_a_model_for_other_categories_is_refused(digits, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train(CONFIG, digits, replace(model_config(digits), **change), tmp_path)


@pytest.mark.parametrize(
    "bad",
    [{"steps": 0}, {"batch": 0}, {"workers": -1}, {"clip": 0.0}, {"lr": -1.0}, {"decay": "x"}, {"eval_every": -1}],
    ids=str,
)
def test_bad_settings(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        TrainConfig(**bad)


def test_default_rate_follows_the_batch():
    assert TrainConfig().schedule().lr == 0.01
    assert TrainConfig(batch=4).schedule().lr == 0.0025
    assert TrainConfig(batch=32, reference_lr=0.02).schedule().lr == 0.04
    assert TrainConfig().schedule().at(60_000) == pytest.approx(0.001)


def test_bfloat16_trains_in_float32_weights(digits, tmp_path):
    train(replace(CONFIG, steps=2, amp=True), digits, model_config(digits), tmp_path, progress=False)
    assert {value.dtype for value in load_weights(tmp_path / LAST).values()} == {torch.float32}


class Oracle(torch.nn.Module):
    """Finds exactly what the annotations say, in the pixels of the batch it is shown."""

    def __init__(self, dataset, short):
        super().__init__()
        self.known = [dataset[index][1] for index in range(len(dataset))]
        self.short, self.seen = short, 0

    def forward(self, images):
        return {"cls": [images]}

    def detect(self, outputs, sizes):
        found = []
        for height, width in sizes:
            target = self.known[self.seen]
            self.seen += 1
            scale = torch.tensor([width / target["size"][1], height / target["size"][0]]).repeat(2)
            boxes = target["boxes"] * scale
            found.append({"boxes": boxes, "scores": torch.ones(len(boxes)), "labels": target["labels"]})
        return found


@pytest.mark.parametrize(("short", "batch"), [(64, 1), (96, 2), (33, 3)], ids=["as_stored", "larger", "smaller"])
def test_boxes_come_back_in_stored_pixels(digits, short, batch):
    dataset = digits.test()
    model = Oracle(dataset, short).train()
    results = detect_all(model, dataset, short=short, long=2 * short, batch=batch, progress=False)
    assert model.training and model.seen == len(dataset)
    truth = dataset.ground_truth()
    assert coco_ap(truth, results)["AP"] == 1.0
    for annotation, result in zip(truth["annotations"], results, strict=True):
        assert result["bbox"] == pytest.approx(annotation["bbox"], abs=0.02)
        assert (result["image_id"], result["category_id"]) == (annotation["image_id"], annotation["category_id"])


def test_load_run_says_what_is_missing(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="not the folder of a training run"):
        load_run(tmp_path)
    (tmp_path / "model.json").write_bytes((run / "model.json").read_bytes())
    with pytest.raises(FileNotFoundError, match="no weights and no checkpoint"):
        load_run(tmp_path)
    config = ModelConfig.load(tmp_path / "model.json")
    replace(config, fpn_channels=16).save(tmp_path / "model.json")
    weights = next(run.glob("weights.*"))
    (tmp_path / weights.name).write_bytes(weights.read_bytes())
    with pytest.raises(ValueError, match=r"weights\..*'model' does not fit"):
        load_run(tmp_path)
    (tmp_path / weights.name).write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a readable"):
        load_run(tmp_path)


def test_an_image_that_breaks_later_is_one_clear_error(digits, tmp_path):
    data = open_data(write_digits(tmp_path / "set", train=6, val=3, size=(64, 96)))
    path = data.train().pictures[0].path
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=f"{path.name}.*truncated or unreadable"):
        train(CONFIG, data, model_config(data), tmp_path / "run", progress=False)


PAIR = """
    import sys
    from dataclasses import replace
    from pathlib import Path

    sys.path.insert(0, sys.argv[2])
    from test_train import CONFIG, model_config

    from nasdet.data import open_data
    from nasdet.engine.train import train

    data = open_data(sys.argv[1])
    train(replace(CONFIG, steps=4), data, model_config(data), Path(sys.argv[3]), progress=False)
"""


@pytest.mark.slow
def test_two_processes_train_like_one(digits, tmp_path):
    script = tmp_path / "pair.py"
    script.write_text(textwrap.dedent(PAIR))
    here = Path(__file__).resolve()
    path = os.pathsep.join([str(here.parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])])
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(script), str(digits.path), str(here.parent), str(tmp_path / "pair")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    train(replace(CONFIG, steps=4), digits, model_config(digits), tmp_path / "alone", progress=False)
    one, two = load_weights(tmp_path / "alone" / LAST), load_weights(tmp_path / "pair" / LAST)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)
    summaries = [json.loads((tmp_path / name / "eval.json").read_text()) for name in ("alone", "pair")]
    assert summaries[0]["images"] == summaries[1]["images"] == 3
