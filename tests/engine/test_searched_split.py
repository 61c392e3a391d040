"""Pictures that chose an architecture are never reported as test pictures."""

from __future__ import annotations

import argparse
import json
import random
import shutil
from dataclasses import replace

import pytest

from nasdet.arch import load_card, save_card
from nasdet.cli import search, search_fad
from nasdet.cli import train as train_verb
from nasdet.cli.splits import with_split
from nasdet.data import Split, open_data, write_digits
from nasdet.spaces.assemble import ModelConfig
from nasdet.spaces.detnas import DetNASSpace

pytest.importorskip("sklearn")


class Opened(Exception):
    pass


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """A data folder without test annotations, and a search of a backbone on it, of seed 0."""
    place = tmp_path_factory.mktemp("held-out")
    data = write_digits(place / "data", train=20, val=1, size=(64, 96))
    next((data / "annotations").glob("instances_val*")).unlink()
    (place / "det").mkdir()
    split = open_data(data).split
    split.save(place / "det" / "split.json")
    source = {"search": "nasdet search detnas", "split": split.sha256, "seed": 0}
    save_card(replace(DetNASSpace("tiny").random(random.Random(0)), source=source), place / "det" / "card.json")
    return place


@pytest.fixture
def opened(monkeypatch):
    """Calls a verb, and gives the data folder that its engine would get."""

    def stop(_config, folder, *_args, **_options):
        raise Opened(folder)

    monkeypatch.setattr("nasdet.engine.train.train", stop)
    monkeypatch.setattr(search_fad, "run", stop)

    def call(module, *words):
        parser = argparse.ArgumentParser()
        module.configure(parser)
        with pytest.raises(Opened) as caught:
            module.run(**vars(parser.parse_args([str(word) for word in words])))
        return caught.value.args[0]

    return call


def train(data, *words):
    return ("--data", data, "--out", data.parent / "new", "--preset", "tiny", *words)


def test_a_searched_backbone_brings_the_split_of_its_search(held_out, opened, capsys):
    data, card = held_out / "data", held_out / "det" / "card.json"
    split = Split.load(card.with_name("split.json"))
    assert opened(train_verb, *train(data, "--backbone", card, "--seed", 1)).split == split
    words = ("fad", "--data", data, "--out", held_out / "new", "--preset", "tiny", "--backbone", card, "--seed", 1)
    assert opened(search, *words).split == split
    assert opened(train_verb, *train(data, "--seed", 1)).split.seed == 1  # a plain one is divided as it says
    assert not capsys.readouterr().err


def test_a_card_away_from_its_run_is_known_by_the_hash(held_out, opened, tmp_path, capsys):
    data, lone = held_out / "data", shutil.copy(held_out / "det" / "card.json", tmp_path / "lone.json")
    for option in ("--card", "--backbone"):
        assert opened(train_verb, *train(data, option, lone, "--seed", 1)).split == open_data(data).split
    other = open_data(data, seed=1).split.save(tmp_path / "other.json")
    with pytest.raises(ValueError, match=r"split must test on no picture that chose .* got \d of 4 .* --split FILE"):
        train_verb.run(data=data, out=tmp_path / "new", preset="tiny", card=str(lone), split=other)
    assert not capsys.readouterr().err
    card = load_card(lone)
    save_card(replace(card, source=card.source | {"split_seed": 7}), lone)  # as of a split that cannot be drawn again
    assert opened(train_verb, *train(data, "--card", lone, "--seed", 1)).split.seed == 1
    assert "warning: " in capsys.readouterr().err


def test_other_annotations_than_the_searched_bring_a_warning(held_out, opened, tmp_path, capsys):
    data, card = shutil.copytree(held_out / "data", tmp_path / "data"), held_out / "det" / "card.json"
    file = next((data / "annotations").glob("instances_train*"))
    document = json.loads(file.read_text())
    document["annotations"][0]["category_id"] = document["annotations"][1]["category_id"]
    file.write_text(json.dumps(document, indent=1))
    opened(train_verb, *train(data, "--card", card, "--seed", 1))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: ") and "may have chosen the architecture" in line
    assert with_split(open_data(data), card.with_name("split.json")).split.seed == 0
    assert "may hold pictures that were trained on" in capsys.readouterr().err
    apart = write_digits(tmp_path / "apart", train=6, val=3, size=(64, 96), seed=1)  # with a test set of its own
    opened(train_verb, *train(apart, "--card", card))
    assert not capsys.readouterr().err


def test_the_searched_backbone_of_a_search_is_remembered(held_out, opened, tmp_path):
    data, body = held_out / "data", load_card(held_out / "det" / "card.json")
    save_card(load_card("fad-paper"), tmp_path / "card.json")
    ModelConfig(backbone=body.to_json(), fpn_channels=48).save(tmp_path / "model.json")
    words = ("--data", data, "--out", tmp_path / "new", "--card", tmp_path / "card.json", "--seed", 1)
    assert opened(train_verb, *words).split.seed == 0
