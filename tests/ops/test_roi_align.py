"""What is particular to RoIAlign: an independent oracle, exact properties, level rules, layouts, errors, raw ops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from nasdet.ops import multilevel_roi_align, roi_align

BACKENDS = ["cpp", "reference"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, require: Any) -> str:
    from nasdet._dispatch import OPS

    entry = next(b for b in OPS["roi_align"].backends if b.name == request.param)
    if reason := entry.available():
        require(request.param, reason)
    return str(request.param)


def bilinear(plane: list[list[float]], y: float, x: float) -> float:
    """One sample as the published algorithm takes it."""
    height, width = len(plane), len(plane[0])
    if not (-1 <= y <= height and -1 <= x <= width):  # also for NaN
        return 0.0
    y, x = max(y, 0.0), max(x, 0.0)
    y0, x0 = int(y), int(x)
    if y0 >= height - 1:
        y0 = y1 = height - 1
        y = float(y0)
    else:
        y1 = y0 + 1
    if x0 >= width - 1:
        x0 = x1 = width - 1
        x = float(x0)
    else:
        x1 = x0 + 1
    fy, fx = y - y0, x - x0
    top = plane[y0][x0] * (1 - fx) + plane[y0][x1] * fx
    return top * (1 - fy) + (plane[y1][x0] * (1 - fx) + plane[y1][x1] * fx) * fy


def oracle(x: Tensor, rois: Tensor, size: tuple[int, int], scale: float, sampling: int, aligned: bool) -> Tensor:
    """RoIAlign one sample at a time, in Python's floats."""
    y = torch.zeros(len(rois), x.shape[1], *size, dtype=torch.float64)
    planes = x.tolist()
    for k, (image, x1, y1, x2, y2) in enumerate(rois.tolist()):
        shift = 0.5 if aligned else 0.0
        left, top = x1 * scale - shift, y1 * scale - shift
        wide, high = x2 * scale - shift - left, y2 * scale - shift - top
        if not aligned:
            wide, high = (1.0 if v < 1 else v for v in (wide, high))
        step = (high / size[0], wide / size[1])
        grid = [sampling if sampling > 0 else math.ceil(s) if math.isfinite(s) else 0 for s in step]
        for p in range(size[0]):
            for q in range(size[1]):
                for c in range(x.shape[1]):
                    total = 0.0
                    for i in range(grid[0]):
                        at_y = top + p * step[0] + (i + 0.5) * step[0] / grid[0]
                        for j in range(grid[1]):
                            at_x = left + q * step[1] + (j + 0.5) * step[1] / grid[1]
                            total += bilinear(planes[int(image)][c], at_y, at_x)
                    y[k, c, p, q] = total / max(grid[0] * grid[1], 1)
    return y


NAN, INF = float("nan"), float("inf")
ODD_BOXES = torch.tensor(
    [
        [0, 3.0, 4.0, 30.0, 25.0],
        [1, -60.0, -50.0, 90.0, 80.0],  # around the map
        [1, 10.0, 10.0, 10.0, 10.0],  # a point
        [0, 20.0, 18.0, 4.0, 2.0],  # inverted
        [0, 20.0, 2.0, 4.0, 18.0],  # inverted in x
        [1, 200.0, 300.0, 240.0, 340.0],  # outside
        [0, -8.0, -8.0, -4.0, -4.0],  # samples on the border -1
        [1, 36.0, 28.0, 44.0, 36.0],  # samples on the border H, W
        [0.9, 0.0, 0.0, 44.0, 32.0],  # exactly the map; the image index is truncated
        [-0.9, 7.0, 3.0, 8.0, 31.0],  # thin; toward zero
        [0, NAN, 4.0, 30.0, 25.0],
        [0, 3.0, 4.0, 30.0, NAN],
        [0, 3.0, 4.0, INF, 25.0],
        [1, -INF, 4.0, INF, 25.0],
        [1, 2.0, 2.0, 900.0, 700.0],
    ]
)


