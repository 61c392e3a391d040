"""The effective receptive fields of a run's networks, as a file of the run folder for its report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from nasdet._files import write_atomic
from nasdet.measure import effective_receptive_field, field_size
from nasdet.measure.receptive_field import THRESHOLD

#: Height and width of the input, in pixels: the paper's, whatever a run's pictures, so that runs can be compared.
SIZE = (800, 1200)
_COLUMNS = 200  # at most, of a map in the file
_STEPS = 1000


def measure_field(network: nn.Module, name: str) -> dict[str, object]:
    """One network's entry of ``erf.json``: its ``name``, the ``side`` of its field in pixels, and its map as ``rows``.

    The map is reduced to at most 200 columns, each cell the strongest of its pixels, in thousandths of the maximum.
    """
    field = effective_receptive_field(network, SIZE)
    return {"name": name, "side": round(field_size(field), 1), "rows": _reduced(field)}


def _reduced(field: Tensor) -> list[list[int]]:
    cell = -(-field.shape[1] // _COLUMNS)
    cells = F.max_pool2d(field[None, None], cell, ceil_mode=True)[0, 0]
    rows: list[list[int]] = (cells * _STEPS).round().int().tolist()
    return rows


def write_fields(out: Path, fields: Sequence[Mapping[str, object]], weights: str) -> Path:
    """Write ``erf.json`` with what :func:`measure_field` found; ``weights`` says in words whose they were."""
    content = {"size": list(SIZE), "threshold": THRESHOLD, "steps": _STEPS, "weights": weights, "maps": list(fields)}
    return write_atomic(out / "erf.json", json.dumps(content, separators=(",", ":"), allow_nan=False) + "\n")
