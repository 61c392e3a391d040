"""What every search promises: resumed as if never stopped, never on test images, never over another run."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nasdet.arch import load_card
from nasdet.data import DataFolder, DetectionDataset, Split, TestSplitError, open_data
from nasdet.engine import hit_config, search, search_detnas, search_msnas, search_nats
from nasdet.engine.checkpoint import load_checkpoint
from nasdet.engine.search import search_fad
from nasdet.engine.supernet import SupernetRun
from nasdet.search.gradient import Bilevel
from nasdet.spaces import space_class
from nasdet.spaces.assemble import ModelConfig, build_model

Records = Callable[[Path, str], list[dict[str, Any]]]
FILES = ("card.json", "model.json", "cost.json", "split.json")


def test_run_folder(name: str, finished: Callable[[str], Path], cases: dict[str, Any], data: DataFolder) -> None:
    out, config = finished(name), cases[name].config
    run = json.loads((out / "run.json").read_text())
    verb = cases[name].search.__name__.replace("_", " ")
    assert (run["verb"], run["status"], run["seed"]) == (verb, "done", 3)
    assert run["arguments"] == dataclasses.asdict(config)
    assert Split.load(out / "split.json") == data.split
    # The pyramids of MSNAS and Hit-Detector always have five levels.
    other = {"msnas": "blocks: 5; the paper: 13", "hit": "layout of the backbone: tiny; the paper: released"}
    wanted = other.get(name.split()[0]) or f"pyramid levels: {config.levels}; the paper: 5"
    assert any(wanted in line for line in run["deviations"])


def test_the_card_is_the_derived_detectors(name: str, finished: Callable[[str], Path], cases: dict[str, Any]) -> None:
    out, config = finished(name), cases[name].config
    card, model = load_card(out / "card.json"), ModelConfig.load(out / "model.json")
    config.search_space().check(card)
    assert card.source["search"] == f"nasdet {cases[name].search.__name__.replace('_', ' ')}"
    split = Split.load(out / "split.json")
    assert (card.source["split"], card.source["split_seed"]) == (split.sha256, split.seed)
    assert (model.card, model.detector, model.num_classes) == (card, config.detector, 10)
    assert space_class(card.method).describe(card)
    parts = json.loads((out / "cost.json").read_text())["parts"]
    assert sum(part["parameters"] for part in parts) == sum(p.numel() for p in build_model(model).parameters())
    # A neck that only passes on has neither parameters nor MACs.
    assert all(part["macs"] > 0 for part in parts if part["parameters"]), "heads of two-stage detectors count too"


@pytest.mark.parametrize(
    ("name", "at"),
    [
        *(("fad", at) for at in (1, 3, 5)),
        *(("nats", at) for at in (1, 2, 5)),
        *(("hit", at) for at in (1, 3)),
        ("fad in a mask head", 3),
        ("nats in two stages", 3),
        ("hit in one stage", 5),
    ],
    indirect=["name"],
    ids=lambda value: f"killed-in-step-{value}" if isinstance(value, int) else value,
)
def test_resume_equals_never_stopped(
    name: str,
    at: int,
    run: Callable[..., Any],
    finished: Callable[[str], Path],
    records: Records,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, step = finished(name), Bilevel.weight_step

    def killed(self: Bilevel, index: int, loss: Any) -> Any:
        if index == at:
            raise RuntimeError("killed")
        return step(self, index, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Bilevel, "weight_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run(name, tmp_path)
    info = json.loads((tmp_path / "run.json").read_text())
    assert (info["status"], info["error"]) == ("failed", "killed") and not (tmp_path / "card.json").exists()
    torch.manual_seed(99)
    run(name, tmp_path, resume=True)
    for record in ("metrics.jsonl", "alphas.jsonl"):
        assert records(tmp_path, record) == records(whole, record)
    for file in (*FILES, *(("erf.json",) if name.startswith("nats") else ())):
        assert (tmp_path / file).read_bytes() == (whole / file).read_bytes()
    ours, theirs = (load_checkpoint(out / "checkpoints" / "last.pt")["state"] for out in (tmp_path, whole))
    assert ours["model"].keys() == theirs["model"].keys()
    assert all(torch.equal(value, theirs["model"][key]) for key, value in ours["model"].items())


@pytest.mark.parametrize("name", ["fad", "nats", "detnas", "msnas", "hit"], indirect=True)
def test_a_run_is_not_overwritten(
    name: str, run: Callable[..., Any], finished: Callable[[str], Path], cases: dict[str, Any], folder: Path
) -> None:
    whole = finished(name)
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="already holds a run"):
        run(name, whole)
    with pytest.raises(ValueError, match=cases[name].differs):
        run(name, whole, resume=True, change=cases[name].another)
    with pytest.raises(ValueError, match="split.json: split must be the run's own"):
        run(name, whole, data=open_data(folder, seed=1), resume=True)
    assert before == {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}


HOLDER = """
import fcntl, sys, time
with open(sys.argv[1], "ab") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("name", ["fad", "detnas"], indirect=True)
def test_a_run_has_one_writer(name: str, run: Callable[..., Any], finished: Callable[[str], Path]) -> None:
    whole = finished(name)
    command = [sys.executable, "-c", HOLDER, str(whole / "run.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None and holder.stdout.readline() == "held\n"
            before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
            with pytest.raises(ValueError, match="is being written by another process"):
                run(name, whole, resume=True)
            assert before == {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
        finally:
            holder.kill()


class Cheating(DataFolder):
    """A folder whose search parts are test images."""

    def search_val(self) -> DetectionDataset:
        return self.test()


class Mislabelled(DataFolder):
    """Test images that call themselves something else."""

    def search_train(self) -> DetectionDataset:
        part = self.test()
        part.role = "search-train"
        return part


@pytest.mark.parametrize("kind", [Cheating, Mislabelled])
def test_test_images_are_refused(
    name: str, kind: type[DataFolder], run: Callable[..., Any], data_with_masks: DataFolder, tmp_path: Path
) -> None:
    fields = {field.name: getattr(data_with_masks, field.name) for field in dataclasses.fields(DataFolder)}
    with pytest.raises(TestSplitError, match="choosing an architecture on the test split is refused"):
        run(name, tmp_path / "run", data=kind(**fields))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["fad", "nats", "hit"], indirect=True)
def test_one_process(name: str, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=f"search {name} must run in one process, got 2"):
        run(name, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_masks_must_be_there(cases: dict[str, Any], data: DataFolder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="data must give masks for mask_scoring_rcnn"):
        search_fad(cases["fad in a mask head"].config, data, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


BAD: dict[str, list[tuple[dict[str, Any], str]]] = {
    "fad": [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"arch_lr": float("nan")}, "arch_lr must be a positive number, got nan"),
        ({"space": "everything"}, "subset must be one of"),
        ({"score": "best"}, "score must be 'softmax' or 'alpha', got 'best'"),
        ({"name": "a/b"}, "name must be letters"),
        ({"detector": "faster_rcnn"}, "detector must have towers or a mask trunk to search, got 'faster_rcnn'"),
        ({"part": "mask_trunk"}, "part must be towers for fcos, got 'mask_trunk'"),
        ({"detector": "mask_rcnn", "part": "towers"}, "part must be mask_trunk for mask_rcnn, got 'towers'"),
        ({"detector": "yolo"}, "detector must be one of"),
    ],
    "nats": [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"frozen_epochs": 3}, "frozen_epochs must be in 0..2, got 3"),
        ({"arch_lr": float("nan")}, "arch_lr must be a positive number, got nan"),
        ({"final_lr": 0.02}, "final_lr must be between 0 and lr 0.01, got 0.02"),
        ({"clip": 0.0}, "clip must be a positive number or None, got 0.0"),
        ({"dilations": "Q"}, "dilations must be one of A, B, C"),
        ({"name": "a/b"}, "name must be letters"),
        ({"norm": "ln"}, "norm must be one of"),
    ],
    "hit": [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"stage": "both"}, "stage must be one of screen, joint, all, got 'both'"),
        ({"detector": "fcos"}, "detector must be one of faster_rcnn, retinanet, got 'fcos'"),
        ({"layout": "huge"}, "layout must be one of released, paper, tiny, got 'huge'"),
        ({"frozen_epochs": 6}, "frozen_epochs must be in 0..5, got 6"),
        ({"norm": "frozen_bn"}, "norm must be one that learns"),
        ({"norm": "ln"}, "norm must be one of"),
        ({"target": 0.0}, "target must be a positive number, got 0.0"),
        ({"cost_weight": -1.0}, "cost_weight must be at least 0, got -1.0"),
        ({"memory": "none"}, "memory must be one of full, recompute, sampled, got 'none'"),
        ({"parts": ["towers"]}, "parts must be among backbone, neck, head, in this order, for faster_rcnn"),
        ({"parts": ["neck", "backbone"]}, "in this order"),
        ({"parts": []}, "parts must be different ones"),
        ({"candidates": ["conv_k8_d1"]}, "candidates of backbone: operation must be .*, got 'conv_k8_d1' at 0"),
        ({"candidates": {"backbone": ["conv_k3_d1"]}}, "candidates must have neck, got backbone"),
        ({"stage": "screen", "keep": 4, "removal_epoch": 4}, "keep must be in 1..3, got 4"),
        ({"stage": "all", "keep": 2}, "removal_epoch must be in 3..6, got 7"),
        ({"stage": "all", "keep": 2, "removal_epoch": 2}, "removal_epoch must be in 3..6, got 2"),
        ({"name": "a/b"}, "name must be letters"),
    ],
}


