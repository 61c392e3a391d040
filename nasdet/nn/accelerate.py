"""``accelerate(model)``: the library's convolutions inside anybody's model, and the way back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType, TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nasdet.nn.depthwise_conv import DepthwiseConv2d, LibraryConv2d, add_bias, check_depthwise
from nasdet.nn.dilation_conv import check_same_conv2d, lay_out_weight
from nasdet.ops import depthwise_conv2d, grouped_dilation_conv2d
from nasdet.ops._dilation import autocasts, chosen_algorithm, holds_data, is_channels_last, torch_is_faster
from nasdet.ops.depthwise_conv2d import OP as DEPTHWISE
from nasdet.ops.grouped_dilation_conv2d import OP as DENSE

_TYPICAL = (1, 56, 84)  # images, height and width: a middle level of a detector's pyramid
_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_SMALL_CALL = 25_000_000  # products, below which an op's call costs more than its kernels save
_SMALL_MAP = 64  # pixels of all images, for which a forward does not repay making the weights ready


class AcceleratedConv2d(LibraryConv2d):
    """An ``nn.Conv2d`` whose forward on the CPU is :func:`nasdet.ops.grouped_dilation_conv2d` with one dilation, or of
    a depthwise one :func:`nasdet.ops.depthwise_conv2d`.

    :func:`accelerate` turns convolutions into it and back. It is ``nn.Conv2d`` elsewhere than on the CPU, in float64,
    for unbatched inputs, where TorchScript traces or compiles the model or it is exported, and, in float32 and unless
    depthwise, for so little work that a call of the op would take longer, and where padding, dilation or weight were
    changed to what the op does not take. ``torch.fx`` takes it as one call. Second derivatives of the library's kernels
    raise.
    """

    def _library_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _convolved(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    traced = torch.compiler.is_exporting() or torch.jit.is_tracing()
    ours = x.device.type == "cpu" and x.dim() == 4 and x.dtype in _TYPES
    if traced or not ours or not _is_odd_square(weight):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if weight.shape[1] == 1 and weight.shape[0] == groups > 1:
        return add_bias(depthwise_conv2d(x, weight, stride, padding, dilation), bias)
    if not _keeps_the_size(padding, dilation, weight) or _is_small(x, weight):
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)
    return add_bias(grouped_dilation_conv2d(x, weight, (dilation,), (weight.shape[0],), stride, groups), bias)


torch.fx.wrap("_convolved")  # one node in a graph that torch.fx traces: the choice looks at real tensors


def _is_odd_square(weight: Tensor) -> bool:
    """As when the module was accelerated, unless somebody put another weight into it."""
    return weight.shape[-1] == weight.shape[-2] and weight.shape[-1] % 2 == 1


def _keeps_the_size(padding: Any, dilation: Any, weight: Tensor) -> bool:
    """Whether a stride of 1 would; padding or dilation may have been set since, to whatever ``F.conv2d`` takes."""
    if not isinstance(dilation, tuple):
        return False
    return bool(padding in ("same", tuple(d * (weight.shape[-1] // 2) for d in dilation)))


def _is_small(x: Tensor, weight: Tensor) -> bool:
    """Of float32 alone: torch's convolutions of 16 bits are slow, and do not sum in 32 bits, on some processors."""
    if x.dtype != torch.float32 or autocasts(x):
        return False
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    return pixels * weight.numel() < _SMALL_CALL or (pixels <= _SMALL_MAP and not torch.is_grad_enabled())


def _shown(name: str) -> str:
    return name or "the model itself"


def _make_plain(module: nn.Module) -> bool:
    if type(module) is not AcceleratedConv2d:
        return False
    module.__class__ = nn.Conv2d  # type: ignore[assignment]  # back to the base class, on purpose
    return True


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return conv.groups == conv.in_channels == conv.out_channels > 1


class Acceleration:
    """What :func:`accelerate` did to a model, and the way back. Also a context manager; ``print`` shows it in words.

    Attributes:
        swapped: names of the convolutions that run on the library's kernels now.
        left: names of the other convolutions, and why each was left to torch.
    """

    def __init__(self, convs: Mapping[str, nn.Conv2d], left: Mapping[str, str]) -> None:
        self.swapped = tuple(convs)
        self.left = MappingProxyType(dict(left))
        self._convs = dict(convs)
        # The kernels take taps of a channel side by side, and give gradients so: nothing to turn at every call.
        self._turned = [conv for conv in convs.values() if is_channels_last(conv.weight)]
        for conv in self._turned:
            lay_out_weight(conv, torch.contiguous_format)

    @property
    def active(self) -> bool:
        """Whether this call's convolutions are still accelerated; a call that swapped none is never active."""
        return any(type(conv) is not nn.Conv2d for conv in self._convs.values())

    def undo(self) -> None:
        """Make the swapped convolutions plain ``nn.Conv2d`` again; again: no effect.

        Raises RuntimeError, after all others, for those that something else changed the class of since; they are left
        to another ``undo()``, when their class is back.
        """
        for conv in self._convs.values():
            _make_plain(conv)
        self._convs = {name: conv for name, conv in self._convs.items() if type(conv) is not nn.Conv2d}
        for conv in self._turned:
            if type(conv) is nn.Conv2d:
                lay_out_weight(conv, torch.channels_last)
        self._turned = [conv for conv in self._turned if type(conv) is not nn.Conv2d]
        if self._convs:
            changed = ", ".join(f"{_shown(name)} is a {type(conv).__name__}" for name, conv in self._convs.items())
            raise RuntimeError(f"accelerated convolutions must keep their class until undo(): {changed}")

    def __enter__(self) -> Acceleration:
        if self.swapped and not self.active:
            raise RuntimeError("this acceleration was undone already: call accelerate() again")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        total = len(self.swapped) + len(self.left)
        state = "" if self.active or not self.swapped else " (undone)"
        lines = [f"accelerated {len(self.swapped)} of {total} convolutions{state}"]
        lines += [f"  {_shown(name)}" for name in self.swapped]
        for reason, count in Counter(self.left.values()).items():
            names = [_shown(name) for name, why in self.left.items() if why == reason]
            shown = ", ".join(names[:3]) + (f" and {count - 3} more" if count > 3 else "")
            lines.append(f"left {count}: {reason} ({shown})")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Acceleration: {len(self.swapped)} swapped, {len(self.left)} left, active={self.active}>"


