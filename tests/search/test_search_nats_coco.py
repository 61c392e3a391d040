"""NATS on real COCO pictures: a few steps of the paper's network at 416 px, killed in between and resumed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from nasdet.data import open_data
from nasdet.engine import receptive_field
from nasdet.engine.checkpoint import load_checkpoint
from nasdet.engine.records import read_lines
from nasdet.engine.search_nats import NATSSearchConfig, search_nats
from nasdet.report import write_report
from nasdet.search.gradient import Bilevel

CONFIG = NATSSearchConfig(
    steps=4,
    epochs=4,
    frozen_epochs=2,
    batch=1,
    short_side=416,
    long_side=416,
    lr=0.002,
    clip=20.0,
    workers=0,
    log_every=1,
    checkpoint_every=1,
)


def records(out: Path, name: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(out / name)]


@pytest.mark.slow
def test_resnet50_searches_on_coco_pictures(tiny_coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receptive_field, "SIZE", (416, 416))
    data = open_data(tiny_coco)
    assert len(data.categories) == 80 and data.layout == "coco"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    card = search_nats(CONFIG, data, whole, progress=False)
    assert sum(count for _, count in card.genotype["layer2.0.conv2"]) == 16 and len(card.genotype) == 13

    lines = records(whole, "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert [math.isfinite(line.get("arch_loss", math.nan)) for line in lines] == [False, False, True, True]
    alphas = [torch.tensor(line["alphas"]["layer4.2.conv2"]) for line in records(whole, "alphas.jsonl")]
    assert alphas[0].shape == (16, 9) and not alphas[2].any() and alphas[3].abs().min() > 0
    assert sum(sum(map(len, rows)) for rows in records(whole, "alphas.jsonl")[-1]["alphas"].values()) == 1232

    step = Bilevel.arch_step

    def stop(self: Bilevel, loss: Any) -> Any:
        if self.alphas[0].any():
            raise KeyboardInterrupt
        return step(self, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Bilevel, "arch_step", stop)
        with pytest.raises(KeyboardInterrupt):
            search_nats(CONFIG, data, killed, progress=False)
    assert not (killed / "card.json").exists()
    assert search_nats(CONFIG, data, killed, resume=True, progress=False) == card
    for name in ("metrics.jsonl", "alphas.jsonl"):
        assert records(killed, name) == records(whole, name)
    states = [load_checkpoint(out / "checkpoints" / "last.pt")["state"]["model"] for out in (whole, killed)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())

    fields = json.loads((whole / "erf.json").read_text())["maps"]
    assert fields[1]["side"] > fields[0]["side"] > 64, "dilations widen what a neuron sees"
    assert "Effective receptive field" in write_report(whole).read_text()
