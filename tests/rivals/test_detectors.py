"""torchvision's detectors and ours with the same weights: the same names, anchors, proposals and detections."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from nasdet.detectors import from_torchvision
from nasdet.detectors.parts.anchors import AnchorGenerator, octave_sizes
from nasdet.detectors.parts.codec import BoxCodec
from nasdet.detectors.rpn import rpn_anchors

NAMES = ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn", "maskrcnn_resnet50_fpn"]
# Thresholds under the scores of random weights, so that there is something to suppress.
LOW = {
    "fasterrcnn": {"box_score_thresh": 0.05, "box_detections_per_img": 500},
    "maskrcnn": {"box_score_thresh": 0.05, "box_detections_per_img": 15},
    "retinanet": {"score_thresh": 0.3, "detections_per_img": 5000},
    "fcos": {"score_thresh": 0.3, "detections_per_img": 5000},
}
OURS = {
    "box_score_thresh": "score_threshold",
    "score_thresh": "score_threshold",
    "box_detections_per_img": "max_detections",
    "detections_per_img": "max_detections",
}


@pytest.fixture(scope="module")
def rivals() -> Callable[[str], Any]:
    """``rivals(name)``: torchvision's model with random weights, in float64, and its options."""
    made: dict[str, Any] = {}

    def model(name: str) -> Any:
        from torchvision.models import detection

        if name not in made:
            torch.manual_seed(0)
            options = {"num_classes": 8, "min_size": 128, "max_size": 192}
            options |= LOW[name.split("_")[0]]
            rival = getattr(detection, name)(weights=None, weights_backbone=None, **options)
            for key, parameter in rival.named_parameters():  # predictions that differ from place to place
                if key.endswith(("cls_logits.weight", "bbox_reg.weight", "bbox_ctrness.weight", "bbox_pred.weight")):
                    torch.nn.init.normal_(parameter, std=0.01)
                if key == "head.classification_head.cls_logits.bias":
                    torch.nn.init.constant_(parameter, -1.0)
                if name.startswith("fcos") and key.endswith("bbox_reg.bias"):
                    torch.nn.init.constant_(parameter, 0.5)  # its distances are cut at 0
            made[name] = rival.double().eval()
        return made[name]

    return model


def pictures() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(3, *size, generator=generator, dtype=torch.float64) for size in ((128, 168), (150, 128))]


def ours_of(name: str, rival: Any) -> Any:
    options = {OURS[key]: value for key, value in LOW[name.split("_")[0]].items()}
    return from_torchvision(name, rival.state_dict(), **options).double()


