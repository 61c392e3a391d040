"""The region proposal network (Ren et al., 2015) on a feature pyramid (Lin et al., 2017, section 4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdet.detectors.parts.anchors import AnchorGenerator
from nasdet.detectors.parts.boxes import Size
from nasdet.detectors.parts.codec import PLAIN_CODEC, BoxCodec
from nasdet.detectors.parts.layers import normal_init
from nasdet.detectors.parts.locations import flatten_levels
from nasdet.detectors.parts.losses import at_least_float32
from nasdet.detectors.parts.matcher import match_boxes
from nasdet.detectors.parts.objects import Objects
from nasdet.detectors.parts.postprocess import AS_MANY, Selection
from nasdet.detectors.parts.sampler import sample

MIN_SIDE = 1e-3
"""Thinner proposals, in pixels, are dropped, as in torchvision."""


def rpn_anchors(
    strides: Sequence[int], nominal: Sequence[int] | None = None, *, convention: str = "torchvision"
) -> AnchorGenerator:
    """One size of 8 strides a level (32 to 512 for strides 4 to 64) and 3 ratios; of ``nominal`` strides, if given."""
    return AnchorGenerator(strides, [(8.0 * stride,) for stride in nominal or strides], convention=convention)


class RPN(nn.Module):
    """A 3x3 convolution and two 1x1 predictors, shared by all levels; their loss, and the proposals.

    The 3x3 has ``hidden`` channels, by default as many as the maps. Without ``shared`` every level has layers of its
    own: two levels on one map would otherwise say the same of anchors of two sizes.

    ``anchors`` default to one size and 3 ratios a cell. At training, ``samples`` anchors of each image are drawn, at
    most ``positive_fraction`` of them positive (IoU from ``positive_iou``, and each object's best anchors), the rest
    background (below ``negative_iou``); ``box_beta`` is the smooth L1 loss's. Proposals are the best ``candidates`` of
    every level, clipped, suppressed within their level at IoU ``nms_threshold``, and of these the best ``limit`` of
    all levels; both are pairs (training, detection).
    """

    def __init__(
        self,
        channels: int,
        strides: Sequence[int],
        *,
        hidden: int | None = None,
        shared: bool = True,
        anchors: AnchorGenerator | None = None,
        codec: BoxCodec = PLAIN_CODEC,
        positive_iou: float = 0.7,
        negative_iou: float = 0.3,
        samples: int = 256,
        positive_fraction: float = 0.5,
        box_beta: float = 1 / 9,
        candidates: tuple[int, int] = (2000, 1000),
        limit: tuple[int, int] = (2000, 1000),
        nms_threshold: float = 0.7,
    ) -> None:
        super().__init__()
        self.anchors = anchors if anchors is not None else rpn_anchors(strides)
        if self.anchors.strides != tuple(strides):
            raise ValueError(f"anchors must be for the strides {tuple(strides)}, got {self.anchors.strides}")
        self.codec = codec
        self.positive_iou, self.negative_iou = positive_iou, negative_iou
        self.samples, self.positive_fraction, self.box_beta = samples, positive_fraction, box_beta
        self.candidates, self.limit, self.nms_threshold = candidates, limit, nms_threshold
        self.shared = shared
        if hidden is not None and hidden < 1:
            raise ValueError(f"hidden must be positive, got {hidden}")
        layers = [self._layers(channels, hidden or channels) for _ in (strides if not shared else strides[:1])]
        if shared:
            for name, layer in layers[0].items():
                self.add_module(name, layer)
        else:
            self.heads = nn.ModuleList(nn.ModuleDict(own) for own in layers)

    def _layers(self, channels: int, hidden: int) -> dict[str, nn.Module]:
        each = self.anchors.per_cell
        conv = nn.Conv2d(channels, hidden, 3, padding=1)
        cls, box = nn.Conv2d(hidden, each, 1), nn.Conv2d(hidden, each * 4, 1)
        normal_init(conv, cls, box)
        return {"conv": conv, "cls_logits": cls, "box_pred": box}

    def forward(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level objectness logits ``[N, A, H, W]`` and box deltas ``[N, A * 4, H, W]``."""
        cls, box = [], []
        for index, level in enumerate(features):
            layers: Any = self._modules if self.shared else self.heads[index]
            hidden = F.relu(layers["conv"](level), inplace=True)
            cls.append(layers["cls_logits"](hidden))
            box.append(layers["box_pred"](hidden))
        return cls, box

    def loss(self, cls: Sequence[Tensor], box: Sequence[Tensor], batch: Sequence[Objects]) -> dict[str, Tensor]:
        """``loss_rpn_cls`` (cross-entropy) and ``loss_rpn_box`` (smooth L1), divided by the number of drawn anchors."""
        logits = at_least_float32(flatten_levels(cls, 1)).flatten()
        deltas = at_least_float32(flatten_levels(box, 4)).flatten(0, 1)
        positive, negative, wanted = self._targets(cls, batch)
        drawn = torch.cat([positive, negative])
        labels = torch.cat([logits.new_ones(len(positive)), logits.new_zeros(len(negative))])
        count = max(1, len(drawn))
        return {
            "loss_rpn_cls": F.binary_cross_entropy_with_logits(logits[drawn], labels, reduction="sum") / count,
            "loss_rpn_box": F.smooth_l1_loss(deltas[positive], wanted, reduction="sum", beta=self.box_beta) / count,
        }

    @torch.no_grad()
    def _targets(self, maps: Sequence[Tensor], batch: Sequence[Objects]) -> tuple[Tensor, Tensor, Tensor]:
        """Places of drawn positives and negatives in the flat batch, and the positives' deltas ``[P, 4]``."""
        anchors = torch.cat(self.anchors(maps))
        positives, negatives, deltas = [], [], []
        for image, objects in enumerate(batch):
            match = match_boxes(anchors, objects.boxes, self.negative_iou, self.positive_iou, keep_best=True)
            positive, negative = sample(match, self.samples, self.positive_fraction)
            positives.append(positive + image * len(anchors))
            negatives.append(negative + image * len(anchors))
            deltas.append(self.codec.encode(anchors[positive], objects.boxes[match[positive]]))
        return torch.cat(positives), torch.cat(negatives), torch.cat(deltas)

    @torch.no_grad()
    def proposals(
        self,
        cls: Sequence[Tensor],
        box: Sequence[Tensor],
        sizes: Sequence[Size],
        *,
        training: bool,
        selection: Selection = AS_MANY,
    ) -> list[Tensor]:
        """Per image boxes ``[R, 4]``, best first, inside ``sizes`` ``[(h, w)]``; none where none is a number."""
        candidates, limit = (pair[0 if training else 1] for pair in (self.candidates, self.limit))
        levels = []
        for index, (anchors, logits, deltas) in enumerate(zip(self.anchors(cls), cls, box, strict=True)):
            flat = at_least_float32(flatten_levels([logits], 1)).squeeze(-1).nan_to_num(nan=-torch.inf)
            scores, place = flat.topk(min(candidates, flat.shape[1]), dim=1)
            chosen = flatten_levels([deltas], 4).gather(1, place[..., None].expand(-1, -1, 4))
            boxes = self.codec.decode(anchors[place], at_least_float32(chosen))
            levels.append((boxes, scores, torch.full_like(place, index)))
        boxes, ranks, groups = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        limits = (self.nms_threshold, limit, MIN_SIDE)
        images = zip(boxes, ranks, groups, sizes, strict=True)
        return [selection.survivors(*image, *limits)["boxes"] for image in images]
