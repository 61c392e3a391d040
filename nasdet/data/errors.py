"""What is wrong with data on disk, said once, with the file and the record."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

ROLES = ("train", "search-train", "search-val", "test")


class DataError(ValueError):
    """A file of a data set cannot be used.

    The message reads ``file: record: reason: detail``; ``reason`` is a short constant phrase that ``skip_bad`` counts
    by (``"missing image"``, ``"box without area"``, ...). Survives pickling: it crosses worker processes unchanged.
    """

    def __init__(self, reason: str, file: str | Path, record: str = "", detail: str = "") -> None:
        self.reason, self.file, self.record, self.detail = reason, str(file), record, detail
        super().__init__(": ".join(part for part in (self.file, record, reason, detail) if part))

    def __reduce__(self) -> tuple[type[DataError], tuple[str, str, str, str]]:
        return type(self), (self.reason, self.file, self.record, self.detail)


class TestSplitError(RuntimeError):
    """An architecture was about to be scored or chosen on data of the test split."""

    __test__ = False  # the name starts with "Test": pytest must not take it for a test class


class Problems:
    """Either stops at the first :class:`DataError`, or counts it and lets the reader go on.

    Args:
        skip_bad: go on; what was dropped is then in ``counts`` (reason -> number) and ``examples`` (reason -> the first
            message).
    """

    def __init__(self, skip_bad: bool = False) -> None:
        self.skip_bad = skip_bad
        self.counts: dict[str, int] = {}
        self.examples: dict[str, str] = {}

    def found(self, error: DataError) -> None:
        """Raise ``error``, or count it when bad records are skipped."""
        if not self.skip_bad:
            raise error
        self.counts[error.reason] = self.counts.get(error.reason, 0) + 1
        self.examples.setdefault(error.reason, str(error))

    def __str__(self) -> str:
        return format_counts(self.counts)


def format_counts(counts: Mapping[str, int]) -> str:
    """``{"missing image": 2}`` as ``2 x missing image``; empty counts as an empty string."""
    return ", ".join(f"{number} x {reason}" for reason, number in sorted(counts.items()))
