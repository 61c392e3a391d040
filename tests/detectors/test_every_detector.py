"""What holds for every detector of the registry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasdet import use_backend
from nasdet.detectors import DETECTORS

SIZE = (64, 96)
TWO_STAGE = [name for name in DETECTORS if "rcnn" in name]
MASKS = [name for name in DETECTORS if "mask" in name]


def build(name: str, classes: int = 5, **options: Any) -> Any:
    torch.manual_seed(0)
    small: dict[str, Any] = {"width": 0.125, "fpn_channels": 16, "norm": "gn", "tower_convs": 1}
    if name in TWO_STAGE:
        small |= {"hidden": 32, "samples": 64, "rpn": {"limit": (100, 50)}}
    return DETECTORS[name]("resnet18", classes, **small | options)


def found_at_all(name: str, **options: Any) -> Any:
    """A detector in evaluation mode that finds something, sure of nothing as it is; and scores its masks above 0."""
    model = build(name, score_threshold=0.0, max_detections=20, **options).eval()
    if name == "mask_scoring_rcnn":
        nn.init.constant_(model.masks.iou_head.iou.bias, 0.5)
    return model


@pytest.fixture(scope="module", params=DETECTORS)
def model(request: pytest.FixtureRequest) -> Any:
    """A small model of each detector, in training mode."""
    return build(request.param)


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(1))


CASES = {
    "objects": [([[4, 6, 40, 50], [30, 10, 90, 60]], [1, 4], ()), ([[0, 0, 20, 12]], [0], ())],
    "one empty": [([[4, 6, 40, 50], [30, 10, 90, 60]], [1, 4], ()), ([], [], ())],
    "both empty": [([], [], ()), ([], [], ())],
    "crowds": [([[4, 6, 40, 50], [0, 0, 96, 64]], [1, 4], (1,)), ([[5, 5, 60, 60]], [0], (0,))],
    "crowds only": [([[4, 6, 40, 50], [0, 0, 96, 64]], [1, 4], (0, 1)), ([[5, 5, 60, 60]], [0], (0,))],
    "one pixel": [([[7, 7, 8, 8], [95, 63, 96, 64]], [2, 2], ()), ([[3.25, 4.25, 4.25, 5.25]], [0], ())],
    "no area": [([[7, 7, 7, 20], [50, 20, 40, 30]], [2, 2], ()), ([[20, 20, 50, 50]], [0], ())],
    "outside": [([[-20, -30, 200, 300]], [2], ()), ([[500, 500, 600, 600]], [0], ())],
    "twice": [([[4, 6, 40, 50], [4, 6, 40, 50]], [1, 3], ()), ([[0, 0, 96, 64]], [0], ())],
}


@pytest.mark.parametrize("case", CASES)
def test_finite_losses_and_a_gradient_for_every_parameter(model: Any, case: str, make_target: Callable) -> None:
    targets = [make_target(boxes, labels, SIZE, crowds) for boxes, labels, crowds in CASES[case]]
    model.zero_grad()
    losses = model.loss(model(images()), targets)
    assert all(value.dim() == 0 and value.dtype == torch.float32 for value in losses.values())
    assert all(bool(value.isfinite()) for value in losses.values()), losses
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and bool(parameter.grad.isfinite().all()), name
    if case in ("both empty", "crowds only"):
        assert all(float(v.detach()) == 0 for k, v in losses.items() if "cls" not in k)
    else:  # all parts learn
        silent = [part for part, module in model.named_children() if not _learns(module)]
        assert not silent, silent


def _learns(module: nn.Module) -> bool:
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return not gradients or any(bool((g != 0).any()) for g in gradients)


def test_crowds_teach_nothing(model: Any, make_target: Callable) -> None:
    outputs = model(images(1))
    crowd = make_target([[4, 6, 40, 50], [30, 10, 90, 60]], [1, 4], SIZE, (1,))
    alone = make_target([[4, 6, 40, 50]], [1], SIZE)
    results = []
    for target in (crowd, alone):
        torch.manual_seed(2)
        results.append(model.loss(outputs, [target]))
    assert results[0] == results[1]


def test_the_same_seed_gives_the_same_losses(model: Any, make_target: Callable) -> None:
    outputs, targets = model(images(1)), [make_target([[4, 6, 40, 50], [30, 10, 90, 60]], [1, 4], SIZE)]
    results = []
    for _ in range(2):
        torch.manual_seed(3)
        results.append(model.loss(outputs, targets))
    assert results[0] == results[1]


@pytest.mark.parametrize("name", DETECTORS)
def test_plain_pytorch_gives_the_same(name: str, make_target: Callable) -> None:
    """``use_backend("reference")`` runs the whole model without a compiled operator; in float64, so that rounding does
    not decide what is found."""
    model = found_at_all(name).double()
    found, losses = [], []
    for backend in (None, "reference"):
        torch.manual_seed(2)
        with use_backend(backend):
            outputs = model(images().double())
            targets = [make_target([[4, 6, 40, 50]], [1], SIZE), make_target([], [], SIZE)]
            losses.append(model.loss(outputs, targets))
            found.append(model.detect(outputs, [SIZE, (40, 70)]))
    for key, value in losses[0].items():
        torch.testing.assert_close(value, losses[1][key], rtol=1e-5, atol=1e-7)
    for ours, plain in zip(*found, strict=True):
        assert ours.keys() == plain.keys() and len(ours["boxes"]) > 0
        assert ("mask_logits" in ours, "mask_scores" in ours) == (name in MASKS, name == "mask_scoring_rcnn")
        for key, value in ours.items():
            assert key == "labels" or bool(value.any()), key
            torch.testing.assert_close(value, plain[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DETECTORS)
def test_detections_stay_in_their_image(name: str) -> None:
    model = build(name, score_threshold=0.0, max_detections=30).eval()
    sizes = [SIZE, (40, 70), (1, 1)]
    outputs = model(images(3))
    for key in ("box", "rpn_box"):
        outputs[key] = [level + 1 for level in outputs.get(key, [])]
    for found, (height, width) in zip(model.detect(outputs, sizes), sizes, strict=True):
        boxes = found["boxes"]
        assert 0 < len(boxes) <= 30 and boxes.dtype == torch.float32 and found["labels"].dtype == torch.int64
        assert float(boxes.min()) >= 0 and float(boxes[:, 2].max()) <= width and float(boxes[:, 3].max()) <= height
        assert bool((boxes[:, 2:] > boxes[:, :2]).all()) and bool((found["scores"].diff() <= 0).all())
        assert 0 <= int(found["labels"].min()) and int(found["labels"].max()) < 5
        if name in MASKS:
            assert found["mask_logits"].shape == (len(boxes), 28, 28) and found["mask_logits"].dtype == torch.float32


@pytest.mark.parametrize("name", DETECTORS)
def test_one_class(name: str, make_target: Callable) -> None:
    model = found_at_all(name, classes=1).train()
    losses = model.loss(model(images(1)), [make_target([[4, 6, 40, 50]], [0], SIZE)])
    assert all(bool(value.isfinite()) for value in losses.values())
    (found,) = model.eval().detect(model(images(1)), [SIZE])
    assert len(found["labels"]) > 0 and not found["labels"].any() and bool((found["scores"] > 0).all())


@pytest.mark.parametrize("name", TWO_STAGE)
@pytest.mark.parametrize("case", ["objects", "both empty"])
def test_no_proposals(name: str, case: str, make_target: Callable) -> None:
    model = build(name, rpn={"limit": (0, 0)})
    targets = [make_target(boxes, labels, SIZE) for boxes, labels, _ in CASES[case]]
    losses = model.loss(model(images()), targets)
    torch.stack(list(losses.values())).sum().backward()
    assert all(bool(value.isfinite()) for value in losses.values())
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    for found in model.eval().detect(model(images()), [SIZE] * 2):
        assert found["boxes"].shape == (0, 4) and found["labels"].shape == (0,)
        assert name not in MASKS or found["mask_logits"].shape == (0, 28, 28)


@pytest.mark.parametrize("name", DETECTORS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_outputs_that_are_not_numbers_give_no_such_detection(name: str, value: float) -> None:
    """On all levels, and on the finest alone, beside which a one-stage detector finds what there is on the others."""
    model = build(name, score_threshold=0.0).eval()
    outputs = model(images(1))
    for key, levels in outputs.items():
        for count in (1, len(levels)):
            broken = [torch.full_like(level, value) for level in levels[:count]]
            (found,) = model.detect(outputs | {key: broken + levels[count:]}, [SIZE])
            assert all(bool(found[part].isfinite().all()) for part in ("boxes", "scores"))
            assert len(found["boxes"]) > 0 or count > 1 or name in TWO_STAGE


@pytest.mark.parametrize("name", DETECTORS)
def test_autocast_computes_losses_in_float32_inside_and_outside(name: str, make_target: Callable) -> None:
    model, targets = build(name), [make_target([[4, 6, 40, 50]], [1], SIZE), make_target([], [], SIZE)]
    torch.manual_seed(2)
    exact = model.loss(model(images()), targets)
    for inside in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(images())
        torch.manual_seed(2)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            losses = model.loss(outputs, targets)
        model.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
        for key, value in losses.items():
            assert value.dtype == torch.float32
            # Proposals and samples change with the rounding, so this is a check of the scale.
            torch.testing.assert_close(value, exact[key], rtol=0.5, atol=0.1)
    found = model.eval().detect(outputs, [SIZE] * 2)
    assert found[0]["boxes"].dtype == found[0]["scores"].dtype == torch.float32


@pytest.mark.parametrize("name", DETECTORS)
def test_compiles_as_one_graph(name: str) -> None:
    model = build(name).eval()
    outputs = torch.compile(model, fullgraph=True, backend="eager")(images(1))
    for key, levels in model(images(1)).items():
        for value, wanted in zip(outputs[key], levels, strict=True):
            torch.testing.assert_close(value, wanted)


@pytest.mark.parametrize("name", DETECTORS)
def test_state_round_trip(name: str) -> None:
    model, other = found_at_all(name), found_at_all(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01)
    before = other.detect(other(images(1)), [SIZE])[0]
    other.load_state_dict(model.state_dict())
    found, same = (m.detect(m(images(1)), [SIZE])[0] for m in (model, other))
    assert len(found["boxes"]) > 0 and not torch.equal(found["scores"], before["scores"])
    assert found.keys() == same.keys() and all(torch.equal(found[key], same[key]) for key in found)


class Foreign(nn.Module):
    """Somebody's own backbone: nothing but maps, by names of its own, and what is said of them."""

    strides = {"last": 32, "fine": 4, "coarse": 16, "middle": 8}
    channels = {"last": 10, "fine": 6, "coarse": 9, "middle": 7}

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {name: nn.Conv2d(3, count, 3, self.strides[name], 1) for name, count in self.channels.items()}
        )

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {name: layer(images).relu() for name, layer in self.layers.items()}


