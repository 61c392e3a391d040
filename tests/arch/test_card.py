"""Cards: plain data in, the same plain data out, and a clear error for anything else."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nasdet.arch import Card, load_card, published, save_card

GENOTYPE = {"box": [[["std1", 0], ["sep2", 1]]]}


def make(**changes: Any) -> Card:
    return Card(**{"method": "fad", "name": "test", "genotype": GENOTYPE, **changes})


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    card = make(settings={"channels": 64, "inner_channels": {"box": 8}}, source={"run": "here", "scores": [0.5, None]})
    path = save_card(card, tmp_path / "new" / "card.json")
    assert load_card(path) == card
    assert load_card(str(path)).to_json() == card.to_json()
    assert list(tmp_path.joinpath("new").iterdir()) == [path], "nothing but the card is left"


def test_tuples_become_lists_and_nothing_is_shared() -> None:
    genotype = {"box": ((("std1", 0), ("sep2", 1)),)}
    settings = {"channels": 64}
    card = make(genotype=genotype, settings=settings)
    settings["channels"] = 1
    card.to_json()["settings"]["channels"] = 2
    assert card == make(settings={"channels": 64})
    with pytest.raises(dataclasses.FrozenInstanceError):
        card.name = "other"  # type: ignore[misc]  # this is the point


def test_key_is_of_the_architecture_alone() -> None:
    assert make(name="a", source={"x": 1}).key == make(name="b").key
    assert make(settings={"cells": 2}).key != make(settings={"cells": 1}).key


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "version": ({"schema_version": 2}, ValueError, "schema_version must be 1, got 2"),
    "version-bool": ({"schema_version": True}, ValueError, "schema_version must be 1, got True"),
    "method": ({"method": "FAD!"}, ValueError, "method must be a lower-case word"),
    "name": ({"name": "../card"}, ValueError, "name must be letters, digits"),
    "genotype": ({"genotype": {}}, ValueError, "genotype must be a non-empty object or list, got {}"),
    "settings": ({"settings": [1]}, TypeError, "settings must be an object, got list"),
    "not-plain": ({"settings": {"a": {1, 2}}}, TypeError, "settings.a must be plain data"),
    "nan": ({"source": {"ap": [0.1, float("nan")]}}, ValueError, r"source.ap\[1\] must be finite, got nan"),
    "key": ({"settings": {1: 2}}, TypeError, "settings keys must be strings, got 1"),
}


@pytest.mark.parametrize(("changes", "kind", "words"), BAD.values(), ids=BAD)
def test_bad_fields(changes: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        make(**changes)


FILES = {
    "malformed": ("{not json", "not valid JSON"),
    "truncated": (json.dumps(make().to_json())[:-9], "not valid JSON"),
    "list": ("[1]", "card must be an object, got list"),
    "unknown-key": (json.dumps({**make().to_json(), "cels": 2}), "card keys must be among .*, got 'cels'"),
    "missing-key": ('{"schema_version": 1, "method": "fad", "name": "x"}', "card must have the key 'genotype'"),
    "no-version": ('{"method": "fad", "name": "x", "genotype": [1]}', "card must have the key 'schema_version'"),
    "future": (json.dumps({**make().to_json(), "schema_version": 9}), "schema_version must be 1, got 9"),
    "nan": (json.dumps({**make().to_json(), "source": {"x": float("inf")}}), "source.x must be finite"),
    "binary": (b"\xff\xfe\x00", "not valid JSON"),
}


@pytest.mark.parametrize(("content", "words"), FILES.values(), ids=FILES)
def test_bad_files_are_named(tmp_path: Path, content: str | bytes, words: str) -> None:
    path = tmp_path / "broken.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((TypeError, ValueError), match=words) as caught:
        load_card(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_unknown_card_lists_the_published_ones() -> None:
    with pytest.raises(ValueError, match=r"card must be a JSON file or one of .*fad-paper.*, got 'fad-papr'"):
        load_card("fad-papr")


def test_published_cards_load_by_name() -> None:
    assert {"fad-paper", "fad-alternative"} <= set(published())
    for name in published():
        card = load_card(name)
        assert card.name == name
        assert load_card(published()[name]) == card


def test_failed_write_leaves_the_old_card(tmp_path: Path) -> None:
    path = save_card(make(), tmp_path / "card.json")
    with pytest.raises(TypeError, match="card must be a Card, got dict"):
        save_card({"method": "fad"}, path)  # type: ignore[arg-type]  # a wrong call
    assert load_card(path) == make()


def test_arch_and_random_search_need_no_torch() -> None:
    code = "import sys, nasdet.arch, nasdet.search.random; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
