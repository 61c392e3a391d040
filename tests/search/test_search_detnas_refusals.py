"""What a DetNAS search refuses: settings, supernets of other searches, data without anything to score by."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nasdet._files import write_json
from nasdet.data import DataFolder, Split
from nasdet.engine.checkpoint import load_checkpoint
from nasdet.engine.one_shot import OneShotRun
from nasdet.engine.search_detnas import DetNASSearchConfig, search_detnas

Finished = Callable[[str], Path]


@pytest.fixture(scope="module")
def config(cases: dict[str, Any]) -> DetNASSearchConfig:
    found: DetNASSearchConfig = cases["detnas"].config
    return found


@pytest.fixture(scope="module")
def whole(finished: Finished) -> Path:
    return finished("detnas")


SUPERNETS: dict[str, tuple[dict[str, Any], str]] = {
    "space": ({"space": "small"}, "its supernet must have space small, got tiny"),
    "shuffle": ({"shuffle": "halves"}, "its supernet must have shuffle halves, got even_odd"),
    "detector": (
        {"detector": "faster_rcnn", "levels": 4},
        "its supernet must have detector faster_rcnn, got retinanet",
    ),
    "norm": ({"norm": "bn"}, "its supernet must have norm bn, got sync_bn"),
    "images": ({"val_images": 5001}, "val_images must be at most the 5000 that the supernet of .* kept, got 5001"),
}


@pytest.mark.parametrize(("changes", "words"), SUPERNETS.values(), ids=SUPERNETS)
def test_another_supernet_is_refused(
    changes: dict[str, Any], words: str, config: DetNASSearchConfig, data: DataFolder, whole: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        search_detnas(
            dataclasses.replace(config, supernet=str(whole), **changes), data, tmp_path / "run", progress=False
        )
    assert not (tmp_path / "run").exists()


def test_a_run_without_a_trained_supernet_is_refused(
    config: DetNASSearchConfig, data: DataFolder, whole: Path, finished: Finished, tmp_path: Path
) -> None:
    def take(folder: Path) -> None:
        search_detnas(dataclasses.replace(config, supernet=str(folder)), data, tmp_path / "run", progress=False)

    for folder, verb in ((finished("fad"), "search fad"), (tmp_path, "None")):
        with pytest.raises(ValueError, match=f"supernet must be the folder of a run of search detnas, got .*: {verb}"):
            take(folder)
    (tmp_path / "half" / "checkpoints").mkdir(parents=True)
    payload = load_checkpoint(whole / "checkpoints" / "last.pt") | {"step": 16}
    torch.save(payload, tmp_path / "half" / "checkpoints" / "last.pt")
    (tmp_path / "half" / "run.json").write_bytes((whole / "run.json").read_bytes())
    with pytest.raises(ValueError, match="half: its supernet must be trained, got 16 of 24 steps"):
        take(tmp_path / "half")
    payload["state"]["model"].popitem()
    torch.save(payload | {"step": 24}, tmp_path / "half" / "checkpoints" / "last.pt")
    with pytest.raises(ValueError, match="last.pt: its 'model' does not fit this configuration"):
        take(tmp_path / "half")
    assert not (tmp_path / "run").exists()


def test_a_folder_with_another_run_is_left_alone(
    config: DetNASSearchConfig, data: DataFolder, whole: Path, tmp_path: Path
) -> None:
    """Also where there is nothing to train, and so no checkpoint that could stand in the way."""
    taken = dataclasses.replace(config, supernet=str(whole))
    write_json(tmp_path / "run.json", {"verb": "train"})
    with pytest.raises(ValueError, match="already holds a run: add --resume to go on with it, or choose another --out"):
        search_detnas(taken, data, tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_scores_of_another_search_are_refused_before_anything_is_written(
    config: DetNASSearchConfig, data: DataFolder, whole: Path, tmp_path: Path
) -> None:
    taken = dataclasses.replace(config, supernet=str(whole))
    search_detnas(taken, data, tmp_path, progress=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    with pytest.raises(ValueError, match=r"written by another search \(eval_batch: "):
        search_detnas(dataclasses.replace(taken, eval_batch=3), data, tmp_path, resume=True, progress=False)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "backend": ({"backend": "reference"}, "backend must be None for search detnas, .*, got 'reference'"),
    "weights": ({"weights": "resnet.pth"}, "weights must be None with the supernet of another run, got resnet.pth"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_would_change_nothing(
    name: str,
    config: DetNASSearchConfig,
    data: DataFolder,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options, words = OPTIONS[name]
    monkeypatch.setattr("nasdet.detectors.build.load_backbone_weights", lambda *_: None)
    with pytest.raises(ValueError, match=words):
        search_detnas(
            dataclasses.replace(config, supernet=str(whole)), data, tmp_path / "run", progress=False, **options
        )
    assert not (tmp_path / "run").exists()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"steps": 0}, "steps must be at least 1, got 0"),
    "space": ({"space": "huge"}, "sizes must be one of small, large, 3.8g, tiny, or Sizes, got 'huge'"),
    "parents": ({"parents": 5}, "parents must not exceed the population of 4, got 5"),
    "algorithm": ({"algorithm": "luck"}, "algorithm must be one of evolution, random, got 'luck'"),
    "offspring": ({"offspring": "many"}, "offspring must be 'paper' or 'released', got 'many'"),
    "recalibration": ({"recalibration": "all"}, "recalibration must be one of paper, released, none, got 'all'"),
    "recalibration-images": ({"recalibration_images": 0}, "recalibration_images must be at least 1, got 0"),
    "val-images": ({"val_images": 0}, "val_images must be at least 1, got 0"),
    "macs": ({"max_macs": 1000.0}, "macs must be at most 1000, reachable are 8963472 to 14732928"),
    "small-macs": ({"space": "small", "max_macs": 2e8}, "macs must be at most 200000000, reachable are 2[0-9]{8} to 3"),
    "parameters": ({"max_parameters": 10.0}, "parameters must be at most 10, reachable are"),
    "detector": ({"detector": "yolo"}, "detector must be one of"),
    "norm": ({"norm": "ln"}, "norm must be one of"),
    "name": ({"name": "a/b"}, "name must be letters"),
    "top": ({"top": 0}, "top must be at least 1, got 0"),
    "optimizer-rate": ({"lr": -1.0}, "lr must be a positive number or None, got -1.0"),
}


@pytest.mark.parametrize(("changes", "words"), BAD.values(), ids=BAD)
def test_bad_settings(changes: dict[str, Any], words: str, config: DetNASSearchConfig) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(config, **changes)


@pytest.mark.parametrize("part", ["search_val", "search_train"])
def test_no_images(part: str, config: DetNASSearchConfig, data: DataFolder, tmp_path: Path) -> None:
    split = data.split
    empty = dataclasses.replace(data, split=Split(**{**dataclasses.asdict(split), part: (), "sha256": ""}))
    role = part.replace("_", "-")
    with pytest.raises(ValueError, match=f"{role} must hold at least one image, got none of .*digits"):
        search_detnas(config, empty, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_no_objects_to_score_by(
    config: DetNASSearchConfig, data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(data.trainval)
    truth = kind.ground_truth
    monkeypatch.setattr(kind, "ground_truth", lambda self: truth(self) | {"annotations": []})
    with pytest.raises(ValueError, match="search-val must hold an object to score by, got none in 4 images"):
        search_detnas(config, data, tmp_path / "run", progress=False)


def test_a_search_must_say_what_it_does() -> None:
    class Half(OneShotRun):
        verb = "search half"

    with pytest.raises(TypeError, match="abstract"):
        Half(None, None, None)  # type: ignore[abstract, arg-type]  # wrong on purpose
