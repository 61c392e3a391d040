from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nasdet.detectors import RPN, BoxHead, BoxStage, BoxTrunk, FasterRCNN, FixedRoIs, RoIPooler, build_faster_rcnn
from nasdet.detectors.faster_rcnn import HEAD_CODEC, box_losses
from nasdet.detectors.norm import SyncBatchNorm
from nasdet.detectors.parts.boxes import pairwise_iou
from nasdet.detectors.parts.objects import Objects, batch_objects
from nasdet.detectors.parts.sampler import Samples
from nasdet.measure import count
from nasdet.ops import roi_align


def _rpn(**options: Any) -> RPN:
    torch.manual_seed(0)
    return RPN(8, (8, 16), **options)


def _maps(fill: float = 0.0) -> tuple[list[Tensor], list[Tensor]]:
    shapes = [(8, 12), (4, 6)]
    return [torch.full((1, 3, *s), fill) for s in shapes], [torch.zeros(1, 12, *s) for s in shapes]


def _perfect_rpn(rpn: RPN, objects: Objects) -> tuple[list[Tensor], list[Tensor]]:
    rpn.samples, rpn.positive_fraction = 100_000, 0.5
    cls, box = _maps()
    positive, _, deltas = rpn._targets(cls, [objects])
    counts = [level[0].numel() for level in cls]
    flat = torch.full((sum(counts),), -12.0).index_fill(0, positive, 12.0).split(counts)
    moves = torch.zeros(sum(counts), 4).index_put((positive,), deltas).split(counts)
    for level, (logits, move) in enumerate(zip(flat, moves, strict=True)):
        shape = cls[level].shape[-2:]
        cls[level] = logits.view(1, *shape, 3).permute(0, 3, 1, 2)
        box[level] = move.view(1, *shape, 12).permute(0, 3, 1, 2)
    return cls, box


def test_perfect_rpn_has_no_loss_and_proposes_the_objects(make_target: Callable) -> None:
    rpn, target = _rpn(), make_target([[4, 6, 40, 50], [50, 10, 90, 60]], [0, 1])
    (objects,) = batch_objects([target], 1, 2)
    cls, box = _perfect_rpn(rpn, objects)
    losses = rpn.loss(cls, box, [objects])
    assert float(losses["loss_rpn_cls"]) < 1e-4 and float(losses["loss_rpn_box"]) < 1e-6
    (found,) = rpn.proposals(cls, box, [(64, 96)], training=False)
    assert float(pairwise_iou(target["boxes"], found[:2]).amax(dim=1).min()) > 0.999


def test_rpn_loss_of_undecided_maps(make_target: Callable) -> None:
    rpn = _rpn(samples=32)
    cls, box = _maps()
    losses = rpn.loss(cls, box, batch_objects([make_target([], [])], 1, 2))
    assert float(losses["loss_rpn_cls"]) == pytest.approx(math.log(2)) and float(losses["loss_rpn_box"]) == 0.0


@pytest.mark.parametrize("training", [True, False])
def test_limits_of_the_proposals(training: bool) -> None:
    rpn = _rpn(candidates=(20, 10), limit=(25, 7), nms_threshold=1.0)
    cls, box = _maps()
    cls = [torch.randn_like(level) for level in cls]
    (found,) = rpn.proposals(cls, box, [(64, 96)], training=training)
    # Twenty (ten) of each of two levels, less what lies outside the picture, then the best of all.
    assert len(found) <= (25 if training else 7) and len(found) >= (15 if training else 5)
    assert float(found.min()) >= 0 and float(found[:, 2].max()) <= 96 and float(found[:, 3].max()) <= 64


