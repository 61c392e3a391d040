from __future__ import annotations

import math

import pytest

from nasdet.engine.records import append_line, read_lines, truncate_lines


def write(path, steps):
    for step in steps:
        append_line(path, {"step": step, "loss": step / 3})


def test_append_read_truncate(tmp_path):
    path = tmp_path / "deep" / "metrics.jsonl"
    write(path, [2, 4, 4, 6])
    assert [line["step"] for line in read_lines(path)] == [2, 4, 4, 6]
    assert read_lines(path)[0]["loss"] == 2 / 3
    before = path.stat().st_ino
    assert truncate_lines(path, 6) == 4 and path.stat().st_ino == before
    assert truncate_lines(path, 4) == 3
    assert [line["step"] for line in read_lines(path)] == [2, 4, 4]
    assert truncate_lines(path, -1) == 0 and path.read_text() == ""


@pytest.mark.parametrize("cut", range(1, 20, 3))
def test_a_cut_off_last_line_is_dropped(tmp_path, cut):
    path = tmp_path / "metrics.jsonl"
    write(path, [1, 2, 3])
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    assert [line["step"] for line in read_lines(path)] == [1, 2]
    truncate_lines(path, 3)
    write(path, [3])
    assert path.read_bytes() == content


def test_absent_file(tmp_path):
    assert read_lines(tmp_path / "no") == [] and truncate_lines(tmp_path / "no", 3) == 0
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("line", ["{", "[1]", '{"loss": 1}', '{"step": "3"}'])
def test_damage_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    write(path, [1])
    with open(path, "a") as file:
        file.write(line + "\n")
    write(path, [3])
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a record"):
        read_lines(path)


@pytest.mark.parametrize(
    ("record", "error"),
    [({}, ValueError), ({"step": 1.0}, ValueError), ({"step": 1, "x": math.nan}, ValueError)]
    + [({"step": 1, "x": {1}}, TypeError)],
    ids=["no_step", "float_step", "nan", "set"],
)
def test_bad_records_write_nothing(tmp_path, record, error):
    with pytest.raises(error):
        append_line(tmp_path / "metrics.jsonl", record)
    assert not (tmp_path / "metrics.jsonl").exists()
