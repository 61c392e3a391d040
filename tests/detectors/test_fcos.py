from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasdet.detectors import DETECTORS, FCOS, FPN, PlainTowers, build_fcos


def _small(**options: Any) -> FCOS:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"width": 0.125, "fpn_channels": 16, "tower_convs": 1, "levels": 3, **options}
    return build_fcos("resnet18", 5, **arguments)


def _target(boxes: list[list[float]], labels: list[int]) -> dict[str, Tensor]:
    count = len(labels)
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "iscrowd": torch.zeros(count, dtype=torch.bool),
    }


OBJECTS = [_target([[4, 6, 40, 50], [30, 10, 90, 80]], [1, 4]), _target([[0, 0, 20, 12]], [0])]
NOTHING = _target([], [])


def test_published_parameters() -> None:
    with torch.device("meta"):
        model = build_fcos("resnet50", 80, norm="frozen_bn")
    head = sum(p.numel() for part in (model.towers, model.head) for p in part.parameters())
    assert head == 4_920_666
    # 32.2 M in the FAD paper, frozen batch norm not counted.
    assert sum(p.numel() for p in model.parameters()) == 32_244_250


def test_start_of_training() -> None:
    model = _small()
    outputs = {name: [level.detach() for level in levels] for name, levels in model(torch.randn(2, 3, 64, 96)).items()}
    assert {name: len(levels) for name, levels in outputs.items()} == {"cls": 3, "box": 3, "centerness": 3}
    for level, stride in enumerate((8, 16, 32)):
        size = (-(-64 // stride), 96 // stride)
        assert outputs["cls"][level].shape == (2, 5, *size)
        assert outputs["box"][level].shape == (2, 4, *size) and float(outputs["box"][level].min()) >= 0
        assert outputs["centerness"][level].shape == (2, 1, *size)
    assert float(outputs["cls"][0].sigmoid().mean()) == pytest.approx(0.01, rel=0.1)
    assert model.detect(outputs, [(64, 96)] * 2)[0]["boxes"].shape == (0, 4)


@pytest.mark.parametrize("targets", [OBJECTS, [OBJECTS[0], NOTHING], [NOTHING, NOTHING]], ids=["both", "one", "none"])
@pytest.mark.parametrize("norm", ["gn", "bn"])
def test_every_parameter_gets_a_finite_gradient(targets: list[dict[str, Tensor]], norm: str) -> None:
    model = _small(norm=norm, levels=5).train()
    losses = model.loss(model(torch.randn(2, 3, 64, 96)), targets)
    assert list(losses) == ["loss_cls", "loss_box", "loss_centerness"]
    assert all(value.dim() == 0 and bool(value.isfinite()) for value in losses.values())
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
    if targets[1] is NOTHING and targets[0] is NOTHING:
        assert float(losses["loss_box"].detach()) == 0.0 == float(losses["loss_centerness"].detach())


def _perfect(model: FCOS, targets: list[dict[str, Tensor]], size: tuple[int, int]) -> dict[str, list[Tensor]]:
    """Outputs that say exactly what the targets ask for."""
    shapes = [(-(-size[0] // s), -(-size[1] // s)) for s in model.strides]
    maps = [torch.zeros(len(targets), 1, *shape) for shape in shapes]
    labels, distances = model._targets(maps, targets)
    counts = [h * w for h, w in shapes]
    outputs: dict[str, list[Tensor]] = {"cls": [], "box": [], "centerness": []}
    for (height, width), label, box in zip(shapes, labels.split(counts, 1), distances.split(counts, 1), strict=True):
        logits = torch.where(label[..., None] == torch.arange(model.num_classes), 12.0, -12.0)
        opposite = torch.stack([box[..., :2], box[..., 2:]], -1)
        quality = (opposite.amin(-1) / opposite.amax(-1)).prod(-1).sqrt().clamp(1e-6, 1 - 1e-6)
        for name, flat in (("cls", logits), ("box", box), ("centerness", quality.logit()[..., None])):
            outputs[name].append(flat.transpose(1, 2).unflatten(2, (height, width)))
    return outputs


def test_perfect_outputs_have_no_loss_and_give_the_objects_back() -> None:
    model = _small()
    outputs = _perfect(model, OBJECTS, (96, 96))
    losses = model.loss(outputs, OBJECTS)
    assert float(losses["loss_cls"]) < 1e-6 and float(losses["loss_box"]) == pytest.approx(0, abs=1e-6)
    # Detections: suppression leaves one box per object, exactly the object's.
    for found, target in zip(model.detect(outputs, [(96, 96)] * 2), OBJECTS, strict=True):
        assert sorted(found["labels"].tolist()) == sorted(target["labels"].tolist())
        for label, box in zip(found["labels"], found["boxes"], strict=True):
            torch.testing.assert_close(box, target["boxes"][target["labels"] == label][0], rtol=0, atol=1e-3)


def test_loss_matches_the_definition_at_one_location() -> None:
    model = _small(levels=1, ranges=[(0, math.inf)])
    # One 8-pixel cell, centre (4, 4); a box 2 left, 4 above, 6 right, 4 below; predictions of 1 stride each.
    target = _target([[2, 0, 10, 8]], [3])
    cls, centerness = torch.tensor([0.3, -1.0, 0.5, 0.2, 0.0]), 0.7
    outputs = {
        "cls": [cls.view(1, 5, 1, 1)],
        "box": [torch.ones(1, 4, 1, 1)],
        "centerness": [torch.full((1, 1, 1, 1), centerness)],
    }
    losses = model.loss(outputs, [target])
    # In strides: prediction (-1, -1, 1, 1), object (-0.25, -0.5, 0.75, 0.5): inside, so hull = prediction.
    overlap = 1.0 / 4.0
    assert float(losses["loss_box"]) == pytest.approx(1 - overlap)
    quality = math.sqrt(0.25 / 0.75 * 0.5 / 0.5)
    p = 1 / (1 + math.exp(-centerness))
    assert float(losses["loss_centerness"]) == pytest.approx(-quality * math.log(p) - (1 - quality) * math.log(1 - p))
    probability = cls.double().sigmoid()
    focal = -0.25 * (1 - probability[3]) ** 2 * probability[3].log()
    rest = probability[[0, 1, 2, 4]]
    focal = focal - (0.75 * rest**2 * (1 - rest).log()).sum()
    assert float(losses["loss_cls"]) == pytest.approx(float(focal), rel=1e-5)


def test_crowds_teach_nothing() -> None:
    model = _small()
    outputs = model(torch.randn(1, 3, 96, 96))
    crowd = {**OBJECTS[0], "iscrowd": torch.tensor([False, True])}
    alone = {name: value[:1] for name, value in OBJECTS[0].items()}
    assert model.loss(outputs, [crowd]) == model.loss(outputs, [alone])


def test_detections_stay_in_their_image() -> None:
    torch.manual_seed(3)
    model = _small(score_threshold=0.0, max_detections=30)
    outputs = model(torch.randn(3, 3, 96, 96))
    outputs["box"] = [level + 3 for level in outputs["box"]]
    sizes = [(96, 96), (40, 70), (1, 1)]
    for found, (height, width) in zip(model.detect(outputs, sizes), sizes, strict=True):
        boxes = found["boxes"]
        assert 0 < len(boxes) <= 30 and boxes.dtype == torch.float32 and found["labels"].dtype == torch.int64
        assert float(boxes.min()) >= 0 and float(boxes[:, 2].max()) <= width and float(boxes[:, 3].max()) <= height
        assert bool((boxes[:, 2:] > boxes[:, :2]).all()) and bool((found["scores"].diff() <= 0).all())
        assert 0 <= int(found["labels"].min()) and int(found["labels"].max()) < 5


@pytest.mark.parametrize("name", ["cls", "box", "centerness"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_numbers_give_no_such_detection(name: str, value: float) -> None:
    model = _small(score_threshold=0.0)
    outputs = model(torch.randn(1, 3, 64, 64))
    outputs["box"] = [level + 1 for level in outputs["box"]]
    outputs[name] = [torch.full_like(level, value) for level in outputs[name]]
    (found,) = model.detect(outputs, [(64, 64)])
    assert bool(found["boxes"].isfinite().all()) and bool(found["scores"].isfinite().all())
    assert math.isnan(value) <= (len(found["boxes"]) == 0)


def test_a_nan_in_the_outputs_shows_in_the_loss() -> None:
    model = _small()
    outputs = model(torch.randn(1, 3, 64, 64))
    outputs["cls"][0] = outputs["cls"][0] * math.nan
    assert bool(model.loss(outputs, OBJECTS[:1])["loss_cls"].isnan())


@pytest.mark.parametrize("norm", ["gn", "bn", "frozen_bn"])
def test_autocast_computes_the_losses_in_float32(norm: str) -> None:
    model = _small(norm=norm)
    images = torch.rand(2, 3, 64, 96) - 0.5
    exact = model.loss(model(images), OBJECTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = model(images)
        losses = model.loss(outputs, OBJECTS)
    assert outputs["cls"][0].dtype == torch.bfloat16
    for name, value in losses.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact[name], rtol=0.05, atol=0.02)
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    model.detect(outputs, [(64, 96)] * 2)


@pytest.mark.parametrize("norm", ["gn", "frozen_bn"])
def test_compiles_as_one_graph(norm: str) -> None:
    model = _small(norm=norm, levels=5).eval()
    images = torch.rand(1, 3, 64, 64)
    compiled = torch.compile(model, fullgraph=True, backend="eager")(images)
    for name, levels in model(images).items():
        for value, wanted in zip(compiled[name], levels, strict=True):
            torch.testing.assert_close(value, wanted)


def test_channels_last_throughout() -> None:
    model = _small()
    images = torch.rand(2, 3, 64, 96)
    expected = model.loss(model(images), OBJECTS)
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    outputs = model(images.contiguous(memory_format=torch.channels_last))
    assert all(level.is_contiguous(memory_format=torch.channels_last) for level in outputs["cls"] + outputs["box"])
    for name, value in model.loss(outputs, OBJECTS).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (32, 32), (33, 95), (8, 200)], ids=str)
def test_any_image_size(size: tuple[int, int]) -> None:
    model = _small(levels=5, norm="gn", score_threshold=0.0)
    for targets in ([OBJECTS[0], NOTHING], [OBJECTS[0]]):
        outputs = model(torch.rand(len(targets), 3, *size))
        losses = model.loss(outputs, targets)
        assert all(bool(value.isfinite()) for value in losses.values())
        assert len(model.detect(outputs, [size] * len(targets))) == len(targets)


def test_one_class_and_one_pixel_boxes() -> None:
    model = build_fcos("resnet18", 1, width=0.125, fpn_channels=16, tower_convs=1, levels=3)
    target = _target([[3.5, 3.5, 4.5, 4.5], [5, 5, 6, 6]], [0, 0])
    losses = model.loss(model(torch.rand(1, 3, 64, 64)), [target])
    assert all(bool(value.isfinite()) for value in losses.values())


class _OneMap(nn.Module):
    """A backbone of another kind: one map, under its own name."""

    strides = {"deep": 16}
    channels = {"deep": 7}

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 7, 16, stride=16)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"deep": self.conv(images)}


class _UnlikeTowers(nn.Module):
    box_channels = 6
    cls_channels = 10

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 16, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        box, cls = self.conv(x).split([6, 10], dim=1)
        return box, cls


def test_any_backbone_and_towers() -> None:
    backbone = _OneMap()
    model = FCOS(backbone, FPN(backbone.channels, backbone.strides, 8), _UnlikeTowers(), num_classes=5)
    assert model.strides == (16, 32, 64) and model.ranges[-1] == (256, math.inf)
    losses = model.loss(model(torch.rand(2, 3, 64, 64)), OBJECTS)
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: build_fcos("resnet19"), ValueError, "backbone must be one of resnet18, resnet34"),
        (lambda: _small(levels=0), ValueError, "levels must be positive, got 0"),
        (lambda: _small(prior=1.0), ValueError, "prior must be between 0 and 1, got 1.0"),
        (lambda: _small(ranges=[(0, 8)]), ValueError, r"one entry per level \(3\), got 1"),
        (lambda: FCOS(nn.Identity(), nn.Identity(), PlainTowers(8), num_classes=1), TypeError, "neck must say its str"),
        (lambda: FCOS(nn.Identity(), FPN({"a": 3}, {"a": 8}), nn.Identity(), num_classes=1), TypeError, "towers must"),
        (lambda: FCOS(_OneMap(), FPN({"a": 3}, {"a": 8}), PlainTowers(8), num_classes=0), ValueError, "num_classes"),
    ],
)
def test_bad_parts(call: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


def test_bad_targets_and_sizes() -> None:
    model = _small()
    outputs = model(torch.rand(2, 3, 64, 64))
    with pytest.raises(ValueError, match=r"targets must have one entry per image \(2\), got 1"):
        model.loss(outputs, OBJECTS[:1])
    with pytest.raises(ValueError, match=r"labels must be in 0..4, got 5..5 in image 1"):
        model.loss(outputs, [OBJECTS[0], _target([[0, 0, 9, 9]], [5])])
    with pytest.raises(ValueError, match=r"sizes must have one entry per image \(2\), got 3"):
        model.detect(outputs, [(64, 64)] * 3)


def test_state_round_trip_and_registry() -> None:
    model = DETECTORS["fcos"]("resnet18", 5, width=0.125, fpn_channels=16, levels=3)
    other = build_fcos("resnet18", 5, width=0.125, fpn_channels=16, levels=3)
    other.load_state_dict(model.state_dict())
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(model.eval()(images)["cls"][0], other.eval()(images)["cls"][0])