@pytest.mark.parametrize(("name", "changes", "words"), [(m, *bad) for m in BAD for bad in BAD[m]], indirect=["name"])
def test_bad_settings(name: str, changes: dict[str, Any], words: str, cases: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(cases[name].config, **changes)


RATES: dict[str, tuple[Any, Any, Any, str]] = {
    "fad": (search, search.FADSearchConfig, {"lr": 0.001}, "0.004 for 1 images a step; the paper: 0.004 for 4"),
    "nats": (
        search_nats,
        search_nats.NATSSearchConfig,
        {"lr": 0.00125, "final_lr": 0.00005},
        "0.01 for 1 images a step; the paper: 0.01 for 8",
    ),
    "detnas": (
        search_detnas,
        search_detnas.DetNASSearchConfig,
        {"lr": 0.00125},
        "0.02 for 1 images a step; the paper: 0.02 for 16",
    ),
    "msnas": (
        search_msnas,
        search_msnas.MSNASSearchConfig,
        {"lr": 0.00125, "tuning_lr": 0.000125},
        "0.04 for 1 images a step; the paper: 0.04 for 32",
    ),
    "hit": (
        hit_config,
        hit_config.HitSearchConfig,
        {"lr": 0.00125},
        "0.04 for 1 images a step; the paper: 0.04 for 32",
    ),
}


@pytest.mark.parametrize("name", RATES)
def test_a_rate_is_the_papers_for_an_image(name: str, data: DataFolder) -> None:
    module, settings, scaled, words = RATES[name]
    kept = [line for line in module.deviations(settings(batch=1), data, True) if "learning rate" in line]
    assert len(kept) == len(scaled) and words in kept[0]
    assert not [line for line in module.deviations(settings(batch=1, **scaled), data, True) if "learning rate" in line]
    assert any("learning rate" in line for line in module.deviations(settings(lr=0.5), data, True))


def test_a_search_must_say_what_it_does() -> None:
    class Half(SupernetRun):
        verb = "search half"

    with pytest.raises(TypeError, match="abstract"):
        Half(None, None, None)  # type: ignore[abstract, arg-type]  # wrong on purpose
