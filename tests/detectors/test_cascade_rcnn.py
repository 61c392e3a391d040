from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasdet.detectors import BoxHead, BoxStage, BoxTrunk, CascadeStages, FasterRCNN, RoIPooler, build_cascade_rcnn
from nasdet.detectors.cascade_rcnn import CASCADE_IOUS, cascade_codecs, refine
from nasdet.detectors.parts.codec import BoxCodec
from nasdet.detectors.parts.objects import Objects


class _Says(nn.Module):
    """A head of fixed answers for every box."""

    num_classes, class_agnostic = 2, True

    def __init__(self, logits: list[float], deltas: list[float]) -> None:
        super().__init__()
        self.logits, self.deltas = torch.tensor(logits).float(), torch.tensor(deltas)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits.expand(len(pooled), 3), self.deltas.expand(len(pooled), 1, 4)


def _stages(*answers: tuple[list[float], list[float]]) -> CascadeStages:
    pooler = RoIPooler((8,), 7)
    stages = zip(answers, CASCADE_IOUS, cascade_codecs(), strict=False)
    return CascadeStages(
        [BoxStage(_Says(*answer), pooler, iou=iou, codec=codec) for answer, iou, codec in stages],  # type: ignore[arg-type]  # heads in all but name
        weights=(1.0, 0.5, 0.25)[: len(answers)],
    )


FEATURES = [torch.zeros(1, 4, 12, 12)]
RIGHT = [1.0, 0.0, 0.0, 0.0]


def test_stages_refine_in_turn_with_their_own_weights() -> None:
    stages = _stages(([0, 0, 0], RIGHT), ([0, 0, 0], RIGHT), ([0, 0, 9], RIGHT))
    predicted = stages.predict(FEATURES, [torch.tensor([[0.0, 0, 20, 20]])], [(96, 96)])
    (found,) = stages.select(*predicted, [(96, 96)])
    # 20 pixels wide: 2 to the right, then 1, then 2 / 3.
    shift = 20 * (1 / 10 + 1 / 20 + 1 / 30)
    torch.testing.assert_close(found["boxes"][0], torch.tensor([shift, 0, 20 + shift, 20]))


def test_scores_are_the_mean_over_the_stages() -> None:
    still = [0.0] * 4
    stages = _stages(([0, 3, 0], still), ([0, 0, 1], still), ([0, 5, 0], still))
    predicted = stages.predict(FEATURES, [torch.tensor([[0.0, 0, 20, 20]])], [(96, 96)])
    (found,) = stages.select(*predicted, [(96, 96)])
    tables = torch.tensor([[0.0, 3, 0], [0, 0, 1], [0, 5, 0]]).softmax(dim=1)
    assert found["labels"].tolist() == [0, 1]
    torch.testing.assert_close(found["scores"], tables.mean(dim=0)[1:])


def test_later_stages_ask_for_more_overlap() -> None:
    """A box of IoU 0.55 is an object to the first stage and background to the others, until it is refined."""
    batch = [Objects(torch.tensor([[0.0, 0, 20, 20]]), torch.tensor([0]), torch.tensor([0]))]
    proposals = [torch.tensor([[0.0, 0, 20, 11]])]

    def classes(*moves: list[float]) -> list[float]:
        stages = _stages(*(([0.0, 9.0, 0.0], move) for move in moves))
        stages.stages[0].draw = lambda features, boxes, batch: _labelled(boxes, batch)  # type: ignore[assignment]  # no chance
        losses, samples = stages.losses(FEATURES, proposals, batch)
        assert samples.labels[0].tolist() == [1]  # the first stage's
        return [float(losses[f"loss_cls_{index}"]) for index in (1, 2, 3)]

    still, fit = [0.0] * 4, [0.0, 10 * 4.5 / 11, 0.0, 5 * math.log(20 / 11)]
    low, high = (float(-torch.tensor([0.0, 9.0, 0.0]).log_softmax(0)[k]) for k in (1, 0))
    assert classes(still, still, still) == pytest.approx([low, 0.5 * high, 0.25 * high])
    assert classes(fit, still, still) == pytest.approx([low, 0.5 * low, 0.25 * low])


def _labelled(boxes: list[Tensor], batch: list[Objects]) -> Any:
    from nasdet.detectors.parts.sampler import label_proposals

    return label_proposals(boxes, batch, 0.5)


def test_refined_boxes_are_clipped_and_carry_no_gradient() -> None:
    deltas = torch.tensor([[[0.0, 0, 9, 9]], [[0.0, 0, 0, 0]]], requires_grad=True)
    boxes = [torch.tensor([[10.0, 10, 20, 20]]), torch.tensor([[5.0, 5, 9, 9]])]
    first, second = refine(boxes, deltas, BoxCodec(), [(40, 30), (40, 30)])
    assert first.tolist() == [[0, 0, 30, 40]] and second.tolist() == [[5, 5, 9, 9]] and not first.requires_grad


def _small(**options: Any) -> FasterRCNN:
    torch.manual_seed(0)
    return build_cascade_rcnn("resnet18", 5, width=0.125, fpn_channels=16, hidden=32, samples=32, **options)


def test_published_settings(make_target: Callable) -> None:
    model = _small()
    stages = list(model.boxes.stages)  # type: ignore[arg-type]  # a cascade's
    assert [stage.iou for stage in stages] == [0.5, 0.6, 0.7]
    assert [stage.codec.weights[0] for stage in stages] == [10, 20, 30]
    assert all(stage.head.box_pred.out_features == 4 for stage in stages)
    losses = model.loss(model(torch.randn(1, 3, 96, 96)), [make_target([[4, 6, 40, 50]], [1])])
    names = [f"loss_{kind}_{stage}" for stage in (1, 2, 3) for kind in ("cls", "box")]
    assert list(losses) == ["loss_rpn_cls", "loss_rpn_box", *names]


def test_bad_stages() -> None:
    pooler = RoIPooler((8,), 7)
    agnostic, other = (BoxHead(BoxTrunk(4, hidden=8), classes, class_agnostic=True) for classes in (2, 3))
    specific = BoxHead(BoxTrunk(4, hidden=8), 2)
    with pytest.raises(ValueError, match=r"weights must have one entry per stage \(1\), got 3"):
        CascadeStages([BoxStage(agnostic, pooler)])
    for pair in ((agnostic, other), (agnostic, specific)):
        with pytest.raises(ValueError, match="class-agnostic and for the same classes"):
            CascadeStages([BoxStage(head, pooler) for head in pair], weights=(1.0, 1.0))
