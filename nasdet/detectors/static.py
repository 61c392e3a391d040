"""Whole detectors with results of one shape, in plain PyTorch operators: what is exported to programs and to ONNX.

Of variable size in a detector are the candidates, the survivors of a suppression and the boxes of a level to pool.
Here candidates that do not count are scored -inf, suppression picks one box after the other in a ``while_loop``, and
pooling gathers from all levels at once; what is missing is filled up with boxes and scores of 0 and labels -1.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nasdet.detectors.faster_rcnn import FasterRCNN
from nasdet.detectors.parts.boxes import Size, clip_boxes, iou
from nasdet.detectors.parts.postprocess import Selection, whole_boxes
from nasdet.detectors.roi_heads import RoIPooler
from nasdet.ops._roi_reference import levels_of, shifted_level


def pick(boxes: Tensor, scores: Tensor, labels: Tensor, iou_threshold: float, limit: int) -> Tensor:
    """The ``limit`` first of :func:`nasdet.ops.batched_nms`, int64 ``[limit]``, with -1 for those that there are not.

    ``boxes`` ``[M, 4]`` have an area where ``scores`` ``[M]`` are above -inf; the others count for nothing. Among equal
    scores the first wins. Takes ``limit * M`` comparisons, and no memory to speak of.
    """
    slots = torch.arange(limit, device=boxes.device)
    rows = torch.arange(len(scores), device=boxes.device)

    def some_left(step: Tensor, left: Tensor, chosen: Tensor) -> Tensor:
        return (step < limit) & (left > -torch.inf).any()

    def take_best(step: Tensor, left: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        best = left.argmax(dim=0, keepdim=True)
        beaten = (iou(boxes[best], boxes) > iou_threshold) & (labels == labels[best])
        return step + 1, left.masked_fill(beaten | (rows == best), -torch.inf), torch.where(slots == step, best, chosen)

    start = (torch.zeros((), dtype=torch.int64, device=boxes.device), scores, torch.full_like(slots, -1))
    chosen: Tensor = torch.while_loop(some_left, take_best, start)[2]
    return chosen


class PaddedSelection(Selection):
    """Results of one shape, whatever there is to find."""

    def top(self, scores: Tensor, judged: Tensor, threshold: float, limit: int) -> tuple[Tensor, Tensor, Tensor]:
        """As many as there may be; in the order of the table, and those that do not count scored -inf."""
        counts = (judged > (threshold if self.threshold is None else self.threshold)) & (scores.abs() < torch.inf)
        flat = scores.masked_fill(~counts, -torch.inf).flatten()
        place = torch.arange(flat.numel(), device=flat.device)
        if limit < flat.numel():
            # Which of equal scores topk takes at the cut is anybody's guess: the first of the table, as elsewhere.
            cut = flat.topk(limit).values[-1]
            above, level = flat > cut, flat == cut
            taken = above | (level & (level.long().cumsum(0) <= limit - above.long().sum()))
            place = place.masked_fill(~taken, flat.numel()).topk(limit, largest=False).values
        columns = scores.shape[1]
        return flat[place], place // columns, place % columns

    def survivors(
        self,
        boxes: Tensor,
        scores: Tensor,
        labels: Tensor,
        size: Size,
        iou_threshold: float,
        max_detections: int,
        min_side: float = 0.0,
    ) -> dict[str, Tensor]:
        """``max_detections`` boxes, scores and labels; 0, 0 and -1 stand for none."""
        boxes = clip_boxes(boxes, size)
        left = scores.masked_fill(~whole_boxes(boxes, min_side), -torch.inf)
        chosen = pick(boxes, left, labels, iou_threshold, max_detections)
        place, none = chosen.clamp(min=0), chosen < 0
        return {
            "boxes": boxes[place].masked_fill(none[:, None], 0.0),
            "scores": scores[place].masked_fill(none, 0.0),
            "labels": labels[place].masked_fill(none, -1),
        }


@dataclass(frozen=True)
class GatheringPooler(RoIPooler):
    """:class:`RoIPooler` without a step whose size depends on the boxes: every pixel gathered from all levels."""

    def __call__(self, features: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Levels ``[N, C, H, W]``, finest first, and boxes ``[R_i, 4]`` per image to ``[sum R_i, C, size, size]``."""
        maps = features[: len(self.strides)]
        flat = torch.cat([level.flatten(2) for level in maps], dim=2).transpose(1, 2).flatten(0, 1)
        rois = torch.cat(list(boxes))
        scales = [1.0 / stride for stride in self.strides]
        base = shifted_level(scales, self.canonical_level, self.lowest_level)
        level = levels_of(rois, scales, 0, self.canonical_scale, base)
        areas = [level.shape[-2] * level.shape[-1] for level in maps]
        table = rois.new_tensor(
            [(*map_.shape[-2:], sum(areas[:index]), scales[index]) for index, map_ in enumerate(maps)]
        )
        height, width, first, scale = table[level].unbind(1)
        image = torch.cat([first.new_full((len(own),), index) for index, own in enumerate(boxes)]).long()
        first = first.long() + image * sum(areas)
        rows, down = self._samples(rois[:, 1], rois[:, 3], scale, height)
        columns, across = self._samples(rois[:, 0], rois[:, 2], scale, width)
        total = None
        for index in range(rows.shape[2]):  # one after the other: all at once would take gigabytes
            line = first[:, None] + rows[:, :, index] * width.long()[:, None]
            pixels = flat[line[:, :, None, None] + columns[:, None]]
            part = (across[:, None, :, None] @ pixels).squeeze(3) * down[:, :, index, None, None]
            total = part if total is None else total + part
        assert total is not None
        return total.permute(0, 3, 1, 2)

    def _samples(self, low: Tensor, high: Tensor, scale: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
        """One axis: the pixels ``[R, size, T]`` that each bin reads, two for each of its samples, and their weights."""
        shift = 0.5 if self.aligned else 0.0
        start = low * scale - shift
        length = high * scale - shift - start
        step = (length if self.aligned else length.clamp(min=1.0))[:, None] / self.size
        bins = torch.arange(self.size, device=low.device)
        last = sides[:, None, None] - 1
        samples = (torch.arange(self.sampling_ratio, device=low.device) + 0.5) / self.sampling_ratio
        at = (start[:, None] + bins * step)[..., None] + step[..., None] * samples
        weight = ((at >= -1) & (at <= sides[:, None, None])).to(at.dtype) / self.sampling_ratio
        at = torch.minimum(at.clamp(min=0.0), last)
        below = at.floor()
        above = torch.minimum(below + 1, last)
        share = at - below
        return torch.cat([below, above], 2).long(), torch.cat([(1 - share) * weight, share * weight], 2)


class StaticDetector(nn.Module):
    """A detector of :mod:`nasdet.detectors` as one module whose outputs have one shape.

    ``forward(images [N, 3, H, W], sizes int64 [N, 2], threshold float32 [])`` takes normalised, padded images, the
    height and width of the valid area of each, and the class probability that a detection must be above. For N images,
    D detections of each at most, and M the side of a mask, it gives by name

    * ``boxes`` ``[N, D, 4]`` as (x1, y1, x2, y2) in pixels, best first, ``scores`` ``[N, D]``, ``labels`` int64
      ``[N, D]``; 0, 0 and -1 fill up what there is not;
    * with masks ``mask_logits`` ``[N, D, M, M]`` over each box, and ``mask_scores`` ``[N, D]`` where masks have some;
    * and what these were computed from: the detector's own maps, such as ``cls_p3`` or ``rpn_cls_p2``; of a two-stage
      one also the ``proposals`` ``[N, P, 4]``, their ``probabilities`` ``[N, P, K + 1]`` (background first) and
      ``deltas`` ``[N, P, K + 1 or 1, 4]``, and ``refined``, the boxes of a cascade's last stage.

    The detector is copied. Its operators are those that :func:`nasdet.use_backend` chooses.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = copy.deepcopy(model).eval()
        for module in self.model.modules():
            pooler = getattr(module, "pooler", None)
            if isinstance(pooler, RoIPooler):
                if pooler.sampling_ratio < 1:
                    raise ValueError(f"sampling_ratio must be positive to be exported, got {pooler.sampling_ratio}")
                module.pooler = GatheringPooler(**asdict(pooler))  # type: ignore[assignment]  # not a module

    @torch.no_grad()
    def forward(self, images: Tensor, sizes: Tensor, threshold: Tensor) -> dict[str, Tensor]:
        outputs = self.model(images)
        selection, each = PaddedSelection(threshold), list(sizes.unbind(0))
        if isinstance(self.model, FasterRCNN):
            found, stages = self._two_stages(outputs, each, selection)
        else:
            found, stages = self.model.detect(outputs, each, selection), {}
        results = {name: torch.stack([image[name] for image in found]) for name in found[0]}
        names = list(self.model.neck.strides)
        for key, levels in outputs.items():
            stages |= {f"{key}_{name}": level for name, level in zip(names, levels, strict=True)}
        return results | stages

    def _two_stages(
        self, outputs: dict[str, list[Tensor]], sizes: list[Tensor], selection: Selection
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        features, images = outputs["features"], len(sizes)
        maps = (outputs["rpn_cls"], outputs["rpn_box"])
        proposals = self.model.rpn.proposals(*maps, sizes, training=False, selection=selection)
        probabilities, deltas, boxes = self.model.boxes.predict(features, proposals, sizes)
        found = self.model.boxes.select(probabilities, deltas, boxes, sizes, selection)
        if self.model.masks is not None:
            found = self.model.masks.complete(features, found)
        stages = {
            "proposals": torch.stack(proposals),
            "probabilities": probabilities.unflatten(0, (images, -1)),
            "deltas": deltas.unflatten(0, (images, -1)),
        }
        if boxes is not proposals:
            stages["refined"] = torch.stack(boxes)
        return found, stages
