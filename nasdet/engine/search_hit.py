"""Hit-Detector's joint search: operations of backbone, neck and head are chosen together.

Screening, which comes before it, is :mod:`nasdet.engine.screen_hit`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nasdet.arch import Card
from nasdet.data import DataFolder
from nasdet.data.transforms import padded
from nasdet.engine.hit_config import HitSearchConfig, deviations
from nasdet.engine.hit_run import HitRun
from nasdet.engine.loop import Loop
from nasdet.engine.screen_hit import screen_hit
from nasdet.engine.supernet import SearchOptions, run_search
from nasdet.measure.latency_table import LatencyTable
from nasdet.spaces.hit import CostTable, HitSpace, expected_cost
from nasdet.spaces.hit.latency import HitBlocks

if TYPE_CHECKING:
    from typing_extensions import Unpack

GIGA = 1e9


def search_hit(config: HitSearchConfig, data: DataFolder, out: str | Path, **options: Unpack[SearchOptions]) -> Card:
    """Search a detector's parts together (first order; CVPR 2020, sections 3.2 and 3.3) and return the derived card.

    The weights learn on ``data.search_train()``, the alphas on ``data.search_val()``; test images are refused. With
    ``stage="all"`` every part is screened first, in sub-folders of ``out``, and what was kept is searched;
    ``stage="screen"`` is :func:`~nasdet.engine.screen_hit.screen_hit`'s and a ``ValueError`` here. ``weights`` are the
    backbone's: a supernet's where it is searched; with ``stage="all"`` the plain one's, around other parts.

    The run folder and what is raised are :func:`~nasdet.engine.supernet.run_search`'s, the ``options``
    :class:`~nasdet.engine.supernet.SearchOptions`; ``run.json`` also has the forecast of the memory and the measured
    peak of the first two steps.
    """
    if config.stage == "screen":
        raise ValueError("stage must be joint or all, got 'screen', which finds no architecture: call screen_hit")
    if config.screen_weights is not None and config.stage == "joint":
        raise ValueError(f"screen_weights must be None for a joint search, got {config.screen_weights}")
    if config.stage == "all":
        if config.latency_table is not None:  # before hours of screening
            measured_costs(config, config.search_space())
        config = replace(config, stage="joint", candidates=screen_hit(config, data, out, **options))
        if "backbone" in config.searched_parts():
            options["weights"] = None
    return run_search(_JointRun, config, data, out, **options)


def measured_costs(config: HitSearchConfig, space: HitSpace) -> CostTable:
    """The milliseconds of the configured latency table by part, place and operation of ``space``.

    ``ValueError``, which names the file, for a table of other layouts, RoIs or pictures than the search's largest
    (padded to multiples of 32), and one that lacks an operation.
    """
    blocks = HitBlocks(space, config.proposals)
    size = padded(config.short_side), padded(config.long_side)
    table = LatencyTable.load(str(config.latency_table), blocks, size)
    return blocks.costs({key: latency.ms for key, latency in table.latencies.items()})


class _JointRun(HitRun):
    costs: CostTable
    verb = "search hit"

    def build(self, weights: str | Path | None) -> None:
        super().build(weights)
        config = self.config
        if config.latency_table is None:
            self.unit, self.cost = GIGA, "multiply-accumulates"
            self.costs = self.space.macs((config.short_side, config.long_side), config.proposals)
        else:
            self.unit, self.cost = 1.0, "milliseconds"
            self.costs = measured_costs(config, self.space)

    def facts(self) -> dict[str, Any]:
        return super().facts() | {"cost": self.cost, "cost_range": list(self.costs.reachable())}

    def loop(self, out: Path, settings: Mapping[str, Any], resume: bool, progress: bool) -> Loop:
        # A table measured anew is another search, though its name is the same.
        return super().loop(out, {**settings, "cost_range": list(self.costs.reachable())}, resume, progress)

    def term(self, values: dict[str, Any]) -> Tensor:
        costs = {part: cost / self.unit for part, cost in expected_cost(self.model, self.costs).items()}
        values |= {f"expected_{part}": cost.detach() for part, cost in costs.items()}
        return self.config.cost_weight / self.config.target * torch.stack(list(costs.values())).sum()

    def deviations(self) -> list[str]:
        return deviations(self.config, self.data, self.weights is not None)

    def derive(self, source: Mapping[str, Any]) -> Card:
        config = self.config
        name = config.name or f"hit-{config.layout}-{config.detector}-seed{config.seed}"
        return self.space.derive(self.model, name, source=source)