def test_levels_are_suppressed_apart() -> None:
    rpn = _rpn()
    cls, box = _maps(-20.0)
    cls[0][0, 1, 4, 4] = cls[1][0, 1, 2, 2] = 5.0  # one place on both levels
    box[1][0, 6:8, 2, 2] = math.log(0.5)  # the coarser anchor shrunk to the finer
    (found,) = rpn.proposals(cls, box, [(64, 96)], training=False)
    assert float(pairwise_iou(found[:1], found[1:2])) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("kind", "norm", "convs", "fcs"),
    [("2fc", None, 0, 2), ("4conv1fc", "gn", 4, 1), ("2conv1fc", "sync_bn", 2, 1), ("4conv1fc", None, 4, 1)],
)
def test_kinds_of_box_heads(kind: str, norm: str | None, convs: int, fcs: int) -> None:
    trunk = BoxTrunk(16, kind, norm=norm, hidden=24)
    found = [m for m in trunk.modules() if isinstance(m, nn.Conv2d)]
    assert len(found) == convs and len(trunk.fcs) == fcs and trunk.out_channels == 24
    assert all((m.bias is None) == (norm is not None) for m in found)
    norms = {"gn": nn.GroupNorm, "sync_bn": SyncBatchNorm}
    assert sum(isinstance(m, tuple(norms.values())) for m in trunk.modules()) == (convs if norm else 0)
    assert trunk.eval()(torch.randn(3, 16, 7, 7)).shape == (3, 24)


@pytest.mark.parametrize(("kind", "norm"), [("4conv1fc", "gn"), ("4conv1fc", "sync_bn"), ("2conv1fc", "sync_bn")])
def test_box_heads_with_norms_learn_and_detect(kind: str, norm: str, make_target: Callable) -> None:
    model: Any = _small(box_head=kind, head_norm=norm, samples=32, score_threshold=0.0, rpn={"limit": (60, 40)})
    images, head = torch.randn(2, 3, 64, 96), model.boxes.head
    for boxes in ([[4, 6, 40, 50], [30, 10, 90, 60]], []):
        target = make_target(boxes, [1, 4][: len(boxes)], (64, 96))
        model.zero_grad()
        losses = torch.stack(list(model.loss(model(images), [target] * 2).values()))
        assert bool(losses.isfinite().all())
        losses.sum().backward()
        for name, parameter in head.named_parameters():
            assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
            # without an object no box has anything to learn
            assert bool(parameter.grad.any()) == (bool(boxes) or not name.startswith("box_pred")), name
    norms = [module for module in head.modules() if isinstance(module, SyncBatchNorm)]
    assert len(norms) == (0 if norm == "gn" else int(kind[0]))
    assert all(bool(n.running_mean.isfinite().all()) and bool(n.running_mean.any()) for n in norms)
    model.eval()
    for found in model.detect(model(images), [(64, 96), (40, 70)]):
        assert len(found["boxes"]) > 0 and bool(found["boxes"].isfinite().all())


@pytest.mark.parametrize("kind", ["", "fc", "0fc", "4conv", "2fc1conv", "12fc"])
def test_unknown_box_heads(kind: str) -> None:
    with pytest.raises(ValueError, match="kind must be like"):
        BoxTrunk(16, kind)


def test_pooler_takes_each_box_from_its_level() -> None:
    levels = [torch.randn(1, 2, 64, 64), torch.randn(1, 2, 32, 32), torch.randn(1, 2, 16, 16)]
    boxes = torch.tensor([[0.0, 0, 100, 100], [0, 0, 130, 120], [3, 9, 20, 20]])
    pooled = RoIPooler((4, 8), 7)(levels, [boxes])  # the third level is the RPN's alone
    for index, level in enumerate([0, 1, 0]):
        wanted = roi_align(levels[level], [boxes[index : index + 1]], 7, 1 / (4 * 2**level), 2)
        torch.testing.assert_close(pooled[index : index + 1], wanted)


def _samples() -> tuple[Samples, list[Objects]]:
    objects = Objects(torch.tensor([[0.0, 0, 10, 10]]), torch.tensor([1]), torch.tensor([0]))
    boxes = torch.tensor([[0.0, 0, 10, 8], [40, 40, 50, 50]])
    return Samples([boxes], [torch.tensor([2, 0])], [torch.tensor([0, 0])]), [objects]


@pytest.mark.parametrize("agnostic", [False, True])
def test_box_losses_follow_the_definition(agnostic: bool) -> None:
    samples, batch = _samples()
    logits = torch.tensor([[0.1, 0.2, 0.7], [1.0, -1.0, 0.5]])
    deltas = torch.full((2, 1 if agnostic else 3, 4), 50.0)
    wanted = HEAD_CODEC.encode(samples.boxes[0][:1], batch[0].boxes)[0]
    deltas[0, 0 if agnostic else 2] = wanted + torch.tensor([0.0, 2.0, 0.0, 0.5])
    classes, boxes = box_losses(logits, deltas, samples, batch, HEAD_CODEC, 1.0)
    torch.testing.assert_close(classes, F.cross_entropy(logits, torch.tensor([2, 0])))
    assert float(boxes) == pytest.approx((1.5 + 0.5 * 0.25) / 2, rel=1e-5)