def accelerate(model: nn.Module) -> Acceleration:
    """Let the convolutions of ``model`` run on the library's CPU kernels wherever these are the faster ones.

    A convolution stays the module that it is: parameters, names in the state dict, hooks and options are untouched, and
    only its class changes, to :class:`AcceleratedConv2d`, and the order of its weight in memory, to contiguous, until
    ``undo()``; a weight in shared memory, or that is a part of a larger buffer, stays where it lies, and any other that
    is channels_last moves, away from a ``state_dict()`` taken before. Training and ``torch.compile`` work as before.
    Values agree with torch's to the rounding of float32 (Winograd's algorithm: 1e-6 relative).

    Swapped are plain ``nn.Conv2d`` on the CPU with an odd square kernel and zero padding: depthwise ones, and of
    others, of any dilation with "same" padding, those for which the op's cost model chooses one of its fast algorithms
    on maps of a usual size; these are above all 3x3 convolutions of stride 1 in one group. On CUDA nothing is swapped.
    ``model.to(memory_format=torch.channels_last)`` beforehand saves the copies between the layouts.

    Args:
        model: anything, from one convolution to a detector. It may be accelerated already, wholly or in part.

    Returns:
        An :class:`Acceleration`: what was swapped, what was left and why, ``undo()``. In ``with accelerate(model) as
        report:`` it holds until the end of the block. What was accelerated before is left, and is not undone by it.
        A copy of the model is accelerated too, and has no report: :func:`decelerate` is its way back.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
    """
    _check_model(model)
    convs: dict[str, nn.Conv2d] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            reason = _why_not(module)
            if reason is None:
                convs[name] = module
            else:
                left[name] = reason
    for conv in convs.values():
        conv.__class__ = AcceleratedConv2d
    return Acceleration(convs, left)


def decelerate(model: nn.Module) -> tuple[str, ...]:
    """Make all accelerated convolutions of ``model`` plain ``nn.Conv2d`` again, whoever accelerated them.

    For what has no :class:`Acceleration`: copies (``copy.deepcopy``, an average of the weights) and unpickled models.
    Weights keep their order in memory, which is contiguous; where there is a report its ``undo()`` turns them back too.

    Returns:
        The names of these convolutions.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
    """
    _check_model(model)
    return tuple(name for name, module in model.named_modules() if _make_plain(module))


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _why_not(conv: nn.Conv2d) -> str | None:
    """Why a convolution is left to torch, or None."""
    if type(conv) is AcceleratedConv2d:
        return "accelerated already"
    if type(conv) is DepthwiseConv2d:
        return "it runs on the library's kernels by itself"
    if "forward" in vars(conv) or "_conv_forward" in vars(conv):
        return "its forward was replaced"
    try:
        check = check_depthwise if _is_depthwise(conv) else check_same_conv2d
        check(conv, "it", kept=True)
    except (TypeError, ValueError) as error:
        return str(error)
    if conv.weight.device.type != "cpu":
        return f"its weight is on {conv.weight.device.type}, where torch's convolutions are left alone"
    if conv.weight.dtype not in _TYPES:
        return f"its weight is {conv.weight.dtype}"
    if not holds_data(conv.weight):
        return "its weight holds no data here"
    op = DEPTHWISE if _is_depthwise(conv) else DENSE
    compiled = next(backend for backend in op.backends if backend.name == "cpp")
    return compiled.available() or (None if _is_depthwise(conv) else _slower(conv))


@torch.no_grad()
def _slower(conv: nn.Conv2d) -> str | None:
    """Why the op would gain nothing on a map of a usual size, by its own rules, or None."""
    images, *size = _TYPICAL
    weight = conv.weight.detach()
    x = weight.new_empty(1).expand(images, conv.in_channels, *size)
    dilation, stride = (conv.dilation[0], conv.dilation[1]), (conv.stride[0], conv.stride[1])
    if torch_is_faster(x, weight, stride, conv.groups):
        return "torch's is faster"
    algorithm = chosen_algorithm(x, weight, (dilation,), (conv.out_channels,), stride, conv.groups)
    if algorithm == "direct" and weight.dtype == torch.float32:
        height, width = conv.kernel_size
        return f"torch's is as fast at a {height}x{width} kernel of stride {stride[0]} with such channels"
    return None
