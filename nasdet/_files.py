"""Files that are either whole or not there."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any


def write_atomic(path: str | Path, content: bytes | str | Callable[[IO[bytes]], Any]) -> Path:
    """Write a file so that a reader, or a crash, sees the old content or the new, never a part.

    ``content`` is text, bytes, or a function that writes to the open binary file. Missing parent folders are made.
    An ``OSError``, such as that of a full disk, names the file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _errors_about(path):
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(name, 0o666 & ~umask)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    return path


@contextlib.contextmanager
def _errors_about(path: Path) -> Iterator[None]:
    """The system's errors in the block name ``path``, not the temporary file that stands for it."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:  # else it is words, which a file name would take the place of
            error.filename = str(path)
            del error.filename2  # None would be printed
        raise


def write_json(path: str | Path, value: Any) -> Path:
    """Write ``value`` as indented JSON, atomically; NaN and infinity are refused."""
    return write_atomic(path, json.dumps(value, indent=1, allow_nan=False) + "\n")


def write_json_once(path: str | Path, value: Any) -> None:
    """As :func:`write_json`, unless the file is there: of several processes the first writes it, for good."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _errors_about(path):
        draft = write_json(path.with_name(f".{path.name}.{uuid.uuid4().hex}"), value)
        try:
            os.link(draft, path)  # atomic where os.replace would let the last one win, over NFS too
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            if not path.exists():
                os.replace(draft, path)
        finally:
            draft.unlink(missing_ok=True)


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a malformed one is a ``ValueError`` that names the file and what is wrong in it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also of Python's limits: of digits in a number, of depth
        raise ValueError(f"{path}: not valid JSON: {error}") from error


def first_line(error: BaseException) -> str:
    """What an error says in one line; its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
