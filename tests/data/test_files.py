"""Files that are whole or not there: what is told when one cannot be written or read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nasdet._files import read_json, write_atomic, write_json, write_json_once

LONG = "x" * 250  # a name that the disk takes, and that of no temporary file beside it


@pytest.mark.parametrize("write", [write_json, write_json_once])
def test_a_file_that_cannot_be_begun_is_named(write: Callable[[Path, Any], Any], tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught:
        write(tmp_path / LONG, {})
    assert str(caught.value).endswith(f"File name too long: {str(tmp_path / LONG)!r}")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_take_its_name_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as caught:
        write_atomic(tmp_path / "folder", "text")
    assert str(caught.value).endswith(f"Is a directory: {str(tmp_path / 'folder')!r}")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("error", "said"),
    [(OSError(28, "No space left on device"), "[Errno 28] No space left on device: {!r}"), (OSError("words"), "words")],
    ids=["system", "words"],
)
def test_what_writing_raises_is_told(error: OSError, said: str, tmp_path: Path) -> None:
    def fail(file: Any) -> None:
        raise error

    path = tmp_path / "deep" / "file.json"
    with pytest.raises(OSError) as caught:
        write_atomic(path, fail)
    assert str(caught.value) == said.format(str(path)) and not list(path.parent.iterdir())


def test_of_several_writers_the_first_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    write_json_once(path, 1)
    write_json_once(path, 2)
    assert read_json(path) == 1 and [one.name for one in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe", 5000 * b"1", 100_000 * b"["], ids=["cut", "bytes", "digits", "deep"]
)
def test_malformed_json_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "file.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"file\.json: not valid JSON: "):
        read_json(tmp_path / "file.json")
