"""What a NATS search hands to its parts: who learns from which images and when, the optimisers, weights, dilations."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasdet.arch import load_card
from nasdet.data import DataFolder
from nasdet.detectors import BACKBONES
from nasdet.engine import receptive_field, search_nats
from nasdet.engine.search_nats import NATSSearchConfig, deviations
from nasdet.spaces.nats import NATSSpace

Records = Callable[[Path, str], list[dict[str, Any]]]
OWN: dict[Any, Any] = {3: [1, 2], 4: [1, (1, 3)], 5: [1, 2]}


@pytest.fixture(scope="module")
def config(cases: dict[str, Any]) -> NATSSearchConfig:
    found: NATSSearchConfig = cases["nats"].config
    return found


def made(config: NATSSearchConfig, data: DataFolder, **options: Any) -> Any:
    """A search before its first step."""
    return search_nats._NATSRun(config, data, torch.device("cpu"), **options)


def test_the_papers_settings_are_the_defaults() -> None:
    """Section 4.2; the rates, 0.00125 and 0.00005, are for each of 8 images. Table 1 has the size."""
    paper = NATSSearchConfig()
    assert (paper.epochs, paper.frozen_epochs, paper.batch) == (25, 10, 8)
    assert (paper.lr, paper.final_lr, paper.momentum, paper.weight_decay) == (0.01, 0.0004, 0.9, 1e-4)
    assert (paper.arch_lr, paper.arch_weight_decay) == (0.01, 1e-5)
    assert (paper.dilations, paper.index_preserving, paper.detector) == ("C", False, "faster_rcnn")
    assert (paper.backbone, paper.short_side, paper.long_side) == ("resnet50", 800, 1200)
    space = paper.search_space()
    assert (space.channel_groups, space.channels_per_group, space.alpha_count()) == (16, None, 1232)


def test_the_optimisers_have_the_settings(config: NATSSearchConfig, data: DataFolder) -> None:
    changed = {"momentum": 0.7, "weight_decay": 0.03, "arch_lr": 0.02, "arch_weight_decay": 0.005, "clip": 3.0}
    run = made(dataclasses.replace(config, **changed), data)
    for weights in run.bilevel.weight_optimizer.param_groups:
        assert (weights["momentum"], weights["weight_decay"]) == (0.7, 0.03)
    for alphas in run.bilevel.arch_optimizer.param_groups:
        assert (alphas["lr"], alphas["weight_decay"], alphas["betas"]) == (0.02, 0.005, (0.5, 0.999))
    assert run.bilevel.clip == 3.0 and run.bilevel.schedule(2) == run.config.schedule(run.steps).at(2)


def test_who_learns_from_which_images_and_when(config: NATSSearchConfig, data: DataFolder) -> None:
    """The weights first, from one half, then the alphas from the other, once their time has come."""
    run = made(dataclasses.replace(config, flip=False), data)
    alphas = run.space.arch_parameters(run.supernet)
    seen: list[tuple[str, list[int]]] = []

    def loss(batch: Any, terms: dict[str, Any]) -> Tensor:
        """Of the side that moves; the other one is held."""
        sides = {"alphas": alphas, "weights": run.bilevel.weights}
        (side,) = (name for name, parameters in sides.items() if all(p.requires_grad for p in parameters))
        seen.append((side, [target["image_id"] for target in batch.targets]))
        return torch.stack([parameter.sum() for parameter in sides[side]]).sum()

    run.loss = loss
    step = run.stepper(0)
    for index in range(run.steps):
        step(index)
    assert run.alphas_from == 2
    assert [side for side, _ in seen] == ["weights"] * 2 + ["weights", "alphas"] * 4
    images = {
        name: {image for side, batch in seen if side == name for image in batch} for name in ("weights", "alphas")
    }
    assert images["weights"] and images["weights"] <= set(data.split.search_train)
    assert images["alphas"] and images["alphas"] <= set(data.split.search_val)
    assert not set(data.split.search_train) & set(data.split.search_val)


@pytest.mark.parametrize("change", [{"index_preserving": True}, {"channel_groups": None, "channels_per_group": 4}])
def test_the_space_has_the_settings(config: NATSSearchConfig, change: dict[str, Any]) -> None:
    space = dataclasses.replace(config, **change).search_space()
    settings = {"channel_groups": 2, "channels_per_group": None, "index_preserving": False} | change
    assert {name: getattr(space, name) for name in settings} == settings
    assert (space.backbone, space.width) == ("resnet50", 0.125)


def test_channel_groups_keep_their_places_where_asked(config: NATSSearchConfig, data: DataFolder) -> None:
    run = made(dataclasses.replace(config, index_preserving=True), data)
    with torch.no_grad():
        for alpha in run.space.arch_parameters(run.supernet):
            alpha[0, 1] = 1.0  # the first channel group chooses the second dilation
    card = run.derive({})
    assert card.genotype["layer2.0.conv2"] == [[3, 1], [1, 1]] and card.settings["index_preserving"] is True


def test_fields_are_those_of_the_weights_given(
    config: NATSSearchConfig, data: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    state = BACKBONES["resnet50"](width=0.125).state_dict()
    torch.save(state, tmp_path / "net.pth")
    measured = []

    def measure(network: nn.Module, name: str) -> dict[str, object]:
        found = network.state_dict()
        measured.append(all(torch.equal(value, state[key]) for key, value in found.items()))
        return {"name": name}

    monkeypatch.setattr(search_nats, "measure_field", measure)
    run = made(config, data, weights=tmp_path / "net.pth")
    run._record_fields(run.derive({}), tmp_path)
    assert measured == [True, True]
    written = json.loads((tmp_path / "erf.json").read_text())
    assert written["weights"] == "the pretrained weights" and len(written["maps"]) == 2


def test_fields_are_measured_on_pictures_of_the_papers_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a fresh copy of the module: these tests measure on smaller ones."""
    spec = importlib.util.find_spec(receptive_field.__name__)
    assert spec is not None and spec.loader is not None
    fresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
    sizes = []

    def field(network: nn.Module, size: tuple[int, int]) -> Tensor:
        sizes.append(size)
        return torch.eye(20)

    monkeypatch.setattr(fresh, "effective_receptive_field", field)
    fresh.measure_field(nn.Identity(), "some")
    assert sizes == [(800, 1200)] == [fresh.SIZE]


