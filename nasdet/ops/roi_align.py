"""``roi_align`` and ``multilevel_roi_align``: boxes of any size pooled to one size, from one map or a pyramid."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nasdet import _dispatch
from nasdet._cases import Case, Inputs
from nasdet._library import LIBRARY
from nasdet.ops._checks import integer_within, positive_number
from nasdet.ops._dilation import empty_map, is_channels_last
from nasdet.ops._roi_checks import (
    checked_features,
    checked_level,
    checked_lowest_level,
    checked_rois,
    checked_scales,
    checked_size,
)
from nasdet.ops._roi_reference import memory_format, reference, shifted_level

ASSIGNMENTS = {"torchvision": 0, "detectron2": 1}


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    backend: str | None = None,
) -> Tensor:
    """RoIAlign (He et al. 2017, "Mask R-CNN", section 3): each bin of a box is the mean of bilinear samples of the map.

    ``y[k, :, p, q] = mean over bin (p, q)'s sampling grid of input[image_k, :, y_s, x_s]``. Signature and values of
    ``torchvision.ops.roi_align``; a sample outside ``[-1, H] x [-1, W]`` counts in the mean as 0, and a box with a NaN
    pools to 0.

    Args:
        input: ``[N, C, H, W]``; float32, float64, float16 or bfloat16; contiguous or channels_last without a copy.
        boxes: ``[K, 5]`` (image index, x1, y1, x2, y2), or one ``[L, 4]`` tensor per image, in pixels of the picture;
            of any floating dtype: the geometry is computed in float32 (float64 for a float64 ``input``).
        output_size: ``(height, width)`` of the result, or one number for both; below 2**20.
        spatial_scale: pixels of the map per pixel of the picture, e.g. 1/16 for stride 16.
        sampling_ratio: samples per bin and axis, below 2**31; ``ceil(box size / output size)`` when 0 or negative.
        aligned: shift by half a pixel so that the map's pixel i covers ``[i, i + 1]``; boxes may be thinner than 1.
        backend: ``"cpp"``, ``"cuda"`` or ``"reference"``; the best that can run when None.

    Returns:
        ``[K, C, height, width]`` in ``input``'s dtype and layout (channels_last for a channels_last ``input``).

    ``input`` has a gradient, ``boxes`` have none. On the CPU the gradient is bit for bit the same with any number of
    threads; on CUDA under ``torch.use_deterministic_algorithms(True)``.

    Raises:
        TypeError: a tensor or option has another type. ValueError: a shape, device or option is wrong. RuntimeError: an
        image index is outside ``[0, N)`` (CPU; on CUDA such a box pools to 0).
    """
    features = checked_features("input", [input])
    args = _arguments(features, boxes, output_size, [spatial_scale], sampling_ratio, aligned, 0, 224, 4)
    return _dispatch.choose("roi_align", backend, *args).run(*args)


def multilevel_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int = -1,
    aligned: bool = False,
    *,
    assignment: str = "torchvision",
    canonical_scale: float = 224,
    canonical_level: int = 4,
    lowest_level: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """:func:`roi_align` over a feature pyramid, each box from the level of its size (Lin et al. 2017, FPN, Eq. 1).

    Level ``k = floor(k0 + log2(sqrt(area) / s0) + 1e-6)`` (``assignment="torchvision"``) or
    ``floor(k0 + log2(sqrt(area) / s0 + 1e-8))`` (``"detectron2"``), with ``s0 = canonical_scale`` and
    ``k0 = canonical_level``, clamped to the levels that there are; the two differ for boxes just below a boundary, e.g.
    223.9999 pixels. One call for all levels: no selection per level, no synchronisation.

    Args:
        features: the levels, at most 63, finest first, each ``[N, C, H_l, W_l]`` of one dtype: float32, float64,
            float16 or bfloat16; each contiguous or channels_last without a copy.
        boxes: ``[K, 5]`` (image index, x1, y1, x2, y2), or one ``[L, 4]`` tensor per image, in pixels of the picture.
        output_size: ``(height, width)`` of the result, or one number for both; below 2**20.
        spatial_scales: per level, pixels of its map per pixel of the picture; each half of the one before, unless
            ``lowest_level`` is given.
        sampling_ratio: samples per bin and axis, below 2**31; ``ceil(box size / output size)`` when 0 or negative.
        aligned: shift by half a pixel, as in :func:`roi_align`.
        assignment: whose rounding of the level.
        canonical_scale: ``s0``, in pixels of the picture.
        canonical_level: ``k0``, where stride ``2**k`` is level ``k``; from -2**20 to 2**20.
        lowest_level: the level of ``features[0]``, in the same range; the next ones are of the next levels. By default
            its stride says it. Given, scales need not halve and maps may come twice: boxes are grouped by size alone,
            and each group is pooled from the map that it is given (MSNAS, figure 2b).
        backend: ``"cpp"``, ``"cuda"`` or ``"reference"``; the best that can run when None.

    Returns:
        ``[K, C, height, width]`` in the features' dtype, row k for box k, in ``features[0]``'s layout.

    Gradients, determinism and ``backend`` are :func:`roi_align`'s. A box whose area is NaN or negative takes the first
    level.

    Raises:
        TypeError, ValueError and RuntimeError as :func:`roi_align`; ValueError: ``spatial_scales`` do not halve,
        and ``lowest_level`` is None.
    """
    checked = checked_features("features", features)
    if assignment not in tuple(ASSIGNMENTS):  # a tuple takes what has no hash
        raise ValueError(f"assignment must be one of {list(ASSIGNMENTS)}, got {assignment!r}")
    scales = checked_scales(spatial_scales, len(checked))
    policy = ASSIGNMENTS[assignment]
    args = _arguments(
        checked, boxes, output_size, scales, sampling_ratio, aligned, policy, canonical_scale, canonical_level
    )
    lowest_level = checked_lowest_level(scales, lowest_level)
    args = (*args[:-1], shifted_level(scales, args[-1], lowest_level))
    return _dispatch.choose("multilevel_roi_align", backend, *args).run(*args)


def _arguments(
    features: list[Tensor],
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    scales: list[float],
    sampling_ratio: int,
    aligned: bool,
    policy: int,
    canonical_scale: float,
    canonical_level: int,
) -> tuple[Any, ...]:
    """The raw op's arguments."""
    size = checked_size(output_size)
    scales = [positive_number("spatial_scale", scale) for scale in scales]
    canonical = positive_number("canonical_scale", canonical_scale)
    sampling_ratio = integer_within("sampling_ratio", sampling_ratio, -(2**31), 2**31 - 1)
    canonical_level = checked_level("canonical_level", canonical_level)
    if not isinstance(aligned, bool):
        raise TypeError(f"aligned must be a bool, got {aligned!r}")
    rois = checked_rois(boxes, features[0])
    return (features, rois, scales, *size, sampling_ratio, aligned, policy, canonical, canonical_level)


