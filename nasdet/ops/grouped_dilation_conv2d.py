"""``grouped_dilation_conv2d``: one convolution whose output channels have dilations of their own (NATS, derived)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nasdet import _dispatch
from nasdet._cases import Case, Inputs
from nasdet._checks import plain_int
from nasdet.ops._dilation import (
    Pair,
    algorithm_code,
    checked_algorithm,
    checked_dilations,
    checked_operands,
    checked_splits,
    chosen_algorithm,
    define,
    flat,
    holds_data,
    in_layout_of,
    merged,
    pair,
    same_conv2d,
    torch_is_faster,
    torchs_own,
)


def grouped_dilation_conv2d(
    x: Tensor,
    weight: Tensor,
    dilations: Sequence[int | Pair],
    splits: Sequence[int],
    stride: int | Pair = 1,
    groups: int = 1,
    *,
    algorithm: str | None = None,
    precision: str = "fast",
    backend: str | None = None,
) -> Tensor:
    """One convolution whose slices of output channels have their own dilations::

        y = cat([conv2d(x, weight[rows of slice s], dilation=dilations[s]) for s in slices])

    The derived form of NATS (Peng et al., NeurIPS 2019, section 3.3): parameters and multiply-accumulates are those of
    one convolution. One slice is a plain convolution. Padding is "same" for each dilation (zeros), so the size is
    ``ceil(H / stride)`` by ``ceil(W / stride)`` for all of them.

    Args:
        x: ``[N, Cin, H, W]``; float32, float64, float16 or bfloat16. ``N`` may be 0.
        weight: ``[Cout, Cin / groups, k, k]``, ``k`` odd, the dtype of ``x``. Under autocast both are taken in
            autocast's dtype.
        dilations: one per slice: integers >= 1, or (vertical, horizontal) pairs. May exceed the map.
        splits: output channels of each slice, >= 1, in the order of the channels; their sum is ``Cout``. With
            ``groups > 1`` each covers whole convolution groups, and reads only the inputs of these.
        stride: integer >= 1 or (vertical, horizontal).
        groups: convolution groups, as in ``torch.nn.functional.conv2d``.
        algorithm: force ``"direct"``, ``"frequency"`` or ``"winograd"``, where a backend has it; None: the backend's
            choice.
        precision: ``"exact"`` excludes Winograd's algorithm, which rounds more; ``"fast"`` allows it. Beside outliers
            and NaN only ``algorithm="direct"`` is as exact as the definition: others err by a tile's largest value.
        backend: ``"cpp"``, ``"triton"`` or ``"reference"``; the best that can run when None.

    Returns:
        ``y [N, Cout, ceil(H / stride), ceil(W / stride)]``, dtype of ``x``, channels_last when ``x`` is (and is not
        also contiguous), else contiguous. Sums are kept in float32 (float64).

    Gradients for ``x`` and ``weight``. With equal dilations throughout, the reference is exactly torch's ``conv2d``
    in float32 and float64.

    Raises:
        TypeError, ValueError: "name must be X, got Y".
    """
    pairs, strides = checked_dilations(dilations), pair("stride", stride)
    groups = plain_int(groups)
    x, weight = checked_operands(x, weight, "Cout, Cin / groups, k, k", groups)
    sizes = checked_splits(splits, len(pairs), weight.shape[0], groups)
    checked_algorithm(algorithm, precision)
    arguments = (x, weight, *merged(pairs, sizes), strides, groups, algorithm, precision)
    return _dispatch.choose("grouped_dilation_conv2d", backend, *arguments).run(*arguments)


def _reference(
    x: Tensor,
    weight: Tensor,
    dilations: Sequence[int | Pair],
    splits: Sequence[int],
    stride: int | Pair = 1,
    groups: int = 1,
    algorithm: str | None = None,
    precision: str = "fast",
) -> Tensor:
    # torch's 16-bit convolution on the CPU is slow and sums in 16 bits on some processors; cuDNN's does neither.
    narrow = x.device.type != "cuda" and x.dtype in (torch.float16, torch.bfloat16)
    inputs, kernels = (x.float(), weight.float()) if narrow else (x, weight)
    slices = merged(checked_dilations(dilations), splits)
    return in_layout_of(_by_slices(inputs, kernels, slices, pair("stride", stride), groups).to(x.dtype), x)


def _by_slices(
    x: Tensor, weight: Tensor, slices: tuple[Sequence[Pair], Sequence[int]], stride: Pair, groups: int
) -> Tensor:
    """One of torch's convolutions for each slice."""
    fan, width = weight.shape[1], weight.shape[0] // groups
    parts, first = [], 0
    for dilation, size in zip(*slices, strict=True):
        rows, own, taken = weight.narrow(0, first, size), x, groups
        if groups > 1 and size < weight.shape[0]:
            taken = size // width
            own = x.narrow(1, first // width * fan, taken * fan)
        parts.append(same_conv2d(own, rows, dilation, stride, taken))
        first += size
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


define("grouped_dilation_conv2d", ("x", "weight"), ("dilations", "splits"))


def _raw(
    op: Any,
    x: Tensor,
    weight: Tensor,
    dilations: Sequence[Pair],
    splits: Sequence[int],
    stride: Pair,
    groups: int,
    algorithm: str | None,
    precision: str,
) -> Tensor:
    return op(x, weight, flat(dilations), list(splits), *stride, groups, algorithm_code(algorithm, precision))


def _run_compiled(x: Tensor, weight: Tensor, *arguments: Any) -> Tensor:
    pairs, splits, strides, groups, algorithm, precision = arguments
    if algorithm is not None and holds_data(x):
        chosen_algorithm(x, weight, pairs, splits, strides, groups, algorithm, precision)
    if algorithm is None and torch_is_faster(x, weight, strides, groups, len(splits)):
        return in_layout_of(_by_slices(x, weight, (pairs, splits), strides, groups), x)
    arguments = (x, weight, *arguments)
    return _raw(torch.ops.nasdet.grouped_dilation_conv2d, *arguments)


def _run_triton(*arguments: Any) -> Tensor:
    from nasdet.ops._triton import ensure_registered

    ensure_registered("grouped_dilation_conv2d")
    return _raw(torch.ops.nasdet.grouped_dilation_conv2d_triton, *arguments)


def _map(x: Tensor, *_: Any) -> Tensor:
    return x


def _case(
    name: str,
    x: tuple[int, int, int, int],
    dilations: Sequence[int | Pair],
    splits: Sequence[int],
    *,
    kernel: int = 3,
    stride: int | Pair = 1,
    groups: int = 1,
    layout: str = "contiguous",
    large: bool = False,
) -> Case:
    def make(inputs: Inputs) -> tuple[list[Any], dict[str, Any]]:
        fan = x[1] // groups
        weight = inputs.randn(sum(splits), fan, kernel, kernel, scale=(fan * kernel**2) ** -0.5)
        return [inputs.randn(*x, layout=layout), weight, dilations, splits, stride, groups], {}

    return Case(name, make, large=large)


_C3: tuple[int | Pair, ...] = (1, 2, 3, (1, 3), (3, 1))  # NATS's set C in stages 3 and 4, and in stage 5
_C5: tuple[int | Pair, ...] = (1, 2, 3, 4, 5, (1, 3), (3, 1), (1, 5), (5, 1))
_LARGE: dict[int, tuple[int, int, Sequence[int | Pair], Sequence[int]]] = {
    128: (100, 152, _C3, (48, 32, 16, 16, 16)),
    256: (50, 76, _C3, (112, 48, 32, 32, 32)),
    512: (25, 38, _C5, (128, 64, 64, 64, 64, 32, 32, 32, 32)),
}

OP = _dispatch.register(
    _dispatch.Op(
        name="grouped_dilation_conv2d",
        call=grouped_dilation_conv2d,
        reference=_reference,
        backends=(
            _dispatch.compiled_backend("cpp", "grouped_dilation_conv2d", _run_compiled, _map),
            _dispatch.triton_backend(_run_triton, _map),
            _dispatch.Backend("reference", _reference, torchs_own, _dispatch.never),
        ),
        reduce_len=lambda x, weight, *_: weight[0].numel(),
        differentiable=(0, 1),
        cases=(
            _case("set-c", (2, 8, 9, 11), _C3, (5, 3, 1, 2, 4)),
            _case("set-c-stage-5", (1, 6, 12, 10), _C5, (1, 2, 1, 3, 1, 2, 1, 1, 4)),
            _case("plain", (2, 5, 6, 7), (1,), (7,)),
            _case("plain-dilated", (2, 5, 6, 7), ((2, 3),), (4,)),
            _case("equal-neighbours", (1, 4, 7, 7), (1, 1, 2, 2, 1), (2, 1, 3, 2, 4)),
            _case("stride-2", (2, 4, 9, 12), _C3, (2, 1, 1, 1, 1), stride=2),
            _case("uneven-stride", (1, 3, 8, 9), (1, (2, 3)), (3, 1), stride=(2, 1)),
            _case("1x1", (2, 5, 4, 6), (1, 3), (2, 1), kernel=1),
            _case("1x1-stride-2", (1, 3, 5, 5), (1, 3), (1, 1), kernel=1, stride=2),
            _case("5x5", (1, 3, 9, 10), (1, 2, (1, 2)), (2, 1, 1), kernel=5),
            _case("two-groups", (1, 6, 7, 5), (1, 3), (2, 2), groups=2),
            _case("resnext", (1, 32, 7, 6), _C3, (8, 4, 12, 4, 4), groups=8),
            _case("resnext-stride-2", (1, 32, 7, 6), (1, 2, (3, 1)), (16, 12, 4), groups=8, stride=2),
            _case("depthwise", (2, 7, 6, 5), (1, 2), (3, 4), groups=7),
            _case("one-channel", (2, 1, 6, 7), (2,), (1,)),
            _case("odd-channels", (1, 3, 6, 7), (1, 2, (1, 3)), (11, 5, 1)),
            _case("seventeen-in", (1, 17, 5, 6), (1, (3, 1)), (1, 2), layout="channels_last"),
            _case("one-pixel", (2, 4, 1, 1), _C3, (1, 1, 1, 1, 1)),
            _case("two-by-three", (1, 4, 2, 3), _C5, (1,) * 9),
            _case("dilation-beyond-the-map", (1, 3, 4, 5), (9, (1, 7), 4), (1, 1, 1)),
            _case("channels-last", (2, 8, 7, 9), _C3, (6, 4, 2, 2, 2), layout="channels_last"),
            _case("channels-last-stride-2", (2, 16, 7, 8), _C3, (2, 2, 2, 1, 1), layout="channels_last", stride=2),
            _case("channels-last-groups", (2, 16, 6, 5), (1, 2), (4, 12), layout="channels_last", groups=4),
            _case("sliced", (2, 4, 6, 7), (1, 2), (2, 2), layout="sliced"),
            _case("transposed", (2, 4, 6, 7), (1, (2, 1)), (2, 2), layout="transposed"),
            _case("expanded", (3, 4, 5, 5), (1, 2), (2, 2), layout="expanded"),
            _case("empty", (0, 4, 5, 6), (1, 2), (2, 1)),
            *(
                _case(f"c{c}-n{n}", (n, c, h, w), dilations, splits, layout="channels_last", large=True)
                for c, (h, w, dilations, splits) in _LARGE.items()
                for n in (1, 2)
            ),
            *(
                _case(f"plain-c{c}", (1, c, h, w), (1,), (c,), layout="channels_last", large=True)
                for c, (h, w, _, _) in _LARGE.items()
            ),
            _case(
                "x101-stage-3",
                (1, 256, 100, 152),
                _C3,
                (96, 64, 32, 32, 32),
                groups=32,
                layout="channels_last",
                large=True,
            ),
        ),
    )
)
