"""``nasdet measure``: tables of latencies and rank correlations from the command line."""

from __future__ import annotations

import argparse
import json
import math
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest

from nasdet.arch import Card, save_card
from nasdet.cli import main, measure
from nasdet.spaces.detnas import DetNASSpace, Sizes

ROWS = [("a", 0.1, 30.0), ("b", 0.2, 31.0), ("c", 0.3, 33.0), ("d", 0.4, 32.0), ("e", 0.5, 33.0)]
TAU = (8 - 1) / math.sqrt(10 * 9)  # of ten pairs one is tied, and d is before c and not after


def csv_file(folder: Path, header: str = "net,one_shot,stand_alone") -> Path:
    path = folder / "scores.csv"
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in ROWS)]) + "\n")
    return path


@pytest.mark.parametrize("action", ["latency", "tau"])
def test_help_of_the_actions_teaches(action: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["measure", action, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and len(text) > 800 and "examples:" in text
    assert ("detnas-small" in text and "msnas-r50" in text) == (action == "latency")


def test_a_table_says_which_shuffle(tmp_path: Path) -> None:
    out = tmp_path / "table.json"
    arguments = latency("--space", "detnas-tiny", "--size", "32x64", out=out)
    assert main([*arguments, "--shuffle", "halves"]) == 0
    assert json.loads(out.read_text())["space"]["shuffle"] == "halves"
    assert main(arguments) == 2, "those of the other one are not mixed in"


def test_a_table_of_a_detectors_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The head's blocks run on as many RoIs as the search's cost has."""
    out = tmp_path / "table.json"
    arguments = latency("--space", "hit-tiny-screened", "--size", "64x96", "--proposals", "3", out=out)
    assert main([*arguments, "--check", "1"]) == 0
    assert "ir_k3_d1_e3 32>32 stride 1 on 3 RoIs" in capsys.readouterr().out
    stored = json.loads(out.read_text())
    assert stored["space"]["proposals"] == 3 and len(stored["rows"]) == 114 and len(stored["nets"]) == 1


def latency(*more: str, out: Path) -> list[str]:
    base = ["measure", "latency", "--space", "detnas-small", "--out", str(out), "--size", "32x64", "--device", "cpu"]
    return [*base, "--threads", "1", "--rounds", "1", "--check", "0", *more]


def test_a_table_is_measured_shown_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "table.json"
    assert main(latency("--check", "2", out=out)) == 0
    shown = capsys.readouterr()
    assert "detnas-small at 32x64" in shown.out and "xcep 320>640 stride 2 at 1/16" in shown.out
    assert "in the mean" in shown.out and "tau-b" in shown.out and "round 1 of 1" in shown.err
    stored = json.loads(out.read_text())
    assert len(stored["rows"]) == 33 and len(stored["nets"]) == 2 and stored["threads"] == 1
    assert stored["size"] == [32, 64] and stored["dtype"] == "float32" and stored["clock"] == "wall"
    assert set(stored["versions"]) >= {"nasdet", "python", "torch"} and stored["device"] and stored["started"]
    assert main(latency("--json", out=out)) == 0
    again = capsys.readouterr()
    value = json.loads(again.out)
    assert json.loads(out.read_text()) == stored and again.err == "", "nothing was left to measure"
    assert value["rows"] == stored["rows"] and len(value["places"]) == 20 and len(value["check"]["nets"]) == 2
    assert 0 < value["reachable"][0] < value["reachable"][1]
    assert main(latency("--dtype", "bfloat16", out=out)) == 2
    error = capsys.readouterr().err
    assert "dtype must be bfloat16, got float32" in error and str(out) in error and error.count("\n") == 1
    assert json.loads(out.read_text()) == stored


def test_predictions_are_checked_unless_told_otherwise() -> None:
    parser = argparse.ArgumentParser()
    measure.configure(parser)
    assert parser.parse_args(["latency", "--space", "detnas-small", "--out", "table.json"]).check == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--space", "detnas-huge"], "space must be one of detnas-small, detnas-large, .*, got 'detnas-huge'"),
        (["--size", "32"], "size must be HEIGHTxWIDTH in pixels, got '32'"),
        (["--proposals", "3"], "proposals must be left out for detnas-small, whose blocks see whole pictures, got 3"),
        (["--space", "hit-tiny", "--proposals", "0"], "proposals must be a positive integer, got 0"),
        (["--space", "msnas-r18"], "size must be .* divisible by 64, got .*32, 64"),
        (["--space", "msnas-r18", "--shuffle", "halves"], "shuffle must be left out for msnas-r18, .*, got 'halves'"),
        (["--check", "-1"], "nets must be an integer of at least 0, got -1"),
    ],
    ids=["space", "size", "no-proposals", "proposals", "msnas-size", "no-shuffle", "check"],
)
def test_what_cannot_be_measured(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(latency(*arguments, out=tmp_path / "t.json")) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_tau_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure", "tau", str(csv_file(tmp_path))]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"tau-b {TAU:+.4f}, 95% interval ") and "5 nets: 8 pairs agree, 1 do not" in text
    assert main(["measure", "tau", str(csv_file(tmp_path)), "--json", "--confidence", "0.8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tau"] == pytest.approx(TAU) and found["confidence"] == 0.8 and found["method"] == "exact"
    assert found["low"] < TAU < found["high"]


def test_tau_of_other_columns_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = csv_file(tmp_path, "net,before,after")
    assert main(["measure", "tau", str(path), "--columns", "before, after"]) == 0
    first = capsys.readouterr().out
    other = tmp_path / "scores.json"
    other.write_text(json.dumps([{"net": name, "one_shot": x, "stand_alone": y} for name, x, y in ROWS]))
    assert main(["measure", "tau", str(other)]) == 0
    assert capsys.readouterr().out == first


def runs(folder: Path) -> tuple[Path, Path, list[Card]]:
    """A search that told five architectures and asked for a sixth, and training runs of some of them."""
    space, rng = DetNASSpace(Sizes(8, (16, 24, 32, 40), (1, 2, 1, 1), 16)), Random(0)
    cards = [space.random(rng) for _ in range(7)]
    search, nets = folder / "search", folder / "nets"
    search.mkdir()
    told = [{"card": card.to_json(), "operator": "random", "costs": {}, "score": None} for card in cards[:6]]
    for one, (_, score, _) in zip(told, ROWS, strict=False):
        one["score"] = score
    (search / "evolution.json").write_text(json.dumps({"of": {}, "state": {"generations": [told[:4], told[4:]]}}))
    for place, card in enumerate(cards):  # also one that was not told, and one of no search
        save_card(card, nets / f"net{place}" / "card.json")
        evaluation: dict[str, Any] = {"AP": ROWS[place][2] if place < 5 else 40.0}
        (nets / f"net{place}" / "eval.json").write_text(json.dumps(evaluation))
    save_card(cards[0], nets / "unfinished" / "card.json")
    return search, nets, cards


def test_tau_of_a_search_and_its_nets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search, nets, _ = runs(tmp_path)
    assert main(["measure", "tau", str(search), "--nets", str(nets), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tau"] == pytest.approx(TAU) and found["items"] == 5


BAD_SCORES = {
    "object.json": b"{}",
    "empty.json": b"[]",
    "huge.json": b'[{"one_shot": 1' + 400 * b"0" + b', "stand_alone": 1}]',
    "digits.json": b'[{"one_shot": ' + 5000 * b"1" + b', "stand_alone": 1}]',
    "deep.json": 100_000 * b"[",
    "nan.csv": b"one_shot,stand_alone\n1,2\n2,nan\n3,4\n",
    "same.csv": b"one_shot,stand_alone\n1,2\n2,2\n",
    "binary.csv": b"\xb0\x01\xff",
    "long.csv": b"one_shot,stand_alone\n1," + 200_000 * b"1",
}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{search}"], "a search's folder needs --nets"),
        (["{search}", "--nets", "{search}"], "at least 2 runs must have an eval.json and a card of .*, got 0"),
        (["{search}", "--nets", "{nowhere}"], "--nets must be a folder of training runs"),
        (["{nets}", "--nets", "{nets}"], "evolution.json"),
        (["{csv}", "--nets", "{nets}"], "--nets goes with a search's folder"),
        (["{csv}", "--columns", "one_shot"], "columns must be two names with a comma between, got 'one_shot'"),
        (["{csv}", "--columns", "one_shot,AP"], "net 1 must have AP, got net, one_shot, stand_alone"),
        (["{csv}", "--columns", "net,one_shot"], "net of net 1 must be a finite number, got 'a'"),
        (["{nan}"], "nan.csv: stand_alone of net 2 must be a finite number, got 'nan'"),
        (["{same}"], "same.csv: stand_alone must differ between nets, got 2.0 for all 2"),
        (["{huge}"], "huge.json: one_shot of net 1 must be a finite number, got 1000"),
        (["{digits}"], "digits.json: not valid JSON: .*digits"),
        (["{deep}"], "deep.json: not valid JSON: "),
        (["{binary}"], "binary.csv: not a CSV file: 'utf-8' codec"),
        (["{long}"], "long.csv: not a CSV file: field larger"),
        (["{nowhere}"], "nowhere"),
        (["{csv}", "--confidence", "95"], r"confidence must be in \(0, 1\), got 95.0"),
        (["{object}"], "must be a list of objects, one for each net"),
        (["{empty}"], "at least 2 items, got 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_has_no_tau(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search, nets, _ = runs(tmp_path)
    places: dict[str, Any] = {"search": search, "nets": nets, "csv": csv_file(tmp_path)}
    places |= {"nowhere": tmp_path / "nowhere"}
    for name, content in BAD_SCORES.items():
        places[name.partition(".")[0]] = tmp_path / name
        (tmp_path / name).write_bytes(content)
    assert main(["measure", "tau", *(one.format(**places) for one in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("nasdet measure: ") and re.search(message, error) and error.count("\n") == 1


def test_a_broken_state_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    search, nets, _ = runs(tmp_path)
    (search / "evolution.json").write_text(json.dumps({"state": {"generations": [[{"score": 1.0}]]}}))
    assert main(["measure", "tau", str(search), "--nets", str(nets)]) == 2
    assert "not the state of a search" in capsys.readouterr().err
