"""A DetNAS search on a real, small data folder: its supernet, its population, killed and resumed, and its records."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nasdet.arch import Card, load_card
from nasdet.data import DataFolder
from nasdet.engine import one_shot
from nasdet.engine import search_detnas as search_module
from nasdet.engine.checkpoint import digest, load_checkpoint
from nasdet.engine.evaluate import evaluate
from nasdet.engine.pretrain import PretrainConfig
from nasdet.engine.recalibrate import recalibrate
from nasdet.engine.search_detnas import (
    RECALIBRATIONS,
    DetNASSearchConfig,
    Recalibration,
    _DetNASRun,
    deviations,
    offspring,
    search_detnas,
)
from nasdet.search.evolution import PRESETS
from nasdet.spaces.assemble import ModelConfig, build_model, searched_fields

Finished = Callable[[str], Path]


@pytest.fixture(scope="module")
def config(cases: dict[str, Any]) -> DetNASSearchConfig:
    found: DetNASSearchConfig = cases["detnas"].config
    return found


@pytest.fixture(scope="module")
def whole(finished: Finished) -> Path:
    return finished("detnas")


def state(out: Path) -> Any:
    return json.loads((out / "evolution.json").read_text())["state"]


def files(out: Path) -> dict[str, bytes]:
    names = ["evolution.json", "card.json", "model.json", "cost.json", "cards/1.json", "cards/2.json"]
    return {name: (out / name).read_bytes() for name in names}


def run_of(config: DetNASSearchConfig, data: DataFolder, source: Path | None = None) -> _DetNASRun:
    """The moving parts of a search, with the supernet of a finished one."""
    run = _DetNASRun(config, data, torch.device("cpu"))
    if source is not None:
        run.model.load_state_dict(load_checkpoint(source / "checkpoints" / "last.pt")["state"]["model"])
    return run


def test_the_papers_settings() -> None:
    paper = DetNASSearchConfig()
    schedule = paper.schedule(90_000)
    rates = [schedule.at(step) for step in (0, 500, 59_999, 60_000, 80_000)]
    assert rates == pytest.approx([0.02 / 3, 0.02, 0.02, 0.002, 0.0002])
    assert dataclasses.replace(paper, detector="retinanet").schedule(90_000).lr == 0.01
    evaluations = paper.population * paper.generations
    assert (evaluations, paper.parents, paper.val_images) == (1000, 10, 5000)
    assert RECALIBRATIONS == {"paper": Recalibration(500, 4, None), "released": Recalibration(4000, 8, 0.1)}
    assert (paper.recalibration, paper.recalibration_images) == ("paper", None)
    assert PretrainConfig().recalibration_images == 500
    assert offspring("paper", 50) == PRESETS["detnas"]["offspring"]
    assert offspring("released", 50) == PRESETS["detnas-released"]["offspring"]
    head: Any = build_meta(paper).boxes.head.trunk
    assert len([m for m in head.convs if isinstance(m, nn.Conv2d)]) == 4 and len(head.fcs) == 1
    assert any(isinstance(m, nn.SyncBatchNorm) for m in head.modules())


def build_meta(config: DetNASSearchConfig) -> Any:
    with torch.device("meta"):
        return build_model(config.model(("thing",)))


def test_population(whole: Path, config: DetNASSearchConfig, data: DataFolder) -> None:
    space = config.search_space()
    generations = state(whole)["generations"]
    assert [len(generation) for generation in generations] == [4, 4]
    everyone = [candidate for generation in generations for candidate in generation]
    keys = {Card.from_json(candidate["card"]).key for candidate in everyone}
    assert len(keys) == 8, "none twice"
    for candidate in everyone:
        card = Card.from_json(candidate["card"])
        space.check(card)
        assert candidate["costs"] == {
            "macs": space.macs(card.genotype),
            "parameters": space.parameters(card.genotype),
        }
        assert 0 < candidate["score"] <= 1
    assert len({candidate["score"] for candidate in everyone}) == 8, "and no two alike, so that a wrong one shows"
    stored = {path.stem: json.loads(path.read_text())["score"] for path in (whole / "scores").glob("*/*.json")}
    assert stored == {Card.from_json(c["card"]).key: c["score"] for c in everyone}
    run = json.loads((whole / "run.json").read_text())
    assert run["space"] == space.settings() and run["limits"]["macs"] == [None, None]
    assert run["images"] == {"learnt": 4, "scored": 4}


def test_cards(whole: Path, config: DetNASSearchConfig) -> None:
    card = load_card(whole / "card.json")
    everyone = [c for generation in state(whole)["generations"] for c in generation]
    best = max(everyone, key=lambda c: c["score"])
    assert card.genotype == best["card"]["genotype"] and card.source["score"] == best["score"]
    assert (card.name, card.source["evaluations"]) == ("detnas-tiny-retinanet-seed3", 8)
    places = [load_card(whole / "cards" / f"{place}.json") for place in (1, 2)]
    assert places[0].genotype == card.genotype and places[0].name == "detnas-tiny-retinanet-seed3-1"
    assert places[0].source["score"] >= places[1].source["score"] and places[0].key != places[1].key
    assert not (whole / "cards" / "3.json").exists()
    model = ModelConfig.load(whole / "model.json")
    assert model.card == card and isinstance(model.backbone, dict) and model.norm == "sync_bn"


@pytest.mark.parametrize("at", [3, 8, 20])
def test_killed_in_the_training(
    at: int, run: Callable[..., Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = one_shot.train_step
    count = 0

    def killed(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count > at:
            raise RuntimeError("killed")
        return step(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(one_shot, "train_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run("detnas", tmp_path)
    torch.manual_seed(99)
    run("detnas", tmp_path, resume=True)
    assert files(tmp_path) == files(whole)


def test_sigterm_in_the_search_is_an_interruption(
    run: Callable[..., Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoints").mkdir()
    for name in ("checkpoints/last.pt", "split.json", "metrics.jsonl", "run.json"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    reached: list[int] = []

    def default(number: int, frame: Any) -> None:
        reached.append(number)  # where the process would have ended
        raise RuntimeError("terminated")

    def terminated(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **options)

    before = signal.signal(signal.SIGTERM, default)
    try:
        monkeypatch.setattr(one_shot, "evaluate", terminated)
        with pytest.raises(KeyboardInterrupt):
            run("detnas", tmp_path, resume=True)
        assert signal.getsignal(signal.SIGTERM) is default and not reached
    finally:
        signal.signal(signal.SIGTERM, before)
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.parametrize("at", [0, 2, 3, 4, 7])
def test_killed_in_the_search(
    at: int, run: Callable[..., Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of an evaluation: after the norms' statistics were changed, before the score was known."""
    (tmp_path / "checkpoints").mkdir()
    for name in ("checkpoints/last.pt", "split.json", "metrics.jsonl", "run.json"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    count = 0

    def killed(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count > at:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(one_shot, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            run("detnas", tmp_path, resume=True)
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted"
    told = [c for generation in state(tmp_path)["generations"] for c in generation if c["score"] is not None]
    assert len(told) == at and not (tmp_path / "card.json").exists()
    calls = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return evaluate(*args, **options)

    monkeypatch.setattr(one_shot, "evaluate", counted)
    run("detnas", tmp_path, resume=True)
    assert calls == 8 - at, "what is known is not evaluated again"
    assert files(tmp_path) == files(whole)
    run("detnas", tmp_path, resume=True)
    assert calls == 8 - at and files(tmp_path) == files(whole), "nothing is left to do"


def test_a_score_that_was_stored_and_not_told(run: Callable[..., Any], whole: Path, tmp_path: Path) -> None:
    """Killed between the two files: the search begins anew, and takes what is stored."""
    for path in [*whole.rglob("*.json"), *whole.rglob("*.pt"), *whole.rglob("*.jsonl")]:
        target = tmp_path / path.relative_to(whole)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (tmp_path / "evolution.json").unlink()
    run("detnas", tmp_path, resume=True)
    assert files(tmp_path) == files(whole)


def test_fitness_depends_on_the_card_alone(whole: Path, config: DetNASSearchConfig, data: DataFolder) -> None:
    """Not on what was scored before, nor on any generator; and the supernet stays as it is."""
    search = run_of(config, data, whole)
    before = digest(search.model.state_dict())
    generations = state(whole)["generations"]
    candidates = [c for generation in generations for c in generation]
    for candidate in (candidates[5], candidates[0], candidates[5], candidates[2]):
        torch.rand(3)
        assert search.fitness(Card.from_json(candidate["card"])) == candidate["score"]
        assert digest(search.model.state_dict()) == before
    assert all(parameter.grad is None for parameter in search.model.parameters())


def test_fitness_is_that_of_the_cards_own_detector(whole: Path, config: DetNASSearchConfig, data: DataFolder) -> None:
    """With the path's weights, and statistics that it gets by itself on the same images."""
    candidate = state(whole)["generations"][1][0]
    card, search = Card.from_json(candidate["card"]), run_of(config, data, whole)
    net: Any = build_model(dataclasses.replace(search.model_config, **searched_fields(card)))
    shared = {k: v for k, v in search.model.state_dict().items() if not k.startswith("backbone.")}
    net.load_state_dict(net.state_dict() | shared)
    search.space.inherit(net.backbone, search.supernet, card)
    batches = search.batches(search.learnt, seed=config.seed, start=0, steps=1, batch=4)
    net.to(memory_format=search.format)
    recalibrate(net, batches, forward=lambda batch: net(batch.images.to(memory_format=search.format)))
    size = {"short": 64, "long": 64, "batch": config.eval_batch}
    found = evaluate(net, search.scored, **size, channels_last=search.format is torch.channels_last, progress=False)
    assert found["AP"] == candidate["score"]


def test_paths_are_uniform_and_the_same_for_all(config: DetNASSearchConfig, data: DataFolder) -> None:
    one, same, other = (run_of(dataclasses.replace(config, seed=seed), data) for seed in (3, 3, 4))
    drawn = [one.draw(step).genotype for step in range(400)]
    assert drawn == list(reversed([same.draw(step).genotype for step in reversed(range(400))]))
    assert drawn[:3] != [other.draw(step).genotype for step in range(3)]
    for block in range(8):
        for choice in ("sh3", "sh5", "sh7", "xcep"):
            share = sum(path[block] == choice for path in drawn)
            assert abs(share - 100) < 4 * (400 * 3 / 16) ** 0.5


@pytest.mark.parametrize("recalibration", ["none", "released"])
def test_other_statistics(recalibration: str, config: DetNASSearchConfig, data: DataFolder, whole: Path) -> None:
    changed = dataclasses.replace(config, recalibration=recalibration, recalibration_images=12)
    search = run_of(changed, data, whole)
    norm: Any = search.supernet.conv1[1]
    before = norm.running_mean.clone()
    search.activate(card := search.draw(0))
    search.adapt(card)
    assert torch.equal(norm.running_mean, before) == (recalibration == "none")
    assert recalibration == "none" or int(norm.num_batches_tracked) == 2, "12 images in steps of 8"


STATISTICS: dict[str, tuple[Any, ...]] = {"paper": ("cumulative", 4, 125), "released": ("momentum", 0.1, 8, 500)}


@pytest.mark.parametrize("name", RECALIBRATIONS)
def test_statistics_are_measured_as_the_papers_are(
    name: str, config: DetNASSearchConfig, data: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """500 images in batches of 4 and their mean; or 500 batches of 8, however few the images, with momentum 0.1."""
    search = run_of(dataclasses.replace(config, recalibration=name, recalibration_images=None), data)
    found: list[Any] = []

    def batches(dataset: Any, *, steps: int, batch: int, **others: Any) -> Any:
        assert dataset is search.learnt
        return iter([(batch, steps)])

    def measure(model: nn.Module, batches: Any, *, mode: str, momentum: float, **others: Any) -> None:
        found.extend([mode, *([momentum] if mode == "momentum" else []), *next(batches)])

    monkeypatch.setattr(search, "learnt", range(600 if name == "paper" else 4))
    monkeypatch.setattr(search, "batches", batches)
    monkeypatch.setattr(search_module, "recalibrate", measure)
    search.adapt(search.draw(0))
    assert tuple(found) == STATISTICS[name]


def test_search_val_images(config: DetNASSearchConfig, data: DataFolder) -> None:
    """What is not needed to score learns; nothing does both, and no test image does either."""
    split = data.split
    few, fewer = (run_of(dataclasses.replace(config, val_images=n, seed=n), data) for n in (3, 2))
    for search, count in ((few, 3), (fewer, 2)):
        assert len(search.scored) == count and set(search.scored.image_ids) <= set(split.search_val)
        assert sorted([*search.learnt.image_ids, *search.scored.image_ids]) == list(split.train)
    assert set(fewer.scored.image_ids) < set(few.scored.image_ids), "whatever the seed"
    assert run_of(dataclasses.replace(config, val_images=9), data).learnt.image_ids == list(split.search_train)


def test_random_search_is_a_baseline(config: DetNASSearchConfig, data: DataFolder, whole: Path, tmp_path: Path) -> None:
    """As many, under the same limits, with the same supernet; without parents."""
    other = dataclasses.replace(config, algorithm="random", supernet=str(whole), seed=5, max_parameters=70_000.0)
    card = search_detnas(other, data, tmp_path, progress=False)
    everyone = [c for generation in state(tmp_path)["generations"] for c in generation]
    assert len(everyone) == 8 and {c["operator"] for c in everyone} <= {"random", "walk"}
    assert all(c["costs"]["parameters"] <= 70_000 for c in everyone)
    assert card.source["supernet"] == "whole" and not (tmp_path / "checkpoints").exists()
    run = json.loads((tmp_path / "run.json").read_text())
    assert any("the supernet is that of whole" in line for line in run["deviations"])
    with pytest.raises(ValueError, match="already holds a run: add --resume"):
        search_detnas(other, data, tmp_path, progress=False)
    assert search_detnas(other, data, tmp_path, resume=True, progress=False) == card
    with pytest.raises(ValueError, match=r"evolution.json was written by another search \(seed: 5 -> 6\)"):
        search_detnas(dataclasses.replace(other, seed=6), data, tmp_path, resume=True, progress=False)


def test_more_generations(config: DetNASSearchConfig, data: DataFolder, whole: Path, tmp_path: Path) -> None:
    """A finished search goes on; its candidates so far are those of the longer one."""
    shorter = dataclasses.replace(config, supernet=str(whole), generations=1)
    search_detnas(shorter, data, tmp_path, progress=False)
    assert state(tmp_path)["generations"] == state(whole)["generations"][:1]
    longer = dataclasses.replace(shorter, generations=2)
    search_detnas(longer, data, tmp_path, resume=True, progress=False)
    assert state(tmp_path)["generations"] == state(whole)["generations"]


def test_from_scratch(config: DetNASSearchConfig, data: DataFolder) -> None:
    scratch = dataclasses.replace(config, scratch=True)
    assert run_of(scratch, data).steps == 48
    assert any("DetNAS-scratch" in line for line in deviations(scratch, data, False))
    with pytest.raises(ValueError, match="weights must be None for a search from scratch, got net.pth"):
        _DetNASRun(scratch, data, torch.device("cpu"), None, "net.pth")


def test_pretrained_weights(config: DetNASSearchConfig, data: DataFolder, tmp_path: Path) -> None:
    """A supernet's own, by name, the classifier passed over; all of it learns."""
    torch.manual_seed(7)
    net = config.search_space().supernet(norm="bn")
    torch.save(net.state_dict() | {"fc.weight": torch.ones(2)}, tmp_path / "net.pth")
    search = _DetNASRun(config, data, torch.device("cpu"), None, tmp_path / "net.pth")
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in search.supernet.state_dict().items())
    assert all(parameter.requires_grad for parameter in search.supernet.parameters())
    assert not any("random supernet" in line for line in search.deviations())


def test_two_stages(config: DetNASSearchConfig, data: DataFolder, tmp_path: Path) -> None:
    """Faster R-CNN with the paper's head: its norms get statistics of their own too."""
    two = dataclasses.replace(config, detector="faster_rcnn", levels=4, steps=1, population=1, parents=1, generations=1)
    card = search_detnas(two, data, tmp_path, progress=False)
    model: Any = build_model(ModelConfig.load(tmp_path / "model.json"))
    assert len(model.boxes.head.trunk.fcs) == 1 and isinstance(model.boxes.head.trunk.convs[1], nn.SyncBatchNorm)
    search = run_of(two, data, tmp_path)
    norm: Any = search.model.boxes.head.trunk.convs[1]  # type: ignore[union-attr, index]  # a detector's parts
    before = norm.running_mean.clone()
    search.activate(card)
    search.adapt(card)
    assert not torch.equal(norm.running_mean, before)


def test_deviations_tell_everything_that_differs(data: DataFolder, config: DetNASSearchConfig) -> None:
    paper = deviations(DetNASSearchConfig(), data, True)
    assert len(paper) == 5 and any("the paper: COCO" in line for line in paper), "ours by design, and the data"
    assert len(deviations(DetNASSearchConfig(detector="retinanet", space="large"), data, True)) == 5
    changes: dict[str, Any] = {"amp": True, "shuffle": "halves", "offspring": "released", "recalibration": "none"}
    ours = deviations(dataclasses.replace(config, **changes), data, False)
    for words in (
        "steps of the supernet: 24; the paper: 90000",
        "population: 4; the paper: 50",
        "optimiser: adamw; the paper: sgd",
        "space: tiny; the paper: small",
        "shuffled by halves",
        "20 % random",
        "statistics of batch norms: none",
        "random supernet",
        "bfloat16",
    ):
        assert any(words in line for line in ours), words
