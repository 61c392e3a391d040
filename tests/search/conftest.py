"""Small searches on real digits, each run once for all tests of this folder."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nasdet.data import DataFolder, open_data, write_digits
from nasdet.engine import receptive_field
from nasdet.engine.hit_config import HitSearchConfig
from nasdet.engine.records import read_lines
from nasdet.engine.search import FADSearchConfig, search_fad
from nasdet.engine.search_detnas import DetNASSearchConfig, search_detnas
from nasdet.engine.search_hit import search_hit
from nasdet.engine.search_msnas import MSNASSearchConfig, search_msnas
from nasdet.engine.search_nats import NATSSearchConfig, search_nats

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for landscapes


@dataclass(frozen=True)
class Case:
    """One method on one detector; ``another`` is a setting that a resumed run must not change."""

    search: Callable[..., Any]
    config: Any
    another: dict[str, Any]
    differs: str
    masks: bool = False


FAD = FADSearchConfig(
    steps=6,
    batch=2,
    short_side=64,
    long_side=64,
    lr=0.01,
    arch_lr=0.05,
    space="subset1",
    backbone="resnet18",
    width=0.125,
    fpn_channels=12,
    levels=2,
    inner_channels=6,
    workers=0,
    log_every=2,
    checkpoint_every=2,
    seed=3,
)
NATS = NATSSearchConfig(
    steps=6,
    epochs=3,
    frozen_epochs=1,
    batch=2,
    short_side=64,
    long_side=64,
    lr=0.01,
    arch_lr=0.05,
    clip=20.0,
    dilations="A",
    channel_groups=2,
    detector="fcos",
    width=0.125,
    fpn_channels=12,
    levels=3,
    tower_convs=1,
    workers=0,
    log_every=1,
    checkpoint_every=2,
    seed=3,
)
DETNAS = DetNASSearchConfig(
    steps=24,
    batch=2,
    short_side=64,
    long_side=64,
    optimizer="adamw",
    lr=0.01,
    warmup_steps=None,
    clip=20.0,
    space="tiny",
    detector="retinanet",
    fpn_channels=12,
    levels=3,
    tower_convs=1,
    population=4,
    parents=2,
    generations=2,
    top=2,
    recalibration_images=4,
    workers=0,
    log_every=8,
    checkpoint_every=8,
    seed=3,
)
MSNAS = MSNASSearchConfig(
    steps=12,
    batch=2,
    short_side=64,
    long_side=64,
    optimizer="adamw",
    lr=0.005,
    clip=20.0,
    blocks=5,
    channels=16,
    rpn_channels=8,
    head_channels=16,
    norm="bn",
    target_macs=16e6,
    tolerance=0.3,
    macs_height=64,
    macs_width=64,
    tuning_steps=2,
    tuning_lr=0.002,
    population=4,
    parents=2,
    generations=2,
    top=2,
    workers=0,
    log_every=4,
    checkpoint_every=4,
    seed=3,
)
HIT = HitSearchConfig(
    steps=6,
    epochs=6,
    frozen_epochs=2,
    batch=2,
    short_side=64,
    long_side=64,
    lr=0.01,
    arch_lr=0.05,
    layout="tiny",
    fpn_channels=12,
    candidates=["ir_k3_d1_e1", "sep_k3_d2", "conv_k3_d1"],
    norm="bn",
    proposals=10,
    rois=64,
    workers=0,
    log_every=1,
    checkpoint_every=2,
    seed=3,
)
FAD_CHANGE: dict[str, Any] = {"another": {"arch_lr": 0.1}, "differs": "arch_lr: 0.05 -> 0.1"}
NATS_CHANGE: dict[str, Any] = {"another": {"channel_groups": 4}, "differs": "channel_groups: 2 -> 4"}
HIT_CHANGE: dict[str, Any] = {"another": {"cost_weight": 0.1}, "differs": "cost_weight: 0.01 -> 0.1"}
CASES = {
    "fad": Case(search_fad, FAD, **FAD_CHANGE),
    "nats": Case(search_nats, NATS, **NATS_CHANGE),
    "detnas": Case(search_detnas, DETNAS, another={"lr": 0.02}, differs="lr: 0.01 -> 0.02"),
    "msnas": Case(search_msnas, MSNAS, another={"tuning_steps": 3}, differs="tuning_steps: 2 -> 3"),
    "hit": Case(search_hit, HIT, **HIT_CHANGE),
    "fad in a mask head": Case(
        search_fad, replace(FAD, detector="mask_scoring_rcnn", levels=4), **FAD_CHANGE, masks=True
    ),
    "nats in two stages": Case(search_nats, replace(NATS, detector="faster_rcnn", levels=4), **NATS_CHANGE),
    "hit in one stage": Case(search_hit, replace(HIT, detector="retinanet", memory="sampled"), **HIT_CHANGE),
}


@pytest.fixture(scope="session", autouse=True)
def _small_fields() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(receptive_field, "SIZE", (96, 160))
        yield


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a few digits."""
    pytest.importorskip("sklearn", reason="the digits data set is made from scikit-learn's")
    return write_digits(tmp_path_factory.mktemp("data") / "digits", train=8, val=2, size=(64, 64))


@pytest.fixture(scope="session")
def data(folder: Path) -> DataFolder:
    return open_data(folder)


@pytest.fixture(scope="session")
def data_with_masks(folder: Path) -> DataFolder:
    return open_data(folder, masks=True)


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    """Every search in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def cases() -> dict[str, Case]:
    return CASES


@pytest.fixture(scope="session")
def run(data: DataFolder, data_with_masks: DataFolder) -> Callable[..., Any]:
    """``run(name, out, data=..., resume=..., change={...})``: one of the searches."""

    def search(
        name: str, out: Path, *, data: DataFolder = data, change: dict[str, Any] | None = None, **options: Any
    ) -> Any:
        case = CASES[name]
        folder = data_with_masks if case.masks and not data.trainval.masks else data
        return case.search(replace(case.config, **change or {}), folder, out, progress=False, **options)

    return search


@pytest.fixture(scope="session")
def finished(run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``finished(name)``: the folder of a search that was never stopped."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            out = tmp_path_factory.mktemp("runs") / "whole"
            run(name, out)
            made[name] = out
        return made[name]

    return of


@pytest.fixture(scope="session")
def records() -> Callable[[Path, str], list[dict[str, Any]]]:
    """``records(out, name)``: the lines of a record, but for their timings."""
    return lambda out, name: [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(out / name)]


@pytest.fixture(scope="session")
def candidates() -> Callable[[Path], list[dict[str, Any]]]:
    """``candidates(out)``: those of a run's evolution, in the order they came."""

    def of(out: Path) -> list[dict[str, Any]]:
        generations = json.loads((out / "evolution.json").read_text())["state"]["generations"]
        return [candidate for generation in generations for candidate in generation]

    return of


@pytest.fixture(scope="session")
def call() -> Callable[..., int]:
    """``call(verb, *words)``: a command."""

    def command(verb: ModuleType, *words: Any) -> int:
        parser = argparse.ArgumentParser()
        verb.configure(parser)
        return int(verb.run(**vars(parser.parse_args([str(word) for word in words]))))

    return command
