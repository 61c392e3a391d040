"""What the two multi-dilation convolutions share: their checks, and the convolution that their references call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from nasdet import _library
from nasdet._checks import check_whole, plain_int
from nasdet._library import LIBRARY
from nasdet.ops._checks import FLOATS

Pair = tuple[int, int]

ALGORITHMS = ("direct", "frequency", "winograd")
FASTEST, FASTEST_EXACT = 0, 4  # to the raw ops; between them the places of ALGORITHMS, counted from 1
PRECISIONS = ("fast", "exact")
LARGEST_KERNEL = 255
LARGEST = 2**30  # dilations, strides and paddings are below
LARGE_MAP = 2048  # pixels of all images, from which several calls of torch cost little beside their work
# once: a look-up per call would break torch.compile's graph
_BFLOAT16_PRODUCTS = _library.cpu_isa() in ("avx512_bf16", "amx")
_BFLOAT16_TILES = _library.cpu_tiles() == "hardware"


def pair(name: str, value: Any) -> Pair:
    """A positive int below 2**30, or two of them, as (vertical, horizontal)."""
    first, second = value if isinstance(value, (tuple, list)) and len(value) == 2 else (value, value)
    if type(first) is int is type(second) and 0 < first < LARGEST and 0 < second < LARGEST:
        return first, second  # as nearly always: a call of an op makes several pairs
    first, second = plain_int(first), plain_int(second)
    if not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in (first, second)):
        raise ValueError(f"{name} must be a positive integer or a pair of them, got {value!r}")
    if max(first, second) >= LARGEST:
        raise ValueError(f"{name} must be below 2**30, got {value!r}")
    return first, second


def checked_dilations(dilations: Any) -> tuple[Pair, ...]:
    """A non-empty sequence of dilations, each an int or (vertical, horizontal), as pairs."""
    if isinstance(dilations, (str, Tensor)) or not isinstance(dilations, Sequence):
        raise TypeError(f"dilations must be a sequence of integers or pairs, got {type(dilations).__name__}")
    if len(dilations) == 0:
        raise ValueError("dilations must hold at least one dilation, got none")
    return tuple([pair(f"dilations[{index}]", value) for index, value in enumerate(dilations)])


def checked_splits(splits: Any, count: int, channels: int, groups: int) -> tuple[int, ...]:
    """Output channels per dilation: positive, ``count`` of them, summing to ``channels``, no convolution group cut."""
    if isinstance(splits, (str, Tensor)) or not isinstance(splits, Sequence):
        raise TypeError(f"splits must be a sequence of integers, got {type(splits).__name__}")
    if len(splits) != count:
        raise ValueError(f"splits must have one entry for each of the {count} dilations, got {len(splits)}")
    sizes = tuple(check_whole(f"splits[{index}]", plain_int(value)) for index, value in enumerate(splits))
    if sum(sizes) != channels:
        raise ValueError(f"splits must sum to the {channels} output channels, got {sizes} with sum {sum(sizes)}")
    width = channels // groups
    if groups > 1:
        for index, size in enumerate(sizes):
            if size % width:
                raise ValueError(
                    f"splits[{index}] must cover whole convolution groups of {width} output channels, got {size}"
                )
    return sizes


def merged(dilations: Sequence[Pair], splits: Sequence[int]) -> tuple[tuple[Pair, ...], tuple[int, ...]]:
    """Neighbouring slices of one dilation as one slice: the same convolution in fewer parts."""
    kept: list[tuple[Pair, int]] = []
    for dilation, size in zip(dilations, splits, strict=True):
        if kept and kept[-1][0] == dilation:
            kept[-1] = dilation, kept[-1][1] + size
        else:
            kept.append((dilation, size))
    return tuple(dilation for dilation, _ in kept), tuple(size for _, size in kept)


def checked_algorithm(algorithm: str | None, precision: str) -> None:
    """The names of :data:`ALGORITHMS` (or None) and :data:`PRECISIONS`."""
    if algorithm is not None and algorithm not in ALGORITHMS:
        raise ValueError(f"algorithm must be one of {', '.join(ALGORITHMS)} or None, got {algorithm!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "exact" and algorithm == "winograd":
        raise ValueError("algorithm must not be 'winograd' with precision 'exact', which excludes it")


def algorithm_code(algorithm: str | None, precision: str) -> int:
    """The two arguments as the one of the raw ops."""
    if algorithm is not None:
        return ALGORITHMS.index(algorithm) + 1
    return FASTEST if precision == "fast" else FASTEST_EXACT


def chosen_algorithm(
    x: Tensor,
    weight: Tensor,
    dilations: Sequence[Pair],
    splits: Sequence[int],
    stride: Pair,
    groups: int,
    algorithm: str | None = None,
    precision: str = "fast",
    need_x: bool = False,
    need_weight: bool = False,
) -> str:
    """The algorithm that the C++ backend runs such a call with; ``splits`` is empty for the mixture. With a gradient
    needed, that of the backward.

    For tests, benchmarks and errors: it is not traced. Raises ValueError when the algorithm asked for cannot run.
    """
    with torch.no_grad():
        name, reason = torch.ops.nasdet._dilation_conv_choice(
            x.detach(),
            weight.detach(),
            flat(dilations),
            list(splits),
            *stride,
            groups,
            algorithm_code(algorithm, precision),
            need_x,
            need_weight,
        )
    if reason:
        raise ValueError(f"algorithm must be one that can run this call, got {algorithm!r}: {reason}")
    return str(name)


def has_tiles(x: Tensor) -> bool:
    """Whether the CPU multiplies maps of this dtype in matrix tiles (AMX)."""
    return _BFLOAT16_TILES and x.dtype == torch.bfloat16


def torch_is_faster(x: Tensor, weight: Tensor, stride: Pair, groups: int, slices: int = 1) -> bool:
    """Whether torch's convolutions, one for each of ``slices``, beat the C++ backend, by what was measured:

    - bfloat16 in one group, on a CPU with dot products of that type: oneDNN is a tenth faster. With matrix tiles it is
      for a single slice only, in groups as well; several are faster here in one call;
    - depthwise, which is bound by memory;
    - narrow groups (:func:`_narrow_groups_are_faster`), one group of float32 at a stride above 1 on large maps, and
      maps of a few pixels, in the forward. Where gradients follow they cost less here.
    """
    out_channels, fan = weight.shape[:2]
    single = x.dtype == torch.float32
    products, tiles = x.dtype == torch.bfloat16 and _BFLOAT16_PRODUCTS and weight.shape[-1] > 1, has_tiles(x)
    forward_only = not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
    if max(stride) > 1 and not forward_only:  # oneDNN's gradients of strided weights can be wrong for a few channels
        return False
    if products and groups == 1:
        return min(out_channels, fan) >= 32 and (slices == 1 or not tiles)
    if single and fan == 1 and out_channels == groups:
        return groups >= 32 and max(stride) == 1
    if not forward_only or not (single or products) or torch.compiler.is_exporting():  # a program for maps of any size
        return False
    n, _, height, width = same_size(x, out_channels, stride)
    pixels = n * height * width
    if max(stride) > 1:
        return groups == 1 and min(out_channels, fan) >= 64 and pixels >= LARGE_MAP
    if single and pixels <= 16 and fan >= 32:
        return True
    if tiles:
        return slices == 1 and groups > 1 and min(fan, out_channels // groups) >= 8
    return groups > 1 and fan >= 4 and _narrow_groups_are_faster(out_channels // groups, slices, pixels, products)


def _narrow_groups_are_faster(width: int, slices: int, pixels: int, products: bool) -> bool:
    """Groups of 4 to 8 output channels; of more where torch has bfloat16 products and one call does.

    On small maps the calls of several slices cost more than they save.
    """
    if slices > 1:
        return 4 <= width <= 8 and pixels >= LARGE_MAP
    return width >= 4 and (products or width <= 8)


def holds_data(x: Tensor) -> bool:
    """Whether this is a real call, not one that a compiler, an exporter or a transform traces."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if type(x) not in (Tensor, torch.nn.Parameter):  # a fake tensor has no values
        return False
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        return False
    transforms = torch._C._functorch
    return not transforms.is_functorch_wrapped_tensor(x) and not transforms.is_legacy_batchedtensor(x)


