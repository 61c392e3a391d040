"""The one place that makes normalisation layers: batch, frozen batch, synchronised batch and group norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from nasdet.detectors.parts.losses import at_least_float32
from nasdet.nn import AcceleratedConv2d, DepthwiseConv2d, GroupedDilationConv2d

NORMS = ("bn", "frozen_bn", "sync_bn", "gn")


class FrozenBatchNorm2d(nn.Module):
    """Batch norm whose statistics and affine terms never change: ``weight * (x - mean) / sqrt(var + eps) + bias``.

    All four are buffers under batch norm's own names, so weights trained with batch norm load as they are, and the
    layer has no parameters. Freshly made it is the identity (up to ``eps``). The output has the input's dtype.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.channels = channels
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        """``x`` is ``[N, C, H, W]``; so is the result."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)

    def extra_repr(self) -> str:
        return f"{self.channels}, eps={self.eps}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)  # batch norm's counter has no meaning here
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def conv_norm(conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(conv(x))``; the norm goes into the convolution's weight where it is a fixed affine map of each channel.

    That is a frozen batch norm, and batch norm in evaluation mode. The map between the two, which is as large as the
    result, is then neither made nor kept for backward. Gradients are the same, to rounding. Where somebody listens by
    hooks, and in traced and exported graphs, both modules are called.
    """
    if not _folds(conv, norm):
        return norm(conv(x))
    return _folded(conv, norm, x)


def in_sequence(layers: Sequence[nn.Module], x: Tensor) -> Tensor:
    """``layers`` one after the other, each norm that follows a convolution by :func:`conv_norm`."""
    index = 0
    while index < len(layers):
        two = index + 1 < len(layers) and _folds(layers[index], layers[index + 1])
        x = _folded(layers[index], layers[index + 1], x) if two else layers[index](x)
        index += 1 + two
    return x


class FoldingSequential(nn.Sequential):
    """``nn.Sequential`` that runs its modules :func:`in_sequence`."""

    def forward(self, input: Tensor) -> Tensor:
        return in_sequence(list(self), input)


def _folded(conv: Any, norm: Any, x: Tensor) -> Tensor:
    weight, bias, mean, var = (
        at_least_float32(value) for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    )
    scale = weight * torch.rsqrt(var + norm.eps)
    kernels = (at_least_float32(conv.weight) * scale[:, None, None, None]).to(conv.weight.dtype)
    y: Tensor = conv._conv_forward(x, kernels, (bias - mean * scale).to(conv.weight.dtype))
    return y


def _folds(conv: nn.Module, norm: nn.Module) -> bool:
    if (
        type(conv) not in (nn.Conv2d, AcceleratedConv2d, DepthwiseConv2d, GroupedDilationConv2d)
        or conv.bias is not None
    ):
        return False
    evaluated = type(norm) is nn.BatchNorm2d and not norm.training and norm.running_mean is not None and norm.affine
    if not evaluated and type(norm) is not FrozenBatchNorm2d:
        return False
    listened = any(
        hooks
        for module in (conv, norm)
        for hooks in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    )
    return not (listened or torch.compiler.is_exporting() or torch.jit.is_tracing())


class _SumOverRanks(torch.autograd.Function):
    """All-reduce (sum); its adjoint is the same sum of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


class SyncBatchNorm(nn.SyncBatchNorm):
    """``torch.nn.SyncBatchNorm`` that also synchronises on the CPU (gloo), where torch's own refuses.

    Statistics are over the samples of all ranks, weighted by their counts; computed in float32. Where no rank has a
    sample, the running ones stay as they are.
    """

    def forward(self, input: Tensor) -> Tensor:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if input.device.type != "cpu" or not self.training or not several:
            return super().forward(input)
        x = input.float()
        axes = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = x.new_full((1,), x.numel() // x.shape[1])
        sums = _SumOverRanks.apply(torch.cat([x.sum(axes), count]))
        total = sums[-1].detach().clamp(min=1.0)  # no rank has a sample: 0 / 1, and nothing to track
        # Two passes, as E[x^2] - E[x]^2 cancels where the mean is large.
        centred = x - (sums[:-1] / total).view(shape)
        variance = _SumOverRanks.apply(centred.square().sum(axes)) / total
        if float(sums[-1].detach()):
            self._track((sums[:-1] / total).detach(), variance.detach(), total)
        y = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.float().view(shape) + self.bias.float().view(shape)
        return y.to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor, count: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        rate = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        unbiased = variance * (count / (count - 1).clamp(min=1.0))
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), rate)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), rate)


class GroupNorm(nn.GroupNorm):
    """Group norm (Wu and He, 2018) that also takes one value per group, as on a 1x1 map of a narrow pyramid.

    There the normalised value is 0 and the output the bias, where torch's module refuses to run.
    """

    def forward(self, input: Tensor) -> Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def group_count(channels: int, most: int = 32) -> int:
    """The largest divisor of ``channels`` that is at most ``most``: the number of groups for group norm."""
    if channels < 1 or most < 1:
        raise ValueError(f"channels and most must be positive, got {channels} and {most}")
    return next(groups for groups in range(min(channels, most), 0, -1) if channels % groups == 0)


def group_norm(channels: int) -> GroupNorm:
    """Group norm with 32 groups, or the largest smaller number that divides ``channels``."""
    return GroupNorm(group_count(channels), channels)


def norm_layer(kind: str, channels: int) -> nn.Module:
    """A normalisation layer over ``channels``: ``kind`` is one of :data:`NORMS`."""
    if kind == "bn":
        return nn.BatchNorm2d(channels)
    if kind == "frozen_bn":
        return FrozenBatchNorm2d(channels)
    if kind == "sync_bn":
        return SyncBatchNorm(channels)
    if kind == "gn":
        return group_norm(channels)
    raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {kind!r}")
