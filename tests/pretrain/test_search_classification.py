"""Evolution on accuracy: every candidate with its own statistics, killed and resumed the same, never on test images."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from small_nets import CONFIG, PATHS, SmallSpace, SmallSupernet

from nasdet.arch import load_card
from nasdet.data import TestSplitError
from nasdet.engine import search_classification as module
from nasdet.engine.classify import evaluate_classifier
from nasdet.engine.pretrain import load_classifier, recalibrate_classifier
from nasdet.engine.search_classification import ClassificationSearchConfig, search_classification
from nasdet.search.constraints import Constraint

SEARCH = ClassificationSearchConfig(population=2, parents=1, generations=2, top=2)


@pytest.fixture
def search(supernet_run, digit_classes):
    """``search(out, **changes)``: the small search with the weights of the run."""

    def call(out, config=SEARCH, data=digit_classes, trained=CONFIG, **options):
        model = load_classifier(supernet_run, trained, data, SmallSupernet)
        return search_classification(
            config, trained, data, out, SmallSpace(), model, paths=PATHS, progress=False, **options
        )

    return call


def told(out):
    generations = json.loads((out / "evolution.json").read_text())["state"]["generations"]
    return [(tuple(one["card"]["genotype"]), one["score"]) for generation in generations for one in generation]


def test_scores_are_the_accuracies_of_recalibrated_paths(search, supernet_run, digit_classes, tmp_path):
    card = search(tmp_path)
    scores = dict(told(tmp_path))
    assert len(scores) == len(told(tmp_path)) >= 3, "no path twice"
    for genotype, score in scores.items():
        model = load_classifier(supernet_run, CONFIG, digit_classes, SmallSupernet)
        model.backbone.activate(SmallSpace().card(*genotype))
        where = torch.device("cpu"), torch.channels_last
        model.to(memory_format=torch.channels_last)
        recalibrate_classifier(model, CONFIG, digit_classes.search_train(), *where)
        assert evaluate_classifier(model, digit_classes.search_val(), size=24, progress=False)["top1"] == score
    assert scores[tuple(card.genotype)] == max(scores.values()) == card.source["top1"]
    assert load_card(tmp_path / "card.json") == card
    assert load_card(tmp_path / "cards" / "1.json").genotype == card.genotype
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "done"


def test_killed_and_resumed_it_is_the_same(search, tmp_path, monkeypatch):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    card = search(whole)
    evaluate, calls = module.evaluate_classifier, iter(range(100))

    def crash(*arguments, **options):
        if next(calls) == 2:
            raise RuntimeError("killed")
        return evaluate(*arguments, **options)

    monkeypatch.setattr(module, "evaluate_classifier", crash)
    with pytest.raises(RuntimeError, match="killed"):
        search(killed)
    monkeypatch.setattr(module, "evaluate_classifier", evaluate)
    with pytest.raises(ValueError, match="already holds a search"):
        search(killed)
    with pytest.raises(ValueError, match="written by another search.*recalibration"):
        search(killed, replace(SEARCH, recalibration="momentum"), resume=True)
    assert search(killed, resume=True) == card and told(killed) == told(whole)


def test_test_images_are_refused(search, digit_classes, tmp_path, monkeypatch):
    monkeypatch.setattr(type(digit_classes), "search_val", type(digit_classes).test)
    with pytest.raises(TestSplitError, match="choosing an architecture on the test split"):
        search(tmp_path)
    assert not list(tmp_path.iterdir())


def test_limits_are_kept_and_those_out_of_reach_refused_at_once(search, tmp_path):
    space = SmallSpace()

    def limit(high):
        return [Constraint("macs", lambda card: space.macs(card.genotype), high=high, reachable=(2.0, 18.0))]

    assert search(tmp_path / "a", replace(SEARCH, population=1), constraints=limit(2.0)).genotype == ["k1", "k1"]
    with pytest.raises(ValueError, match="macs must be at most 1, reachable are 2 to 18"):
        search(tmp_path / "b", constraints=limit(1.0))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"offspring": "x"}, "offspring must be one of"),
        ({"recalibration": "x"}, "recalibration must be one of"),
        ({"top": 0}, "top"),
        ({"name": ""}, "name must be"),
    ],
    ids=str,
)
def test_bad_settings(bad, message):
    with pytest.raises(ValueError, match=message):
        ClassificationSearchConfig(**bad)


def test_children_are_detnas_numbers_at_any_size():
    assert [one.count for one in ClassificationSearchConfig().children()] == [25, 25]
    assert [one.count for one in ClassificationSearchConfig(offspring="detnas-released").children()] == [20, 20, 10]
    assert [one.count for one in ClassificationSearchConfig(population=10).children()] == [5, 5]
