"""RoIAlign's calls: errors, raw ops, compilation, threads, sizes beyond 32 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nasdet.ops import multilevel_roi_align, roi_align

NAN = float("nan")


@pytest.mark.parametrize("value", [2.0, -1.0, NAN, 1e30])
@pytest.mark.parametrize("backend", [None, "reference"])
def test_image_index_outside_the_batch_names_the_row(backend: str | None, value: float) -> None:
    x, rois = torch.randn(2, 3, 6, 5), torch.zeros(9, 5)
    rois[7, 0] = value
    with pytest.raises(
        RuntimeError, match=rf"rois\[7\] must have a batch index in \[0, 2\), got {value:g}".replace("+", r"\+")
    ):
        roi_align(x, rois, 2, backend=backend)
    rois[7, 0] = 1.75
    roi_align(x, rois, 2, backend=backend)


def call(**changes: Any) -> Tensor:
    arguments: dict[str, Any] = {
        "features": [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 4, 4)],
        "boxes": torch.zeros(1, 5),
        "output_size": 2,
        "spatial_scales": [0.5, 0.25],
    }
    return multilevel_roi_align(**(arguments | changes))


MAP = torch.randn(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"features": MAP}, TypeError, "features must be a sequence of tensors, got Tensor"),
        ({"features": []}, ValueError, "features must hold at least one level, got none"),
        ({"features": [MAP, MAP.int()]}, TypeError, r"features\[1\] must be a float32.*got torch.int32"),
        ({"features": [MAP, MAP.half()]}, TypeError, r"features\[1\] must be torch.float32 as.*got torch.float16"),
        ({"features": [MAP[0], MAP]}, ValueError, r"features\[0\] must have shape \(N, C, H, W\), got \(3, 4, 4\)"),
        ({"features": [MAP, MAP[:1]]}, ValueError, r"features\[1\] must have N, C = \(2, 3\), got \(1, 3\)"),
        ({"features": [MAP, MAP.to("meta")]}, ValueError, r"features\[1\] must be on cpu, got meta"),
        ({"boxes": torch.zeros(4)}, ValueError, r"boxes must have shape \(K, 5\), got \(4,\)"),
        ({"boxes": torch.zeros(1, 5).int()}, TypeError, "boxes must be a floating-point tensor, got torch.int32"),
        ({"boxes": 3}, TypeError, "boxes must be a tensor or a sequence of tensors, got int"),
        ({"boxes": torch.zeros(1, 5, device="meta")}, ValueError, "boxes must be on cpu, got meta"),
        ({"boxes": [torch.zeros(1, 4)]}, ValueError, r"boxes must hold one tensor per image \(2\), got 1"),
        (
            {"boxes": [torch.zeros(1, 4), torch.zeros(1, 5)]},
            ValueError,
            r"boxes\[1\] must have shape \(L, 4\), got \(1, 5\)",
        ),
        ({"output_size": (2, 0)}, ValueError, r"output_size must be one or two positive integers, got \(2, 0\)"),
        ({"output_size": (1, 2, 3)}, ValueError, "output_size must be one or two positive integers"),
        ({"output_size": 2.5}, ValueError, "output_size must be one or two positive integers, got 2.5"),
        ({"output_size": True}, ValueError, "output_size must be one or two positive integers, got True"),
        ({"output_size": (2, 2.0)}, ValueError, r"output_size must be .* integers, got \(2, 2.0\)"),
        ({"output_size": None}, ValueError, "output_size must be .* integers, got None"),
        ({"output_size": 2**20}, ValueError, r"output_size must be below 2\*\*20, got 1048576"),
        ({"output_size": (1, 2**63)}, ValueError, r"output_size must be below 2\*\*20, got \(1, 9223372036854775808\)"),
        ({"sampling_ratio": 2**31}, ValueError, "sampling_ratio must be from .* to 2147483647, got 2147483648"),
        ({"sampling_ratio": 2.0}, TypeError, "sampling_ratio must be an integer, got 2.0"),
        ({"sampling_ratio": True}, TypeError, "sampling_ratio must be an integer, got True"),
        ({"canonical_level": 4.0}, TypeError, "canonical_level must be an integer, got 4.0"),
        ({"aligned": 1}, TypeError, "aligned must be a bool, got 1"),
        ({"spatial_scales": None}, TypeError, "spatial_scales must be a sequence of numbers, got NoneType"),
        ({"spatial_scales": [0.5]}, ValueError, r"spatial_scales must have one entry per level \(2\), got 1"),
        ({"spatial_scales": [0.5, NAN]}, ValueError, "spatial_scale must be positive and finite, got nan"),
        ({"spatial_scales": [0.5, 0.0]}, ValueError, "spatial_scale must be positive and finite, got 0.0"),
        ({"spatial_scales": [0.5, None]}, TypeError, "spatial_scale must be a number, got None"),
        ({"spatial_scales": [0.5, 0.125]}, ValueError, r"spatial_scales must halve from.*got \[0.5, 0.125\]"),
        ({"spatial_scales": [0.5, 0.5]}, ValueError, "spatial_scales must halve from level to level"),
        (
            {"features": [MAP] * 4, "spatial_scales": [1 / 4, 1 / 16, 1 / 8, 1 / 32]},
            ValueError,
            r"spatial_scales must halve from level to level, got \[0.25, 0.0625, 0.125, 0.03125\]",
        ),
        ({"assignment": ["x"]}, ValueError, r"assignment must be one of .*, got \['x'\]"),
        (
            {"assignment": "mmdet"},
            ValueError,
            r"assignment must be one of \['torchvision', 'detectron2'\], got 'mmdet'",
        ),
        ({"lowest_level": 1.0}, TypeError, "lowest_level must be an integer or None, got 1.0"),
        ({"lowest_level": True}, TypeError, "lowest_level must be an integer or None, got True"),
        ({"lowest_level": -(2**31)}, ValueError, "lowest_level must be from -1048576 to 1048576, got -2147483648"),
        ({"canonical_level": 2**31}, ValueError, "canonical_level must be from -1048576 to 1048576, got 2147483648"),
        (
            {"features": [MAP] * 64, "spatial_scales": [0.5**level for level in range(64)]},
            ValueError,
            "features must hold at most 63 levels, got 64",
        ),
        ({"canonical_scale": 0}, ValueError, "canonical_scale must be positive and finite, got 0"),
        ({"canonical_scale": "224"}, TypeError, "canonical_scale must be a number, got '224'"),
    ],
)
def test_errors_name_the_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(**changes)


@pytest.mark.needs("cpp")
def test_far_levels_and_as_many_as_there_may_be_agree_with_the_reference() -> None:
    features = [torch.randn(1, 2, 4, 4, requires_grad=True) for _ in range(63)]
    scales, boxes = [0.5**level for level in range(63)], torch.tensor([[0, 0, 0, 5, 5.0], [0, 1, 0, 25, 25.0]])
    for options in (
        {"lowest_level": 2**20, "canonical_level": -(2**20)},
        {"lowest_level": -(2**20), "canonical_level": 2**20},
        {"lowest_level": 0, "canonical_level": 40},
    ):
        found, expected = (
            torch.autograd.grad(
                multilevel_roi_align(features, boxes, 2, scales, 2, backend=backend, **options).square().sum(), features
            )
            for backend in ("cpp", "reference")
        )
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


RAW = ([0.5, 0.25], 2, 3, 2, False, 0, 224.0, 4)


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_raw_ops_pass_opcheck(layout: torch.memory_format, count: int) -> None:
    features = [torch.randn(2, 3, n, n).contiguous(memory_format=layout).requires_grad_() for n in (8, 4)]
    rois = torch.cat([torch.randint(0, 2, (count, 1)).float(), torch.rand(count, 4) * 16], 1)
    torch.library.opcheck(torch.ops.nasdet.multilevel_roi_align.default, (features, rois, *RAW))
    mask = 3 if layout == torch.channels_last else 0
    grad = torch.randn(count, 3, 2, 3)
    raw_backward = torch.ops.nasdet.multilevel_roi_align_backward.default
    arguments = (grad, rois, 2, [8, 4], [8, 4], mask, *RAW, True)
    torch.library.opcheck(raw_backward, arguments, test_utils="test_faketensor")
    strided = torch.randn(count, 3, 3, 4).transpose(2, 3)[:, :, ::2, :]
    for a, b in zip(
        raw_backward(strided, *arguments[1:]), raw_backward(strided.contiguous(), *arguments[1:]), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.needs("cpp")
def test_raw_launcher_checks_before_it_runs() -> None:
    x, rois, raw = torch.randn(1, 3, 8, 8), torch.zeros(1, 5), torch.ops.nasdet.multilevel_roi_align
    with pytest.raises(RuntimeError, match=r"rois must have shape \(K, 5\)"):
        raw([x], rois[:, :4], [0.5], 2, 2, 2, False, 0, 224.0, 4)
    with pytest.raises(RuntimeError, match="rois must be float32"):
        raw([x], rois.double(), [0.5], 2, 2, 2, False, 0, 224.0, 4)
    with pytest.raises(RuntimeError, match="features and scales must have one entry per level, got 1 and 2"):
        raw([x], rois, [0.5, 0.25], 2, 2, 2, False, 0, 224.0, 4)
    with pytest.raises(RuntimeError, match=r"the pooled size must be positive and below 2\^20, got 0 x 2"):
        raw([x], rois, [0.5], 0, 2, 2, False, 0, 224.0, 4)
    with pytest.raises(RuntimeError, match=r"canonical_level must be within -2\^30 and 2\^30, got 2147483648"):
        raw([x], rois, [0.5], 2, 2, 2, False, 0, 224.0, 2**31)
    with pytest.raises(RuntimeError, match="grad must have shape"):
        backward = torch.ops.nasdet.multilevel_roi_align_backward
        backward(torch.zeros(1, 3, 2, 3), rois, 1, [8], [8], 0, [0.5], 2, 2, 2, False, 0, 224.0, 4, True)


class BackwardCalls(TorchDispatchMode):
    """The last argument, ``deterministic``, of every call of the raw backward."""

    def __init__(self) -> None:
        super().__init__()
        self.deterministic: list[bool] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.nasdet.multilevel_roi_align_backward.default:
            self.deterministic.append(args[-1])
        return func(*args, **(kwargs or {}))


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("wanted", [False, True])
def test_backward_is_told_of_deterministic_algorithms(wanted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA another kernel runs then. What counts is what is set when the gradient is computed."""
    x, rois = torch.randn(1, 3, 8, 8, requires_grad=True), torch.tensor([[0, 1.0, 1.0, 7.0, 7.0]])
    y = roi_align(x, rois, 2, backend="cpp") + multilevel_roi_align([x, x[..., ::2, ::2]], rois, 2, [1.0, 0.5])
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: wanted)
    with BackwardCalls() as calls:
        y.sum().backward()
    assert calls.deterministic == [wanted, wanted]


