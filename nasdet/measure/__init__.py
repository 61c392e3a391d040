"""What a model costs, parameters and multiply-accumulates, and what it sees: its effective receptive field."""

from __future__ import annotations

from nasdet.measure.flops import PartCost, count, total
from nasdet.measure.receptive_field import effective_receptive_field, field_size

__all__ = ["PartCost", "count", "effective_receptive_field", "field_size", "total"]
