"""What a model costs and what it sees: parameters, multiply-accumulates, latency on this device, its receptive field;
and whether one score ranks models as another does."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nasdet.measure.latency_table import Latency, LatencyTable
from nasdet.measure.tau import RankCorrelation, kendall_tau, rank_correlation

if TYPE_CHECKING:
    from nasdet.measure.flop_formulas import register_flop_formulas
    from nasdet.measure.flops import PartCost, count, total
    from nasdet.measure.latency import measure_module, measure_table
    from nasdet.measure.receptive_field import effective_receptive_field, field_size

# Loaded on demand, as these need torch: a search by tables of costs does not.
_MODULES = {
    "PartCost": "flops",
    "count": "flops",
    "total": "flops",
    "measure_module": "latency",
    "measure_table": "latency",
    "effective_receptive_field": "receptive_field",
    "field_size": "receptive_field",
    "register_flop_formulas": "flop_formulas",
}

__all__ = [
    "Latency",
    "LatencyTable",
    "PartCost",
    "RankCorrelation",
    "count",
    "effective_receptive_field",
    "field_size",
    "kendall_tau",
    "measure_module",
    "measure_table",
    "rank_correlation",
    "register_flop_formulas",
    "total",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"nasdet.measure.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'nasdet.measure' has no attribute {name!r}")
