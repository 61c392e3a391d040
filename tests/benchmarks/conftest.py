"""Makes the benchmarks' own modules importable, as running a file in their folder would."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if BENCHMARKS.is_dir():
    sys.path.insert(0, str(BENCHMARKS))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not BENCHMARKS.is_dir():
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=f"no benchmarks beside these tests ({BENCHMARKS.name}/)"))


@pytest.fixture(autouse=True, scope="module")
def _little_garbage() -> None:
    """What earlier tests imported and made stays out of the collections that precede every measurement of memory."""
    gc.collect()
    gc.freeze()
