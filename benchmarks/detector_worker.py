"""One contestant of a race of detectors: inference or a training step, run by ``worker.py``."""

from __future__ import annotations

import contextlib
import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from rivals import TORCHVISION_DETECTORS, torchvision_detector
from torch import Tensor, nn
from worker import random_objects, serve

import nasdet
from nasdet.detectors import DETECTORS, from_torchvision

CLASSES = 80
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# torchvision's names of the losses that both compute alike, whatever boxes are drawn afterwards
LOSSES = {"loss_objectness": "loss_rpn_cls", "loss_rpn_box_reg": "loss_rpn_box"}


class Run:
    """A detector with random weights, the same for every contestant, and random pictures with six objects each."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options, self.device = options, options["device"]
        self.theirs = options["library"] == "torchvision"
        self.training = options["phase"] != "inference"
        self.model: Any = _made(options["detector"], self.theirs, options["size"]).to(self.device).train(self.training)
        self.model.to(memory_format=torch.channels_last)
        if options["accelerated"]:
            nasdet.accelerate(self.model)
        generator = torch.Generator().manual_seed(1)
        size = options["size"]
        self.pictures = [torch.rand(3, *size, generator=generator).to(self.device) for _ in range(options["images"])]
        self.targets = [self._target(size, generator) for _ in self.pictures]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=1e-6, momentum=0.9)

    def _target(self, size: list[int], generator: torch.Generator) -> dict[str, Tensor]:
        target = random_objects(6, size, CLASSES, generator)
        if "mask" in self.options["detector"]:
            target["masks"] = torch.zeros(6, *size, dtype=torch.uint8)
            for mask, (x1, y1, x2, y2) in zip(target["masks"], target["boxes"].long().tolist(), strict=True):
                mask[y1 : y2 + 1, x1 : x2 + 1] = 1
        if self.theirs and self.options["detector"].endswith("rcnn"):
            target["labels"] += 1  # the background comes first there
        return {name: value.to(self.device) for name, value in target.items()}

    def step(self) -> dict[str, float]:
        """From pictures to detections, or to changed weights."""
        with nasdet.use_backend(self.options["backend"]):
            return self._train() if self.training else self._detect()

    def _batch(self) -> Tensor:
        """Normalised and padded to a multiple of 32, as torchvision's detectors do it within their forward."""
        mean, deviation = (torch.tensor(v, device=self.device)[:, None, None] for v in (MEAN, DEVIATION))
        height, width = self.options["size"]
        pad = (0, -width % 32, 0, -height % 32)
        batch = torch.stack([F.pad((picture - mean) / deviation, pad) for picture in self.pictures])
        return batch.contiguous(memory_format=torch.channels_last)

    @torch.no_grad()
    def _detect(self) -> dict[str, float]:
        if self.theirs:
            found = self.model(self.pictures)
        else:
            found = self.model.detect(self.model(self._batch()), [tuple(self.options["size"])] * len(self.pictures))
        scores = torch.cat([image["scores"] for image in found])
        return {"detections": float(len(scores)), "scores": float(scores.sum())}

    def _train(self) -> dict[str, float]:
        torch.manual_seed(2)  # the two-stage detectors draw which boxes they learn from
        self.optimizer.zero_grad()
        losses = self.model(self.pictures, self.targets) if self.theirs else self._losses()
        torch.stack(list(losses.values())).sum().backward()
        self.optimizer.step()
        values = {LOSSES.get(name, name): float(loss.detach()) for name, loss in losses.items()}
        shared = {name: value for name, value in values.items() if name in LOSSES.values()}
        return shared or values

    def _losses(self) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = self.model.loss(self.model(self._batch()), self.targets)
        return losses


def _made(name: str, theirs: bool, size: list[int]) -> nn.Module:
    """torchvision's detector, ours with its weights, or where it has none or is absent ours with others."""
    torch.manual_seed(0)
    if name not in TORCHVISION_DETECTORS or not importlib.util.find_spec("torchvision"):
        ours = DETECTORS[name]("resnet50", CLASSES, norm="frozen_bn", frozen_stages=2)
        _settle(ours, name)
        return ours
    rival = torchvision_detector(name, CLASSES, size)
    _settle(rival, name)
    if theirs:
        return rival
    return from_torchvision(f"{name.replace('_', '')}_resnet50_fpn", rival.state_dict(), frozen_stages=2)


@torch.no_grad()
def _settle(model: nn.Module, detector: str) -> None:
    """Random weights whose maps neither grow nor fade from layer to layer, and whose scores are there to detect by."""
    for name, value in [*model.named_buffers(), *model.named_parameters()]:
        if name.endswith("bn3.weight"):
            value.fill_(0.2)
        elif name.endswith("cls_logits.weight") and "rpn" not in name:
            value.normal_(std=0.05)
        elif name.endswith("cls_score.weight"):
            value.normal_(std=0.5)
        elif detector == "fcos" and name.endswith(("bbox_reg.bias", "box_pred.bias")):
            value.fill_(0.5)  # its distances are cut at 0, and torchvision keeps boxes without area
        elif name.startswith(("head", "towers")) and value.shape == (256, 256, 3, 3):
            nn.init.kaiming_normal_(value)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        serve(Run)
