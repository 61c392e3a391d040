"""What a model costs: parameters and multiply-accumulates."""

from __future__ import annotations

from nasdet.measure.flops import PartCost, count, total

__all__ = ["PartCost", "count", "total"]
