"""An MSNAS search on a real, small data folder: its window, its population, candidates on their own, and resumption."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import nn

from nasdet.arch import Card, load_card
from nasdet.data import DataFolder
from nasdet.engine import distributed, one_shot
from nasdet.engine import search_msnas as search_module
from nasdet.engine.checkpoint import load_checkpoint
from nasdet.engine.evaluate import evaluate
from nasdet.engine.one_shot import digest
from nasdet.engine.optim import make_optimizer
from nasdet.engine.search_msnas import MSNASSearchConfig, _MSNASRun, deviations, search_msnas
from nasdet.engine.step import train_step
from nasdet.search.evolution import PRESETS
from nasdet.spaces.assemble import ModelConfig, build_model, searched_fields
from nasdet.spaces.msnas import MSNASSpace

Candidates = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def config(cases: dict[str, Any]) -> MSNASSearchConfig:
    found: MSNASSearchConfig = cases["msnas"].config
    return found


@pytest.fixture(scope="module")
def whole(finished: Callable[[str], Path]) -> Path:
    return finished("msnas")


def run_of(config: MSNASSearchConfig, data: DataFolder, source: Path | None = None) -> _MSNASRun:
    """The moving parts of a search, with the supernet of a finished one."""
    run = _MSNASRun(config, data, torch.device("cpu"))
    if source is not None:
        run.model.load_state_dict(load_checkpoint(source / "checkpoints" / "last.pt")["state"]["model"])
    return run


def test_the_papers_settings() -> None:
    paper = MSNASSearchConfig()
    steps = paper.total_steps(32 * 1000)
    schedule = paper.schedule(steps)
    assert steps == 48_000
    rates = [schedule.at(step) for step in (0, 1000, 41_999, 42_000, 46_999, 47_000)]
    assert rates == pytest.approx([0.00125, 0.04, 0.04, 0.004, 0.004, 0.0004])
    assert (paper.batch, paper.momentum, paper.weight_decay, paper.norm) == (32, 0.9, 1e-4, "sync_bn")
    assert (paper.tuning_steps, paper.tuning_lr, paper.tolerance, paper.top) == (100, 0.004, 0.01, 5)
    assert (paper.population, paper.generations) == (50, 21)
    with torch.device("meta"):
        model: Any = build_model(paper.model(("thing",)), backbone=paper.search_space().supernet)
    trunk = model.boxes.head.trunk
    assert len([m for m in trunk.convs if isinstance(m, nn.Conv2d)]) == 2 and len(trunk.fcs) == 1
    assert any(isinstance(m, nn.SyncBatchNorm) for m in trunk.modules())
    assert any(isinstance(m, nn.SyncBatchNorm) for m in model.backbone.modules())
    assert [head["conv"].out_channels for head in model.rpn.heads] == [256] * 5


def test_windows_are_those_of_the_paper(data: DataFolder) -> None:
    """1 % of the variant's FLOPs at 832 x 1280, which all of the published R18 nets keep."""
    (macs, parameters) = _constraints(MSNASSearchConfig())
    assert (macs.low, macs.high) == pytest.approx((0.99 * 145.45e9, 1.01 * 145.45e9))
    assert (parameters.low, parameters.high) == (None, None)
    for rank in range(1, 6):
        card = load_card(f"msnas-r18-{rank}")
        assert not macs.excess(macs.cost(card)) and macs.cost(card) == MSNASSpace("r18").macs(card)
    assert [_constraints(MSNASSearchConfig(variant=name))[0].high for name in ("r34", "r50")] == pytest.approx(
        [1.01 * 182.20e9, 1.01 * 197.33e9]
    )
    assert _constraints(MSNASSearchConfig(blocks=5))[0].high is None


def _constraints(config: MSNASSearchConfig) -> list[Any]:
    from nasdet.engine.search_msnas import constraints

    return constraints(config, config.search_space())


def test_children_are_the_papers(data: DataFolder, config: MSNASSearchConfig) -> None:
    run = run_of(config, data)
    run.config = dataclasses.replace(config, population=50)
    assert run.children() == PRESETS["msnas"]["offspring"]
    run.config = dataclasses.replace(config, population=1, parents=1)
    assert [group.count for group in run.children()] == [1, 1]


def test_population(whole: Path, config: MSNASSearchConfig, candidates: Candidates) -> None:
    space, found = config.search_space(), candidates(whole)
    assert 6 <= len(found) <= 10
    assert len({Card.from_json(one["card"]).key for one in found}) == len(found), "none twice"
    for one in found:
        card = Card.from_json(one["card"])
        space.check(card)
        assert one["costs"] == {"macs": space.macs(card, (64, 64), 8), "parameters": space.parameters(card)}
        assert abs(one["costs"]["macs"] / 16e6 - 1) <= 0.3 and 0 <= one["score"] <= 1
    run = json.loads((whole / "run.json").read_text())
    assert run["space"] == space.settings() and run["limits"]["macs"] == pytest.approx([11.2e6, 20.8e6])
    best = max(found, key=lambda one: one["score"])
    card = load_card(whole / "card.json")
    assert (card.genotype, card.name) == (best["card"]["genotype"], "msnas-r18-faster_rcnn-seed3")
    model = ModelConfig.load(whole / "model.json")
    assert model.card == card and model.options["box_head"] == "2conv1fc" and model.fpn_channels == 16


