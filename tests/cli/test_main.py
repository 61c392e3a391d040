"""The command line as a whole: help of every verb, errors as one line, info."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from nasdet.cli import VERBS, main
from nasdet.engine.loop import Interrupted


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_every_verb_teaches(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert len(text) > 300 and text.startswith(f"usage: nasdet {verb}")


def test_without_a_verb_it_says_how_to_begin(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2 and "VERB" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "begin here" in capsys.readouterr().out


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = tmp_path / "nowhere"
    assert main(["train", "--data", str(missing), "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("nasdet train: ") and str(missing) in error and "\n" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "said"),
    [(Interrupted("stopped after 3 of 9 steps"), "stopped after 3 of 9 steps"), (KeyboardInterrupt(), "interrupted")],
)
def test_an_interrupted_run_says_how_to_go_on(
    error: KeyboardInterrupt, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(**options: Any) -> int:
        raise error

    monkeypatch.setattr("nasdet.cli.info.run", stopped)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == f"nasdet: {said}\n"


def test_sigterm_interrupts_between_the_parts_of_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def stopped(**options: Any) -> int:
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler  # else the tests would end here
        signal.raise_signal(signal.SIGTERM)
        return 0

    monkeypatch.setattr("nasdet.cli.info.run", stopped)
    assert main(["info"]) == 130
    assert capsys.readouterr().err == "nasdet: interrupted\n"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("error", "status", "said"), [(KeyboardInterrupt(), 130, "interrupted"), (OSError("no torch"), 2, "no torch")]
)
def test_what_ends_the_start_is_one_line_too(
    error: BaseException, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def importing() -> Any:
        raise error

    monkeypatch.setattr("nasdet.cli.build_parser", importing)
    assert main(["info"]) == status
    assert capsys.readouterr().err == f"nasdet: {said}\n"


def talkative(done: list[int]) -> Callable[..., int]:
    """A run that shows its progress, writes more than a pipe holds back, and notes its steps."""

    def run(**options: Any) -> int:
        for step in tqdm(range(3), file=sys.stderr, mininterval=0.5 if sys.stderr.isatty() else 0):
            print("result " * 5000)
            done.append(step)
        return 0

    return run


@pytest.fixture
def left_pipe() -> Iterator[Any]:
    """A stream into a pipe whose reader has left."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        yield stream


