"""Candidates scored by one process or several: the same population, and files that lose nothing."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest

from nasdet.arch import Card
from nasdet.engine.evolve import Scores, evolve
from nasdet.search.evolution import Evolution
from nasdet.spaces.detnas import DetNASSpace


def toy(seed: int = 0) -> Evolution:
    return Evolution(DetNASSpace("tiny"), population=6, parents=2, generations=3, seed=seed)


def score(card: Card) -> float:
    return Random(card.key).random()


def test_files_of_several_processes(tmp_path: Path) -> None:
    """Scores of all files count, also of more processes than there are now; the population is that of one."""
    evolve(alone := toy(), score, tmp_path / "alone", {}, progress=False)
    asked: list[str] = []

    def counted(card: Card) -> float:
        asked.append(card.key)
        return score(card)

    first = [candidate.card for candidate in toy().candidates[0]]
    for rank in (1, 3):
        scores = Scores(tmp_path / "four" / "scores", rank, {})
        scores.add(first[rank], score(first[rank]))
    evolve(found := toy(), counted, tmp_path / "four", {}, progress=False)
    assert found.state_dict() == alone.state_dict()
    assert len(asked) == 16 and not {first[1].key, first[3].key} & set(asked)


def test_scores_of_something_else_do_not_count(tmp_path: Path) -> None:
    """Such as those that another supernet left in the folder."""
    cards = [candidate.card for candidate in toy().candidates[0]]
    Scores(tmp_path, 0, {"supernet": "a"}).add(cards[0], 0.5)
    other = Scores(tmp_path, 1, {"supernet": "b"})
    keys = [card.key for card in cards]
    assert other.known(keys) == {}
    other.add(cards[1], 0.25)
    assert other.known(keys) == {cards[1].key: 0.25} and other.known(keys[2:]) == {}
    assert Scores(tmp_path, 0, {"supernet": "b"}).known(keys) == {cards[1].key: 0.25}
    assert Scores(tmp_path, 2, {"supernet": "a"}).known(keys) == {cards[0].key: 0.5}


@pytest.mark.parametrize("content", ["{}", "[]", '{"score": null}', '{"score": "high"}'])
def test_a_file_without_a_score_is_named(content: str, tmp_path: Path) -> None:
    card = toy().candidates[0][0].card
    scores = Scores(tmp_path, 0, {})
    scores.add(card, 0.5)
    (scores.folder / f"{card.key}.json").write_text(content)
    with pytest.raises(ValueError, match=rf"{card.key}\.json: score must be a number, got "):
        scores.known([card.key])


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_the_first_score_counts(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes may evaluate one candidate, and differ by a rounding: all are told the same."""
    if not links:

        def refuse(*paths: Any) -> None:
            raise OSError("no links here")

        monkeypatch.setattr("os.link", refuse)
    card = toy().candidates[0][0].card
    for rank, score in enumerate((0.5, 0.5000001)):
        Scores(tmp_path, rank, {}).add(card, score)
        assert Scores(tmp_path, 7, {}).known([card.key]) == {card.key: 0.5}
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert json.loads(file.read_text()) == {"score": 0.5, "rank": 0}


def test_a_process_that_is_gone_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its candidates are taken over, whoever it is."""
    monkeypatch.setattr("nasdet.engine.evolve._POLL", 0.001)
    evolve(alone := toy(), score, tmp_path / "alone", {}, progress=False)
    evolve(found := toy(), score, tmp_path / "pair", {}, rank=1, ranks=2, progress=False)
    assert found.state_dict() == alone.state_dict()
    assert not (tmp_path / "pair" / "evolution.json").exists(), "process 0 alone keeps it"


def test_another_search_is_not_resumed(tmp_path: Path) -> None:
    evolve(toy(), score, tmp_path, {"supernet": "a"}, progress=False)
    with pytest.raises(ValueError, match=r"written by another search \(supernet: 'a' -> 'b'\)"):
        evolve(toy(), score, tmp_path, {"supernet": "b"}, resume=True, progress=False)
    with pytest.raises(ValueError, match="evolution.json: state must be of a search with population"):
        other = Evolution(DetNASSpace("tiny"), population=5, parents=2, generations=3)
        evolve(other, score, tmp_path, {"supernet": "a"}, resume=True, progress=False)
