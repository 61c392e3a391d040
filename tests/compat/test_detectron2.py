"""nasdet.compat.detectron2 against values computed by hand, since detectron2 itself cannot be installed here."""

from __future__ import annotations

import inspect
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from nasdet.compat import detectron2, torchvision

SCALES = (1 / 4, 1 / 8, 1 / 16, 1 / 32)


@dataclass
class Boxes:
    """As much of detectron2's structure as the pooler looks at."""

    tensor: Tensor


def levels_as_constants(size: int = 256, channels: int = 2, images: int = 1) -> list[Tensor]:
    """Map l is l everywhere, so what comes out of the pooler names the level that it came from."""
    return [
        torch.full((images, channels, int(size * s), int(size * s)), float(level)) for level, s in enumerate(SCALES)
    ]


def square(side: float) -> Tensor:
    return torch.tensor([[0.0, 0.0, side, side]])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ROIAlign", [("output_size", ...), ("spatial_scale", ...), ("sampling_ratio", ...), ("aligned", True)]),
        (
            "ROIPooler",
            [
                ("output_size", ...),
                ("scales", ...),
                ("sampling_ratio", ...),
                ("pooler_type", ...),
                ("canonical_box_size", 224),
                ("canonical_level", 4),
            ],
        ),
        ("nms", [("boxes", ...), ("scores", ...), ("iou_threshold", ...)]),
        ("batched_nms", [("boxes", ...), ("scores", ...), ("idxs", ...), ("iou_threshold", ...)]),
    ],
)
def test_arguments_and_defaults(name: str, expected: list[tuple[str, Any]]) -> None:
    parameters = inspect.signature(getattr(detectron2, name)).parameters.values()
    found = [(p.name, ... if p.default is p.empty else p.default) for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert found == expected


def test_roi_align_shifts_by_half_a_pixel_unless_told_otherwise() -> None:
    ramp = (10.0 * torch.arange(12)[:, None] + torch.arange(12)[None])[None, None]
    rois = torch.tensor([[0.0, 4.0, 2.0, 8.0, 6.0]])
    middles = 10 * torch.tensor([3.0, 5.0])[:, None] + torch.tensor([5.0, 7.0])[None]
    torch.testing.assert_close(detectron2.ROIAlign((2, 2), 1.0, 0)(ramp, rois)[0, 0], middles - 5.5)
    torch.testing.assert_close(detectron2.ROIAlign(2, 1.0, 2, aligned=False)(ramp, rois)[0, 0], middles)


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")
def test_roi_align_takes_quantized_maps_and_float32_rois_beside_float16() -> None:
    maps, rois = torch.randn(1, 2, 8, 8), torch.tensor([[0.0, 1.3, 2.1, 6.2, 5.9]])
    quantized = torch.quantize_per_tensor(maps, 0.05, 0, torch.qint8)
    layer = detectron2.ROIAlign(3, 1.0, 2)
    assert torch.equal(layer(quantized, rois), layer(quantized.dequantize(), rois))
    half = layer(maps.half(), rois)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), layer(maps.half().float(), rois), atol=2e-3, rtol=1e-3)


def test_roi_align_refuses_boxes_without_a_batch_index() -> None:
    with pytest.raises(ValueError, match=r"rois must have shape \(K, 5\), got \(3, 4\)"):
        detectron2.ROIAlign(2, 1.0, 0)(torch.rand(1, 1, 4, 4), torch.rand(3, 4))


@pytest.mark.parametrize(
    ("side", "level"),
    [
        # floor(4 + log2(side / 224 + 1e-8)), clamped to 2..5; level 2 is the first map
        pytest.param(8.0, 0, id="smallest"),
        pytest.param(111.9, 0, id="below-112"),
        pytest.param(112.0, 1, id="112"),
        pytest.param(223.9999, 1, id="just-below-224-stays-below"),
        pytest.param(224.0, 2, id="224"),
        pytest.param(447.0, 2, id="below-448"),
        pytest.param(448.0, 3, id="448"),
        pytest.param(1000.0, 3, id="beyond-the-last"),
    ],
)
def test_pooler_chooses_the_level(side: float, level: int) -> None:
    pooler = detectron2.ROIPooler(1, SCALES, 1, "ROIAlignV2")
    assert pooler(levels_as_constants(1024), [Boxes(square(side))]).unique().tolist() == [float(level)]


def test_pooler_differs_from_torchvision_just_below_a_boundary() -> None:
    maps = levels_as_constants(1024)
    names = [str(level) for level in range(4)]
    tv = torchvision.MultiScaleRoIAlign(names, 1, 1)
    box = square(223.9999)
    assert tv(dict(zip(names, maps, strict=True)), [box], [(1024, 1024)]).unique().tolist() == [2.0]
    assert detectron2.ROIPooler(1, SCALES, 1, "ROIAlign")(maps, [box]).unique().tolist() == [1.0]


@pytest.mark.parametrize(("pooler_type", "aligned"), [("ROIAlign", False), ("ROIAlignV2", True)])
def test_pooler_is_roi_align_on_the_chosen_level(pooler_type: str, aligned: bool) -> None:
    maps = [torch.randn(2, 3, int(512 * s), int(512 * s)) for s in SCALES]
    first = torch.tensor([[10.0, 20.0, 50.0, 90.0], [5.0, 5.0, 400.0, 300.0]])
    second = torch.tensor([[100.0, 120.0, 260.0, 250.0]])
    pooler = detectron2.ROIPooler((3, 2), SCALES, 0, pooler_type)
    got = pooler(maps, [Boxes(first), second])
    assert got.shape == (3, 3, 3, 2)
    rows = [(0, first[0]), (0, first[1]), (1, second[0])]
    for pooled, (image, box) in zip(got, rows, strict=True):
        side = math.sqrt((box[2] - box[0]) * (box[3] - box[1]))
        level = min(max(math.floor(4 + math.log2(side / 224)), 2), 5) - 2
        roi = torch.cat((torch.tensor([float(image)]), box))[None]
        layer = detectron2.ROIAlign((3, 2), SCALES[level], 0, aligned)
        torch.testing.assert_close(pooled, layer(maps[level], roi)[0])