_POOLING = (
    "float[] scales, int pooled_height, int pooled_width, int sampling_ratio, bool aligned, int policy, "
    "float canonical_scale, int canonical_level"
)
LIBRARY.define(f"multilevel_roi_align(Tensor[] features, Tensor rois, {_POOLING}) -> Tensor")
LIBRARY.define(
    "multilevel_roi_align_backward(Tensor grad, Tensor rois, SymInt batch, SymInt[] heights, SymInt[] widths, "
    f"int channels_last_mask, {_POOLING}, bool deterministic) -> Tensor[]"
)


@torch.library.register_fake("nasdet::multilevel_roi_align")
def _fake(features: Sequence[Tensor], rois: Tensor, scales: Any, height: int, width: int, *_: Any) -> Tensor:
    return empty_map(features[0], (rois.shape[0], features[0].shape[1], height, width))


@torch.library.register_fake("nasdet::multilevel_roi_align_backward")
def _fake_backward(
    grad: Tensor, rois: Tensor, batch: int, heights: Sequence[int], widths: Sequence[int], mask: int, *_: Any
) -> list[Tensor]:
    return [
        torch.empty(
            (batch, grad.shape[1], height, width),
            dtype=grad.dtype,
            device=grad.device,
            memory_format=memory_format(bool(mask >> level & 1)),
        )
        for level, (height, width) in enumerate(zip(heights, widths, strict=True))
    ]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, rois, *pooling = inputs
    ctx.save_for_backward(rois)
    ctx.batch = features[0].shape[0]
    ctx.heights = [x.shape[2] for x in features]
    ctx.widths = [x.shape[3] for x in features]
    ctx.mask = sum(is_channels_last(x) << level for level, x in enumerate(features))
    ctx.pooling = pooling


def _backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (rois,) = ctx.saved_tensors
    deterministic = torch.are_deterministic_algorithms_enabled()
    gradients = torch.ops.nasdet.multilevel_roi_align_backward(
        grad, rois, ctx.batch, ctx.heights, ctx.widths, ctx.mask, *ctx.pooling, deterministic
    )
    return gradients, None, *(None for _ in ctx.pooling)


def _no_double_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError(
        "nasdet::multilevel_roi_align_backward is not differentiable: roi_align has no second derivative; "
        "use backend='reference'"
    )


torch.library.register_autograd("nasdet::multilevel_roi_align", _backward, setup_context=_setup_context)
torch.library.register_autograd("nasdet::multilevel_roi_align_backward", _no_double_backward)


def _run_compiled(features: list[Tensor], *args: Any) -> Tensor:
    return torch.ops.nasdet.multilevel_roi_align(features, *args)


def _first_map(features: list[Tensor], *_: Any) -> Tensor:
    return features[0]


def _boxes(inputs: Inputs, count: int, images: int, extent: tuple[float, float]) -> Tensor:
    """Boxes of all sizes, from a fiftieth of the picture to beyond it."""
    draw = torch.rand(count, 5, generator=inputs.generator, dtype=torch.float64)
    size = torch.tensor([extent[1], extent[0]], dtype=torch.float64)
    middle, half = (draw[:, 1:3] * 1.1 - 0.05) * size, size * 0.01 * 60 ** draw[:, 3:]
    rois = torch.cat([(draw[:, :1] * images).floor(), middle - half, middle + half], 1)
    return rois.to(inputs.weight_dtype).to(inputs.device)


