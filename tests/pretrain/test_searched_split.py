"""``nasdet pretrain --card`` never reports on pictures that chose the card."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nasdet.arch import Card, load_card, save_card
from nasdet.cli import main
from nasdet.cli import pretrain as verb
from nasdet.data import ClassificationFolder, Split
from nasdet.engine.search_classification import SEARCH
from nasdet.spaces.detnas import DetNASSpace

Open = Callable[..., ClassificationFolder]


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Classes without a test part, and a search in them: of seed 3, on the split of seed 0."""
    pytest.importorskip("sklearn")
    place = tmp_path_factory.mktemp("searched")
    small = ["--classification", "--train", "100", "--val", "10", "--size", "24x24"]
    assert main(["data", "digits", "--out", str(place / "classes"), *small]) == 0
    shutil.rmtree(place / "classes" / "val")
    split = ClassificationFolder(place / "classes", seed=0).split
    (place / "run").mkdir()
    split.save(place / "run" / "split.json")
    source = {"search": SEARCH, "split": split.sha256, "split_seed": 0, "seed": 3}
    save_card(replace(DetNASSpace("tiny").random(random.Random(0)), source=source), place / "run" / "card.json")
    return place


@pytest.fixture
def opened(searched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Runs the verb with seed 1, and gives the folder that its engine would get."""
    found: list[ClassificationFolder] = []

    def stop(_config: object, folder: ClassificationFolder, *_: object, **__: object) -> None:
        found.append(folder)
        raise KeyboardInterrupt

    monkeypatch.setattr("nasdet.engine.pretrain.pretrain", stop)

    def call(card: Path, seed: int = 1) -> ClassificationFolder:
        with pytest.raises(KeyboardInterrupt):
            verb.run(data=searched / "classes", out=tmp_path / "new", preset="tiny", card=str(card), seed=seed)
        return found[-1]

    return call


def elsewhere(searched: Path, folder: Path, **source: object) -> Path:
    card: Card = load_card(searched / "run" / "card.json")
    save_card(replace(card, source=card.source | source), folder / "lone.json")
    return folder / "lone.json"


def test_what_the_search_held_out_is_tested_on(
    searched: Path, opened: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chose = Split.load(searched / "run" / "split.json")
    for card in (searched / "run" / "card.json", elsewhere(searched, tmp_path)):
        folder = opened(card)
        assert folder.split == chose and not set(folder.test().image_ids) & set(chose.train)
    assert "80 images to train on, 20 to test" in capsys.readouterr().out


def test_a_split_that_is_not_known_brings_a_warning(
    searched: Path, opened: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert opened(elsewhere(searched, tmp_path, split_seed=7)).split.seed == 1
    assert "may have chosen the architecture" in capsys.readouterr().err


def test_a_search_on_detection_data_says_nothing_about_classes(
    searched: Path, opened: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert opened(elsewhere(searched, tmp_path, search="nasdet search detnas")).split.seed == 1
    assert not capsys.readouterr().err
