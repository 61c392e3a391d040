"""A backbone as a classifier, to pretrain it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdet._checks import check_whole


class Classifier(nn.Module):
    """Images ``[N, 3, H, W]`` to logits ``[N, classes]``: the backbone's last map, averaged over its places, and a
    linear layer.

    ``backbone`` gives a dict of maps, of which the last has ``channels`` channels. Of a pyramid, whose maps all have as
    many, the mean over all maps counts, so that every part that a head will read learns. ``last`` puts a 1x1
    convolution to that many, batch norm and ReLU before the average, as in ShuffleNetV2 and DetNAS (1,024). Those
    layers begin as DetNAS's: the convolution normal with standard deviation one over its inputs, the linear layer with
    0.01, biases 0.

    Like a detector it has a ``loss``: cross-entropy, with the targets' distribution smoothed by ``label_smoothing``.
    """

    def __init__(
        self,
        backbone: nn.Module,
        channels: int,
        classes: int,
        last: int | None = None,
        *,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("classes", classes), ("last", 1 if last is None else last)):
            check_whole(name, value)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.backbone = backbone
        self.label_smoothing = label_smoothing
        self.last: nn.Module = nn.Identity() if last is None else _pointwise(channels, last)
        self.fc = nn.Linear(channels if last is None else last, classes)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        maps = [*self.backbone(images).values()]
        if not getattr(self.backbone, "pyramid", False):
            maps = maps[-1:]
        pooled = torch.stack([self.last(map_).mean((2, 3)) for map_ in maps]).mean(0)
        logits: Tensor = self.fc(pooled)
        return logits

    def loss(self, logits: Tensor, targets: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """``{"loss_cls": mean cross-entropy}`` in float32; a target's ``label`` is a class in ``0..classes - 1``."""
        labels = torch.tensor([target["label"] for target in targets], device=logits.device)
        return {"loss_cls": F.cross_entropy(logits.float(), labels, label_smoothing=self.label_smoothing)}


def _pointwise(channels: int, out: int) -> nn.Module:
    conv = nn.Conv2d(channels, out, 1)
    nn.init.normal_(conv.weight, std=1 / channels)
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]  # there by default
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True))