@pytest.mark.parametrize("name", DETECTORS)
def test_any_module_that_describes_its_maps_is_a_backbone(name: str, make_target: Callable) -> None:
    torch.manual_seed(0)
    own: dict[str, Any] = {"hidden": 32, "rpn": {"limit": (100, 50)}} if name in TWO_STAGE else {"tower_convs": 1}
    model: Any = DETECTORS[name](lambda **made_with: Foreign(), 5, fpn_channels=16, score_threshold=0.0, **own)
    assert isinstance(model.backbone, Foreign)
    targets = [make_target([[4, 6, 40, 50], [30, 10, 90, 60]], [1, 4], SIZE), make_target([], [], SIZE)]
    losses = torch.stack(list(model.loss(model(images()), targets).values()))
    assert bool(losses.isfinite().all())
    losses.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert not [key for key, parameter in model.backbone.named_parameters() if not parameter.grad.any()]
    model.eval()
    sizes = [SIZE, (40, 70)]
    for found, (height, width) in zip(model.detect(model(images()), sizes), sizes, strict=True):
        assert len(found["boxes"]) > 0 and bool((found["boxes"] >= 0).all())
        assert float(found["boxes"][:, 2].max()) <= width and float(found["boxes"][:, 3].max()) <= height


@pytest.mark.parametrize("name", DETECTORS)
def test_bad_calls(name: str, make_target: Callable) -> None:
    model = build(name)
    outputs = model(images())
    target = make_target([[4, 6, 40, 50]], [1], SIZE)
    with pytest.raises(ValueError, match=r"targets must have one entry per image \(2\), got 1"):
        model.loss(outputs, [target])
    with pytest.raises(ValueError, match=r"labels must be in 0..4, got 5..5 in image 1"):
        model.loss(outputs, [target, make_target([[0, 0, 9, 9]], [5], SIZE)])
    with pytest.raises(ValueError, match=r"sizes must have one entry per image \(2\), got 3"):
        model.detect(outputs, [SIZE] * 3)
    with pytest.raises(ValueError, match="backbone must be one of"):
        DETECTORS[name]("resnet19")
    with pytest.raises(ValueError, match="num_classes must be positive, got 0"):
        build(name, classes=0)
    with pytest.raises(ValueError, match="levels must be positive, got 0"):
        build(name, levels=0)
