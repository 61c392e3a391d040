"""One small set of digits by class, and one run of each kind on it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))  # for small_nets


@pytest.fixture(scope="session")
def digit_classes(tmp_path_factory):
    pytest.importorskip("sklearn")
    from nasdet.data import ClassificationFolder, write_digit_classes

    return ClassificationFolder(write_digit_classes(tmp_path_factory.mktemp("classes") / "set", train=60, val=20))


@pytest.fixture(scope="session")
def run(digit_classes, tmp_path_factory):
    """A finished run of the small backbone."""
    from small_nets import CONFIG, Small

    from nasdet.engine.pretrain import pretrain

    out = tmp_path_factory.mktemp("run")
    return pretrain(CONFIG, digit_classes, out, Small, named={"net": "small"}, progress=False, command=["x"])


@pytest.fixture(scope="session")
def supernet_run(digit_classes, tmp_path_factory):
    """A finished run of the small supernet."""
    from small_nets import CONFIG, PATHS, SmallSupernet

    from nasdet.engine.pretrain import pretrain

    return pretrain(
        CONFIG, digit_classes, tmp_path_factory.mktemp("supernet"), SmallSupernet, paths=PATHS, progress=False
    )
