"""``mixed_dilation_conv2d``: a channel-wise mixture of convolutions that differ in dilation (NATS at search time)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nasdet import _dispatch
from nasdet._cases import Case, Inputs
from nasdet._checks import plain_int
from nasdet.ops._checks import checked_parameter
from nasdet.ops._dilation import (
    LARGE_MAP,
    Pair,
    algorithm_code,
    checked_algorithm,
    checked_dilations,
    checked_operands,
    chosen_algorithm,
    define,
    finite_on_cpu,
    flat,
    has_tiles,
    holds_data,
    in_layout_of,
    pair,
    same_conv2d,
    torch_is_faster,
    torchs_own,
)


def mixed_dilation_conv2d(
    x: Tensor,
    weight: Tensor,
    mix: Tensor,
    dilations: Sequence[int | Pair],
    stride: int | Pair = 1,
    groups: int = 1,
    *,
    algorithm: str | None = None,
    precision: str = "fast",
    backend: str | None = None,
) -> Tensor:
    """Mixture of ``G`` convolutions of one input that differ in dilation, with a weight per output channel::

        y[:, o] = sum_g mix[g, o] * conv2d(x, weight[g], dilation=dilations[g])[:, o]

    NATS (Peng et al., NeurIPS 2019), Equation 3. Padding is "same" for each dilation (zeros), so the size is that of
    one convolution: ``ceil(H / stride)`` by ``ceil(W / stride)``, for every dilation.

    Args:
        x: ``[N, Cin, H, W]``; float32, float64, float16 or bfloat16. ``N`` may be 0.
        weight: ``[G, Cout, Cin / groups, k, k]``, ``k`` odd, the dtype of ``x``: a kernel per dilation. Under autocast
            ``x`` and ``weight`` are taken in autocast's dtype.
        mix: ``[G, Cout]``, or ``[G, n]`` where ``n`` divides ``Cout``: one column for each of ``n`` equal contiguous
            slices of the channels. Any of these dtypes, used in float32 (float64 with float64 maps).
        dilations: ``G`` integers >= 1, or (vertical, horizontal) pairs of them. May exceed the map.
        stride: integer >= 1 or (vertical, horizontal).
        groups: convolution groups, as in ``torch.nn.functional.conv2d``.
        algorithm: force ``"direct"``, ``"frequency"`` or ``"winograd"``, where a backend has it; None: the backend's
            choice.
        precision: ``"exact"`` excludes Winograd's algorithm, which rounds more; ``"fast"`` allows it. Beside outliers
            and NaN only ``algorithm="direct"`` is as exact as the definition: others err by a tile's largest value.
        backend: ``"cpp"``, ``"triton"``, ``"folded"`` or ``"reference"``; the best that can run when None.

    Returns:
        ``y [N, Cout, ceil(H / stride), ceil(W / stride)]``, dtype of ``x``, channels_last when ``x`` is (and is not
        also contiguous), else contiguous. Sums are kept in float32 (float64).

    Gradients for ``x``, ``weight`` and ``mix``.

    Raises:
        TypeError, ValueError: "name must be X, got Y". NaN or infinity in ``mix`` is refused on the CPU.
    """
    pairs, strides = checked_dilations(dilations), pair("stride", stride)
    groups = plain_int(groups)
    x, weight = checked_operands(x, weight, "G, Cout, Cin / groups, k, k", groups)
    if weight.shape[0] != len(pairs):
        raise ValueError(f"weight must have a kernel for each of the {len(pairs)} dilations, got {weight.shape[0]}")
    checked_algorithm(algorithm, precision)
    mix = _checked_mix(mix, len(pairs), weight.shape[1], x)
    arguments = (x, weight, mix, pairs, strides, groups, algorithm, precision)
    return _dispatch.choose("mixed_dilation_conv2d", backend, *arguments).run(*arguments)


def _checked_mix(mix: Tensor, dilations: int, channels: int, x: Tensor) -> Tensor:
    """``[G, Cout]`` from one column per channel or per slice of channels."""
    if not isinstance(mix, Tensor) or mix.dim() != 2 or mix.shape[1] == 0 or channels % mix.shape[1]:
        got = tuple(mix.shape) if isinstance(mix, Tensor) else type(mix).__name__
        raise ValueError(f"mix must have shape ({dilations}, n), n a divisor of the {channels} channels, got {got}")
    mix = checked_parameter("mix", mix, (dilations, mix.shape[1]), x)
    finite_on_cpu("mix", mix)
    return _per_channel(mix, channels)


def _per_channel(mix: Tensor, channels: int) -> Tensor:
    return mix if mix.shape[1] == channels else mix.repeat_interleave(channels // mix.shape[1], dim=1)


def _reference(
    x: Tensor,
    weight: Tensor,
    mix: Tensor,
    dilations: Sequence[int | Pair],
    stride: int | Pair = 1,
    groups: int = 1,
    algorithm: str | None = None,
    precision: str = "fast",
) -> Tensor:
    mix = _per_channel(mix, weight.shape[1])
    wide, strides = x.to(mix.dtype), pair("stride", stride)
    total = None
    for dilation, kernel, column in zip(checked_dilations(dilations), weight.to(mix.dtype), mix, strict=True):
        term = column[:, None, None] * same_conv2d(wide, kernel, dilation, strides, groups)
        total = term if total is None else total + term
    assert total is not None
    return in_layout_of(total.to(x.dtype), x)


def _folded(
    x: Tensor,
    weight: Tensor,
    mix: Tensor,
    dilations: Sequence[int | Pair],
    stride: int | Pair = 1,
    groups: int = 1,
    algorithm: str | None = None,
    precision: str = "fast",
) -> Tensor:
    """The mixture taken into the kernels: autograd then keeps scaled kernels and no branch's output.

    The reference's form where a kernel is larger than the map that it makes: there the maps are cheaper to scale.
    """
    strides = pair("stride", stride)
    places = x.shape[0] * -(-x.shape[2] // strides[0]) * -(-x.shape[3] // strides[1])
    if not torch.compiler.is_exporting() and places < weight[0, 0].numel():
        return _reference(x, weight, mix, dilations, strides, groups)
    return _with_folded_kernels(x, weight, mix, checked_dilations(dilations), strides, groups, mix.dtype)


def _with_folded_kernels(
    x: Tensor, weight: Tensor, mix: Tensor, dilations: Sequence[Pair], stride: Pair, groups: int, dtype: torch.dtype
) -> Tensor:
    """One of torch's convolutions in ``dtype`` for each dilation, with kernels that hold the mixture; their sum in
    the dtype of ``mix``."""
    kernels = (weight.to(mix.dtype) * _per_channel(mix, weight.shape[1])[:, :, None, None, None]).to(dtype)
    wide, total = x.to(dtype), None
    for dilation, kernel in zip(dilations, kernels, strict=True):
        term = same_conv2d(wide, kernel, dilation, stride, groups)
        total = term.to(mix.dtype) if total is None else total.add_(term)
    assert total is not None
    return in_layout_of(total.to(x.dtype), x)


define("mixed_dilation_conv2d", ("x", "weight", "mix"), ("dilations",))


def _raw(
    op: Any,
    x: Tensor,
    weight: Tensor,
    mix: Tensor,
    dilations: Sequence[Pair],
    stride: Pair,
    groups: int,
    algorithm: str | None,
    precision: str,
) -> Tensor:
    mix = _per_channel(mix, weight.shape[1])
    return op(x, weight, mix, flat(dilations), *stride, groups, algorithm_code(algorithm, precision))


def _run_compiled(x: Tensor, weight: Tensor, mix: Tensor, *arguments: Any) -> Tensor:
    pairs, strides, groups, algorithm, precision = arguments
    if algorithm is not None and holds_data(x):
        chosen_algorithm(x, weight, pairs, (), strides, groups, algorithm, precision)
    if algorithm is None and _torch_mixes_faster(x, weight, mix, strides, groups):
        return _with_folded_kernels(x, weight, mix, pairs, strides, groups, x.dtype)
    arguments = (x, weight, mix, *arguments)
    return _raw(torch.ops.nasdet.mixed_dilation_conv2d, *arguments)


def _torch_mixes_faster(x: Tensor, weight: Tensor, mix: Tensor, stride: Pair, groups: int) -> bool:
    """In bfloat16 with several groups on large maps, where no gradient follows: see :func:`torch_is_faster`.

    With matrix tiles only a single dilation, a plain convolution.
    """
    candidate = weight.shape[0] == 1 if has_tiles(x) else groups > 1
    if not candidate or x.dtype != torch.bfloat16 or (torch.is_grad_enabled() and mix.requires_grad):
        return False
    if torch.compiler.is_exporting():  # a program for maps of any size
        return False
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return pixels >= LARGE_MAP and torch_is_faster(x, weight[0], stride, groups)


def _run_triton(*arguments: Any) -> Tensor:
    from nasdet.ops._triton import ensure_registered

    ensure_registered("mixed_dilation_conv2d")
    return _raw(torch.ops.nasdet.mixed_dilation_conv2d_triton, *arguments)


def _map(x: Tensor, *_: Any) -> Tensor:
    return x


def _operands(inputs: Inputs, x: Sequence[int], weight: Sequence[int], columns: int, layout: str) -> list[Tensor]:
    fan = weight[-3] * weight[-1] ** 2
    kernels = inputs.randn(*weight, scale=fan**-0.5)
    mix = torch.stack([inputs.weights(weight[0]) for _ in range(columns)], dim=1)
    return [inputs.randn(*x, layout=layout), kernels, mix]


def _case(
    name: str,
    x: tuple[int, int, int, int],
    out_channels: int,
    dilations: Sequence[int | Pair],
    *,
    kernel: int = 3,
    stride: int | Pair = 1,
    groups: int = 1,
    columns: int | None = None,
    layout: str = "contiguous",
    large: bool = False,
) -> Case:
    weight = (len(dilations), out_channels, x[1] // groups, kernel, kernel)

    def make(inputs: Inputs) -> tuple[list[Any], dict[str, Any]]:
        operands = _operands(inputs, x, weight, columns or out_channels, layout)
        return [*operands, dilations, stride, groups], {}

    return Case(name, make, large=large)


_C3: tuple[int | Pair, ...] = (1, 2, 3, (1, 3), (3, 1))  # NATS's set C in stages 3 and 4, and in stage 5
_C5: tuple[int | Pair, ...] = (1, 2, 3, 4, 5, (1, 3), (3, 1), (1, 5), (5, 1))

OP = _dispatch.register(
    _dispatch.Op(
        name="mixed_dilation_conv2d",
        call=mixed_dilation_conv2d,
        reference=_reference,
        backends=(
            _dispatch.compiled_backend("cpp", "mixed_dilation_conv2d", _run_compiled, _map),
            _dispatch.triton_backend(_run_triton, _map),
            _dispatch.Backend("folded", _folded, torchs_own, _dispatch.never),
            _dispatch.Backend("reference", _reference, torchs_own, _dispatch.never),
        ),
        reduce_len=lambda x, weight, *_: weight.shape[0] * weight[0, 0].numel(),
        differentiable=(0, 1, 2),
        cases=(
            _case("set-c", (2, 8, 9, 11), 8, _C3),
            _case("set-c-stage-5", (1, 6, 12, 10), 4, _C5, columns=2),
            _case("one-dilation", (2, 5, 6, 7), 4, (2,)),
            _case("slices", (1, 4, 7, 7), 12, (1, 2, (3, 1)), columns=3),
            _case("stride-2", (2, 4, 9, 12), 6, _C3, stride=2),
            _case("uneven-stride", (1, 3, 8, 9), 4, (1, (2, 3)), stride=(1, 2)),
            _case("1x1", (2, 5, 4, 6), 3, (1, 2, 5), kernel=1),
            _case("1x1-stride-2", (1, 3, 5, 5), 2, (1, 3), kernel=1, stride=2),
            _case("5x5", (1, 3, 9, 10), 4, (1, 2, (1, 2)), kernel=5),
            _case("two-groups", (1, 6, 7, 5), 4, (1, 3), groups=2),
            _case("resnext", (1, 32, 7, 6), 32, _C3, groups=8, columns=8),
            _case("resnext-stride-2", (1, 32, 7, 6), 32, (1, 2, (3, 1)), groups=8, columns=4, stride=2),
            _case("depthwise", (2, 7, 6, 5), 7, (1, 2), groups=7),
            _case("one-channel", (2, 1, 6, 7), 1, (1, 2, (1, 3))),
            _case("odd-channels", (1, 3, 6, 7), 17, (1, 2, (1, 3))),
            _case("seventeen-in", (1, 17, 5, 6), 3, (1, (3, 1)), layout="channels_last"),
            _case("one-pixel", (2, 4, 1, 1), 5, _C3),
            _case("two-by-three", (1, 4, 2, 3), 4, _C5),
            _case("dilation-beyond-the-map", (1, 3, 4, 5), 3, (9, (1, 7), 4)),
            _case("channels-last", (2, 8, 7, 9), 16, _C3, layout="channels_last", columns=4),
            _case("channels-last-stride-2", (2, 16, 7, 8), 8, _C3, layout="channels_last", stride=2),
            _case("sliced", (2, 4, 6, 7), 4, (1, 2), layout="sliced"),
            _case("transposed", (2, 4, 6, 7), 4, (1, (2, 1)), layout="transposed"),
            _case("expanded", (3, 4, 5, 5), 4, (1, 2), layout="expanded"),
            _case("empty", (0, 4, 5, 6), 3, (1, 2)),
            *(
                _case(f"c{c}-n{n}", (n, c, h, w), c, _C5 if c == 512 else _C3, layout="channels_last", large=True)
                for c, h, w in ((128, 100, 152), (256, 50, 76), (512, 25, 38))
                for n in (1, 2)
            ),
            _case("c128-stride-2", (1, 128, 200, 304), 128, _C3, layout="channels_last", stride=2, large=True),
            _case("x101-stage-3", (1, 256, 100, 152), 256, _C3, layout="channels_last", groups=32, large=True),
            _case("batch-8-small-maps", (8, 64, 16, 24), 64, _C3, layout="channels_last", large=True),
            _case("c128-n1-nchw", (1, 128, 100, 152), 128, _C3, large=True),
        ),
    )
)