@pytest.mark.parametrize("names", [["stdout"], ["stderr"], ["stdout", "stderr"]], ids="+".join)
def test_who_stops_reading_ends_nothing(names: list[str], left_pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    monkeypatch.setattr("nasdet.cli.info.run", talkative(done))
    for name in names:
        monkeypatch.setattr(sys, name, left_pipe)
    assert main(["info"]) == 0 and done == [0, 1, 2]
    assert all(getattr(sys, name) is left_pipe for name in names)
    left_pipe.flush()  # as the interpreter does at its end


def test_another_broken_pipe_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def worker_lost(**options: Any) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("nasdet.cli.info.run", worker_lost)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == "nasdet info: [Errno 32] Broken pipe\n"


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_closed_streams_are_done_without(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[int] = []
    monkeypatch.setattr("nasdet.cli.info.run", talkative(done))
    monkeypatch.setattr(sys, name, None)
    assert main(["info"]) == 0 and done == [0, 1, 2]
    assert getattr(sys, name) is None


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_output_that_does_not_fit_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(**options: Any) -> int:
        print("a line")
        return 0

    monkeypatch.setattr("nasdet.cli.info.run", short)
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert main(["info"]) == 2
    assert "nasdet info: [Errno 28]" in capsys.readouterr().err


def test_info_as_json_names_every_operator_and_backend(capsys: pytest.CaptureFixture[str]) -> None:
    from nasdet._dispatch import OPS

    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert {name: list(backends) for name, backends in info["ops"].items()} == {
        name: [backend.name for backend in op.backends] for name, op in OPS.items()
    }
    assert all(backends["reference"] == "can run" for backends in info["ops"].values())
    assert set(info["libraries"]) == {"cpu", "cuda"}
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert "norm_act_mix" in text and f"library cuda: {info['libraries']['cuda']}\n" in text


def test_published_net_costs_what_the_paper_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["arch", "info", "fad-paper", "--size", "800x1280", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    subnet = [part for part in info["parts"] if part["name"] in ("towers", "head")]
    assert sum(part["parameters"] for part in subnet) == 4_169_498
    locations = sum(-(-800 // s) * -(-1280 // s) for s in (8, 16, 32, 64, 128))
    assert sum(part["macs"] for part in subnet) == 4_143_360 * locations


def test_the_module_runs_like_the_command() -> None:
    command = [sys.executable, "-m", "nasdet", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, env=os.environ)
    assert result.returncode == 0 and result.stdout.startswith("nasdet ")


def test_a_demo_of_another_budget_is_not_mixed_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"verb": "demo", "arguments": {"train_steps": 1}}))
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert "same arguments" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("option", ["search-steps", "train-steps", "images"])
def test_a_demo_of_nothing_is_refused_at_once(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another budget is refused once there is a run."""
    assert main(["demo", "--out", str(tmp_path / "demo"), f"--{option}", "0"]) == 2
    assert f"{option.replace('-', '_')} must be a positive integer, got 0" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("there", [False, True])
def test_a_run_that_is_not_there_cannot_be_resumed_in_silence(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("nasdet.cli.train.run", lambda **_: 0)
    if there:
        (tmp_path / "run.json").write_text("{}")
    for resume in ([], ["--resume"]):
        assert main(["train", "--data", "data", "--out", str(tmp_path), *resume]) == 0
    expected = "" if there else f"nothing to resume in {tmp_path}: a new run begins\n"
    assert capsys.readouterr().err == expected


def test_an_interrupted_demo_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: Any) -> Any:
        raise Interrupted("search stopped; run the same command with --resume to go on")

    monkeypatch.setattr("nasdet.data.write_digits", lambda *_, **__: None)
    monkeypatch.setattr("nasdet.cli.demo._compare", stopped)
    assert main(["demo", "--out", str(tmp_path)]) == 130
    error = capsys.readouterr().err
    assert error.endswith(f"everything is in {tmp_path}; run the same command again to go on\n")
    assert "--resume" not in error and json.loads((tmp_path / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("space", "names"),
    [
        ("fad", ("searched towers", "plain towers", "random architecture")),
        ("nats", ("searched backbone", "original backbone", "random dilations")),
    ],
)
def test_a_small_demo_runs_through_and_again(
    space: str, names: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["demo", "--out", str(tmp_path / "demo"), "--search-steps", "2", "--train-steps", "3", "--images", "12"]
    arguments += ["--space", space] if space != "fad" else []
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert all(name in first for name in names) and (tmp_path / "demo" / "report.html").is_file()
    rows = json.loads((tmp_path / "demo" / "demo.json").read_text())["rows"]
    assert [row["run"] for row in rows] == ["train-searched", "train-plain", "train-random"]
    assert tuple(row["name"] for row in rows) == names
    if space == "nats":
        assert len({(row["parameters"], row["macs"]) for row in rows}) == 1, "dilations cost nothing"
        fields = json.loads((tmp_path / "demo" / "erf.json").read_text())["maps"]
        assert [field["name"] for field in fields] == ["original backbone", "searched backbone"]
        cards = [json.loads((tmp_path / "demo" / run / "card.json").read_text()) for run in ("search", "train-random")]
        assert cards[0]["settings"]["channel_groups"] == cards[1]["settings"]["channel_groups"] == 16
        assert cards[0]["genotype"].keys() == cards[1]["genotype"].keys() and cards[0] != cards[1]
    assert main(arguments) == 0
    assert json.loads((tmp_path / "demo" / "demo.json").read_text())["rows"] == rows
