"""torchvision's own detectors, unchanged, with and without nasdet's kernels under them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nasdet.compat import patch_torchvision

NAMES = ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"]


@pytest.fixture(scope="module")
def models() -> Callable[[str], Any]:
    """``models(name)``: random weights, which score many boxes high, so that there is something to suppress."""
    made: dict[str, Any] = {}

    def model(name: str) -> Any:
        from torchvision.models import detection

        if name not in made:
            torch.manual_seed(0)
            options = {"num_classes": 12, "min_size": 256, "max_size": 320, "box_score_thresh": 0.12}
            options |= {"rpn_post_nms_top_n_train": 400, "rpn_post_nms_top_n_test": 400, "box_detections_per_img": 25}
            made[name] = getattr(detection, name)(weights=None, weights_backbone=None, **options)
        return made[name]

    return model


def pictures() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(3, 256, 320, generator=generator), torch.rand(3, 240, 200, generator=generator)]


def targets(masks: bool) -> list[dict[str, Tensor]]:
    boxes = [
        torch.tensor([[20.0, 30.0, 120.0, 150.0], [150.0, 60.0, 300.0, 240.0], [5.0, 200.0, 60.0, 250.0]]),
        torch.tensor([[30.0, 20.0, 180.0, 200.0]]),
    ]
    made = []
    for rows, picture in zip(boxes, pictures(), strict=True):
        target = {"boxes": rows.double(), "labels": torch.arange(1, 1 + len(rows))}
        if masks:
            inside = torch.zeros(len(rows), *picture.shape[1:], dtype=torch.uint8)
            for mask, (x1, y1, x2, y2) in zip(inside, rows.long().tolist(), strict=True):
                mask[y1:y2, x1:x2] = 1
            target["masks"] = inside
        made.append(target)
    return made


@pytest.mark.parametrize("name", NAMES)
def test_the_same_detections(models: Callable[[str], Any], name: str) -> None:
    """In float64 every detection agrees to many digits: nothing is left to a tie that rounding decides."""
    model = models(name).double().eval()

    def detect() -> list[dict[str, Tensor]]:
        with torch.no_grad():
            return model([picture.double() for picture in pictures()])

    expected = detect()
    with patch_torchvision():
        got = detect()
    assert sum(len(found["scores"]) for found in expected) == 50
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.keys() == theirs.keys() and torch.equal(ours["labels"], theirs["labels"])
        for key in ours.keys() - {"labels"}:
            torch.testing.assert_close(ours[key], theirs[key], atol=1e-9, rtol=0)


def test_the_same_detections_in_float32(models: Callable[[str], Any]) -> None:
    model = models(NAMES[0]).float().eval()
    with torch.no_grad():
        expected = model(pictures())
        with patch_torchvision():
            got = model(pictures())
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.equal(ours["labels"], theirs["labels"])
        torch.testing.assert_close(ours["boxes"], theirs["boxes"], atol=2e-2, rtol=0)
        torch.testing.assert_close(ours["scores"], theirs["scores"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_same_losses_and_gradients(models: Callable[[str], Any], name: str) -> None:
    """In float64, from the losses down through the heads and the pyramid into the backbone's last stage."""
    model = models(name).double().train()
    for key, parameter in model.backbone.body.named_parameters():
        parameter.requires_grad_(key.startswith("layer4"))
    images, truth = [pictures()[0].double()], targets(name.startswith("mask"))[:1]
    state = {key: value.clone() for key, value in model.state_dict().items()}

    def step() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model.load_state_dict(state)  # batch normalisation counts along
        model.zero_grad()
        torch.manual_seed(11)  # the heads draw which boxes they learn from
        losses = model(images, truth)
        sum(losses.values()).backward()
        return losses, {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    expected, wanted = step()
    with patch_torchvision():
        losses, gradients = step()
    assert losses.keys() == expected.keys() and len(losses) == (5 if name.startswith("mask") else 4)
    for key, loss in losses.items():
        torch.testing.assert_close(loss, expected[key], atol=0, rtol=1e-9)
    assert gradients.keys() == wanted.keys() and len(gradients) > 40
    largest = max(gradient.norm() for gradient in wanted.values())
    for key, gradient in gradients.items():
        distance = (gradient - wanted[key]).norm()
        assert distance <= 1e-9 * wanted[key].norm() + 1e-12 * largest, f"{key}: {distance} of {wanted[key].norm()}"
