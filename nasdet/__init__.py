"""nasdet: fast detection operators, and architecture searches for object detectors that run.

``nasdet.ops`` holds the operators, ``nasdet.nn`` modules over them, and ``nasdet.accelerate`` puts the convolutions
into a model of yours; ``nasdet.spaces``, ``nasdet.search``, ``nasdet.detectors``, ``nasdet.data`` and ``nasdet.engine``
run the searches. ``nasdet info`` says what can run on this machine.
"""

from __future__ import annotations

import importlib
from typing import Any

from nasdet._version import __version__

_SUBMODULES = ("arch", "compat", "data", "detectors", "engine", "measure", "nn", "ops", "report", "search", "spaces")

__all__ = ["__version__", "accelerate", "decelerate", "release_scratch", "scratch_limit", "use_backend", *_SUBMODULES]


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"nasdet.{name}")
    if name in ("accelerate", "decelerate"):
        return getattr(importlib.import_module("nasdet.nn"), name)
    if name == "use_backend":
        return importlib.import_module("nasdet._dispatch").use_backend
    if name in ("release_scratch", "scratch_limit"):
        return getattr(importlib.import_module("nasdet._library"), name)
    raise AttributeError(f"module 'nasdet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
