from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasdet.detectors import FasterRCNN, MaskHead, MaskTrunk, build_faster_rcnn, build_mask_rcnn
from nasdet.detectors.mask_rcnn import chosen, mask_loss, object_crops, with_masks
from nasdet.detectors.parts import masks as parts
from nasdet.detectors.parts.masks import crop_masks, target_masks
from nasdet.detectors.parts.objects import batch_objects
from nasdet.detectors.parts.sampler import Samples


def _small(**options: Any) -> FasterRCNN:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"width": 0.125, "fpn_channels": 16, "hidden": 32, "samples": 32, **options}
    return build_mask_rcnn("resnet18", 5, **arguments)


def test_crops_of_whole_and_empty_masks() -> None:
    masks = torch.stack([torch.ones(40, 60), torch.zeros(40, 60)]).bool()
    boxes = torch.tensor([[3.0, 5, 33, 21], [10.5, 0.25, 50, 39], [0, 0, 59, 39]])
    crops = crop_masks(masks, torch.tensor([0, 1, 0]), boxes, 14)
    assert crops.shape == (3, 14, 14) and crops.dtype == torch.float32
    torch.testing.assert_close(crops[0], torch.ones(14, 14))
    torch.testing.assert_close(crops[2], torch.ones(14, 14))
    assert float(crops[1].abs().max()) == 0


def test_a_crop_is_the_covered_share_of_each_bin() -> None:
    """A half-plane's crop is the half-plane, in the box's own coordinates; sharp but for the bin on the border."""
    mask = torch.zeros(1, 64, 64, dtype=torch.bool)
    mask[:, :, 24:] = True
    (crop,) = crop_masks(mask, torch.tensor([0]), torch.tensor([[8.0, 8, 40, 40]]), 8)  # bins of 4 pixels: border at 4
    assert torch.equal(crop, crop[:1].expand(8, 8))
    assert crop[0, :3].tolist() == [0] * 3 and crop[0, 4:].tolist() == [1] * 4 and 0 <= float(crop[0, 3]) < 0.5


def test_crops_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    masks, rows = torch.rand(7, 20, 30) > 0.5, torch.tensor([6, 0, 3, 3, 5, 0])
    boxes = torch.rand(6, 4) * 8 + torch.tensor([0.0, 0, 10, 10])
    expected = crop_masks(masks, rows, boxes, 28)
    monkeypatch.setattr(parts, "_PIXELS", 1300)  # two masks at a time
    assert torch.equal(crop_masks(masks, rows, boxes, 28), expected)
    assert crop_masks(masks, rows[:0], boxes[:0], 28).shape == (0, 28, 28)
    assert crop_masks(masks[:0], rows[:0], boxes[:0], 28).shape == (0, 28, 28)


def test_crops_skip_crowds_and_images_without_objects(make_target: Callable) -> None:
    """Rows are the target's own, also where a crowd before them was left out."""
    target = make_target([[0, 0, 90, 90], [10, 10, 50, 50], [60, 60, 90, 90]], [0, 1, 2], crowds=(0,))
    targets = [target, make_target([], [])]
    batch = batch_objects(targets, 2, 3)
    boxes = [torch.tensor([[12.0, 12, 40, 40], [62, 62, 80, 80], [52, 52, 58, 58]]), torch.zeros(0, 4)]
    labels = [torch.tensor([2, 3, 2]), torch.zeros(0, dtype=torch.int64)]
    samples = Samples(boxes, labels, [torch.tensor([0, 1, 0]), labels[1]])
    means = object_crops(samples, batch, targets, 14).mean(dim=(1, 2))
    assert means.tolist() == [1, 1, 0]


def test_the_loss_is_the_mean_cross_entropy_of_the_right_mask() -> None:
    table = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    logits = chosen(table, torch.tensor([2, 1]))
    assert torch.equal(logits, torch.stack([table[0, 2], table[1, 1]]))
    crops = torch.rand(2, 4, 4)
    p = logits.sigmoid()
    expected = -(crops * p.log() + (1 - crops) * (1 - p).log()).mean()
    torch.testing.assert_close(mask_loss(logits, crops), expected)
    assert float(mask_loss(logits[:0], crops[:0])) == 0
    assert float(mask_loss((crops > 0.5) * 60.0 - 30, (crops > 0.5).float())) < 1e-9


