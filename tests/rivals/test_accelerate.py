"""torchvision's detectors, accelerated, alone and under patch_torchvision(): the same results."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import nasdet
from nasdet.compat import patch_torchvision
from nasdet.nn import AcceleratedConv2d

NAMES = ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn"]


@pytest.fixture(scope="module")
def models() -> Callable[[str], Any]:
    """``models(name)``: random weights with scores that differ enough for ranks to be settled in float32."""
    made: dict[str, Any] = {}

    def model(name: str) -> Any:
        from torchvision.models import detection

        if name not in made:
            torch.manual_seed(0)
            options: dict[str, Any] = {"num_classes": 5, "min_size": 160, "max_size": 224}
            if "rcnn" in name:
                options |= {"box_detections_per_img": 20, "rpn_post_nms_top_n_test": 100, "box_score_thresh": 0.1}
            else:
                options |= {"score_thresh": 0.3, "detections_per_img": 20}
            rival = getattr(detection, name)(weights=None, weights_backbone=None, **options)
            for key, parameter in rival.named_parameters():
                if key.endswith("bn3.weight"):  # or maps grow from block to block, and rounding with them
                    torch.nn.init.constant_(parameter, 0.2)
                if key.startswith("head.") and parameter.shape == (256, 256, 3, 3):  # or they fade
                    torch.nn.init.kaiming_normal_(parameter)
                if key.endswith(("cls_logits.weight", "bbox_reg.weight")):
                    torch.nn.init.normal_(parameter, std=0.03)
                if key.endswith("cls_score.weight"):
                    torch.nn.init.normal_(parameter, std=0.5)
                if key == "head.classification_head.cls_logits.bias":
                    torch.nn.init.constant_(parameter, -1.0)
            made[name] = rival.eval()
        return made[name]

    return model


def smooth(model: torch.nn.Module) -> Any:
    """A copy with SiLU for ReLU."""
    model = copy.deepcopy(model)
    for parent in list(model.modules()):
        for key, module in parent.named_children():
            if isinstance(module, torch.nn.ReLU):
                setattr(parent, key, torch.nn.SiLU())
    return model


def pictures() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(3, 160, 224, generator=generator), torch.rand(3, 150, 130, generator=generator)]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_detections(models: Callable[[str], Any], name: str, layout: torch.memory_format) -> None:
    model = models(name).to(memory_format=layout)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        expected = model(pictures())
        with patch_torchvision():  # whose rule of suppression rounds less
            patched = model(pictures())
        with nasdet.accelerate(model) as report:
            assert len(report.swapped) >= 18 and len(report.left) >= 43
            got = model(pictures())
            with patch_torchvision():
                both = model(pictures())
        again = model(pictures())
    assert all(parameters[key] is parameter for key, parameter in model.named_parameters())
    assert sum(len(found["scores"]) for found in expected) == 40
    for results, wanted, atol in ((got, expected, 1e-2), (both, patched, 1e-2), (again, expected, 0.0)):
        for ours, theirs in zip(results, wanted, strict=True):
            assert torch.equal(ours["labels"], theirs["labels"])
            torch.testing.assert_close(ours["boxes"], theirs["boxes"], atol=atol, rtol=0)
            torch.testing.assert_close(ours["scores"], theirs["scores"], atol=atol / 100, rtol=0)


@pytest.mark.parametrize("name", NAMES[2:])
def test_the_same_losses_and_gradients(models: Callable[[str], Any], name: str) -> None:
    """Of those that draw no samples: a proposal more or less would change all that are drawn.

    Activations are smooth ones: at a ReLU's kink one rounding changes a gradient by more than any tolerance, so that
    PyTorch's own gradients in float32 can be 3 % from those in float64.
    """
    model = smooth(models(name))
    truth = [{"boxes": torch.tensor([[20.0, 30.0, 120.0, 150.0]]), "labels": torch.tensor([2])}]

    def step() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        model.zero_grad()
        model.training = True  # but not its norms, which would count along
        try:
            losses = model(pictures()[:1], truth)
        finally:
            model.training = False
        sum(losses.values()).backward()
        return losses, {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}

    expected, wanted = step()
    with nasdet.accelerate(model):
        losses, gradients = step()
    assert not any(isinstance(module, AcceleratedConv2d) for module in model.modules())
    for key, loss in losses.items():
        torch.testing.assert_close(loss, expected[key], rtol=1e-4, atol=1e-6)
    assert gradients.keys() == wanted.keys() and len(gradients) > 100
    for key, gradient in gradients.items():
        distance = (gradient - wanted[key]).norm()
        assert distance <= 1e-4 * wanted[key].norm(), f"{key}: {distance} of {wanted[key].norm()}"
