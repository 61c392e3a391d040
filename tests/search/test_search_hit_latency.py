"""A Hit-Detector search against measured milliseconds."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nasdet._files import read_json, write_json
from nasdet.data import DataFolder
from nasdet.engine.hit_config import HitSearchConfig
from nasdet.engine.search_hit import search_hit
from nasdet.measure import measure_table
from nasdet.spaces.hit import HitSpace
from nasdet.spaces.hit.latency import HitBlocks

Records = Callable[[Path, str], list[dict[str, Any]]]
PARTS = ("backbone", "neck", "head")


@pytest.fixture(scope="module")
def config(cases: dict[str, Any]) -> HitSearchConfig:
    found: HitSearchConfig = cases["hit"].config
    return found


def table_of_parameters(path: Path, space: HitSpace, per_ms: float = 1e6) -> str:
    """A latency table whose clock shows a millisecond for every ``per_ms`` parameters of a block."""
    clock = lambda call: sum(parameter.numel() for parameter in call.func.parameters()) / per_ms / 1e3 + 1e-9  # noqa: E731
    measure_table(HitBlocks(space, 10), (64, 64), path, rounds=1, warmup=0, timer=clock)
    return str(path)


def test_the_cost_may_be_measured_latency(
    config: HitSearchConfig, data: DataFolder, records: Records, tmp_path: Path
) -> None:
    """Of an injected clock that shows parameters: no layer takes the operation with the most, and they are recorded."""
    path = table_of_parameters(tmp_path / "ms.json", config.search_space())
    timed = dataclasses.replace(config, cost_weight=1.0, target=1e-6, latency_table=path)
    card = search_hit(timed, data, tmp_path / "run", progress=False)
    counts = config.search_space().parameters()
    for part in PARTS:
        for row, name in zip(counts.parts[part].rows, card.genotype[part], strict=True):
            assert row[name] < max(row.values())
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["cost"] == "milliseconds" and any("measured latency" in line for line in run["deviations"])
    assert not any("milliseconds are those of" in line for line in run["deviations"]), "it was measured here"
    assert run["cost_range"] == pytest.approx([value / 1e6 for value in counts.reachable()], rel=1e-3)
    lines = records(tmp_path / "run", "metrics.jsonl")[2:]
    totals = [sum(line[f"expected_{part}"] for part in PARTS) for line in lines]
    assert totals == sorted(totals, reverse=True) and run["cost_range"][0] < totals[-1] < totals[0]
    assert totals[0] < run["cost_range"][1]


def test_latency_tables_that_do_not_fit(config: HitSearchConfig, data: DataFolder, tmp_path: Path) -> None:
    space = config.search_space()
    fewer = table_of_parameters(tmp_path / "fewer.json", HitSpace(space.sizes, ["sep_k3_d2"]))
    for path, changes, words in (
        (fewer, {}, r"fewer.json: rows must be there for all .*'ir_k3_d1_e1 16>24 stride 2 at 1/2'"),
        (fewer, {"proposals": 20}, "fewer.json: space must be .*'proposals': 20"),
        (fewer, {"fpn_channels": 16}, "fewer.json: space must be .*'channels': 16"),
        (str(tmp_path / "none.json"), {}, "none.json"),
    ):
        with pytest.raises((ValueError, OSError), match=words):
            one = dataclasses.replace(config, latency_table=path, **changes)
            search_hit(one, data, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_table_of_another_device_is_told_and_another_table_is_another_search(
    config: HitSearchConfig, data: DataFolder, tmp_path: Path
) -> None:
    path = tmp_path / "ms.json"
    timed = dataclasses.replace(config, latency_table=table_of_parameters(path, config.search_space()))
    write_json(path, read_json(path) | {"device": "a phone"})
    search_hit(timed, data, tmp_path / "run", progress=False)
    deviations = read_json(tmp_path / "run" / "run.json")["deviations"]
    assert any(line.startswith("milliseconds are those of a phone; the search runs on ") for line in deviations)
    path.unlink()
    table_of_parameters(path, config.search_space(), per_ms=2e6)
    with pytest.raises(ValueError, match="cost_range"):
        search_hit(timed, data, tmp_path / "run", resume=True, progress=False)
