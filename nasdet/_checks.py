"""Checks of arguments that many parts share. No torch."""

from __future__ import annotations

import numbers
from typing import Any


def plain_int(value: Any) -> Any:
    """An integer of another library, such as NumPy's, as an int; anything else as it is."""
    return value if isinstance(value, int) or not isinstance(value, numbers.Integral) else int(value)


def check_whole(name: str, value: Any, least: int = 1) -> int:
    """``value``, if it is an integer (and no bool) of at least ``least``; else a ``ValueError``."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        wanted = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    return value