@pytest.mark.parametrize("aligned", [False, True], ids=["plain", "aligned"])
@pytest.mark.parametrize("sampling", [0, 1, 2, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_odd_boxes_match_the_oracle(backend: str, layout: torch.memory_format, sampling: int, aligned: bool) -> None:
    x = torch.randn(2, 3, 8, 11, dtype=torch.float64).contiguous(memory_format=layout)
    arguments = ((3, 2), 0.25, sampling, aligned)
    y = roi_align(x, ODD_BOXES, *arguments, backend=backend)
    torch.testing.assert_close(y, oracle(x, ODD_BOXES, *arguments), rtol=1e-12, atol=1e-12)


def test_random_degenerate_boxes_match_the_oracle(backend: str) -> None:
    generator = torch.Generator().manual_seed(3)
    for trial in range(12):
        height, width = (int(v) for v in torch.randint(1, 12, (2,), generator=generator))
        x = torch.randn(2, 2, height, width, generator=generator, dtype=torch.float64)
        corners = (torch.rand(6, 4, generator=generator) * 60 - 15).double()
        corners[trial % 6] = corners[trial % 6].round()
        rois = torch.cat([torch.randint(0, 2, (6, 1), generator=generator).double(), corners], 1)
        arguments = ((1 + trial % 4, 5 - trial % 4), (0.5, 1.0, 0.2)[trial % 3], trial % 3, trial % 2 == 0)
        y = roi_align(x, rois, *arguments, backend=backend)
        torch.testing.assert_close(y, oracle(x, rois, *arguments), rtol=1e-11, atol=1e-11)


def test_a_ramp_is_pooled_to_its_value_at_the_bin_centres(backend: str) -> None:
    rows, columns = torch.arange(30.0), torch.arange(40.0)
    ramp = (2 * rows[:, None] - 3 * columns + 5).expand(1, 1, 30, 40)
    rois = torch.tensor([[0, 8.0, 12.0, 60.0, 40.0], [0, 20.5, 10.25, 25.75, 33.5]])
    for sampling in (0, 1, 2, 3):
        y = roi_align(ramp, rois, (4, 3), 0.5, sampling, backend=backend)
        for k, (_, x1, y1, x2, y2) in enumerate((rois * 0.5).tolist()):
            at_y = y1 + (torch.arange(4.0) + 0.5) * (y2 - y1) / 4
            at_x = x1 + (torch.arange(3.0) + 0.5) * (x2 - x1) / 3
            torch.testing.assert_close(y[k, 0], 2 * at_y[:, None] - 3 * at_x + 5, rtol=0, atol=2e-5)


def test_a_constant_map_shows_what_part_of_a_bin_lies_on_it(backend: str) -> None:
    x = torch.full((1, 1, 8, 8), 3.0)
    inside, half = [0, 1.0, 1.0, 5.0, 5.0], [0, -9.0, 2.0, 7.0, 6.0]  # samples from -8 on, those below -1 count as 0
    y = roi_align(x, torch.tensor([inside, half]), (1, 1), 1.0, 16, backend=backend)
    torch.testing.assert_close(y.flatten(), torch.tensor([3.0, 3.0 * 8 / 16]), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["fp32", "fp64", "bf16"])
def test_gradients_sum_to_what_the_bins_saw(backend: str, dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.zeros(2, 5, 20, 24, dtype=dtype).contiguous(memory_format=layout).requires_grad_()
    rois = torch.tensor([[0, 3.0, 4.0, 30.0, 25.0], [1, -60.0, -50.0, 90.0, 80.0], [1, 0.0, 0.0, 47.0, 39.0]])
    upstream = torch.randn(3, 5, 7, 7).to(dtype)
    y = roi_align(x, rois, 7, 0.5, 2, backend=backend)
    (gradient,) = torch.autograd.grad(y, x, upstream)
    covered = roi_align(torch.ones(2, 5, 20, 24), rois, 7, 0.5, 2, backend=backend)
    for n in (0, 1):
        mine = rois[:, 0] == n
        wanted = (upstream[mine].double() * covered[mine].double()).sum((0, 2, 3))
        room = gradient[n].double().abs().sum((1, 2)).max().item() * torch.finfo(dtype).eps + 1e-5
        torch.testing.assert_close(gradient[n].double().sum((1, 2)), wanted, rtol=0, atol=room)
    assert gradient.dtype == dtype and (backend == "reference" or gradient.stride() == x.stride())


@pytest.mark.parametrize(
    ("side", "torchvision", "detectron2"),
    [
        (223.9999, 2, 1),
        (224.0, 2, 2),
        (223.99, 1, 1),
        (111.9, 0, 0),
        (448.0, 3, 3),
        (1e4, 3, 3),
        (0.0, 0, 0),
        (5.0, 0, 0),
    ],
)
def test_level_of_a_box(backend: str, side: float, torchvision: int, detectron2: int) -> None:
    features = [torch.full((1, 1, 4, 4), float(level)) for level in range(4)]
    rois = torch.tensor([[0, 0.0, 0.0, side, side]])
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    for assignment, level in (("torchvision", torchvision), ("detectron2", detectron2)):
        y = multilevel_roi_align(features, rois, 1, scales, 1, assignment=assignment, backend=backend)
        edge = roi_align(torch.ones(1, 1, 4, 4), rois, 1, scales[level], 1, backend=backend)
        assert y.item() == level * edge.item()


@pytest.mark.parametrize("lowest", [-1, 1, 2, 4])
@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (8, 8, 16, 16), (32, 8, 16, 8), (8, 8, 8, 8)], ids=str)
def test_levels_counted_from_another_one(backend: str, strides: tuple[int, ...], lowest: int) -> None:
    """Groups by size alone, each from the map that it is given, also where two are on maps of one stride or on one."""
    sides = torch.tensor([5.0, 20.0, 30.0, 60.0, 111.0, 113.0, 130.0, 260.0, 500.0, 900.0])
    rois = torch.stack([torch.zeros(10), sides * 0.1, sides * 0.2, sides * 1.1, sides * 1.2], 1)
    maps = {stride: torch.randn(1, 3, 1024 // stride, 1024 // stride) for stride in strides}
    features = [maps[stride] for stride in strides]
    scales = [1 / stride for stride in strides]
    y = multilevel_roi_align(features, rois, 3, scales, 2, lowest_level=lowest, backend=backend)
    groups = (torch.floor(4 + torch.log2(sides / 224)).long() - lowest).clamp(0, 3)
    for k, group in enumerate(groups.tolist()):
        alone = roi_align(features[group], rois[k : k + 1], 3, scales[group], 2, backend=backend)
        torch.testing.assert_close(y[k : k + 1], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("lowest", [None, 2])
@pytest.mark.parametrize("exponent", [-4.5, -3.5, -2.5, -1.5, 1.5])
def test_levels_of_scales_halfway_between_two(backend: str, exponent: float, lowest: int | None) -> None:
    """Rounded to the even level, whoever computes it: C++ and Python."""
    scales = [2.0**exponent, 2.0 ** (exponent - 1), 2.0 ** (exponent - 2)]
    assert math.log2(scales[0]) == exponent
    sides = 2.0 ** (torch.arange(-4, 14) + 0.5)
    rois = torch.stack([torch.zeros(18), torch.zeros(18), torch.zeros(18), sides, sides], 1)
    features = [torch.full((1, 1, 64, 64), float(level)) for level in range(3)]
    y = multilevel_roi_align(features, rois, 1, scales, 1, canonical_scale=32, lowest_level=lowest, backend=backend)
    ones = [roi_align(torch.ones(1, 1, 64, 64), rois, 1, scale, 1, backend=backend).flatten() for scale in scales]
    first = -round(exponent) if lowest is None else lowest  # Python rounds a half to the even neighbour
    groups = [min(max(math.floor(4 + math.log2(side / 32)) - first, 0), 2) for side in sides.tolist()]
    assert y.flatten().tolist() == [group * ones[group][k].item() for k, group in enumerate(groups)]
    assert set(y.flatten().round().tolist()) == {0, 1, 2}


def test_area_that_is_nan_or_negative_takes_the_first_level(backend: str) -> None:
    features = [torch.full((1, 1, 64, 64), 1.0), torch.full((1, 1, 32, 32), 2.0)]
    rois = torch.tensor([[0, 100.0, 20.0, 60.0, 90.0], [0, NAN, 0.0, 9.0, 9.0]])
    y = multilevel_roi_align(features, rois, 1, [0.25, 0.125], 2, canonical_level=9, backend=backend)
    assert y.flatten().tolist() == [1.0, 0.0]


def test_levels_agree_with_one_call_per_level(backend: str) -> None:
    sizes = torch.tensor([20.0, 60.0, 130.0, 260.0, 500.0])
    rois = torch.stack([torch.zeros(5), sizes * 0.1, sizes * 0.2, sizes * 1.1, sizes * 1.2], 1)
    features = [torch.randn(1, 6, 640 >> i, 640 >> i) for i in (2, 3, 4, 5)]
    scales = [0.25, 0.125, 0.0625, 0.03125]
    y = multilevel_roi_align(features, rois, (5, 4), scales, backend=backend)
    for k, level in enumerate([0, 0, 1, 2, 3]):
        alone = roi_align(features[level], rois[k : k + 1], (5, 4), scales[level], backend=backend)
        torch.testing.assert_close(y[k : k + 1], alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_infinity_stays_in_the_bins_that_read_it(backend: str, layout: torch.memory_format) -> None:
    x = torch.ones(1, 2, 16, 40).contiguous(memory_format=layout)
    x[0, 1, 3, 7] = INF  # of rows 3, 4 and columns 7, 8, which the sample of bin (1, 1) at (3.5, 7.5) reads
    rois = torch.tensor([[0, 0.0, 0.0, 35.0, 49.0 / 3]])
    y = roi_align(x, rois, 7, 1.0, 1, backend=backend)
    assert y.isinf().nonzero().tolist() == [[0, 1, 1, 1]] and not y.isnan().any()


def test_output_follows_the_layout_of_the_first_map(backend: str) -> None:
    nchw = torch.randn(2, 8, 12, 10)
    nhwc = nchw.contiguous(memory_format=torch.channels_last)
    rois = torch.tensor([[1, 2.0, 3.0, 9.0, 8.0], [0, 0.0, 0.0, 5.0, 5.0]])
    y, z = (roi_align(x, rois, 3, backend=backend) for x in (nchw, nhwc))
    assert y.is_contiguous() and z.is_contiguous(memory_format=torch.channels_last) and not z.is_contiguous()
    torch.testing.assert_close(y, z, rtol=0, atol=1e-6)
    one = torch.randn(2, 1, 12, 10).contiguous(memory_format=torch.channels_last)
    assert roi_align(one, rois, 3, backend=backend).is_contiguous()


@pytest.mark.needs("cpp")
def test_dense_maps_are_not_copied() -> None:
    x, rois = torch.randn(2, 8, 12, 10), torch.tensor([[1, 2.0, 3.0, 9.0, 8.0]])
    copies = {}
    for name, map_ in {
        "nchw": x,
        "nhwc": x.contiguous(memory_format=torch.channels_last),
        "sliced": x[..., ::2],
    }.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            roi_align(map_, rois, 3, backend="cpp")
        names = {event.name for event in profile.events()}
        assert "nasdet::multilevel_roi_align" in names
        copies[name] = bool(names & {"aten::copy_", "aten::clone"})
    assert copies == {"nchw": False, "nhwc": False, "sliced": True}


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_dense_gradients_are_not_copied(layout: torch.memory_format) -> None:
    x = torch.randn(2, 8, 12, 10).contiguous(memory_format=layout).requires_grad_()
    y = roi_align(x, torch.tensor([[1, 2.0, 3.0, 9.0, 8.0], [0, 0.0, 1.0, 7.0, 5.0]]), 3, backend="cpp")
    same = torch.randn_like(y)  # in the layout of y
    other = torch.randn(2, 8, 3, 3) if layout == torch.channels_last else same.to(memory_format=torch.channels_last)
    copies = {}
    for name, upstream in {"same": same, "other": other, "sliced": torch.randn(2, 8, 3, 6)[..., ::2]}.items():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            torch.autograd.grad(y, x, upstream, retain_graph=True)
        names = {event.name for event in profile.events()}
        assert "nasdet::multilevel_roi_align_backward" in names
        copies[name] = bool(names & {"aten::copy_", "aten::clone"})
    assert copies == {"same": False, "other": True, "sliced": True}


def test_boxes_per_image_are_rows_in_order(backend: str) -> None:
    x = torch.randn(3, 4, 9, 9)
    lists = [torch.rand(n, 4) * 4 + torch.tensor([0, 0, 4, 4]) for n in (2, 0, 3)]
    rois = torch.cat([torch.cat([torch.full((len(b), 1), float(n)), b], 1) for n, b in enumerate(lists)])
    assert torch.equal(roi_align(x, lists, 2, backend=backend), roi_align(x, rois, 2, backend=backend))
    assert torch.equal(
        roi_align(x, lists, 2, backend=backend), roi_align(x, [b.double() for b in lists], 2, backend=backend)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_coordinates_keep_float32_beside_16_bit_maps(backend: str, dtype: torch.dtype) -> None:
    x = torch.arange(1024.0).expand(1, 1, 2, 1024).to(torch.float32)
    rois = torch.tensor([[0, 1001.25, 0.0, 1003.25, 1.0]])
    wanted = roi_align(x, rois, 1, backend=backend)
    y = roi_align((x - 1002).to(dtype), rois, 1, backend=backend)
    torch.testing.assert_close(y.float() + 1002, wanted, rtol=0, atol=0.02)


def test_autocast_keeps_the_maps_dtype(backend: str) -> None:
    x, rois = torch.randn(1, 4, 9, 9), torch.tensor([[0, 1.0, 1.0, 8.0, 8.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert roi_align(x, rois, 2, backend=backend).dtype == torch.float32
        assert roi_align(x.bfloat16(), rois, 2, backend=backend).dtype == torch.bfloat16


def test_without_boxes_the_gradient_is_zero(backend: str) -> None:
    x = torch.randn(2, 3, 6, 5, requires_grad=True)
    y = roi_align(x, torch.zeros(0, 5), 7, backend=backend)
    assert y.shape == (0, 3, 7, 7) and y.requires_grad
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.shape == x.shape and not gradient.any()
