from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasdet.detectors import FPN, AnchorGenerator, PlainTowers, RetinaNet, build_retinanet
from nasdet.detectors.parts.boxes import pairwise_iou

OBJECTS = [([[4, 6, 40, 50], [30, 10, 90, 80]], [1, 4]), ([[0, 0, 20, 12]], [0])]


def _small(**options: Any) -> RetinaNet:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"width": 0.125, "fpn_channels": 16, "tower_convs": 1, "levels": 3, **options}
    return build_retinanet("resnet18", 5, **arguments)


def test_start_of_training() -> None:
    model = _small()
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, 64, 96))
    for level, stride in enumerate((8, 16, 32)):
        assert outputs["cls"][level].shape == (2, 9 * 5, 64 // stride, 96 // stride)
        assert outputs["box"][level].shape == (2, 9 * 4, 64 // stride, 96 // stride)
    assert float(outputs["cls"][0].sigmoid().mean()) == pytest.approx(0.01, rel=0.1)
    assert not any(isinstance(module, nn.GroupNorm) for module in model.towers.modules())
    assert any(isinstance(module, nn.GroupNorm) for module in _small(tower_norm="gn").towers.modules())


def _perfect(model: RetinaNet, targets: list[dict[str, Tensor]], size: tuple[int, int]) -> dict[str, list[Tensor]]:
    """Outputs that say exactly what the targets ask for."""
    from nasdet.detectors.parts.objects import batch_objects

    shapes = [(size[0] // s, size[1] // s) for s in model.anchors.strides]
    maps = [torch.zeros(len(targets), 1, *shape) for shape in shapes]
    labels, places, deltas = model._targets(maps, batch_objects(targets, len(targets), model.num_classes))
    logits = torch.where(labels[..., None] == torch.arange(model.num_classes), 12.0, -12.0)
    boxes = torch.zeros(labels.numel(), 4).index_put((places,), deltas).view(*labels.shape, 4)
    counts = [h * w * model.anchors.per_cell for h, w in shapes]
    outputs: dict[str, list[Tensor]] = {"cls": [], "box": []}
    for shape, cls, box in zip(shapes, logits.split(counts, 1), boxes.split(counts, 1), strict=True):
        for name, flat in (("cls", cls), ("box", box)):
            outputs[name].append(flat.reshape(len(targets), *shape, -1).permute(0, 3, 1, 2))
    return outputs


def test_perfect_outputs_have_no_loss_and_give_the_objects_back(make_target: Callable) -> None:
    model, targets = _small(), [make_target(*pair) for pair in OBJECTS]
    outputs = _perfect(model, targets, (96, 96))
    losses = model.loss(outputs, targets)
    assert float(losses["loss_cls"]) < 1e-5 and float(losses["loss_box"]) == 0.0
    for found, target in zip(model.detect(outputs, [(96, 96)] * 2), targets, strict=True):
        assert sorted(found["labels"].tolist()) == sorted(target["labels"].tolist())
        for label, box in zip(found["labels"], found["boxes"], strict=True):
            torch.testing.assert_close(box, target["boxes"][target["labels"] == label][0], rtol=0, atol=1e-3)


def test_loss_matches_the_definition(make_target: Callable) -> None:
    # Three anchors of one cell: 8 x 8 (IoU 1 with the object), 16 x 16 (IoU 1/4), and 9 x 9, which lies between.
    anchors = AnchorGenerator([8], [(8.0, 16.0, 12.0)], (1.0,), convention="centre")
    model = RetinaNet(
        nn.Identity(), FPN({"a": 3}, {"a": 8}, 8, extra_levels=0), PlainTowers(8), num_classes=2, anchors=anchors
    )
    target = make_target([[0, 0, 8, 8]], [1])
    cls = torch.tensor([[0.3, -1.0], [0.5, 0.2], [9.0, 9.0]])  # the last, IoU 4/9, is ignored
    box = torch.tensor([[0.1, -0.2, 0.3, 0.4], [9.0, 9, 9, 9], [9.0, 9, 9, 9]])
    outputs = {"cls": [cls.reshape(1, 6, 1, 1)], "box": [box.reshape(1, 12, 1, 1)]}
    losses = model.loss(outputs, [target])
    assert float(losses["loss_box"]) == pytest.approx(1.0)  # |0.1| + |-0.2| + |0.3| + |0.4|
    p = cls[:2].double().sigmoid()
    negative = [p[0, 0], p[1, 0], p[1, 1]]
    focal = -0.25 * (1 - p[0, 1]) ** 2 * p[0, 1].log() - sum(0.75 * q**2 * (1 - q).log() for q in negative)
    assert float(losses["loss_cls"]) == pytest.approx(float(focal), rel=1e-5)
    model.box_beta = 1.0
    assert float(model.loss(outputs, [target])["loss_box"]) == pytest.approx(0.5 * (0.01 + 0.04 + 0.09 + 0.16))


def test_normalised_by_the_positives_of_the_batch(make_target: Callable) -> None:
    model, target, nothing = _small(), make_target(*OBJECTS[0]), make_target([], [])
    outputs = model(torch.randn(1, 3, 96, 96))
    alone = model.loss(outputs, [target])
    twice = {name: [level.repeat(2, 1, 1, 1) for level in levels] for name, levels in outputs.items()}
    for name, value in model.loss(twice, [target, target]).items():
        torch.testing.assert_close(value, alone[name])
    torch.testing.assert_close(model.loss(twice, [target, nothing])["loss_box"], alone["loss_box"])


def test_an_object_apart_has_an_anchor_that_learns_it(make_target: Callable) -> None:
    model = _small()
    target = make_target([[3, 3, 5, 4], [40, 0, 96, 96]], [2, 3])  # far smaller and larger than the anchors
    outputs = _perfect(model, [target], (96, 96))
    (found,) = model.detect(outputs, [(96, 96)])
    assert float(pairwise_iou(target["boxes"], found["boxes"]).amax(dim=1).min()) > 0.99


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: _small(prior=0.0), ValueError, "prior must be between 0 and 1, got 0.0"),
        (lambda: _small(anchors=AnchorGenerator([8], [(8,)])), ValueError, r"neck's strides \(8, 16, 32\), got \(8,\)"),
        (
            lambda: RetinaNet(nn.Identity(), FPN({"a": 3}, {"a": 8}), nn.Identity(), num_classes=1),
            TypeError,
            "towers must say its cls_channels",
        ),
    ],
)
def test_bad_parts(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_prior_bias() -> None:
    bias = _small(prior=0.02).cls_logits.bias
    assert bias is not None
    torch.testing.assert_close(bias.sigmoid(), torch.full_like(bias, 0.02))
    assert math.isclose(float(bias[0].detach()), -math.log(49), rel_tol=1e-6)