def test_pooler_with_other_canonical_sizes() -> None:
    pooler = detectron2.ROIPooler(1, SCALES, 1, "ROIAlign", canonical_box_size=56, canonical_level=2)
    found = [pooler(levels_as_constants(), [square(side)])[0, 0, 0, 0].item() for side in (55.0, 56.0, 112.0, 224.0)]
    assert found == [0.0, 0.0, 1.0, 2.0]
    pooler = detectron2.ROIPooler(1, SCALES, 1, "ROIAlign", canonical_box_size=100)
    found = [pooler(levels_as_constants(), [square(side)])[0, 0, 0, 0].item() for side in (49.0, 51.0, 99.0, 101.0)]
    assert found == [0.0, 1.0, 1.0, 2.0]


def test_pooler_of_one_level() -> None:
    maps = torch.randn(1, 2, 16, 16)
    pooler = detectron2.ROIPooler((2, 2), [1 / 16], 0, "ROIAlignV2")
    assert (pooler.min_level, pooler.max_level) == (4, 4)
    rois = torch.tensor([[0.0, 30.0, 20.0, 200.0, 190.0]])
    assert torch.equal(pooler([maps], [Boxes(rois[:, 1:])]), detectron2.ROIAlign((2, 2), 1 / 16, 0)(maps, rois))


def test_pooler_without_boxes() -> None:
    pooler = detectron2.ROIPooler((3, 2), SCALES, 0, "ROIAlignV2")
    maps = levels_as_constants(images=2)
    assert pooler(maps, [Boxes(torch.zeros(0, 4)), torch.zeros(0, 4)]).shape == (0, 2, 3, 2)
    one = pooler(maps, [torch.zeros(0, 4), square(20.0)])
    assert one.shape == (1, 2, 3, 2)
    assert pooler([m[:0] for m in maps], []).shape == (0, 2, 3, 2)


def test_gradients_reach_the_chosen_levels_only() -> None:
    maps = [m.requires_grad_() for m in levels_as_constants()]
    pooled = detectron2.ROIPooler(2, SCALES, 2, "ROIAlignV2")(maps, [torch.cat((square(20.0), square(130.0)))])
    sums = [g.sum().item() for g in torch.autograd.grad(pooled.sum(), maps)]
    assert sums == pytest.approx([8.0, 8.0, 0.0, 0.0])  # 2 channels x 4 bins, each bin a mean


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(
            {"pooler_type": "ROIPool"}, "pooler_type must be 'ROIAlign' or 'ROIAlignV2', got 'ROIPool'", id="t"
        ),
        pytest.param({"scales": [1 / 4, 1 / 16]}, "scales must each be half of the one before", id="gap"),
        pytest.param({"scales": [1 / 8, 1 / 4]}, "scales must each be half of the one before", id="order"),
        pytest.param({"scales": [0.3]}, "scales must be powers of two", id="power"),
        pytest.param({"scales": []}, "scales must hold at least one", id="none"),
        pytest.param({"scales": [0.0]}, "scales must hold at least one number above 0", id="zero"),
        pytest.param({"output_size": (1, 2, 3)}, "output_size must be an int or a pair", id="size"),
        pytest.param({"canonical_box_size": 0}, "canonical_box_size must be above 0, got 0", id="canonical"),
    ],
)
def test_pooler_refuses(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"output_size": 7, "scales": SCALES, "sampling_ratio": 0, "pooler_type": "ROIAlignV2"}
    with pytest.raises(ValueError, match=message):
        detectron2.ROIPooler(**{**arguments, **change})


def test_pooler_refuses_lists_that_do_not_fit() -> None:
    pooler = detectron2.ROIPooler(2, SCALES, 0, "ROIAlignV2")
    with pytest.raises(ValueError, match="x must hold 4 maps, one per scale, got 3"):
        pooler(levels_as_constants()[:3], [square(8.0)])
    with pytest.raises(ValueError, match="box_lists must hold one entry per image, 1, got 2"):
        pooler(levels_as_constants(), [square(8.0)] * 2)
    with pytest.raises(TypeError, match="must be lists, got a tensor"):
        pooler(levels_as_constants(), square(8.0))


def test_nms_and_batched_nms() -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [2.0, 0.0, 12.0, 10.0], [-5.0, -5.0, -1.0, -1.0]])
    scores = torch.tensor([0.5, 0.9, 0.7])
    assert detectron2.nms(boxes, scores, 0.5).tolist() == [1, 2]
    assert detectron2.batched_nms(boxes, scores, torch.tensor([0, 1, 0]), 0.5).tolist() == [1, 2, 0]
    assert detectron2.batched_nms(boxes, scores, torch.zeros(3, dtype=torch.int64), 0.5).tolist() == [1, 2]
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        got = detectron2.batched_nms(boxes.to(dtype), scores.to(dtype), torch.zeros(3, dtype=torch.int64), 0.5)
        assert got.tolist() == [1, 2]
    assert detectron2.batched_nms(boxes[:0], scores[:0], torch.zeros(0, dtype=torch.int64), 0.5).shape == (0,)