def test_dilations_of_ones_own(
    config: NATSSearchConfig, data: DataFolder, records: Records, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search_nats, "measure_field", lambda network, name: {"name": name})
    own = dataclasses.replace(config, dilations=OWN, steps=2, frozen_epochs=0)
    assert own.dilations == {"3": [1, 2], "4": [1, [1, 3]], "5": [1, 2]} == dataclasses.replace(own).dilations
    card = search_nats.search_nats(own, data, tmp_path, progress=False)
    assert card.name == "nats-own-resnet50-seed3" and card.settings["space"] == own.dilations
    NATSSpace(OWN, channel_groups=2, width=0.125).check(card)
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["choices"]["layer3.0.conv2"] == ["1", "1x3"]
    assert "set of dilations: own; the paper: C" in run["deviations"]
    assert NATSSearchConfig(**run["arguments"]) == own
    # A resumed run may say the same in its own words, but nothing else.
    again = dataclasses.replace(own, dilations={"3": (1, 2), "4": [[1, 1], [1, 3]], "5": [1, 2]})
    assert search_nats.search_nats(again, data, tmp_path, resume=True, progress=False) == card
    assert load_card(tmp_path / "card.json") == card and len(records(tmp_path, "alphas.jsonl")) == 3
    with pytest.raises(ValueError, match="dilations: "):
        search_nats.search_nats(dataclasses.replace(own, dilations="A"), data, tmp_path, resume=True, progress=False)


def test_dilations_that_are_none(data: DataFolder) -> None:
    assert "set of dilations: own; the paper: C" in deviations(NATSSearchConfig(dilations=OWN), data, True)
    with pytest.raises(ValueError, match="dilations of stage 3 must be a non-empty list"):
        NATSSearchConfig(dilations={3: []})
    with pytest.raises(ValueError, match="dilations must be one of A, B, C"):
        NATSSearchConfig(dilations="own")
