"""docs/methods.md: every number with a command is what the command says, every option it names exists."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from nasdet.cli import main

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
ROW = re.compile(
    r"^\| (?P<what>[^|]+) \|[^|]*\| (?P<here>[\d,]+) \| `(?P<command>[^`|]+)` \| (?P<parts>\S+) (?P<of>\w+) \|$", re.M
)
ROWS = [match.groupdict() for match in ROW.finditer(TEXT)]


def test_every_row_of_the_tables_is_seen() -> None:
    counted = TEXT.partition("## Run here")[0].splitlines()
    tables = [line for line in counted if line.startswith("|") and "`" in line and "arch info" not in line]
    assert len(ROWS) == len(tables) >= 25


@pytest.mark.parametrize("command", sorted({row["command"] for row in ROWS}))
def test_numbers_are_the_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["arch", "info", *command.split(), "--json"])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    parts = {part["name"]: part for part in [*found["parts"], found["total"], found.get("subnet")] if part}
    for row in ROWS:
        if row["command"] == command:
            number = sum(parts[name][row["of"]] for name in row["parts"].split("+"))
            assert f"{number:,}" == row["here"], row["what"]


VERBS = (*(["search", method] for method in ("fad", "nats", "detnas", "msnas", "hit")), ["pretrain"], ["arch", "info"])


def test_every_option_it_names_exists(capsys: pytest.CaptureFixture[str]) -> None:
    known = set()
    for verb in VERBS:
        with pytest.raises(SystemExit):
            main([*verb, "--help"])
        known |= set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out))
    named = set(re.findall(r"--[a-z][a-z-]+", TEXT))
    assert len(named) >= 15 and named <= known | {"--json"}, named - known