def test_paths_are_uniform_over_encoders_with_heads(config: MSNASSearchConfig, data: DataFolder) -> None:
    """One random draw a step, the same in every process and after a resumption."""
    run, other = run_of(config, data), run_of(config, data)
    drawn = [run.draw(step) for step in range(300)]
    assert [card.key for card in reversed(drawn)] == [other.draw(step).key for step in reversed(range(300))]
    assert len({card.key for card in drawn}) > 200
    rng = Random(0)
    shares = [
        sum(card.genotype["strides"][0] == 1 for card in cards) / 300
        for cards in (drawn, [run.space.random(rng) for _ in range(300)])
    ]
    assert abs(shares[0] - shares[1]) < 0.15


def test_a_path_takes_the_detector_along(config: MSNASSearchConfig, data: DataFolder) -> None:
    run = run_of(config, data)
    model: Any = run.model
    for step in range(5):
        card = run.draw(step)
        run.activate(card)
        heads = tuple(card.genotype["heads"])
        assert model.rpn.anchors.strides == model.boxes.pooler.strides == heads
        assert tuple(model.neck.strides.values()) == tuple(run.supernet.strides.values()) == heads  # type: ignore[operator, union-attr]  # the supernet's
        assert model.rpn.anchors.sizes == ((32,), (64,), (128,), (256,), (512,))


def test_a_candidate_is_trained_on_its_own(
    whole: Path, config: MSNASSearchConfig, data: DataFolder, candidates: Candidates
) -> None:
    """Its score is that of its own detector with the shared weights, trained as it was: nothing else reaches it."""
    candidate = candidates(whole)[-1]
    card, search = Card.from_json(candidate["card"]), run_of(config, data, whole)
    net: Any = build_model(dataclasses.replace(search.model_config, **searched_fields(card)))
    shared = {k: v for k, v in search.model.state_dict().items() if not k.startswith("backbone.")}
    net.load_state_dict(net.state_dict() | shared)
    search.space.inherit(net.backbone, search.supernet, card)
    net.to(memory_format=search.format).train()
    optimizer = make_optimizer("adamw", net, 0.002, momentum=config.momentum, weight_decay=config.weight_decay)
    chance = hashlib.sha256(f"{config.seed} {card.key}".encode()).digest()
    one_shot.seed_everything(int.from_bytes(chance[:4], "big"))
    for batch in search.batches(search.learnt, seed=config.seed, start=0, steps=2):
        batch = batch.to(search.device, search.format)
        train_step(distributed.LossModule(net), optimizer, batch, 0.002, clip=config.clip)
    size = {"short": 64, "long": 64, "batch": config.eval_batch, "workers": 0}
    found = evaluate(net, search.scored, **size, channels_last=search.format is torch.channels_last, progress=False)
    assert found["AP"] == candidate["score"]


def test_a_candidates_batch_may_come_in_parts(
    whole: Path,
    config: MSNASSearchConfig,
    data: DataFolder,
    monkeypatch: pytest.MonkeyPatch,
    candidates: Candidates,
) -> None:
    """As many images and steps, of which the device sees fewer at a time."""
    seen: dict[int | None, list[list[int]]] = {}
    sums: dict[int | None, list[float]] = {}
    for size in (None, 2, 1):
        parted = dataclasses.replace(config, tuning_batch=4, tuning_micro_batch=size)
        search = run_of(parted, data, whole)
        steps, pictures = seen.setdefault(size, []), sums.setdefault(size, [])

        def step(module: nn.Module, optimizer: Any, batch: Any, *rest: Any, **options: Any) -> Any:
            steps.append([len(part.images) for part in batch])  # noqa: B023  # called in this round of the loop
            for part in batch:
                pictures.extend(part.images.double().sum((1, 2, 3)).tolist())  # noqa: B023
            return train_step(module, optimizer, batch, *rest, **options)

        monkeypatch.setattr(search_module, "train_step", step)
        search.activate(card := Card.from_json(candidates(whole)[0]["card"]))
        search.adapt(card)
        assert all(torch.isfinite(value).all() for value in search.model.parameters())
    assert seen == {None: [[4], [4]], 2: [[2, 2], [2, 2]], 1: [[1] * 4, [1] * 4]}
    assert len(set(sums[1])) > 1 and sums[1] == pytest.approx(sums[None]) and sums[2] == pytest.approx(sums[None])
    with pytest.raises(ValueError, match="tuning_micro_batch must divide 4 images, got 3"):
        dataclasses.replace(config, tuning_batch=4, tuning_micro_batch=3)


