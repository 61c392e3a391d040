"""Searches under a limit of measured milliseconds, by made-up tables."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

from nasdet._files import write_json
from nasdet.data import DataFolder
from nasdet.engine.search_detnas import DetNASSearchConfig, search_detnas
from nasdet.engine.search_msnas import MSNASSearchConfig, search_msnas
from nasdet.measure.latency_table import Blocks, LatencyTable, Record, Setting
from nasdet.measure.machine import device_name
from nasdet.spaces.detnas.latency import DetNASBlocks
from nasdet.spaces.msnas import resolutions
from nasdet.spaces.msnas.latency import MSNASBlocks

Candidates = Callable[[Path], list[dict[str, Any]]]


def made_up(blocks: Blocks, path: Path, ms: Callable[[str], float], device: str = "a made-up machine") -> str:
    """A table as if measured on ``device``: every block takes as long as ``ms`` says of its key."""
    setting = Setting(dict(blocks.settings), (64, 64), device, 1, "float32", True, "wall", {})
    rows = {key: [ms(key)] for key, _, _ in blocks.blocks((64, 64))}
    write_json(path, Record(setting, "today", rows).to_json())
    return str(path)


@pytest.fixture(scope="module")
def whole(finished: Callable[[str], Path]) -> Path:
    return finished("detnas")


@pytest.fixture(scope="module")
def detnas(cases: dict[str, Any], whole: Path) -> DetNASSearchConfig:
    """The search of the finished run, with its supernet."""
    return dataclasses.replace(cases["detnas"].config, supernet=str(whole))


def test_of_detnas(detnas: DetNASSearchConfig, data: DataFolder, tmp_path: Path, candidates: Candidates) -> None:
    slow = {"xcep": 5.0, "sh7": 3.0}
    blocks = DetNASBlocks(detnas.search_space())
    table = made_up(blocks, tmp_path / "table.json", lambda key: slow.get(key.split()[0], 1.0))
    depth = detnas.search_space().sizes.depth
    fast = dataclasses.replace(detnas, latency_table=table, max_latency=float(depth + 5), algorithm="random")
    search_detnas(fast, data, tmp_path / "run", progress=False)
    for one in candidates(tmp_path / "run"):
        assert one["costs"]["milliseconds"] == 1 + sum(slow.get(name, 1.0) for name in one["card"]["genotype"])
        assert one["costs"]["milliseconds"] <= depth + 5
    words = f"milliseconds must be at most 3, reachable are {depth + 1} to {5 * depth + 1}"
    with pytest.raises(ValueError, match=words):
        search_detnas(dataclasses.replace(fast, max_latency=3.0), data, tmp_path / "other", progress=False)
    with pytest.raises(ValueError, match="latency_table must be given with max_latency, got None and 3 ms"):
        dataclasses.replace(detnas, max_latency=3.0)
    small = dataclasses.replace(detnas, space="small", max_macs=None).search_space()
    other = made_up(DetNASBlocks(small), tmp_path / "small.json", lambda key: 1.0)
    with pytest.raises(ValueError, match="small.json: space must be .*, got a table for"):
        search_detnas(dataclasses.replace(fast, latency_table=other), data, tmp_path / "other", progress=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("here", [True, False], ids=["its own", "another"])
def test_the_device_of_a_table_is_told(
    here: bool, detnas: DetNASSearchConfig, data: DataFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it is not the one that searches: on the terminal, and beside the deviations."""
    own = device_name(torch.device("cpu"))
    blocks = DetNASBlocks(detnas.search_space())
    table = made_up(blocks, tmp_path / "table.json", lambda key: 1.0, own if here else "a phone")
    few = dataclasses.replace(detnas, latency_table=table, population=1, parents=1, generations=1)
    search_detnas(few, data, tmp_path / "run", device="cpu")
    note = f"milliseconds are those of a phone; the search runs on {own}"
    said = [line for line in capsys.readouterr().err.splitlines() if "milliseconds" in line]
    recorded = json.loads((tmp_path / "run" / "run.json").read_text())["deviations"]
    assert said == ([] if here else [note])
    assert [line for line in recorded if line.startswith("milliseconds are")] == said


@pytest.fixture(scope="module")
def msnas(cases: dict[str, Any]) -> MSNASSearchConfig:
    """With the RPN that tables are measured with, and no other limits."""
    changes = {"rpn_channels": 256, "target_macs": None, "steps": 1, "tuning_steps": 0}
    return dataclasses.replace(cases["msnas"].config, **changes)


def fine_is_slow(key: str) -> float:
    """Whatever reads the finest map takes 3 ms, all else 1."""
    return 3.0 if key.endswith("1/4") else 1.0


def test_of_msnas(msnas: MSNASSearchConfig, data: DataFolder, tmp_path: Path, candidates: Candidates) -> None:
    blocks = MSNASBlocks(msnas.search_space())
    table = made_up(blocks, tmp_path / "table.json", fine_is_slow)
    predict, rng = LatencyTable.load(table, blocks, (64, 64)), Random(0)
    assert sum(predict(blocks.random(rng)) > 18 for _ in range(100)) > 30, "a limit that keeps many out"
    fast = dataclasses.replace(msnas, latency_table=table, max_latency=18.0)
    search_msnas(fast, data, tmp_path / "run", progress=False)
    found = candidates(tmp_path / "run")
    assert len(found) >= 4
    for one in found:
        genotype = one["card"]["genotype"]
        maps = resolutions(genotype["strides"])
        read = [4, *maps[:-1], *(maps[to - 1] for to, _ in genotype["laterals"]), *genotype["heads"]]
        assert one["costs"]["milliseconds"] == 1 + sum(3 if place == 4 else 1 for place in read) <= 18
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["limits"]["milliseconds"] == [None, 18.0] and run["latency"]["device"] == "a made-up machine"


def test_what_msnas_refuses(msnas: MSNASSearchConfig, data: DataFolder, tmp_path: Path) -> None:
    """A limit that nothing meets, and tables for another net than is searched; before anything is written."""
    table = made_up(MSNASBlocks(msnas.search_space()), tmp_path / "table.json", fine_is_slow)
    timed = dataclasses.replace(msnas, latency_table=table)
    measured = "latency_table must be None but for two stages and an RPN of 256 channels, as tables are measured, got "
    changes: tuple[tuple[dict[str, Any], str], ...] = (
        ({"max_latency": 12.0}, r"milliseconds must be at most 12, met were 13 to \d+"),
        ({"rpn_channels": 8}, f"{measured}faster_rcnn with 8"),
        ({"detector": "fcos", "tower_convs": 1}, f"{measured}fcos with 256"),
        ({"blocks": 6}, "table.json: space must be .*'blocks': 6.*, got a table for .*'blocks': 5"),
    )
    for change, words in changes:
        with pytest.raises(ValueError, match=words):
            search_msnas(dataclasses.replace(timed, **change), data, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()