def test_idle_background_mask_has_a_gradient_of_zero(make_target: Callable) -> None:
    model = _small()
    losses = model.loss(model(torch.randn(1, 3, 96, 96)), [make_target([[4, 6, 40, 50]], [1])])
    losses["loss_mask"].backward()
    gradient = model.get_submodule("masks.head.logits").weight.grad
    assert isinstance(gradient, Tensor)
    assert gradient.flatten(1).abs().amax(dim=1).gt(0).tolist() == [False, False, True, False, False, False]


def test_detections_get_their_own_masks() -> None:
    model = _small(score_threshold=0.0, max_detections=6).eval()
    outputs = model(torch.randn(2, 3, 96, 96))
    found = model.detect(outputs, [(96, 96), (60, 80)])
    for image, detections in enumerate(found):
        features = [level[image : image + 1] for level in outputs["features"]]
        one = [{key: detections[key] for key in ("boxes", "labels")}]
        (alone,) = model.masks.complete(features, one)  # type: ignore[union-attr, operator]  # a mask stage
        torch.testing.assert_close(detections["mask_logits"], alone["mask_logits"], rtol=1e-4, atol=1e-5)


def test_columns_are_dealt_out_by_image() -> None:
    found = [{"labels": torch.zeros(n, dtype=torch.int64)} for n in (2, 0, 3)]
    dealt = with_masks(found, mask_logits=torch.arange(5), mask_scores=torch.arange(5) * 2)
    assert [v["mask_logits"].tolist() for v in dealt] == [[0, 1], [], [2, 3, 4]]
    assert [v["mask_scores"].tolist() for v in dealt] == [[0, 2], [], [4, 6, 8]]


class _Doubled(nn.Module):
    """A searched trunk: anything that keeps the map's size."""

    out_channels = 12

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def test_any_trunk_before_the_deconvolution(make_target: Callable) -> None:
    model = _small(mask_trunk=_Doubled())
    losses = model.loss(model(torch.randn(1, 3, 96, 96)), [make_target([[4, 6, 40, 50]], [1])])
    losses["loss_mask"].backward()
    assert model.get_submodule("masks.head.trunk.conv").weight.grad is not None
    assert MaskHead(MaskTrunk(16, 2, hidden=8, norm="gn"), 3)(torch.randn(2, 16, 14, 14)).shape == (2, 4, 28, 28)


def test_cascade_with_masks(make_target: Callable) -> None:
    model = _small(cascade=True)
    target = make_target([[4, 6, 40, 50]], [1])
    losses = model.loss(model(torch.randn(1, 3, 96, 96)), [target])
    assert {"loss_cls_3", "loss_mask"} <= set(losses)
    assert "mask_logits" in model.eval().detect(model(torch.randn(1, 3, 96, 96)), [(96, 96)])[0]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda target: target.pop("masks"), "targets must hold masks, got boxes, labels, iscrowd"),
        (lambda target: target.update(masks=torch.zeros(2, 9, 9)), r"masks must have shape \(1, h, w\), got \(2, 9, 9"),
        (lambda target: target.update(masks=torch.zeros(9, 9)), r"masks must have shape \(1, h, w\), got \(9, 9\)"),
    ],
)
def test_bad_masks(change: Callable, text: str, make_target: Callable) -> None:
    target = make_target([[4, 6, 40, 50]], [1])
    change(target)
    with pytest.raises(ValueError, match=text):
        target_masks(target)


def test_bad_parts() -> None:
    model, masks = build_faster_rcnn("resnet18", 4, width=0.125, fpn_channels=16), _small().masks
    with pytest.raises(ValueError, match="masks must be for 4 classes as boxes, got 5"):
        FasterRCNN(model.backbone, model.neck, model.rpn, model.boxes, masks)
    with pytest.raises(ValueError, match="convs must be positive, got 0"):
        MaskTrunk(16, 0)
