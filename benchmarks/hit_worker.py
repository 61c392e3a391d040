"""A contestant of a race of supernet steps: a part of Hit-Detector's supernet in one mode; see ``worker.py``."""

from __future__ import annotations

from typing import Any

import torch
from worker import serve

from nasdet.measure.forecast import forecast_memory
from nasdet.spaces.hit import LAYOUTS, HitSpace
from nasdet.spaces.hit.costs import INPUT
from nasdet.spaces.hit.steps import PartStep


class Part:
    """A part's step, from the same weights in every mode, and what it was forecast to take."""

    def __init__(self, options: dict[str, Any]) -> None:
        sizes, part = LAYOUTS["released"], options["part"]
        if part == "backbone" and options["candidates"] == "full":
            sizes = sizes.halved()  # as screening has it
        space = HitSpace(sizes, options["candidates"], (part,))
        common = {"memory": options["memory"]}
        own = common | {"size": tuple(options.get("size", INPUT)), "rois": options.get("rois", 512)}
        self.facts = {
            "forecast": forecast_memory(lambda: PartStep(space, part, **own)),
            "forecast_at_the_papers_size": forecast_memory(lambda: PartStep(space, part, **common)),
        }
        torch.manual_seed(0)
        self._step = PartStep(space, part, **own, device=options["device"])
        self.model = self._step.model

    def step(self) -> dict[str, float]:
        """Forward and backward; nothing changes, so every step computes the same."""
        self._step()
        found = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return {"gradient": float(torch.nn.utils.get_total_norm(found))}


if __name__ == "__main__":
    serve(Part)