def whole(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the boxes of no area that torchvision's one-stage detectors keep, and ours drop."""
    boxes = found["boxes"]
    keep = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return {key: value[keep] for key, value in found.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_detections(rivals: Callable[[str], Any], name: str) -> None:
    rival = rivals(name)
    same_detections(rival, ours_of(name, rival))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_detections_as_published_files(rivals: Callable[[str], Any], name: str) -> None:
    """Those hold frozen norms, in an older format; their eps is 0 for all but FCOS."""
    rival = copy.deepcopy(rivals(name))
    freeze(rival, 1e-5 if name.startswith("fcos") else 0.0)
    options = {OURS[key]: value for key, value in LOW[name.split("_")[0]].items()}
    state = old_names(rival.state_dict(), name)
    assert not any(key.endswith("num_batches_tracked") for key in state)
    same_detections(rival, from_torchvision(name, state, **options).double())
    wrong = from_torchvision(name, state, eps=0.0 if name.startswith("fcos") else 1e-5, **options).double()
    with pytest.raises(AssertionError):
        same_detections(rival, wrong)


def freeze(rival: Any, eps: float) -> None:
    """Frozen norms with statistics in the place of batch norms; some of small variance, where eps shows."""
    from torchvision.ops import FrozenBatchNorm2d

    generator = torch.Generator().manual_seed(5)
    for name, module in list(rival.named_modules()):
        if isinstance(module, torch.nn.BatchNorm2d):
            norm = FrozenBatchNorm2d(module.num_features, eps=eps)
            drawn = [torch.rand(module.num_features, generator=generator) for _ in range(4)]
            norm.running_var.copy_(10 ** (-4 * drawn[0]))
            norm.weight.copy_((norm.running_var + eps).sqrt() * (0.9 + 0.2 * drawn[1]))
            norm.running_mean.copy_(0.1 * drawn[2])
            norm.bias.copy_(0.1 * drawn[3])
            parent, _, leaf = name.rpartition(".")
            setattr(rival.get_submodule(parent), leaf, norm.double())


def same_detections(rival: Any, ours: Any) -> None:
    """Batches of two sizes, none a multiple of the coarsest stride, so that torchvision's spacing of anchors shows."""
    two_stage = hasattr(rival, "roi_heads")
    with torch.no_grad():
        images, _ = rival.transform(pictures())
        if two_stage:  # what torchvision finds before it pastes masks into the pictures
            features = rival.backbone(images.tensors)
            proposals, _ = rival.rpn(images, features)
            expected, _ = rival.roi_heads(features, proposals, images.image_sizes)
        else:
            expected = [whole(found) for found in rival(pictures())]
        outputs = ours(images.tensors)
        got = ours.detect(outputs, images.image_sizes)
        if two_stage:
            maps = (outputs["rpn_cls"], outputs["rpn_box"])
            for mine, theirs in zip(
                ours.rpn.proposals(*maps, images.image_sizes, training=False), proposals, strict=True
            ):
                torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=0)
    assert sum(len(found["scores"]) for found in expected) > (20 if "masks" in expected[0] else 100)
    for found, wanted in zip(got, expected, strict=True):
        assert torch.equal(found["labels"], wanted["labels"] - int(two_stage))
        torch.testing.assert_close(found["boxes"].double(), wanted["boxes"], atol=1e-4, rtol=0)
        torch.testing.assert_close(found["scores"].double(), wanted["scores"], atol=1e-6, rtol=0)
        assert ("mask_logits" in found) == ("masks" in wanted)
    if "masks" in expected[0]:  # over torchvision's own boxes, as detections are float32
        same = [{"boxes": wanted["boxes"], "labels": wanted["labels"] - 1} for wanted in expected]
        for found, wanted in zip(ours.masks.complete(outputs["features"], same), expected, strict=True):
            torch.testing.assert_close(found["mask_logits"].sigmoid(), wanted["masks"][:, 0], atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", [NAMES[1], NAMES[3]])
def test_the_same_losses(rivals: Callable[[str], Any], name: str) -> None:
    """On one picture, whose anchors and proposals are few enough that none is left to chance."""
    from torchvision.models.detection.image_list import ImageList

    rival, image = rivals(name), torch.rand(1, 3, 64, 96, dtype=torch.float64)
    boxes = torch.tensor([[4.3, 6.1, 40.2, 50.9], [30.5, 10.2, 90.4, 60.6]])
    masks = torch.rand(2, 64, 96) > 0.4
    ours = ours_of(name, rival)
    target = {"boxes": boxes, "labels": torch.tensor([1, 4]), "masks": masks}
    theirs = {"boxes": boxes.double(), "labels": torch.tensor([1, 4]) + int("mask" in name), "masks": masks.byte()}
    images = ImageList(image, [(64, 96)])
    features = rival.backbone(image)
    if name.startswith("retinanet"):
        rival.train()
        try:
            anchors = rival.anchor_generator(images, list(features.values()))
            expected = rival.compute_loss([theirs], rival.head(list(features.values())), anchors)
        finally:
            rival.eval()
        losses = ours.loss(ours(image), [target])
        pairs = {"loss_cls": "classification", "loss_box": "bbox_regression"}
    else:
        for sampler in (rival.rpn.fg_bg_sampler, rival.roi_heads.fg_bg_sampler):
            sampler.batch_size_per_image, sampler.positive_fraction = 100_000, 0.5
        ours.rpn.samples = ours.boxes.samples = 100_000
        ours.boxes.positive_fraction = 0.5
        rival.rpn.train()
        rival.roi_heads.train()
        try:
            proposals, expected = rival.rpn(images, features, [theirs])
            expected |= rival.roi_heads(features, proposals, [(64, 96)], [theirs])[1]
        finally:
            rival.eval()
        losses = ours.loss(ours(image), [target])
        pairs = {"loss_cls": "loss_classifier", "loss_box": "loss_box_reg", "loss_mask": "loss_mask"}
        pairs |= {"loss_rpn_cls": "loss_objectness", "loss_rpn_box": "loss_rpn_box_reg"}
    assert set(losses) == set(pairs)
    for key, their in pairs.items():
        torch.testing.assert_close(losses[key].double(), expected[their].double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_its_place(rivals: Callable[[str], Any], name: str) -> None:
    state = rivals(name).state_dict()
    key = "backbone.fpn.layer_blocks.2.0.bias"
    with pytest.raises(ValueError, match="1 missing: neck.output.2.bias"):
        from_torchvision(name, {k: v for k, v in state.items() if k != key})
    with pytest.raises(ValueError, match="1 unexpected: rpn.extra"):
        from_torchvision(name, state | {"rpn.extra": torch.zeros(1)})
    loaded = from_torchvision(name, old_names(state, name)).state_dict()
    wanted = from_torchvision(name, state).state_dict()
    assert loaded.keys() == wanted.keys() and all(torch.equal(loaded[k], wanted[k]) for k in wanted)


def old_names(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The names of torchvision's published files, which are of an older version of its format."""
    old = {}
    for key, value in state.items():
        words = key.split(".")
        if key.startswith(("backbone.fpn.inner", "backbone.fpn.layer")):
            words.pop(4)
        elif key.startswith("rpn.head.conv."):
            words[3:5] = []
        elif key.startswith("roi_heads.mask_head."):
            words[2:4] = [f"mask_fcn{int(words[2]) + 1}"]
        elif name.startswith("retinanet") and key.startswith("head.") and words[2] == "conv":
            words[3:5] = [str(2 * int(words[3]))]
        old[".".join(words)] = value
    return old


def test_the_same_anchors() -> None:
    from torchvision.models.detection.anchor_utils import AnchorGenerator as Theirs
    from torchvision.models.detection.image_list import ImageList
    from torchvision.models.detection.retinanet import _default_anchorgen

    image = torch.zeros(1, 3, 800, 1344)  # P6 and P7 are 13 x 21 and 7 x 11: spaced by 61 and 64, 114 and 122 pixels
    maps = {s: torch.zeros(1, 1, -(-800 // s), -(-1344 // s)) for s in (4, 8, 16, 32, 64, 128)}
    rpn = Theirs(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    pairs = [
        (rpn, rpn_anchors, (4, 8, 16, 32, 64)),
        (_default_anchorgen(), lambda s: AnchorGenerator(s, octave_sizes(s)), (8, 16, 32, 64, 128)),
    ]
    for theirs, ours, strides in pairs:
        levels = [maps[stride] for stride in strides]
        expected = theirs(ImageList(image, [(800, 1344)]), levels)[0]
        assert torch.equal(torch.cat(ours(strides)(levels)), expected)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0, 1.0), (10.0, 10.0, 5.0, 5.0)], ids=["rpn", "head"])
def test_the_same_codec(weights: tuple[float, float, float, float], clustered: Callable[..., Tensor]) -> None:
    from torchvision.models.detection._utils import BoxCoder

    generator = torch.Generator().manual_seed(1)
    anchors, boxes = clustered(200, generator), clustered(200, generator)
    theirs, ours = BoxCoder(weights), BoxCodec(weights)
    deltas = ours.encode(anchors, boxes)
    torch.testing.assert_close(deltas, theirs.encode([boxes], [anchors])[0], rtol=1e-5, atol=1e-5)
    wild = torch.randn(200, 4, generator=generator) * 30  # beyond the limit of the logarithms
    expected = theirs.decode(wild, [anchors])[:, 0]
    torch.testing.assert_close(ours.decode(anchors, wild), expected, rtol=1e-5, atol=1e-3)