def flat(pairs: Sequence[Pair]) -> list[int]:
    """Pairs as the raw ops take them: vertical, horizontal, vertical, ..."""
    return [value for two in pairs for value in two]


def same_size(x: Tensor, channels: int, strides: Pair) -> tuple[int, int, int, int]:
    """The shape of a convolution's result."""
    return x.shape[0], channels, -(-x.shape[2] // strides[0]), -(-x.shape[3] // strides[1])


def empty_map(like: Tensor, shape: Sequence[int]) -> Tensor:
    """An empty map of ``shape`` in the layout that the ops give results for ``like``."""
    layout = torch.channels_last if is_channels_last(like) else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def is_channels_last(x: Tensor) -> bool:
    """Dense as NHWC, and not as NCHW too."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def checked_operands(x: Tensor, weight: Tensor, weight_axes: str, groups: int) -> tuple[Tensor, Tensor]:
    """Map and weight of a convolution; both in autocast's dtype where autocast is on, as for torch's ``conv2d``.

    ``weight_axes`` names the weight's dimensions, for the errors; the last four are (Cout, Cin / groups, k, k).
    """
    for name, value, axes in (("x", x, "N, Cin, H, W"), ("weight", weight, weight_axes)):
        if not isinstance(value, Tensor) or value.dtype not in FLOATS:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"{name} must be a float32, float64, float16 or bfloat16 tensor, got {kind}")
        if value.dim() != axes.count(",") + 1:
            raise ValueError(f"{name} must have shape ({axes}), got {tuple(value.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on {x.device}, got {weight.device}")
    *_, out_channels, fan, height, width = weight.shape
    if height != width or height % 2 == 0:
        raise ValueError(f"weight must have a square kernel of odd size, got {height}x{width}")
    if height > LARGEST_KERNEL:
        most = f"{LARGEST_KERNEL}x{LARGEST_KERNEL}"
        raise ValueError(f"weight must have a kernel of at most {most}, got {height}x{width}")
    check_whole("groups", groups)
    if x.shape[1] % groups or out_channels % groups or out_channels == 0:
        raise ValueError(
            f"groups must divide the {x.shape[1]} input and the {out_channels} output channels, got {groups}"
        )
    if fan * groups != x.shape[1] or fan == 0:
        raise ValueError(
            f"weight must have {x.shape[1]} / {groups} input channels for x with {x.shape[1]} channels and "
            f"groups = {groups}, got {fan}"
        )
    if x.shape[2] == 0 or x.shape[3] == 0:
        raise ValueError(f"x must have a height and width of at least 1, got {tuple(x.shape)}")
    return _in_one_dtype(x, weight)


def _in_one_dtype(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if autocasts(x) and torch.float64 not in (x.dtype, weight.dtype):
        dtype = torch.get_autocast_dtype(x.device.type)
        return x.to(dtype), weight.to(dtype)
    if weight.dtype != x.dtype:
        raise TypeError(f"weight must have the dtype of x, {x.dtype}, got {weight.dtype}")
    return x, weight


def autocasts(x: Tensor) -> bool:
    kind = x.device.type
    return kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind)


def finite_on_cpu(name: str, value: Tensor) -> None:
    """Refuse NaN and infinity where looking costs no wait: real CPU tensors, outside of tracing and transforms."""
    if value.device.type != "cpu" or not holds_data(value):
        return
    if not bool(value.detach().isfinite().all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")


def same_conv2d(x: Tensor, weight: Tensor, dilation: Pair, stride: Pair, groups: int) -> Tensor:
    """torch's ``conv2d`` padded so that stride 1 keeps the size; not touched by autocast, which came before."""
    radius = weight.shape[-1] // 2
    padding = (dilation[0] * radius, dilation[1] * radius)
    if weight.dtype == torch.float64:
        # With both operands channels_last torch 2.13's float64 gradient of the weight is wrong (groups) or raises.
        # Copied, for strides can say channels_last of a tensor that is contiguous too.
        weight = weight.clone(memory_format=torch.contiguous_format)
    if autocasts(x):
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x, weight, None, stride, padding, dilation, groups)
    return F.conv2d(x, weight, None, stride, padding, dilation, groups)


