"""The version, which setup reads from pyproject.toml and an installed nasdet from its metadata."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("nasdet")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+source"
