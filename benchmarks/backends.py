"""Which backend an op's calls ran on: a row under the library's name must not measure its fallback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

from nasdet import _dispatch

ON_CUDA = ("cuda", "triton")


class WrongBackend(RuntimeError):
    """The library ran, but not its kernels for this device: no speed is reported under its name."""


@contextlib.contextmanager
def chosen_backends() -> Iterator[dict[str, list[str]]]:
    """Within the block, each op that is called, with the backends that its calls were handed to."""
    found: dict[str, list[str]] = {}
    choose = _dispatch.choose

    def noted(name: str, backend: str | None, *args: Any) -> _dispatch.Backend:
        chosen = choose(name, backend, *args)
        names = found.setdefault(name, [])
        if chosen.name not in names:
            names.append(chosen.name)
        return chosen

    with mock.patch.object(_dispatch, "choose", noted):
        yield found


def check_backends(contestant: str, found: Mapping[str, list[str]], device: str, *, an_op: bool = False) -> None:
    """Raise WrongBackend where an op's kernels for a CUDA device were passed over. An op without such has no fallback:
    its reference is all that there is. ``an_op``: there must have been one."""
    if device != "cuda":
        return
    if an_op and not found:
        raise WrongBackend(f"{contestant}: must call an op of this library on {device}, got none")
    for op, names in found.items():
        offered = [backend.name for backend in _dispatch.OPS[op].backends if backend.name in ON_CUDA]
        if offered and not set(names) <= set(ON_CUDA):
            wanted = " or ".join(offered)
            raise WrongBackend(f"{contestant}: backend of {op} must be {wanted} on {device}, got {', '.join(names)}")
