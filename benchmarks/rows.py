"""From a race to rows: each race is run once, and its measured times are entered into pytest-benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from interleave import ReplayClock

CLOCK = ReplayClock()


def replay(benchmark: Any, group: str, seconds: Sequence[float], info: dict[str, Any]) -> None:
    """Enter measured times into pytest-benchmark's results, one round per time (needs ``timer=CLOCK.read``)."""
    benchmark.group = group
    benchmark.extra_info.update(info)
    CLOCK.load(seconds)
    benchmark.pedantic(CLOCK.step, rounds=len(seconds))


def race_once(races: dict[Any, Any], key: Any, run: Callable[[], Any]) -> Any:
    """The outcome of race ``key``, run by the first of its rows. A failure is kept too: it fails every row alike."""
    if key not in races:
        try:
            races[key] = run()
        except Exception as error:
            races[key] = error
    outcome = races[key]
    if isinstance(outcome, Exception):
        pytest.fail(f"{type(outcome).__name__}: {outcome}", pytrace=False)
    return outcome