class _Says(nn.Module):
    """A head of fixed answers."""

    num_classes, class_agnostic = 2, False

    def __init__(self, logits: Tensor, deltas: Tensor) -> None:
        super().__init__()
        self.logits, self.deltas = logits, deltas

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        return self.logits, self.deltas


def test_detections_are_the_deltas_of_their_class() -> None:
    proposals = [torch.tensor([[0.0, 0, 20, 20], [40, 40, 60, 60]]), torch.tensor([[10.0, 10, 30, 50]])]
    logits = torch.tensor([[0.0, 5.0, 0.0], [0.0, 0.0, 6.0], [9.0, 0.0, 0.0]])
    deltas = torch.zeros(3, 3, 4)
    deltas[0, 1] = torch.tensor([1.0, 0, 0, 5 * math.log(2)])  # a tenth of the width to the right, twice as high
    stage = BoxStage(_Says(logits, deltas), RoIPooler((8,), 7))  # type: ignore[arg-type]  # a head in all but name
    sizes = [(64, 64)] * 2
    first, second = stage.select(*stage.predict([torch.zeros(2, 4, 8, 8)], proposals, sizes), sizes)
    assert first["labels"].tolist() == [1, 0] and second["labels"].tolist() == []
    torch.testing.assert_close(first["boxes"], torch.tensor([[40.0, 40, 60, 60], [2, 0, 22, 30]]))
    torch.testing.assert_close(first["scores"], torch.stack([logits[1].softmax(0)[2], logits[0].softmax(0)[1]]))


def _small(**options: Any) -> FasterRCNN:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"width": 0.125, "fpn_channels": 16, "hidden": 32, **options}
    return build_faster_rcnn("resnet18", 5, **arguments)


def test_forward_gives_the_pyramid_and_the_rpn() -> None:
    outputs = _small()(torch.randn(1, 3, 64, 96))
    shapes: Sequence[tuple[int, int]] = [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    for name, channels in (("features", 16), ("rpn_cls", 3), ("rpn_box", 12)):
        assert [tuple(level.shape) for level in outputs[name]] == [(1, channels, *shape) for shape in shapes]
    assert torch.equal(outputs["features"][4], outputs["features"][3][..., ::2, ::2])  # P6


@pytest.mark.parametrize("levels", [1, 2, 4, 6])
def test_other_numbers_of_levels(levels: int, make_target: Callable) -> None:
    model = _small(levels=levels)
    losses = model.loss(model(torch.randn(1, 3, 64, 96)), [make_target([[4, 6, 40, 50]], [1])])
    assert all(bool(value.isfinite()) for value in losses.values())
    assert model.boxes.pooler.strides == (4, 8, 16, 32)[:levels]


def test_options_reach_their_parts() -> None:
    assert _small(rpn={"samples": 7}).rpn.samples == 7
    stage = _small(samples=9, score_threshold=0.3, box_head="4conv1fc", head_norm="gn").boxes
    assert (stage.samples, stage.score_threshold) == (9, 0.3) and len(stage.head.trunk.convs) == 8
    with pytest.raises(ValueError, match="towers must be None"):
        _small(towers=nn.Identity())


def test_cost_sees_the_heads() -> None:
    model = _small()
    image = torch.empty(1, 3, 64, 96, device="meta")
    whole = {cost.name: cost for cost in count(FixedRoIs(model, proposals=50), image)}
    assert whole["boxes"].macs == 50 * (16 * 49 * 32 + 32 * 32 + 32 * 6 * 5)
    assert sum(cost.parameters for cost in whole.values()) == sum(p.numel() for p in model.parameters())
    assert "boxes" not in {cost.name for cost in count(model, image) if cost.macs}
    FixedRoIs(model.eval(), proposals=5)(torch.zeros(1, 3, 64, 96))


def test_a_head_needs_its_width() -> None:
    with pytest.raises(TypeError, match="trunk must say its out_channels"):
        BoxHead(nn.Identity(), 3)