def test_fitness_depends_on_the_card_alone(
    whole: Path, config: MSNASSearchConfig, data: DataFolder, candidates: Candidates
) -> None:
    """Weights that a candidate learnt are discarded."""
    search = run_of(config, data, whole)
    before, found = digest(search.model.state_dict()), candidates(whole)
    for index in (3, 0, 3):
        torch.rand(3)
        assert search.fitness(Card.from_json(found[index]["card"])) == found[index]["score"]
        assert digest(search.model.state_dict()) == before
    search.activate(card := Card.from_json(found[0]["card"]))
    search.adapt(card)
    assert digest(search.model.state_dict()) != before


@pytest.mark.parametrize("at", [0, 2, 5])
def test_killed_in_the_search(
    at: int,
    run: Callable[..., Any],
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    candidates: Candidates,
) -> None:
    """After a candidate was trained, before its score was known."""
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
            run("msnas", tmp_path, resume=True)
    assert sum(one["score"] is not None for one in candidates(tmp_path)) == at
    run("msnas", tmp_path, resume=True)
    for name in ("evolution.json", "card.json", "model.json", "cost.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()


def test_killed_in_the_training(
    run: Callable[..., Any], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, count = one_shot.train_step, 0

    def killed(*args: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count > 6:
            raise RuntimeError("killed")
        return step(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(one_shot, "train_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            run("msnas", tmp_path)
    run("msnas", tmp_path, resume=True)
    assert (tmp_path / "evolution.json").read_bytes() == (whole / "evolution.json").read_bytes()


def test_one_stage_and_bottlenecks(config: MSNASSearchConfig, data: DataFolder, tmp_path: Path) -> None:
    small = {"steps": 2, "population": 2, "parents": 1, "generations": 1, "tuning_steps": 0, "target_macs": None}
    changed = dataclasses.replace(
        config, **small, detector="fcos", tower_convs=1, block="bottleneck", channels=8, norm="gn"
    )
    card = search_msnas(changed, data, tmp_path, progress=False)
    assert card.settings == {"channels": 8, "block": "bottleneck"} and card.name == "msnas-r18-fcos-seed3"


def test_a_window_out_of_reach_is_refused_before_anything_is_written(
    config: MSNASSearchConfig, data: DataFolder, tmp_path: Path
) -> None:
    least, most = config.search_space().macs_range((64, 64), 8)
    assert 1.01e6 < least < 16e6 < most
    with pytest.raises(ValueError, match=f"macs must be within 990000 to 1010000, reachable are {least} to {most}"):
        search_msnas(
            dataclasses.replace(config, target_macs=1e6, tolerance=0.01), data, tmp_path / "run", progress=False
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("changes", [{"blocks": 6}, {"channels": 24}, {"norm": "gn"}, {"rpn_channels": 12}], ids=str)
def test_another_supernet_is_refused(
    changes: dict[str, Any], config: MSNASSearchConfig, data: DataFolder, whole: Path, tmp_path: Path
) -> None:
    name, value = next(iter(changes.items()))
    other = dataclasses.replace(config, **changes, supernet=str(whole), target_macs=None)
    with pytest.raises(ValueError, match=f"its supernet must have {name} {value}, got {getattr(config, name)}"):
        search_msnas(other, data, tmp_path, progress=False)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "variant": ({"variant": "r101"}, "variant must be one of r18, r34, r50, got 'r101'"),
    "blocks": ({"blocks": 1}, "blocks must be at least 2, got 1"),
    "block": ({"block": "wide"}, "block must be one of basic, bottleneck, got 'wide'"),
    "epochs": ({"epochs": 0}, "epochs must be at least 1, got 0"),
    "rpn": ({"rpn_channels": 0}, "rpn_channels must be at least 1, got 0"),
    "tuning": ({"tuning_steps": -1}, "tuning_steps must be at least 0, got -1"),
    "rate": ({"tuning_lr": 0.0}, "tuning_lr must be a positive number, got 0.0"),
    "size": ({"macs_height": 800}, r"size must be \(height, width\) divisible by 64, got \(800, 64\)"),
    "target": ({"target_macs": -1.0}, "target of macs must be positive"),
    "target-0": ({"target_macs": 0.0}, "target of macs must be positive"),
    "tolerance": ({"tolerance": 1.0}, r"tolerance in \(0, 1\)"),
    "parents": ({"parents": 5}, "parents must not exceed the population of 4, got 5"),
    "detector": ({"detector": "yolo"}, "detector must be one of fcos, "),
}


@pytest.mark.parametrize(("changes", "words"), BAD.values(), ids=BAD)
def test_bad_settings(changes: dict[str, Any], words: str, config: MSNASSearchConfig) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(config, **changes)


def test_deviations_tell_everything_that_differs(data: DataFolder, config: MSNASSearchConfig) -> None:
    found = "\n".join(deviations(config, data, False))
    for words in (
        "steps: 12; the paper: 48 epochs",
        "blocks: 5; the paper: 13",
        "channels: 16; the paper: 180",
        "MACs of encoder and RPN: 1.6e+07; the paper: 1.4545e+11",
        "images in such a step: 2; the paper: 32",
        "the paper: COCO",
    ):
        assert words in found
    assert "None" not in found
    paper = deviations(MSNASSearchConfig(), data, True)
    assert len(paper) == 7 and paper[-1] == "pretrained supernet; the paper: random weights"
