"""A NATS search on a real, small data folder: its schedule, its run folder, its resumption, what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nasdet.arch import load_card
from nasdet.data import DataFolder, DetectionDataset, Split, TestSplitError, open_data, write_digits
from nasdet.detectors import BACKBONES
from nasdet.engine import receptive_field
from nasdet.engine.checkpoint import load_checkpoint
from nasdet.engine.records import read_lines
from nasdet.engine.search_nats import NATSSearchConfig, deviations, search_nats
from nasdet.measure import effective_receptive_field, field_size
from nasdet.nn import GroupedDilationConv2d
from nasdet.search.gradient import Bilevel
from nasdet.spaces.assemble import ModelConfig, build_model
from nasdet.spaces.nats import NATSSpace, decode

CONFIG = NATSSearchConfig(
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
    width=0.125,
    fpn_channels=12,
    levels=3,
    tower_convs=1,
    workers=0,
    log_every=1,
    checkpoint_every=2,
    seed=3,
)


@pytest.fixture(scope="module", autouse=True)
def _small_fields() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(receptive_field, "SIZE", (96, 160))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("sklearn", reason="the digits data set is made from scikit-learn's")
    return write_digits(tmp_path_factory.mktemp("data") / "digits", train=8, val=2, size=(64, 64))


@pytest.fixture(scope="module")
def data(folder: Path) -> DataFolder:
    return open_data(folder)


@pytest.fixture(scope="module")
def whole(data: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "whole"
    search_nats(CONFIG, data, out, progress=False)
    return out


def records(out: Path, name: str) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_lines(out / name)]


def test_the_papers_schedule() -> None:
    paper = NATSSearchConfig()
    total = paper.total_steps(82_783)
    assert total == 25 * 10_348 and paper.alphas_from(total) == 10 * 10_348
    schedule = paper.schedule(total)
    assert schedule.at(0) == pytest.approx(0.01 / 3) and schedule.at(total) == pytest.approx(0.0004)
    assert schedule.at(total // 2) == pytest.approx(0.0052, rel=1e-3)
    assert dataclasses.replace(paper, steps=10, frozen_epochs=24).alphas_from(1) == 0, "a single step moves the alphas"


def test_run_folder(whole: Path, data: DataFolder) -> None:
    run = json.loads((whole / "run.json").read_text())
    assert (run["verb"], run["status"], run["seed"], run["alphas_from"]) == ("search nats", "done", 3, 2)
    assert run["choices"]["layer2.0.conv2"] == ["1", "3"] and run["choices"]["layer4.2.conv2"] == ["1", "3", "5"]
    assert any("steps: 6; the paper: 25 epochs" in line for line in run["deviations"])
    assert Split.load(whole / "split.json") == data.split
    metrics = records(whole, "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert ["arch_loss" in line for line in metrics] == [False, False, True, True, True, True]
    assert {"loss", "loss_cls", "loss_box", "loss_centerness", "lr", "grad_norm"} <= set(metrics[0])


def test_weights_learn_alone_at_first(whole: Path) -> None:
    alphas = records(whole, "alphas.jsonl")
    assert [line["step"] for line in alphas] == [0, 1, 2, 3, 4, 5, 6]
    assert list(alphas[0]["alphas"]) == [layer.name for layer in CONFIG.search_space().layers]
    first = [torch.tensor(line["alphas"]["layer2.0.conv2"]) for line in alphas]
    assert all(not rows.any() for rows in first[:3]), "no alpha moves in the first third"
    assert first[3].abs().min() > 0.04, "Adam's first step is arch_lr wherever there is a gradient"
    assert not torch.equal(first[6], first[5])


def test_card_is_the_decoded_alphas_and_builds(whole: Path) -> None:
    card = load_card(whole / "card.json")
    space = CONFIG.search_space()
    space.check(card)
    dilations = {layer.name: space.dilations_of(layer) for layer in space.layers}
    assert card.genotype == decode(records(whole, "alphas.jsonl")[-1]["alphas"], dilations)
    assert card.settings["backbone"] == "resnet50" and card.settings["channel_groups"] == 2
    config = ModelConfig.load(whole / "model.json")
    assert config.card == card and config.towers == "plain" and config.num_classes == 10
    model = build_model(config)
    grouped = [m for m in model.modules() if isinstance(m, GroupedDilationConv2d)]
    assert len(grouped) == 13
    plain = build_model(dataclasses.replace(config, backbone_card=None))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())
    parts = json.loads((whole / "cost.json").read_text())["parts"]
    assert sum(part["parameters"] for part in parts) == sum(p.numel() for p in model.parameters())


def test_fields_of_the_original_and_the_derived_backbone(whole: Path) -> None:
    content = json.loads((whole / "erf.json").read_text())
    assert (content["size"], content["threshold"]) == ([96, 160], 0.0455)
    before, after = content["maps"]
    assert before["name"] == "original resnet50" and after["name"] == "derived, nats-A-resnet50-seed3"
    torch.manual_seed(3)
    backbone = build_model(dataclasses.replace(ModelConfig.load(whole / "model.json"), backbone_card=None)).backbone
    derived = NATSSpace.build(load_card(whole / "card.json"), copy.deepcopy(backbone))
    for entry, network in ((before, backbone), (after, derived)):
        field = effective_receptive_field(network, (96, 160))
        assert entry["side"] == round(field_size(field), 1)
        assert torch.tensor(entry["rows"]).equal((1000 * field).round().int())
    assert "random weights" in content["weights"] and before["rows"] != after["rows"]


def test_wide_fields_are_reduced_to_their_strongest_pixels() -> None:
    field = torch.rand(7, 405)
    rows = torch.tensor(receptive_field._reduced(field))
    assert rows.shape == (3, 135) and int(rows.max()) == round(1000 * float(field.max()))
    assert int(rows[2, 0]) == round(1000 * float(field[6, :3].max())), "the last row of cells is a part"


@pytest.mark.parametrize("at", [1, 2, 5], ids=lambda at: f"killed-in-step-{at}")
def test_resume_equals_never_stopped(
    at: int, whole: Path, data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Bilevel.weight_step

    def killed(self: Bilevel, index: int, loss: Any) -> Any:
        if index == at:
            raise RuntimeError("killed")
        return step(self, index, loss)

    with monkeypatch.context() as patch:
        patch.setattr(Bilevel, "weight_step", killed)
        with pytest.raises(RuntimeError, match="killed"):
            search_nats(CONFIG, data, tmp_path, progress=False)
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "failed"
    assert not (tmp_path / "card.json").exists()
    torch.manual_seed(99)
    search_nats(CONFIG, data, tmp_path, resume=True, progress=False)
    for name in ("metrics.jsonl", "alphas.jsonl"):
        assert records(tmp_path, name) == records(whole, name)
    for name in ("card.json", "model.json", "cost.json", "split.json", "erf.json"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    ours, theirs = (load_checkpoint(out / "checkpoints" / "last.pt")["state"] for out in (tmp_path, whole))
    assert ours["model"].keys() == theirs["model"].keys()
    assert all(torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())


def test_pretrained_weights_go_into_every_replica(data: DataFolder, tmp_path: Path) -> None:
    torch.manual_seed(1)
    state = BACKBONES["resnet50"](width=0.125).state_dict()
    torch.save(state, tmp_path / "net.pth")
    config = dataclasses.replace(CONFIG, steps=1, lr=1e-12, final_lr=0.0)
    search_nats(config, data, tmp_path / "run", weights=tmp_path / "net.pth", progress=False)
    model = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["state"]["model"]
    for name, replicas in (("layer2.0.conv2", 2), ("layer4.2.conv2", 3)):
        expected = state[f"{name}.weight"].repeat(replicas, 1, 1, 1)
        torch.testing.assert_close(model[f"backbone.{name}.weight"], expected, rtol=1e-4, atol=1e-6)
    derived = ModelConfig.load(tmp_path / "run" / "model.json")
    assert (derived.norm, derived.frozen_stages) == ("sync_bn", 2)
    built = build_model(derived, weights=tmp_path / "net.pth")
    assert torch.equal(built.state_dict()["backbone.layer3.1.conv2.weight"], state["layer3.1.conv2.weight"])


def test_resnext_and_path_level(data: DataFolder, tmp_path: Path) -> None:
    """Whole convolution groups choose together; with one channel group a whole path does."""
    cut: dict[str, Any] = {"channel_groups": None, "channels_per_group": 32}
    grouped = dataclasses.replace(CONFIG, backbone="resnext50_32x4d", steps=2, epochs=2, width=0.25, **cut)
    card = search_nats(grouped, data, tmp_path / "resnext", progress=False)
    counts = {layer: sum(count for _, count in entries) for layer, entries in card.genotype.items()}
    assert (counts["layer2.0.conv2"], counts["layer4.2.conv2"]) == (2, 8)
    path = dataclasses.replace(CONFIG, steps=2, epochs=2, channel_groups=1)
    card = search_nats(path, data, tmp_path / "path", progress=False)
    assert all(len(entries) == 1 and entries[0][1] == 1 for entries in card.genotype.values())
    assert records(tmp_path / "path", "alphas.jsonl")[-1]["alphas"].keys() == card.genotype.keys()


def test_a_run_is_not_overwritten(data: DataFolder, whole: Path) -> None:
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="already holds a run"):
        search_nats(CONFIG, data, whole, progress=False)
    with pytest.raises(ValueError, match="channel_groups: 2 -> 4"):
        search_nats(dataclasses.replace(CONFIG, channel_groups=4), data, whole, resume=True, progress=False)
    assert before == {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}


class Cheating(DataFolder):
    """A folder whose search parts are test images."""

    def search_val(self) -> DetectionDataset:
        return self.test()


def test_what_is_refused_before_anything_is_written(
    data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(DataFolder)}
    with pytest.raises(TestSplitError, match="choosing an architecture on the test split is refused"):
        search_nats(CONFIG, Cheating(**fields), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="bottlenecks of its stages 3 to 5, got none in ResNet"):
        search_nats(dataclasses.replace(CONFIG, backbone="resnet18"), data, tmp_path / "run", progress=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="search nats must run in one process, got 2"):
        search_nats(CONFIG, data, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"frozen_epochs": 3}, "frozen_epochs must be in 0..2, got 3"),
        ({"arch_lr": float("nan")}, "arch_lr must be a positive number, got nan"),
        ({"final_lr": 0.02}, "final_lr must be between 0 and lr 0.01, got 0.02"),
        ({"clip": 0.0}, "clip must be a positive number or None, got 0.0"),
        ({"dilations": "Q"}, "dilations must be one of A, B, C"),
        ({"name": "a/b"}, "name must be letters"),
        ({"norm": "ln"}, "norm must be one of"),
    ],
)
def test_bad_settings(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **changes)


def test_deviations_tell_everything_that_differs(data: DataFolder) -> None:
    paper = deviations(NATSSearchConfig(), data, True)
    assert len(paper) == 4 and any("faster_rcnn" in line for line in paper), "ours by design, detector, and the data"
    ours = deviations(dataclasses.replace(CONFIG, index_preserving=True, amp=True), data, False)
    for words in ("steps: 6", "set of dilations: A; the paper: C", "keep their places", "bfloat16", "random backbone"):
        assert any(words in line for line in ours), words


def test_cards_stand_where_they_belong() -> None:
    card = NATSSpace(width=0.125, channel_groups=2).random(random.Random(0))
    with pytest.raises(ValueError, match="towers must be a card of towers, got 'nats-random' .nats., a backbone"):
        build_model(ModelConfig(width=0.125, fpn_channels=12, levels=3, towers=card.to_json()))
    with pytest.raises(ValueError, match="backbone_card must be a card of a backbone, got 'fad-paper' .fad."):
        ModelConfig(backbone_card=load_card("fad-paper").to_json())
    both = ModelConfig(
        width=0.125,
        fpn_channels=12,
        inner_channels=6,
        towers=load_card("fad-paper").to_json(),
        backbone_card=card.to_json(),
    )
    assert both.card == load_card("fad-paper") and ModelConfig.from_json(both.to_json()) == both
    assert sum(isinstance(m, GroupedDilationConv2d) for m in build_model(both).modules()) == 13
