"""Detectors on a backbone that is a pyramid by itself: groups of objects on maps whose strides may repeat."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from torch import nn

from nasdet.arch import Card, load_card, published
from nasdet.detectors import (
    FCOS,
    RPN,
    FasterRCNN,
    Pyramid,
    RetinaNet,
    RoIPooler,
    build_faster_rcnn,
    build_fcos,
    build_retinanet,
    countable,
)
from nasdet.detectors.static import GatheringPooler, StaticDetector
from nasdet.measure import count
from nasdet.ops import roi_align
from nasdet.spaces.assemble import ModelConfig, build_model
from nasdet.spaces.msnas import MSNASSpace, genotype

H = 0.5
SPACE = MSNASSpace(blocks=7, channels=16)
REPEATED = SPACE.card(genotype([1, 2, 2, 2, H, H, H], [4, 8, 16, 32, 32]), "repeated")
TWICE = SPACE.card(genotype([1, 2, 1, 2, H, 2, 1], [8, 8, 8, 16, 16]), "twice")
CARDS = {"repeated": REPEATED, "twice": TWICE}
DETECTORS = ("fcos", "retinanet", "faster_rcnn", "cascade_rcnn", "mask_rcnn", "mask_scoring_rcnn")
TWO_STAGES: dict[str, Any] = {"options": {"rpn": {"hidden": 24}, "hidden": 32}}


def config(detector: str, card: Card, **more: Any) -> ModelConfig:
    own = TWO_STAGES if "rcnn" in detector else {"tower_convs": 1}
    return ModelConfig(detector=detector, backbone=card.to_json(), norm="gn", num_classes=3, **own | more)


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
@pytest.mark.parametrize("detector", DETECTORS)
def test_every_detector_learns_and_detects(detector: str, card: Card, make_target: Callable[..., Any]) -> None:
    torch.manual_seed(0)
    model = build_model(config(detector, card))
    targets = [make_target([[8, 8, 60, 70], [60, 10, 66, 17]], [0, 2]), make_target([], [])]
    outputs = model(torch.randn(2, 3, 96, 160))
    losses = model.loss(outputs, targets)  # type: ignore[operator]  # a detector's
    total = torch.stack(list(losses.values())).sum()
    assert total.isfinite()
    total.backward()
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    model.eval()
    found = model.detect(model(torch.randn(2, 3, 96, 160)), [(96, 160), (90, 130)])  # type: ignore[operator]  # as above
    assert len(found) == 2
    for image, size in zip(found, [(96, 160), (90, 130)], strict=True):
        assert (image["boxes"] >= 0).all() and (image["boxes"][:, 2::2] <= size[1]).all()


def test_levels_are_the_maps_and_groups_have_the_usual_sizes() -> None:
    maker = lambda **options: SPACE.backbone(REPEATED, **options)  # noqa: E731
    rcnn = build_faster_rcnn(maker, 3)
    assert isinstance(rcnn.neck, Pyramid) and not list(rcnn.neck.parameters())
    assert rcnn.rpn.anchors.strides == (4, 8, 16, 32, 32)
    assert rcnn.rpn.anchors.sizes == ((32,), (64,), (128,), (256,), (512,))
    assert [head["conv"].out_channels for head in rcnn.rpn.heads] == [256] * 5  # type: ignore[index, union-attr]  # ModuleDicts
    pooler: Any = rcnn.boxes.pooler  # type: ignore[union-attr]  # a BoxStage's
    assert (pooler.strides, pooler.lowest_level) == ((4, 8, 16, 32, 32), 1)
    fcos = build_fcos(maker, 3)
    assert fcos.ranges == [(0, 64), (64, 128), (128, 256), (256, 512), (512, float("inf"))]
    retina = build_retinanet(maker, 3)
    assert retina.anchors.strides == (4, 8, 16, 32, 32)
    assert [sizes[0] for sizes in retina.anchors.sizes] == [32, 64, 128, 256, 512]


@pytest.mark.parametrize("detector", ["fcos", "retinanet", "faster_rcnn"])
def test_two_heads_on_one_map_say_different_things(detector: str) -> None:
    """With shared predictors the two largest groups could not be told apart."""
    torch.manual_seed(1)
    outputs = build_model(config(detector, REPEATED)).eval()(torch.randn(1, 3, 64, 96))
    levels = outputs["rpn_cls" if detector == "faster_rcnn" else "cls"]
    assert levels[3].shape == levels[4].shape and not torch.allclose(levels[3], levels[4])
    own = {"options": {"rpn": {"shared": True, "hidden": 8}}} if "rcnn" in detector else {"options": {"shared": True}}
    outputs = build_model(config(detector, REPEATED, **own)).eval()(torch.randn(1, 3, 64, 96))
    levels = outputs["rpn_cls" if detector == "faster_rcnn" else "cls"]
    assert torch.equal(levels[3], levels[4])


def test_rois_are_pooled_by_group() -> None:
    """k < 2, [2, 3), [3, 4), [4, 5), >= 5 for boxes of side 224 * 2^(k - 4), each with its own map's scale."""
    torch.manual_seed(2)
    strides = (8, 8, 16, 16, 32)
    maps = [torch.randn(1, 4, 640 // stride, 640 // stride) for stride in strides]
    pooler = RoIPooler(strides, 5, lowest_level=1)
    sides = {20.0: 0, 55.0: 0, 57.0: 1, 111.0: 1, 113.0: 2, 223.0: 2, 225.0: 3, 447.0: 3, 449.0: 4, 600.0: 4}
    for side, group in sides.items():
        box = torch.tensor([[3.0, 5.0, 3.0 + side, 5.0 + side]])
        wanted = roi_align(maps[group], [box], 5, 1 / strides[group], 2)
        torch.testing.assert_close(pooler(maps, [box]), wanted, rtol=1e-5, atol=1e-5)
        gathered = GatheringPooler(strides, 5, lowest_level=1)(maps, [box])
        torch.testing.assert_close(gathered, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("detector", ["fcos", "retinanet", "faster_rcnn", "mask_rcnn"])
def test_supernets_detector_follows_its_card(detector: str) -> None:
    """Told the strides of the active card, it computes what the card's own detector with its weights does."""
    torch.manual_seed(3)
    whole = build_model(config(detector, REPEATED), backbone=SPACE.supernet)
    rng = Random(0)
    for card in (TWICE, *(SPACE.random(rng) for _ in range(3)), REPEATED):
        SPACE.activate(whole.backbone, card)  # type: ignore[arg-type]  # the supernet
        whole.set_strides(list(whole.backbone.strides.values()))  # type: ignore[operator, union-attr]  # a detector's
        alone = build_model(config(detector, card))
        rest = {n: v for n, v in whole.state_dict().items() if not n.startswith("backbone.")}
        assert not alone.load_state_dict(rest, strict=False).unexpected_keys
        SPACE.inherit(alone.backbone, whole.backbone, card)  # type: ignore[arg-type]  # as above
        images = torch.randn(1, 3, 96, 128)
        pairs = [(model.eval()(images), model) for model in (whole, alone)]
        for key, maps in pairs[0][0].items():
            assert all(torch.equal(a, b) for a, b in zip(maps, pairs[1][0][key], strict=True)), key
        ours, theirs = (model.detect(outputs, [(96, 128)])[0] for outputs, model in pairs)  # type: ignore[operator]  # as above
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("name", [name for name in published() if name.startswith("msnas-")])
def test_published_detectors_cost_what_the_search_constrains(name: str) -> None:
    card = load_card(name)
    with torch.device("meta"):
        model = build_model(ModelConfig(detector="faster_rcnn", backbone=card.to_json(), norm="bn"))
    costs = {part.name: part.macs for part in count(countable(model), torch.empty(1, 3, 832, 1280, device="meta"))}
    assert costs["backbone"] + costs["rpn"] == MSNASSpace(name.split("-")[1]).macs(card)
    assert costs["neck"] == 0
    if "r18" in name:
        assert (costs["backbone"] + costs["rpn"]) / 145.45e9 == pytest.approx(1, abs=0.01)


def test_searched_towers_stand_on_a_searched_encoder(make_target: Callable[..., Any]) -> None:
    towers = load_card("fad-paper")
    whole = config("fcos", REPEATED, towers=towers.to_json(), inner_channels=8, cells=1)
    assert whole.fpn_channels == 16  # the encoder's
    model = build_model(whole)
    losses = model.loss(model(torch.randn(1, 3, 64, 96)), [make_target([[8, 8, 60, 60]], [1], (64, 96))])  # type: ignore[operator]  # a detector's
    torch.stack(list(losses.values())).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert ModelConfig.from_json(whole.to_json()) == whole


@pytest.mark.parametrize("detector", ["retinanet", "mask_rcnn"])
def test_static_form_gives_the_same_detections(detector: str) -> None:
    torch.manual_seed(4)
    options: dict[str, Any] = {"score_threshold": 0.0, "max_detections": 10}
    if detector == "mask_rcnn":
        options |= TWO_STAGES["options"] | {"rpn": {"hidden": 8, "candidates": (50, 50), "limit": (50, 50)}}
    model = build_model(config(detector, TWICE, options=options)).eval()
    images = torch.randn(1, 3, 64, 64)
    wanted = model.detect(model(images), [(64, 60)])[0]  # type: ignore[operator]  # a detector's
    got = StaticDetector(model)(images, torch.tensor([[64, 60]]), torch.tensor(0.0))
    torch.testing.assert_close(got["boxes"][0], wanted["boxes"], rtol=1e-3, atol=1e-2)
    assert torch.equal(got["labels"][0], wanted["labels"])


BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "falling": (lambda: Pyramid({"a": 4, "b": 4}, {"a": 8, "b": 4}), "strides must not fall"),
    "widths": (lambda: Pyramid({"a": 4, "b": 8}, {"a": 4, "b": 4}), "channels must be one number for all"),
    "strides": (
        lambda: Pyramid({"a": 4, "b": 4}, {"a": 4, "b": 4}).set_strides([4]),
        r"strides must be 2 that do not fall, got \[4\]",
    ),
    "hidden": (lambda: RPN(8, (4, 8), hidden=0), "hidden must be positive, got 0"),
    "card": (
        lambda: config("fcos", load_card("fad-paper")),
        r"backbone must be a card of body, got 'fad-paper' \(fad\), one of towers",
    ),
    "broken": (
        lambda: build_model(config("fcos", Card("msnas", "odd", {"strides": [2, 2]}, REPEATED.settings))),
        "odd: genotype must be an object of strides, heads and laterals, got strides",
    ),
}


@pytest.mark.parametrize(("call", "words"), BAD.values(), ids=BAD)
def test_bad_input(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()


def test_usual_detectors_are_as_before() -> None:
    """The state dicts' names, and predictors shared by all levels."""
    names = build_faster_rcnn("resnet18", 2, width=0.25, fpn_channels=16).state_dict()
    assert {name for name in names if name.startswith("rpn.")} == {
        f"rpn.{layer}.{kind}" for layer in ("conv", "cls_logits", "box_pred") for kind in ("weight", "bias")
    }
    for model in (build_fcos("resnet18", 2, width=0.25), build_retinanet("resnet18", 2, width=0.25)):
        assert isinstance(model, (FCOS, RetinaNet)) and model.shared
    assert isinstance(build_faster_rcnn("resnet18", 2, width=0.25), FasterRCNN) and issubclass(Pyramid, nn.Module)
