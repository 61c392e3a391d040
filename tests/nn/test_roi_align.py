"""The pooling modules: attributes, inferred scales, levels, export of the choice to the operator."""

from __future__ import annotations

import pytest
import torch

from nasdet.nn import MultiScaleRoIAlign, RoIAlign
from nasdet.ops import multilevel_roi_align, roi_align

BOXES = [torch.tensor([[0.0, 0.0, 50.0, 60.0], [10.0, 20.0, 300.0, 380.0]]), torch.tensor([[5.0, 5.0, 130.0, 130.0]])]


def pyramid(height: int, width: int, strides: tuple[int, ...] = (4, 8, 16, 32)) -> dict[str, torch.Tensor]:
    return {str(i): torch.randn(2, 6, -(-height // s), -(-width // s)) for i, s in enumerate(strides)}


def test_roi_align_module_is_the_operator() -> None:
    x, rois = torch.randn(2, 3, 20, 20), torch.tensor([[1, 2.0, 3.0, 30.0, 35.0]])
    module = RoIAlign((3, 2), 0.5, 2, aligned=True)
    assert torch.equal(module(x, rois), roi_align(x, rois, (3, 2), 0.5, 2, True))
    assert repr(module) == "RoIAlign(output_size=(3, 2), spatial_scale=0.5, sampling_ratio=2, aligned=True)"
    with pytest.raises(TypeError):
        RoIAlign(7)  # type: ignore[call-arg]  # as torchvision's: no defaults for the next two


def test_multi_scale_has_torchvisions_attributes() -> None:
    module = MultiScaleRoIAlign(["0", "1"], 7, 2)
    assert module.featmap_names == ["0", "1"] and module.output_size == (7, 7) and module.sampling_ratio == 2
    assert module.scales is None and module.map_levels is None
    assert module.canonical_scale == 224 and module.canonical_level == 4
    assert repr(module) == "MultiScaleRoIAlign(featmap_names=['0', '1'], output_size=(7, 7), sampling_ratio=2)"
    assert not list(module.parameters()) and not module.state_dict()


def test_multi_scale_pools_from_the_named_maps() -> None:
    x = pyramid(400, 500) | {"pool": torch.randn(2, 6, 4, 4)}
    module = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    y = module(x, BOXES, [(400, 500), (380, 490)])
    assert module.scales == [0.25, 0.125, 0.0625, 0.03125]
    assert torch.equal(y, multilevel_roi_align([x[str(i)] for i in range(4)], BOXES, 7, module.scales, 2))
    assert module.map_levels is not None and module.map_levels(BOXES).tolist() == [0, 2, 1]


def test_one_map_is_plain_roi_align() -> None:
    x = pyramid(400, 500)
    module = MultiScaleRoIAlign(["2"], (3, 5), 0)
    assert torch.equal(module(x, BOXES, [(400, 500)] * 2), roi_align(x["2"], BOXES, (3, 5), 1 / 16, 0))


def test_scales_are_kept_from_the_first_call() -> None:
    module = MultiScaleRoIAlign(["0", "1"], 7, 2)
    module(pyramid(400, 500), BOXES, [(400, 500)] * 2)
    module(pyramid(200, 160), BOXES, [(800, 640)] * 2)
    assert module.scales == [0.25, 0.125]


@pytest.mark.parametrize(
    ("picture", "padded"),
    [((800, 1333), (800, 1344)), ((33, 400), (64, 416)), ((400, 33), (416, 64)), ((100, 100), (128, 128))],
    ids=["coco", "flat", "tall", "padded"],
)
def test_scales_come_from_the_longer_side(picture: tuple[int, int], padded: tuple[int, int]) -> None:
    """Padding to a multiple of 32 distorts a short side beyond a factor of sqrt(2): 64 / 33 pixels."""
    module = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    module(pyramid(*padded), [b * 0.1 for b in BOXES], [picture] * 2)
    assert module.scales == [0.25, 0.125, 0.0625, 0.03125]


def test_options_reach_the_operator() -> None:
    x = pyramid(400, 500)
    boxes = [torch.tensor([[0.0, 0.0, 223.9999, 223.9999]]), torch.zeros(0, 4)]
    shapes = [(400, 500)] * 2
    for assignment, level in (("torchvision", "2"), ("detectron2", "1")):
        module = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2, aligned=True, assignment=assignment)
        wanted = roi_align(x[level], boxes, 7, 2.0 ** -(2 + int(level)), 2, True)
        torch.testing.assert_close(module(x, boxes, shapes), wanted, rtol=0, atol=1e-6)
    small = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2, canonical_scale=28, canonical_level=4)
    small(x, boxes, shapes)
    assert small.map_levels is not None and small.map_levels(boxes).tolist() == [3]


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"assignment must be one of \['torchvision', 'detectron2'\], got 'zz'"):
        MultiScaleRoIAlign(["a"], 7, 2, assignment="zz")
    module = MultiScaleRoIAlign(["0", "1"], 7, 2)
    with pytest.raises(ValueError, match=r"x must have one of the maps \['0', '1'\], got \['p'\]"):
        module({"p": torch.zeros(1, 1, 2, 2)}, BOXES, [(8, 8)])
    with pytest.raises(ValueError, match="image_shapes must hold one"):
        module(pyramid(64, 64), BOXES, [])
    with pytest.raises(ValueError, match="must have one scale on both axes"):
        module({"0": torch.zeros(2, 1, 100, 25)}, BOXES, [(400, 400)] * 2)
    module(pyramid(400, 500), BOXES, [(400, 500)] * 2)
    with pytest.raises(ValueError, match="x must have the 2 maps of the first call, got 1"):
        module({"0": torch.zeros(2, 6, 100, 125)}, BOXES, [(400, 500)] * 2)


def test_compiles_with_the_first_call() -> None:
    torch._dynamo.reset()
    x, shapes = pyramid(400, 500), [(400, 500)] * 2
    eager, module = (MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2) for _ in range(2))
    compiled = torch.compile(lambda x, boxes: module(x, boxes, shapes) * 2, fullgraph=True, backend="aot_eager")
    if eager(x, BOXES, shapes) is not None and torch.ops.nasdet.multilevel_roi_align:
        assert torch.equal(compiled(x, BOXES), eager(x, BOXES, shapes) * 2)
        assert module.scales == eager.scales
