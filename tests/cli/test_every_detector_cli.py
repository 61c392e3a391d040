"""``nasdet train``, ``eval``, ``detect`` and ``arch export`` for every detector, on digits, as typed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nasdet.cli import main
from nasdet.detectors import DETECTORS, WITH_MASKS
from nasdet.engine import step as step_module
from nasdet.engine.checkpoint import LAST, load_weights
from nasdet.engine.evaluate import load_run
from nasdet.spaces.assemble import ModelConfig

SCORING = "mask_scoring_rcnn"
SMALL = (
    "--preset tiny --width 0.125 --fpn-channels 8 --tower-convs 1 --size 64x96 --steps 3 --batch 2 "
    "--checkpoint-every 1 --workers 0 --device cpu --no-flip"
).split()


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn")
    pytest.importorskip("pycocotools")
    out = tmp_path_factory.mktemp("digits") / "set"
    assert main(["data", "digits", "--out", str(out), "--train", "6", "--val", "2", "--size", "64x96"]) == 0
    return out


def train(digits: Path, out: Path, name: str, *more: str) -> int:
    return main(["train", "--detector", name, "--data", str(digits), "--out", str(out), *SMALL, *more])


@pytest.mark.parametrize("name", DETECTORS)
def test_train_resume_eval_and_detect(
    name: str, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(digits, whole, name) == 0
    assert f"{name} resnet18" in capsys.readouterr().out
    clip, calls = step_module.clip_gradients, iter(range(10))

    def crash(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise RuntimeError("killed")
        return clip(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(step_module, "clip_gradients", crash)
        assert train(digits, killed, name) == 2
    assert train(digits, killed, name, "--resume") == 0
    weights, again = load_weights(whole / LAST), load_weights(killed / LAST)
    assert all(torch.equal(again[key], value) for key, value in weights.items())

    capsys.readouterr()
    assert main(["eval", str(whole), "--workers", "0", "--device", "cpu", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["images"] == 2 and ("masks" in figures) == (name in WITH_MASKS)
    config = ModelConfig.load(whole / "model.json")  # hardly trained, it finds nothing above the usual threshold
    replace(config, options={**config.options, "score_threshold": 0.0}).save(whole / "model.json")
    picture = next((digits / "val").iterdir())
    found = tmp_path / "found"
    assert main(["detect", str(whole), str(picture), "--out", str(found), "--threshold", "0", "--device", "cpu"]) == 0
    (entry,) = json.loads((found / "detections.json").read_text())["images"]
    assert (found / entry["drawing"]).is_file() and entry["detections"]
    assert all(("mask" in row) == (name in WITH_MASKS) for row in entry["detections"])
    assert all(("mask_score" in row) == (name == SCORING) for row in entry["detections"])
    assert all(row["mask"]["size"] == [64, 96] for row in entry["detections"] if "mask" in row)


@pytest.fixture(scope="module")
def run(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "fad"
    card = ["--card", "fad-paper", "--inner-channels", "6", "--cells", "1", "--levels", "1"]
    assert train(digits, out, "fcos", *card) == 0
    return out


@pytest.mark.slow
def test_export_of_a_run_and_of_its_card_are_the_same_program(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    given = torch.randn(1, 3, 64, 96), torch.tensor([[64, 96]]), torch.tensor(0.0)
    outputs = []
    sources = (str(run),), ("fad-paper", "--weights", str(run / LAST), "--format", "torch")
    for index, words in enumerate(sources):
        file = tmp_path / (f"{index}.pt2" if index == 0 else "net.program")
        assert main(["arch", "export", *words, "--out", str(file)]) == 0
        assert f"{file}: fcos, 10 categories, images 1x3x64x96; agrees" in capsys.readouterr().out
        outputs.append(torch.export.load(file).module()(*given))
    assert list(outputs[0])[:3] == ["boxes", "scores", "labels"] and bool((outputs[0]["labels"] >= 0).any())
    assert all(torch.equal(value, outputs[1][name]) for name, value in outputs[0].items())


def run_onnx(file: Path) -> tuple[dict[str, Any], dict[str, Tensor], Tensor]:
    """The facts and outputs of an ONNX model of pictures of 64 x 96, on noise, and this noise."""
    session = pytest.importorskip("onnxruntime").InferenceSession(str(file), providers=["CPUExecutionProvider"])
    images = torch.randn(1, 3, 64, 96)
    given = {"images": images, "sizes": torch.tensor([[64, 96]]), "threshold": torch.tensor(0.0)}
    values = session.run(None, {name: value.numpy() for name, value in given.items()})
    outputs = [output.name for output in session.get_outputs()]
    found = {name: torch.from_numpy(value) for name, value in zip(outputs, values, strict=True)}
    return session.get_modelmeta().custom_metadata_map, found, images


def check_outputs(found: dict[str, Tensor], run: Path, images: Tensor) -> None:
    """There are detections in the picture, best first, and the maps that they come from are those of the run."""
    count = int((found["labels"] >= 0).sum())
    boxes, scores, labels = (found[name][0, :count] for name in ("boxes", "scores", "labels"))
    assert count > 0 and bool((scores.diff() <= 0).all()) and int(labels.max()) < 10
    assert float(boxes.min()) >= 0 and float(boxes[:, 2].max()) <= 96 and float(boxes[:, 3].max()) <= 64
    model, _ = load_run(run)
    names = list(model.neck.strides)  # type: ignore[union-attr, arg-type]  # a pyramid's
    with torch.no_grad():
        maps = model(images)
    for key, levels in maps.items():
        for name, level in zip(names, levels, strict=True):
            torch.testing.assert_close(found[f"{key}_{name}"], level, rtol=1e-3, atol=1e-3 * float(level.abs().max()))


def needs_onnx() -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_export_of_a_run_to_onnx(
    name: str, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_onnx()
    out, file = tmp_path / "run", tmp_path / "net.onnx"
    assert train(digits, out, name) == 0
    capsys.readouterr()
    assert main(["arch", "export", str(out), "--out", str(file)]) == 0
    assert f"{file}: {name}, 10 categories, images 1x3x64x96; agrees" in capsys.readouterr().out
    facts, found, images = run_onnx(file)
    assert facts["detector"] == name and json.loads(facts["categories"]) == [str(digit) for digit in range(10)]
    assert ("mask_logits" in found) == (name in WITH_MASKS) and ("mask_scores" in found) == (name == SCORING)
    check_outputs(found, out, images)


@pytest.mark.slow
def test_export_of_a_card_with_weights_to_onnx(run: Path, tmp_path: Path) -> None:
    """Hardly trained: scores are so near to each other that rounding swaps some."""
    needs_onnx()
    file = tmp_path / "fad.model"  # the format says what it is, not the name
    words = ("fad-paper", "--weights", str(run / LAST), "--format", "onnx")
    assert main(["arch", "export", *words, "--out", str(file)]) == 0
    facts, found, images = run_onnx(file)
    assert facts["detector"] == "fcos"
    check_outputs(found, run, images)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fad-paper --out x.onnx", "--weights must name the trained weights of fad-paper's detector, got none"),
        ("plain --weights {run}/checkpoints/last.pt --out x.pt2", "--weights must be those of plain, got"),
        ("fad-alternative --weights {run}/checkpoints/last.pt --out x.pt2", "of fad-paper (fad)"),
        ("fad-paper --weights {run}/../lost.pt --out x.pt2", "no model.json beside it"),
        ("{run} --weights {run}/lost.pt --out x.pt2", "lost.pt: no such"),
        ("{run} --out x.pt2 --size 64x90", "size must be multiples of 32"),
        ("{run} --out x.pt2 --size big", "size must be HEIGHTxWIDTH"),
        ("fad-paper --out x.py", "method must be 'nats', got 'fad'"),
        ("fad-paper --out x.py --batch 2", "need --format torch or onnx"),
        ("{run} --out x.py", "--out must end in .pt2 or .onnx, or have a --format, for the run"),
    ],
)
def test_export_says_what_is_wrong(
    words: str, message: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["arch", "export", *words.format(run=run).split()]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and not list(tmp_path.iterdir())
