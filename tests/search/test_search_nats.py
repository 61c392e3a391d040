"""A NATS search on a real, small data folder: its schedule, what it records, what it finds, on every detector."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nasdet.arch import load_card
from nasdet.cli import train
from nasdet.data import DataFolder
from nasdet.detectors import BACKBONES, WITH_MASKS
from nasdet.engine import receptive_field
from nasdet.engine.checkpoint import load_checkpoint, seed_everything
from nasdet.engine.evaluate import load_run
from nasdet.engine.loop import NonFiniteLoss
from nasdet.engine.search_nats import NATSSearchConfig, deviations, search_nats
from nasdet.measure import effective_receptive_field, field_size
from nasdet.nn import GroupedDilationConv2d
from nasdet.search.gradient import Bilevel
from nasdet.spaces.assemble import ModelConfig, build_model
from nasdet.spaces.nats import NATSSpace, decode

Records = Callable[[Path, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def config(cases: dict[str, Any]) -> NATSSearchConfig:
    found: NATSSearchConfig = cases["nats"].config
    return found


@pytest.fixture(scope="module")
def whole(finished: Callable[[str], Path]) -> Path:
    return finished("nats")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone's weights, as a file."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "net.pth"
    torch.save(BACKBONES["resnet50"](width=0.125).state_dict(), path)
    return path


def test_the_papers_schedule() -> None:
    paper = NATSSearchConfig()
    total = paper.total_steps(82_783)
    assert total == 25 * 10_348 and paper.alphas_from(total) == 10 * 10_348
    schedule = paper.schedule(total)
    assert schedule.at(0) == pytest.approx(0.01 / 3) and schedule.at(total) == pytest.approx(0.0004)
    assert schedule.at(total // 2) == pytest.approx(0.0052, rel=1e-3)
    assert dataclasses.replace(paper, steps=10, frozen_epochs=24).alphas_from(1) == 0, "a single step moves the alphas"


def test_records(whole: Path, records: Records) -> None:
    run = json.loads((whole / "run.json").read_text())
    assert run["alphas_from"] == 2
    assert run["choices"]["layer2.0.conv2"] == ["1", "3"] and run["choices"]["layer4.2.conv2"] == ["1", "3", "5"]
    assert any("steps: 6; the paper: 25 epochs" in line for line in run["deviations"])
    metrics = records(whole, "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2, 3, 4, 5, 6]
    assert ["arch_loss" in line for line in metrics] == [False, False, True, True, True, True]
    assert {"loss", "loss_cls", "loss_box", "loss_centerness", "lr", "grad_norm"} <= set(metrics[0])


def test_weights_learn_alone_at_first(whole: Path, config: NATSSearchConfig, records: Records) -> None:
    alphas = records(whole, "alphas.jsonl")
    assert [line["step"] for line in alphas] == [0, 1, 2, 3, 4, 5, 6]
    assert list(alphas[0]["alphas"]) == [layer.name for layer in config.search_space().layers]
    first = [torch.tensor(line["alphas"]["layer2.0.conv2"]) for line in alphas]
    assert all(not rows.any() for rows in first[:3]), "no alpha moves in the first third"
    assert first[3].abs().min() > 0.04, "Adam's first step is arch_lr wherever there is a gradient"
    assert not torch.equal(first[6], first[5])


def test_alphas_that_are_not_finite_stop_the_search(
    config: NATSSearchConfig, data: DataFolder, records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def far(self: Bilevel, loss: Any) -> torch.Tensor:
        self.alphas[1].data[0, 0] = -math.inf
        return torch.zeros(())

    monkeypatch.setattr(Bilevel, "arch_step", far)
    now = dataclasses.replace(config, frozen_epochs=0)
    with pytest.raises(NonFiniteLoss, match=r"step 0: alphas of layer2\.1\.conv2 = -inf; there is no checkpoint yet"):
        search_nats(now, data, tmp_path, progress=False)
    assert [line["step"] for line in records(tmp_path, "alphas.jsonl")] == [0]


def test_card_is_the_decoded_alphas_and_builds(whole: Path, config: NATSSearchConfig, records: Records) -> None:
    card, space = load_card(whole / "card.json"), config.search_space()
    dilations = {layer.name: space.dilations_of(layer) for layer in space.layers}
    assert card.genotype == decode(records(whole, "alphas.jsonl")[-1]["alphas"], dilations)
    assert card.settings["backbone"] == "resnet50" and card.settings["channel_groups"] == 2
    derived = ModelConfig.load(whole / "model.json")
    assert derived.card == card and derived.towers == "plain"
    model = build_model(derived)
    assert sum(isinstance(m, GroupedDilationConv2d) for m in model.modules()) == 13
    plain = build_model(dataclasses.replace(derived, backbone_card=None))
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in plain.parameters())


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


@pytest.mark.parametrize("detector", ["retinanet", "cascade_rcnn", "mask_rcnn"])
def test_every_detector_can_be_searched(
    detector: str, config: NATSSearchConfig, data_with_masks: DataFolder, records: Records, tmp_path: Path
) -> None:
    short = dataclasses.replace(config, detector=detector, levels=4, steps=2, frozen_epochs=0)
    card = search_nats(short, data_with_masks, tmp_path, progress=False)
    first, second, _ = (torch.tensor(line["alphas"]["layer2.0.conv2"]) for line in records(tmp_path, "alphas.jsonl"))
    # Adam's first step is as long as its rate wherever there is a gradient; the next may take some of it back.
    assert not first.any() and second.abs().min() > 0.01, "each alpha has a gradient"
    assert all(math.isfinite(value) for value in records(tmp_path, "metrics.jsonl")[-1].values())
    assert ModelConfig.load(tmp_path / "model.json").detector == detector and len(card.genotype) == 13


SMALL = "--size 64x64 --fpn-channels 12 --levels 4 --tower-convs 1 --steps 2 --batch 2 --workers 0 --no-flip"


def retrain(call: Callable[..., int], card: Path, folder: Path, out: Path, *words: Any) -> tuple[Any, ModelConfig]:
    """``nasdet train --card`` for two steps: the trained model."""
    call(train, "--card", card, "--data", folder, "--out", out, *SMALL.split(), "--lr", "0.01", *words)
    return load_run(out)


@pytest.mark.parametrize("detector", ["mask_rcnn", "cascade_rcnn", "retinanet"])
def test_the_derived_backbone_serves_other_detectors(
    detector: str,
    finished: Callable[[str], Path],
    call: Callable[..., int],
    folder: Path,
    pretrained: Path,
    records: Records,
    tmp_path: Path,
) -> None:
    """Searched on Faster R-CNN; all stages frozen, the backbone keeps every weight, in dilated convolutions too."""
    card = finished("nats in two stages") / "card.json"
    kept = ("--weights", pretrained, "--norm", "frozen_bn", "--frozen-stages", "5")
    model, config = retrain(call, card, folder, tmp_path / "run", "--detector", detector, *kept)
    assert (config.detector, config.card, config.backbone) == (detector, load_card(card), "resnet50")
    grouped = {name: m for name, m in model.backbone.named_modules() if isinstance(m, GroupedDilationConv2d)}
    assert set(grouped) == set(load_card(card).genotype) and any(len(m.dilations) > 1 for m in grouped.values())
    state = torch.load(pretrained, weights_only=True)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, state[name]), name
    seed_everything(0)
    fresh = build_model(config, weights=pretrained)
    moved = {name for name, part in model.named_children() if not _same(part, fresh.get_submodule(name))}
    assert moved == {name for name, _ in model.named_children()} - {"backbone"}, "all else learns"
    assert all(math.isfinite(value) for line in records(tmp_path / "run", "metrics.jsonl") for value in line.values())
    figures = json.loads((tmp_path / "run" / "eval.json").read_text())
    assert ("masks" in figures) == (detector in WITH_MASKS)


def _same(part: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(part.parameters(), other.parameters(), strict=True))


def test_retraining_learns_from_the_weights_given(
    finished: Callable[[str], Path], call: Callable[..., int], folder: Path, pretrained: Path, tmp_path: Path
) -> None:
    """As published: stem and first stage frozen, the rest learns from the pretrained weights, norms included."""
    card = finished("nats in two stages") / "card.json"
    model, config = retrain(call, card, folder, tmp_path, "--weights", pretrained)
    assert (config.detector, config.norm, config.frozen_stages) == ("faster_rcnn", "sync_bn", 2)
    state, found = torch.load(pretrained, weights_only=True), model.backbone.state_dict()
    for name in ("conv1.weight", "layer1.2.conv2.weight"):
        assert torch.equal(found[name], state[name])
    for name in ("layer2.0.conv2.weight", "layer4.2.conv2.weight", "layer4.2.bn2.weight"):
        assert not torch.equal(found[name], state[name])
        torch.testing.assert_close(found[name], state[name], rtol=0, atol=0.05)


def test_pretrained_weights_go_into_every_replica_and_stay_the_runs(
    config: NATSSearchConfig, data: DataFolder, pretrained: Path, tmp_path: Path
) -> None:
    state = torch.load(pretrained, weights_only=True)
    still = dataclasses.replace(config, steps=1, lr=1e-12, final_lr=0.0)
    search_nats(still, data, tmp_path / "run", weights=pretrained, progress=False)
    model = load_checkpoint(tmp_path / "run" / "checkpoints" / "last.pt")["state"]["model"]
    for name, replicas in (("layer2.0.conv2", 2), ("layer4.2.conv2", 3)):
        expected = state[f"{name}.weight"].repeat(replicas, 1, 1, 1)
        torch.testing.assert_close(model[f"backbone.{name}.weight"], expected, rtol=1e-4, atol=1e-6)
    derived = ModelConfig.load(tmp_path / "run" / "model.json")
    assert (derived.norm, derived.frozen_stages) == ("sync_bn", 2)
    built = build_model(derived, weights=pretrained)
    assert torch.equal(built.state_dict()["backbone.layer3.1.conv2.weight"], state["layer3.1.conv2.weight"])
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    torch.save({name: 2 * value for name, value in state.items()}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="written by another configuration.*weights: '.*' -> '"):
        search_nats(still, data, tmp_path / "run", weights=tmp_path / "other.pth", resume=True, progress=False)
    with pytest.raises(FileNotFoundError, match=r"lost\.pth: no such"):
        search_nats(still, data, tmp_path / "run", weights=tmp_path / "lost.pth", resume=True, progress=False)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_resnext_and_path_level(config: NATSSearchConfig, data: DataFolder, records: Records, tmp_path: Path) -> None:
    """Whole convolution groups choose together; with one channel group a whole path does."""
    cut: dict[str, Any] = {"channel_groups": None, "channels_per_group": 32}
    grouped = dataclasses.replace(config, backbone="resnext50_32x4d", steps=2, epochs=2, width=0.25, **cut)
    card = search_nats(grouped, data, tmp_path / "resnext", progress=False)
    counts = {layer: sum(count for _, count in entries) for layer, entries in card.genotype.items()}
    assert (counts["layer2.0.conv2"], counts["layer4.2.conv2"]) == (2, 8)
    path = dataclasses.replace(config, steps=2, epochs=2, channel_groups=1)
    card = search_nats(path, data, tmp_path / "path", progress=False)
    assert all(len(entries) == 1 and entries[0][1] == 1 for entries in card.genotype.values())
    assert records(tmp_path / "path", "alphas.jsonl")[-1]["alphas"].keys() == card.genotype.keys()


def test_a_backbone_without_bottlenecks_is_refused(config: NATSSearchConfig, data: DataFolder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="or depthwise ones, got none in ResNet"):
        search_nats(dataclasses.replace(config, backbone="resnet18"), data, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_deviations_tell_everything_that_differs(data: DataFolder, config: NATSSearchConfig) -> None:
    paper = deviations(NATSSearchConfig(), data, True)
    assert len(paper) == 5 and any("the paper: COCO" in line for line in paper), "ours by design, and the data"
    assert "the backbone's stem and first stage are frozen; the paper does not say" in paper
    words = (
        "warm-up from a third of the rate: 500 steps, at most a tenth of all; the paper has one when retraining only"
    )
    assert words in paper
    without = deviations(NATSSearchConfig(warmup_steps=0), data, True)
    assert without == [line for line in paper if line != words], "no warm-up, as in the paper"
    assert NATSSearchConfig(warmup_steps=0).schedule(20_000).at(0) == 0.01
    assert any("of the rate: 70 steps;" in line for line in deviations(NATSSearchConfig(warmup_steps=70), data, True))
    large = {"backbone": "resnet101", "channel_groups": None}
    for cut, line in (
        ({"channel_groups": 8}, "channel groups: 8 in a layer; the paper: 16 in a layer"),
        ({"channels_per_group": 32}, "channel groups: of 32 channels; the paper: 16 in a layer"),
        (large, "channel groups: 16 in a layer; the paper: of 32 channels"),
    ):
        assert line in deviations(NATSSearchConfig(**cut), data, True)
    theirs = NATSSearchConfig(**large, channels_per_group=32)
    assert not any("groups" in line for line in deviations(theirs, data, True))
    ours = deviations(dataclasses.replace(config, index_preserving=True, amp=True), data, False)
    for words in (
        "steps: 6",
        "detector: fcos; the paper: faster_rcnn",
        "set of dilations: A; the paper: C",
        "keep their places",
        "bfloat16",
        "random backbone",
    ):
        assert any(words in line for line in ours), words
    assert not any("frozen" in line for line in ours)


def test_cards_of_towers_and_backbone_together() -> None:
    card = NATSSpace(width=0.125, channel_groups=2).random(random.Random(0))
    both = ModelConfig(
        width=0.125,
        fpn_channels=12,
        inner_channels=6,
        towers=load_card("fad-paper").to_json(),
        backbone_card=card.to_json(),
    )
    assert both.card == load_card("fad-paper") and ModelConfig.from_json(both.to_json()) == both
    assert sum(isinstance(m, GroupedDilationConv2d) for m in build_model(both).modules()) == 13
