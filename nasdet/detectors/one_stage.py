"""What one-stage detectors share: their parts, their options, and the way from scored places to detections."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nasdet.detectors.parts.boxes import Size
from nasdet.detectors.parts.layers import described
from nasdet.detectors.parts.objects import check_sizes
from nasdet.detectors.parts.postprocess import AS_MANY, Selection

Outputs = dict[str, list[Tensor]]


class OneStage(nn.Module, ABC):
    """A detector that predicts at every place of a pyramid: a location, or an anchor.

    ``backbone(images)`` gives feature maps by name; ``neck(maps)`` the pyramid, described by ``neck.strides`` and
    ``neck.channels``; ``towers(level)`` the box and the class feature, described by ``towers.box_channels`` and
    ``towers.cls_channels``.

    Predictors are the same on all levels, unless ``shared`` is False: two levels on one map would otherwise say the
    same of objects of two sizes.

    ``prior`` is the class probability at the start; ``focal_alpha`` and ``focal_gamma`` are the focal loss's. At
    detection ``candidates`` per level are taken before suppression at IoU ``nms_threshold``, which is per class, and
    ``max_detections`` per image after it; ``score_threshold`` is on the class probability.
    """

    def __init__(
        self,
        backbone: nn.Module,
        neck: nn.Module,
        towers: nn.Module,
        *,
        num_classes: int,
        nms_threshold: float,
        shared: bool = True,
        prior: float = 0.01,
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        score_threshold: float = 0.05,
        candidates: int = 1000,
        max_detections: int = 100,
    ) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be positive, got {num_classes}")
        if not 0 < prior < 1:
            raise ValueError(f"prior must be between 0 and 1, got {prior}")
        self.strides: tuple[int, ...] = tuple(described(neck, "neck", "strides").values())
        self.cls_channels: int = described(towers, "towers", "cls_channels")
        self.box_channels: int = described(towers, "towers", "box_channels")
        self.num_classes, self.prior, self.shared = num_classes, prior, shared
        self.focal_alpha, self.focal_gamma = focal_alpha, focal_gamma
        self.score_threshold, self.nms_threshold = score_threshold, nms_threshold
        self.candidates, self.max_detections = candidates, max_detections
        self.backbone = backbone
        self.neck = neck
        self.towers = towers

    def set_strides(self, strides: Sequence[int]) -> None:
        """Say the strides of the pyramid's maps anew, where the backbone is a pyramid whose strides have changed: a
        supernet. Sizes of objects and anchors stay as they are."""
        self.neck.set_strides(strides)  # type: ignore[operator]  # a Pyramid's
        self.strides = tuple(strides)

    @abstractmethod
    def loss(self, outputs: Outputs, targets: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The losses as scalars; their sum is the loss."""

    @abstractmethod
    def places(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Where the predictions of each level are made: points ``[L, 2]`` or anchors ``[L, 4]`` in batch pixels."""

    @abstractmethod
    def level_candidates(
        self, outputs: Outputs, level: int, image: int, places: Tensor, selection: Selection
    ) -> tuple[Tensor, ...]:
        """The boxes, scores and labels of one level of one image that ``selection.top`` takes."""

    @torch.no_grad()
    def detect(
        self, outputs: Outputs, sizes: Sequence[Size], selection: Selection = AS_MANY
    ) -> list[dict[str, Tensor]]:
        """Detections per image, best first, inside the valid area ``sizes`` ``[(h, w)]`` of the batch.

        Each has ``boxes`` float32 ``[n, 4]`` in batch pixels, ``scores`` ``[n]``, ``labels`` int64 ``[n]``.
        """
        places = self.places(outputs["cls"])
        results = []
        for image, size in enumerate(check_sizes(sizes, len(outputs["cls"][0]))):
            levels = [
                self.level_candidates(outputs, level, image, here, selection) for level, here in enumerate(places)
            ]
            boxes, scores, labels = (torch.cat(parts) for parts in zip(*levels, strict=True))
            limits = (self.nms_threshold, self.max_detections)
            results.append(selection.finish(boxes, scores, labels, size, *limits))
        return results
