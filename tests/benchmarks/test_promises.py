"""Promises: a ratio to a rival, a limit, a share of a peak; a rival that failed keeps nobody's promise."""

from __future__ import annotations

from typing import Any

import pytest

promises = pytest.importorskip("promises", reason="no benchmarks beside these tests")
interleave = pytest.importorskip("interleave", reason="no benchmarks beside these tests")

RACE = {"nasdet": [1.0, 1.0], "rival": [4.0, 4.0]}
MEMORY = {
    "nasdet": {"forward": 1000, "forward, resident": 1500, "graph kept": 100},
    "rival": {"forward": 3000, "graph kept": 900},
}


def verdict(phase: str = "forward", share: float | None = None, **target: Any) -> dict[str, Any] | None:
    measured = promises.Measured(interleave.Race(RACE), MEMORY, {"broken": "WrongResult: off"}, share)
    found: dict[str, Any] | None = promises.verdict(promises.Target("nasdet", phase, **target), measured)
    return found


@pytest.mark.parametrize(
    ("target", "ratio", "met"),
    [
        ({"factor": 3.0}, 4.0, True),
        ({"factor": 5.0}, 4.0, False),
        ({"factor": 2.0, "quantity": "peak_memory"}, 3.0, True),
        ({"factor": 2.0, "quantity": "resident_memory"}, 2.0, True),
        ({"factor": 10.0, "quantity": "kept_memory"}, 9.0, False),
    ],
)
def test_ratios_to_a_rival(target: dict[str, Any], ratio: float, met: bool) -> None:
    quantity, factor = target.get("quantity", "time"), target["factor"]
    expected = {"quantity": quantity, "over": "rival", "at_least": factor, "ratio": ratio, "met": met}
    assert verdict(over="rival", **target) == expected


@pytest.mark.parametrize(
    ("target", "value", "met"),
    [
        ({"at_most": 2.0}, 1.0, True),
        ({"at_most": 0.5}, 1.0, False),
        ({"at_most": 1499, "quantity": "peak_memory"}, 1500, False),
        ({"at_most": 100, "quantity": "kept_memory"}, 100, True),
    ],
)
def test_limits(target: dict[str, Any], value: float, met: bool) -> None:
    quantity, limit = target.get("quantity", "time"), target["at_most"]
    assert verdict(**target) == {"quantity": quantity, "at_most": limit, "value": value, "met": met}


def test_shares_of_the_measured_peak() -> None:
    share = {"quantity": "matrix_share", "at_least": 0.55}
    assert verdict(share=0.56, **share) == share | {"value": 0.56, "met": True}
    assert verdict(share=0.54, **share) == share | {"value": 0.54, "met": False}
    unknown = verdict(share=None, **share)
    assert unknown is not None and not unknown["met"] and "no peak" in unknown["absent"]


def test_a_rival_that_failed_is_a_promise_not_kept() -> None:
    missed = {"quantity": "time", "over": "broken", "at_least": 2.0, "absent": "WrongResult: off", "met": False}
    assert verdict(over="broken", factor=2.0) == missed
    assert verdict(over="nobody", factor=2.0) is None, "who has no place in a race is no rival in it"


def test_whom_a_promise_concerns() -> None:
    target = promises.Target("nasdet", "forward", "rival", 2.0, cases=("a",), device="cuda", dtypes=("bf16",))
    row = {"name": "nasdet", "case": "a", "dtype": "bf16", "phase": "forward", "device": "cuda"}
    assert target.concerns(**row)
    others = {"name": "rival", "case": "b", "dtype": "fp32", "phase": "forward+backward", "device": "cpu"}
    for key, other in others.items():
        assert not target.concerns(**(row | {key: other})), key