def _case(
    name: str,
    shape: tuple[int, int, int, int],
    count: int,
    size: tuple[int, int] = (7, 7),
    sampling: int = 2,
    aligned: bool = False,
    layout: str = "contiguous",
    lists: bool = False,
    large: bool = False,
) -> Case:
    def make(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        rois = _boxes(inputs, count, shape[0], (8.0 * shape[2], 8.0 * shape[3]))
        boxes = [rois[rois[:, 0] == n, 1:] for n in range(shape[0])] if lists else rois
        return (inputs.randn(*shape, layout=layout), boxes, size, 1 / 8, sampling, aligned), {}

    return Case(name, make, large=large, condition=8)


def _pyramid_case(
    name: str,
    shape: tuple[int, int, int, int],
    count: int,
    levels: int = 4,
    layouts: Sequence[str] = ("contiguous",),
    sampling: int = 2,
    large: bool = False,
    steps: Sequence[int] | None = None,
    **options: Any,
) -> Case:
    """``shape`` is that of a map at stride 4; the levels' maps are at strides ``4 * 2^step``, each twice the last."""

    def make(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
        n, c, h, w = shape
        rois = _boxes(inputs, count, n, (4.0 * h, 4.0 * w))
        ladder = list(enumerate(range(levels) if steps is None else steps))
        features = [inputs.randn(n, c, -(-h >> i), -(-w >> i), layout=layouts[k % len(layouts)]) for k, i in ladder]
        scales = [0.25 / 2**i for _, i in ladder]
        return (features, rois, 7, scales, sampling), options

    return Case(name, make, large=large, condition=8)


def _register(name: str, call: Callable[..., Tensor], cases: tuple[Case, ...]) -> _dispatch.Op:
    return _dispatch.register(
        _dispatch.Op(
            name=name,
            call=call,
            reference=functools.partial(call, backend="reference"),
            backends=(
                _dispatch.compiled_backend("cpp", "multilevel_roi_align", _run_compiled, _first_map),
                _dispatch.compiled_backend("cuda", "multilevel_roi_align", _run_compiled, _first_map),
                _dispatch.reference_backend(reference),
            ),
            reduce_len=lambda *_: 64,
            differentiable=(0,),
            cases=cases,
        )
    )


OP = _register(
    "roi_align",
    roi_align,
    (
        _case("seven", (2, 24, 13, 19), 9),
        _case("adaptive-aligned", (2, 5, 17, 11), 7, sampling=0, aligned=True),
        _case("one-channel", (1, 1, 9, 9), 4, (3, 2)),
        _case("channels-last", (2, 37, 13, 19), 9, layout="channels_last"),
        _case("channels-last-adaptive", (1, 64, 13, 19), 6, (5, 3), sampling=-1, layout="channels_last"),
        _case("sliced", (1, 8, 10, 12), 5, layout="sliced"),
        _case("fourteen", (1, 18, 40, 50), 5, (14, 14), aligned=True),
        _case("wide-bins", (1, 3, 12, 90), 6, (2, 33), sampling=3),
        _case("boxes-per-image", (3, 8, 9, 12), 11, lists=True),
        _case("no-boxes", (2, 8, 9, 12), 0),
        _case("no-channels", (2, 0, 9, 12), 4),
        _case("no-images", (0, 8, 9, 12), 0, lists=True),
        _case("c4", (2, 256, 50, 84), 512, (14, 14), large=True),
    ),
)

PYRAMID_OP = _register(
    "multilevel_roi_align",
    multilevel_roi_align,
    (
        _pyramid_case("four-levels", (2, 20, 40, 52), 24),
        _pyramid_case("channels-last", (2, 33, 40, 52), 24, layouts=("channels_last",), aligned=True),
        _pyramid_case("mixed-layouts", (1, 20, 40, 52), 16, layouts=("channels_last", "contiguous", "sliced")),
        _pyramid_case("mixed-layouts-nchw", (1, 20, 40, 52), 16, layouts=("contiguous", "channels_last")),
        _pyramid_case("detectron2", (1, 8, 32, 32), 12, levels=3, assignment="detectron2", sampling=0),
        _pyramid_case("canonical", (1, 4, 32, 32), 12, levels=2, canonical_scale=32.0, canonical_level=2),
        _pyramid_case("groups", (2, 12, 40, 52), 24, steps=(1, 1, 2, 3, 3), lowest_level=1),
        _pyramid_case("expanded", (3, 8, 20, 24), 7, levels=2, layouts=("expanded", "contiguous")),
        _pyramid_case("no-boxes", (1, 8, 16, 16), 0),
        _pyramid_case("fpn", (1, 256, 200, 336), 1000, large=True),
        _pyramid_case("fpn-nhwc", (1, 256, 200, 336), 1000, layouts=("channels_last",), large=True),
        _pyramid_case("fpn-mask", (1, 256, 200, 336), 100, layouts=("channels_last",), large=True),
    ),
)
