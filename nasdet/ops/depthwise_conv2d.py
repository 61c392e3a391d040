"""``depthwise_conv2d``: one kernel per channel, at any dilation and stride, in NCHW and NHWC alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nasdet import _dispatch
from nasdet._cases import Case, Inputs
from nasdet._checks import plain_int
from nasdet._library import LIBRARY
from nasdet.ops._dilation import (
    LARGEST,
    LARGEST_KERNEL,
    Pair,
    autocasts,
    checked_operands,
    empty_map,
    in_layout_of,
    pair,
)


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    stride: int | Pair = 1,
    padding: int | Pair | str = "same",
    dilation: int | Pair = 1,
    *,
    backend: str | None = None,
) -> Tensor:
    """Every channel convolved with a kernel of its own, as ``conv2d`` does it with as many groups as channels::

        y[n, c, i, j] = sum_uv weight[c, 0, u, v] * x[n, c, i * sh - ph + u * dh, j * sw - pw + v * dw]

    with zeros beyond the map: the depthwise half of a separable convolution (Howard et al. 2017, section 3.1).

    Args:
        x: ``[N, C, H, W]``; float32, float64, float16 or bfloat16. ``N`` may be 0.
        weight: ``[C, 1, k, k]``, ``k`` odd and at most 255, the dtype and device of ``x``. Under autocast both are
            taken in autocast's dtype.
        stride: integer >= 1 or (vertical, horizontal).
        padding: integer >= 0 and below 2**30 or (vertical, horizontal), in pixels, or ``"same"``:
            ``dilation * (k // 2)``, which keeps the size at stride 1 and divides it by the stride, rounded up, at
            others.
        dilation: integer >= 1 or (vertical, horizontal).
        backend: ``"cpp"``, ``"cuda"`` or ``"reference"``; the best that can run when None.

    Returns:
        ``y [N, C, (H + 2 ph - dh (k - 1) - 1) // sh + 1, ...]``, dtype of ``x``, channels_last when ``x`` is (and is
        not also contiguous), else contiguous. Sums are kept in float32 (float64), long ones of the weight's gradient in
        float64 on top; they depend neither on threads nor on the run.

    Gradients for ``x`` and ``weight``; there is no second derivative but in the reference.

    Raises:
        TypeError, ValueError: "name must be X, got Y".
    """
    strides, dilations = pair("stride", stride), pair("dilation", dilation)
    x, weight = _checked(x, weight)
    kernel = weight.shape[-1]
    paddings = checked_padding(padding, kernel, dilations)
    for axis, size in enumerate(x.shape[2:]):
        reach = dilations[axis] * (kernel - 1) + 1
        if size + 2 * paddings[axis] < reach:
            raise ValueError(
                f"x must be at least {reach} {('high', 'wide')[axis]} with its padding for this kernel, "
                f"got {size} + 2 x {paddings[axis]}"
            )
    arguments = (x, weight, strides, paddings, dilations)
    return _dispatch.choose("depthwise_conv2d", backend, *arguments).run(*arguments)


def checked_padding(padding: int | Pair | str, kernel: int, dilations: Pair) -> Pair:
    """``padding`` as (vertical, horizontal) pixels."""
    if padding == "same":
        return dilations[0] * (kernel // 2), dilations[1] * (kernel // 2)
    values = [plain_int(v) for v in (padding if isinstance(padding, (tuple, list)) else (padding, padding))]
    whole = [v for v in values if isinstance(v, int) and not isinstance(v, bool) and v >= 0]
    if len(values) != 2 or len(whole) != 2:
        raise ValueError(f"padding must be 'same', an integer of at least 0 or a pair of them, got {padding!r}")
    if max(whole) >= LARGEST:
        raise ValueError(f"padding must be below 2**30, got {padding!r}")
    return whole[0], whole[1]


def _checked(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if isinstance(x, Tensor) and isinstance(weight, Tensor) and x.dim() == weight.dim() == 4:
        if weight.shape[:2] != (x.shape[1], 1) or weight.shape[0] == 0:
            raise ValueError(
                f"weight must have shape ({x.shape[1]}, 1, k, k) for x with {x.shape[1]} channels, at least one, got "
                f"{tuple(weight.shape)}"
            )
        if weight.shape[-1] > LARGEST_KERNEL:
            raise ValueError(f"weight must have a kernel of at most {LARGEST_KERNEL}, got {weight.shape[-1]}")
        return checked_operands(x, weight, "C, 1, k, k", int(x.shape[1]))  # a tensor, or symbolic, while traced
    return checked_operands(x, weight, "C, 1, k, k", 1)


def _reference(
    x: Tensor,
    weight: Tensor,
    stride: int | Pair = 1,
    padding: int | Pair | str = "same",
    dilation: int | Pair = 1,
) -> Tensor:
    # torch's 16-bit convolution on the CPU sums in 16 bits on some processors; with both operands channels_last its
    # float64 gradient of the weight is wrong (2.13).
    narrow = x.device.type != "cuda" and x.dtype in (torch.float16, torch.bfloat16)
    inputs, kernels = (x.float(), weight.float()) if narrow else (x, weight)
    strides, dilations = pair("stride", stride), pair("dilation", dilation)
    paddings = checked_padding(padding, weight.shape[-1], dilations)
    y = _torchs_own(inputs.contiguous(), kernels.contiguous(), strides, paddings, dilations)
    return in_layout_of(y.to(x.dtype), x)


def _torchs_own(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """Not touched by autocast, which came before."""
    if autocasts(x):
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, weight, None, stride, padding, dilation, x.shape[1])
    return F.conv2d(x, weight, None, stride, padding, dilation, x.shape[1])


def _out_size(x: Tensor, weight: Tensor, options: tuple[int, ...]) -> tuple[int, int, int, int]:
    strides, paddings, dilations = options[:2], options[2:4], options[4:6]
    height, width = (
        (x.shape[2 + a] + 2 * paddings[a] - dilations[a] * (weight.shape[-1] - 1) - 1) // strides[a] + 1 for a in (0, 1)
    )
    return x.shape[0], x.shape[1], height, width


def _fake(x: Tensor, weight: Tensor, *options: int) -> Tensor:
    return empty_map(x, _out_size(x, weight, options))


def _fake_backward(grad: Tensor, x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    need_x, need_weight = rest[-2:]
    dx = empty_map(x, x.shape) if need_x else x.new_empty(0)
    return dx, weight.new_empty(weight.shape if need_weight else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.options = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:2]
    raw = torch.ops.nasdet.depthwise_conv2d_backward
    found = raw(grad, *ctx.saved_tensors, *ctx.options, *needed)
    return *(g if need else None for g, need in zip(found, needed, strict=True)), *(None for _ in ctx.options)


def _no_double_backward(ctx: Any, *grads: Any) -> Any:
    raise RuntimeError("depthwise_conv2d has no second derivative in this backend; use backend='reference'")


_OPTIONS = "Tensor x, Tensor weight, " + ", ".join(
    f"int {name}_{axis}" for name in ("stride", "padding", "dilation") for axis in "hw"
)
LIBRARY.define(f"depthwise_conv2d({_OPTIONS}) -> Tensor")
LIBRARY.define(f"depthwise_conv2d_backward(Tensor grad, {_OPTIONS}, bool need_x, bool need_weight) -> (Tensor, Tensor)")
torch.library.register_fake("nasdet::depthwise_conv2d", _fake)
torch.library.register_fake("nasdet::depthwise_conv2d_backward", _fake_backward)
torch.library.register_autograd("nasdet::depthwise_conv2d", _backward, setup_context=_setup_context)
torch.library.register_autograd("nasdet::depthwise_conv2d_backward", _no_double_backward)


def _run_compiled(x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    return torch.ops.nasdet.depthwise_conv2d(x, weight, *stride, *padding, *dilation)


def _map(x: Tensor, *_: Any) -> Tensor:
    return x


def _case(
    name: str,
    x: tuple[int, int, int, int],
    kernel: int = 3,
    stride: int | Pair = 1,
    dilation: int | Pair = 1,
    *,
    padding: int | Pair | str = "same",
    layout: str = "contiguous",
    large: bool = False,
) -> Case:
    def make(inputs: Inputs) -> tuple[list[Any], dict[str, Any]]:
        weight = inputs.randn(x[1], 1, kernel, kernel, scale=1 / kernel)
        return [inputs.randn(*x, layout=layout), weight, stride, padding, dilation], {}

    return Case(name, make, large=large)


_LARGE = (  # ShuffleNetV2's stages at 800 x 1333, FAD's units, and 224 x 224
    ("c256-50x84-k3", (1, 256, 50, 84), 3, 1, 1),
    ("c256-50x84-k5", (1, 256, 50, 84), 5, 1, 1),
    ("c256-50x84-k7", (1, 256, 50, 84), 7, 1, 1),
    ("c256-50x84-k3-dilation-4", (1, 256, 50, 84), 3, 1, 4),
    ("c256-50x84-k5-dilation-4", (1, 256, 50, 84), 5, 1, 4),
    ("c64-100x167-k3", (1, 64, 100, 167), 3, 1, 1),
    ("c232-25x42-k7", (1, 232, 25, 42), 7, 1, 1),
    ("c116-50x84-k3", (1, 116, 50, 84), 3, 1, 1),
    ("c116-50x84-k3-stride-2", (1, 116, 50, 84), 3, 2, 1),
    ("c256-50x84-k3-stride-2", (1, 256, 50, 84), 3, 2, 1),
    ("n8-c116-14x14-k5", (8, 116, 14, 14), 5, 1, 1),
    ("n8-c232-7x7-k3", (8, 232, 7, 7), 3, 1, 1),
)

OP = _dispatch.register(
    _dispatch.Op(
        name="depthwise_conv2d",
        call=depthwise_conv2d,
        reference=_reference,
        backends=(
            _dispatch.compiled_backend("cpp", "depthwise_conv2d", _run_compiled, _map),
            _dispatch.compiled_backend("cuda", "depthwise_conv2d", _run_compiled, _map),
            _dispatch.reference_backend(_reference),
        ),
        reduce_len=lambda x, weight, *_: weight[0].numel(),
        differentiable=(0, 1),
        cases=(
            _case("3x3", (2, 5, 9, 11)),
            _case("5x5", (1, 3, 9, 21), 5),
            _case("7x7", (1, 3, 10, 35), 7),
            _case("1x1", (2, 5, 4, 6), 1),
            _case("9x9", (1, 2, 11, 6), 9),
            _case("dilated", (1, 4, 9, 13), 3, 1, 2),
            _case("dilated-5x5", (1, 2, 17, 19), 5, 1, (4, 3)),
            _case("stride-2", (2, 3, 9, 12), 3, 2),
            _case("stride-2-5x5", (1, 3, 12, 37), 5, 2),
            _case("stride-2-dilated", (1, 3, 13, 26), 3, 2, 2),
            _case("stride-2-7x7-dilated", (1, 2, 31, 24), 7, 2, 3),
            _case("stride-3-dilated", (1, 3, 11, 13), 3, 3, 2),
            _case("uneven-stride", (1, 3, 8, 9), 7, (2, 1)),
            _case("stride-beyond-the-kernel", (1, 2, 9, 8), 1, (2, 3)),
            _case("no-padding", (1, 3, 8, 9), 3, padding=0),
            _case("wide-padding", (1, 3, 4, 5), 3, padding=(4, 3)),
            _case("uneven-padding-stride-2", (1, 3, 9, 8), 5, 2, padding=(1, 4)),
            _case("dilation-beyond-the-map", (1, 3, 4, 5), 3, 1, 9),
            _case("one-pixel", (2, 4, 1, 1), 5),
            _case("eight-rows", (1, 2, 8, 33)),
            _case("tall", (1, 1, 61, 3), 3, 1, 3),
            _case("channels-last", (2, 16, 7, 9), layout="channels_last"),
            _case("channels-last-5x5", (1, 50, 9, 6), 5, layout="channels_last"),
            _case("channels-last-7x7", (2, 35, 8, 5), 7, layout="channels_last"),
            _case("channels-last-9x9", (1, 20, 6, 7), 9, layout="channels_last"),
            _case("channels-last-dilated", (1, 32, 10, 9), 3, 1, (2, 3), layout="channels_last"),
            _case("channels-last-stride-2", (2, 18, 9, 8), 3, 2, layout="channels_last"),
            _case("channels-last-stride-2-dilated", (1, 34, 21, 12), 5, 2, 2, layout="channels_last"),
            _case("channels-last-stride-2-7x7", (1, 33, 33, 8), 7, (2, 1), (3, 1), layout="channels_last"),
            _case("channels-last-stride-3-dilated", (1, 24, 9, 11), 5, (3, 2), 2, layout="channels_last"),
            _case("channels-last-no-padding", (1, 17, 8, 7), 5, padding=0, layout="channels_last"),
            _case("channels-last-wide-padding", (1, 17, 4, 3), 3, padding=5, layout="channels_last"),
            _case("channels-last-beyond-the-map", (1, 16, 3, 4), 3, 1, 9, layout="channels_last"),
            _case("channels-last-few-channels", (2, 5, 6, 7), layout="channels_last"),
            _case("sliced", (2, 4, 6, 7), layout="sliced"),
            _case("transposed", (2, 4, 6, 7), layout="transposed"),
            _case("expanded", (3, 4, 5, 5), layout="expanded"),
            _case("empty", (0, 4, 5, 6)),
            *(
                _case(f"{name}{suffix}", x, kernel, stride, dilation, layout=layout, large=True)
                for name, x, kernel, stride, dilation in _LARGE
                for suffix, layout in (("-nchw", "contiguous"), ("-nhwc", "channels_last"))
            ),
        ),
    )
)
