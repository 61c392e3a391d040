"""Loading torchvision's names, without torchvision; against the real one: tests/rivals/test_detectors.py."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from nasdet.detectors import build_faster_rcnn, build_fcos, from_torchvision, load_torchvision_detector

SMALL: dict[str, Any] = {"width": 0.125, "fpn_channels": 16}


def _faster(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names of a Faster R-CNN to torchvision's."""
    pairs = [
        ("neck.lateral.", "backbone.fpn.inner_blocks."),
        ("neck.output.", "backbone.fpn.layer_blocks."),
        ("backbone.", "backbone.body."),
        ("rpn.conv.", "rpn.head.conv.0.0."),
        ("rpn.box_pred.", "rpn.head.bbox_pred."),
        ("rpn.cls_logits.", "rpn.head.cls_logits."),
        ("boxes.head.trunk.fcs.0.", "roi_heads.box_head.fc6."),
        ("boxes.head.trunk.fcs.1.", "roi_heads.box_head.fc7."),
        ("boxes.head.cls_score.", "roi_heads.box_predictor.cls_score."),
        ("boxes.head.box_pred.", "roi_heads.box_predictor.bbox_pred."),
    ]
    renamed = {}
    for key, value in state.items():
        ours, theirs = next(pair for pair in pairs if key.startswith(pair[0]))
        rest = key.removeprefix(ours)
        renamed[theirs + (rest.replace(".", ".0.", 1) if "fpn" in theirs else rest)] = value
    return renamed


def test_a_state_dict_in_torchvisions_names() -> None:
    torch.manual_seed(0)
    model = build_faster_rcnn("resnet18", 5, norm="bn", hidden=32, **SMALL)
    state = _faster(model.state_dict())
    loaded = from_torchvision("fasterrcnn_resnet18_fpn", state, hidden=32, **SMALL)
    assert isinstance(loaded.num_classes, int) and loaded.num_classes == 5 and not loaded.training
    ours = model.state_dict()
    assert all(torch.equal(value, ours[key]) for key, value in loaded.state_dict().items())
    image = torch.randn(1, 3, 64, 64)
    found, same = (net.eval().detect(net(image), [(64, 64)])[0] for net in (loaded, model))  # type: ignore[operator]  # detectors
    torch.testing.assert_close(found["scores"], same["scores"])


@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_eps_of_every_batch_norm(norm: str) -> None:
    state = _faster(build_faster_rcnn("resnet18", 2, norm="bn", hidden=32, **SMALL).state_dict())
    for options, eps in (({}, 1e-5), ({"eps": 0.0}, 0.0)):
        model = from_torchvision("fasterrcnn_resnet18_fpn", state, norm=norm, hidden=32, **SMALL, **options)
        found = [module.eps for module in model.modules() if hasattr(module, "running_var")]
        assert len(found) == 20 and set(found) == {eps}


def test_eps_of_files_as_torchvision_publishes_them() -> None:
    """Frozen norms of eps 0, told by the names of an older format; a file of today may be of either."""
    today = _faster(build_faster_rcnn("resnet18", 2, norm="frozen_bn", hidden=32, **SMALL).state_dict())
    published = {re.sub(r"(fpn\.\w+_blocks\.\d)\.0", r"\1", key): value for key, value in today.items()}
    counting = published | {"backbone.body.bn1.num_batches_tracked": torch.zeros((), dtype=torch.int64)}
    cases: list[tuple[dict[str, Tensor], dict[str, Any], float]] = [
        (published, {}, 0.0),
        (published, {"eps": 1e-5}, 1e-5),
        (today, {}, 1e-5),
        (today, {"eps": 0.0}, 0.0),
        (counting, {}, 1e-5),
    ]
    for state, options, eps in cases:
        model = from_torchvision("fasterrcnn_resnet18_fpn", state, hidden=32, **SMALL, **options)
        assert {module.eps for module in model.modules() if hasattr(module, "running_var")} == {eps}


def test_nothing_is_loaded_where_something_does_not_fit() -> None:
    torch.manual_seed(0)
    model = build_faster_rcnn("resnet18", 5, norm="bn", hidden=32, **SMALL)
    state = _faster(model.state_dict())
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wrong = {key: value + 1 for key, value in state.items()}
    wrong["roi_heads.box_head.fc7.bias"] = torch.full((32,), torch.nan)
    wrong["roi_heads.box_predictor.cls_score.bias"] = torch.zeros(9)
    del wrong["rpn.head.conv.0.0.bias"]
    text = r"1 missing: rpn.conv.bias; 1 of another shape: boxes.head.cls_score.bias \(9,\) for \(6,\); 1 not finite"
    with pytest.raises(ValueError, match=text):
        load_torchvision_detector(model, wrong)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50", "ssd_resnet50_fpn", "fasterrcnn_resnet19_fpn", "resnet50"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ValueError, match="name must be fasterrcnn|maskrcnn"):
        from_torchvision(name, {})


def test_a_state_of_something_else() -> None:
    with pytest.raises(ValueError, match="state must have roi_heads.box_predictor.cls_score.bias or"):
        from_torchvision("fasterrcnn_resnet50_fpn", {"fc.weight": torch.zeros(1)})


def test_fcos_of_torchvisions_convention() -> None:
    """Locations are the cells' corners, and the threshold is on the detection's score."""
    model = build_fcos("resnet18", 1, levels=1, tower_convs=1, convention="torchvision", score_threshold=0.5, **SMALL)
    outputs = {
        name: [torch.full((1, depth, 2, 2), -9.0)] for name, depth in (("cls", 1), ("box", 4), ("centerness", 1))
    }
    outputs["box"][0].fill_(1.0)
    outputs["cls"][0][0, 0, 1, 1] = 9.0
    outputs["centerness"][0][0, 0, 1, 1] = 0.0  # score sqrt(1 * 0.5) = 0.71
    (found,) = model.detect(outputs, [(64, 64)])
    assert found["boxes"].tolist() == [[0, 0, 16, 16]]  # around (8, 8)
    model.score_threshold = 0.8
    assert len(model.detect(outputs, [(64, 64)])[0]["boxes"]) == 0
    with pytest.raises(ValueError, match="convention must be one of centre, torchvision, got 'corner'"):
        build_fcos("resnet18", 1, convention="corner", **SMALL)
