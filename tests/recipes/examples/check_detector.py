"""The new detector is trained, evaluated and stored by the engine, which knows nothing of it."""

from __future__ import annotations

import json
from pathlib import Path

from nasdet.data import open_data, write_digits
from nasdet.detectors import DETECTORS
from nasdet.engine.evaluate import load_run
from nasdet.engine.train import TrainConfig, train
from nasdet.spaces.assemble import ModelConfig

assert "center" in DETECTORS
data = open_data(write_digits(Path("digits"), train=4, val=2, size=(64, 96)))
model = ModelConfig(
    detector="center",
    backbone="resnet18",
    width=0.125,
    fpn_channels=8,
    tower_convs=1,
    norm="gn",
    num_classes=10,
    categories=data.categories,
    short_side=64,
    long_side=96,
)
config = TrainConfig(steps=1, batch=2, lr=0.01, workers=0, device="cpu")
out = train(config, data, model, Path("run"), progress=False)
assert json.loads((out / "run.json").read_text())["status"] == "done"
assert "AP" in json.loads((out / "eval.json").read_text())
loaded = load_run(out)
assert "CenterDetector" in repr(loaded)[:20000]
print("done")