def in_layout_of(y: Tensor, x: Tensor) -> Tensor:
    """``y`` channels_last where ``x`` is (and is not also contiguous), else contiguous."""
    return y.contiguous(memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)


def torchs_own(*args: Any) -> str | None:
    """``why_not`` of a backend made of torch's convolution, which takes everything but an algorithm asked for; on the
    device "meta", where nothing is computed, also that."""
    algorithm = args[6] if len(args) > 6 and args[0].device.type != "meta" else None
    return None if algorithm is None else f"torch chooses for itself, {algorithm!r} cannot be asked for"


def define(op: str, operands: Sequence[str], lists: Sequence[str]) -> None:
    """The raw op ``nasdet::<op>`` (C++), the same with ``_triton``, and the backward of each.

    They take the tensors ``operands``, of which the first are the map and the weight, the integers ``lists``, the
    strides, ``groups`` and an algorithm's code; the backwards give a gradient for each operand that is wanted.
    """
    count = len(operands)
    options = ", ".join([*(f"Tensor {name}" for name in operands), *(f"int[] {name}" for name in lists)])
    options += ", int stride_h, int stride_w, int groups, int algorithm"
    needs, results = ", ".join(f"bool need_{name}" for name in operands), ", ".join(["Tensor"] * count)

    def fake(x: Tensor, weight: Tensor, *rest: Any) -> Tensor:
        return empty_map(x, same_size(x, weight.shape[-4], rest[-4:-2]))

    def fake_backward(grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        others, needed = rest[: count - 1], rest[-count:]
        dx = empty_map(x, x.shape) if needed[0] else x.new_empty(0)
        return dx, *(t.new_empty(t.shape if need else 0) for t, need in zip(others, needed[1:], strict=True))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:count])
        ctx.options = inputs[count:]

    def no_double_backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(f"{op} has no second derivative in this backend; use backend='reference'")

    def define_with(suffix: str) -> None:
        forward, backward = f"{op}{suffix}", f"{op}_backward{suffix}"
        LIBRARY.define(f"{forward}({options}) -> Tensor")
        LIBRARY.define(f"{backward}(Tensor grad, {options}, {needs}) -> ({results})")
        torch.library.register_fake(f"nasdet::{forward}", fake)
        torch.library.register_fake(f"nasdet::{backward}", fake_backward)

        def backward_formula(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            needed = ctx.needs_input_grad[:count]
            found = getattr(torch.ops.nasdet, backward)(grad, *ctx.saved_tensors, *ctx.options, *needed)
            return *(g if need else None for g, need in zip(found, needed, strict=True)), *(None for _ in ctx.options)

        torch.library.register_autograd(f"nasdet::{forward}", backward_formula, setup_context=setup_context)
        torch.library.register_autograd(f"nasdet::{backward}", no_double_backward)

    for suffix in ("", "_triton"):
        define_with(suffix)
