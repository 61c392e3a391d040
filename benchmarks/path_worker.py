"""A contestant of a race of training steps: a path in its supernet, or the path's net alone; see ``worker.py``."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from worker import random_objects, serve

from nasdet.arch import load_card
from nasdet.data.transforms import Batch
from nasdet.engine.distributed import LossModule
from nasdet.engine.optim import make_optimizer
from nasdet.engine.search_detnas import DetNASSearchConfig
from nasdet.engine.search_msnas import MSNASSearchConfig
from nasdet.engine.step import train_step
from nasdet.spaces.assemble import build_model, searched_fields

CLASSES = 20
CONFIGS: dict[str, Any] = {"detnas": DetNASSearchConfig, "msnas": MSNASSearchConfig}


class Path:
    """A detector, its optimiser, and a fixed batch. Both contestants start from the same weights, those that the
    supernet is seeded with, so that their losses can be compared."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.card = load_card(options["card"])
        config = CONFIGS[self.card.method](**options["config"])
        self.space = config.search_space()
        around = config.model(tuple(map(str, range(CLASSES))))
        torch.manual_seed(0)
        whole: Any = build_model(around, backbone=self.space.supernet)
        self.searching = options["supernet"]
        self.model: Any = whole if self.searching else self._alone(whole, around)
        self.model.to(options["device"]).to(memory_format=torch.channels_last).train()
        self.optimizer = make_optimizer("sgd", self.model, 1e-4, momentum=0.9, weight_decay=1e-4)
        self.module = LossModule(self.model)
        self.batch = _batch(options["images"], options["size"]).to(options["device"], torch.channels_last)
        self.index = 0

    def _alone(self, whole: Any, around: Any) -> Any:
        """The net of the path in the same detector, with the weights of the supernet's."""
        net: Any = build_model(replace(around, **searched_fields(self.card)))
        rest = {name: value for name, value in whole.state_dict().items() if not name.startswith("backbone.")}
        net.load_state_dict(rest, strict=False)
        self.space.inherit(net.backbone, whole.backbone, self.card)
        return net

    def step(self) -> dict[str, float]:
        """A training step of the path; within the supernet it is chosen anew, as in a search."""
        torch.manual_seed(self.index)  # two stages draw the boxes that they learn from
        self.index += 1
        if self.searching:
            self.space.activate(self.model.backbone, self.card)
            if hasattr(self.model.neck, "set_strides"):
                self.model.set_strides(self.card.genotype["heads"])
        values = train_step(self.module, self.optimizer, self.batch, 1e-4, clip=20.0)
        return {"loss": float(values["loss"])}


def _batch(count: int, size: list[int]) -> Batch:
    generator = torch.Generator().manual_seed(1)
    targets = [random_objects(6, size, CLASSES, generator) for _ in range(count)]
    images = torch.randn(count, 3, *size, generator=generator)
    return Batch(images, [(size[0], size[1])] * count, [(1.0, 1.0)] * count, targets)


if __name__ == "__main__":
    serve(Path)