@pytest.mark.needs("cpp")
def test_no_silent_second_derivative() -> None:
    x = torch.randn(1, 3, 8, 8, requires_grad=True)
    weight = torch.ones(1, 3, 2, 2, requires_grad=True)
    y = roi_align(x, torch.tensor([[0, 1.0, 1.0, 7.0, 7.0]]), 2, backend="cpp")
    (gradient,) = torch.autograd.grad(y, x, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("count", [0, 1, 6])
def test_compiles_once_for_any_number_of_boxes(count: int) -> None:
    torch._dynamo.reset()
    features = [torch.randn(1, 3, n, n, requires_grad=True) for n in (16, 8)]

    def pooled(*arguments: Any) -> Tensor:
        *maps, rois = arguments
        return multilevel_roi_align(maps, rois, 3, [0.25, 0.125], 2).cos()

    compiled = torch.compile(pooled, fullgraph=True, backend="aot_eager")
    for k in (4, count):
        rois = torch.cat([torch.zeros(k, 1), torch.rand(k, 2) * 20, torch.rand(k, 2) * 20 + 30], 1)
        torch._dynamo.maybe_mark_dynamic(rois, 0)
        with torch._dynamo.config.patch(error_on_recompile=k == 6 and count == 6):
            y = compiled(*features, rois)
        assert torch.equal(y, pooled(*features, rois))
        for a, b in zip(
            torch.autograd.grad(y.sum(), features),
            torch.autograd.grad(pooled(*features, rois).sum(), features),
            strict=True,
        ):
            assert torch.equal(a, b)


@pytest.mark.needs("cpp")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradient_does_not_depend_on_threads_or_neighbours(dtype: torch.dtype, layout: torch.memory_format) -> None:
    x = torch.randn(2, 90, 24, 33).to(dtype).contiguous(memory_format=layout).requires_grad_()
    rois = torch.cat([torch.randint(0, 2, (150, 1)).float(), torch.rand(150, 2) * 90, torch.rand(150, 2) * 60 + 60], 1)
    upstream = torch.randn(150, 90, 7, 7).to(dtype)
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        y = roi_align(x, rois, 7, 0.25, 2, backend="cpp")
        results.append((y.detach(), *torch.autograd.grad(y, x, upstream)))
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    part = (
        x.detach()[:, 16:32].contiguous(memory_format=layout).requires_grad_()
    )  # other blocks of channels, the same sums
    y = roi_align(part, rois, 7, 0.25, 2, backend="cpp")
    (gradient,) = torch.autograd.grad(y, part, upstream[:, 16:32])
    assert torch.equal(gradient, results[0][1][:, 16:32])


def untouched(nhwc: bool) -> torch.Tensor:
    """A map of more than 2**31 elements, virtual memory until something is written."""
    shape = (1, 257, 257, 33000) if nhwc else (1, 33000, 257, 257)
    x = torch.empty(shape, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    return x.permute(0, 3, 1, 2) if nhwc else x


@pytest.mark.slow
@pytest.mark.needs("cpp")
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
def test_more_than_2_to_31_elements(nhwc: bool) -> None:
    """The map is never touched but where the boxes lie."""
    x = untouched(nhwc)
    corner = x[:, -16:, 240:257, 240:257]
    corner.copy_(torch.randn(corner.shape))
    rois = torch.tensor([[0, 243.0, 244.0, 252.0, 254.0]])
    y = roi_align(x, rois, 2, backend="cpp")[:, -16:]
    moved = rois - torch.tensor([0, 240, 240, 240, 240])
    torch.testing.assert_close(y, roi_align(corner.contiguous(), moved, 2, backend="cpp"), rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@pytest.mark.needs("cpp")
@pytest.mark.parametrize("nhwc", [False, True], ids=["nchw", "nhwc"])
def test_gradient_of_more_than_2_to_31_elements(nhwc: bool) -> None:
    """Only the gradient is touched everywhere: 4.4 GB."""
    x = untouched(nhwc).requires_grad_()
    rois, upstream = torch.tensor([[0, 243.0, 244.0, 252.0, 254.0]]), torch.zeros(1, 33000, 2, 2, dtype=x.dtype)
    upstream[:, -16:] = torch.randn(1, 16, 2, 2)
    (gradient,) = torch.autograd.grad(roi_align(x, rois, 2, backend="cpp"), x, upstream)
    assert gradient.numel() > 2**31 and gradient.stride() == x.stride()
    corner = gradient[:, -16:, 240:257, 240:257]
    small = torch.zeros(1, 16, 17, 17, dtype=x.dtype, requires_grad=True)
    moved = rois - torch.tensor([0, 240, 240, 240, 240])
    (wanted,) = torch.autograd.grad(roi_align(small, moved, 2, backend="cpp"), small, upstream[:, -16:])
    torch.testing.assert_close(corner, wanted, rtol=1e-2, atol=1e-2)
    assert gradient.count_nonzero() == corner.count_nonzero() > 0
