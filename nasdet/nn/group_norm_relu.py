"""Group normalisation and ReLU in one op: what follows nearly every convolution of a detection head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from nasdet.ops import norm_act_mix


def group_norm_relu(x: Tensor, norm: nn.GroupNorm, *, overwrite: bool = False, backend: str | None = None) -> Tensor:
    """``relu(norm(x))`` for ``x [N, C, H, W]``, without storing the normalised map; ``norm`` must have a weight.

    ``overwrite`` lets backward write into ``x``: see :func:`nasdet.ops.norm_act_mix`.
    """
    if norm.weight is None:
        raise ValueError("norm must be affine, got a GroupNorm without weight and bias")
    how = {"eps": norm.eps, "overwrite_inputs": overwrite, "backend": backend}
    return _normed(x, norm.weight, norm.bias, norm.num_groups, **how)


def _normed(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, **how: Any) -> Tensor:
    bias = torch.zeros_like(weight) if bias is None else bias
    return norm_act_mix([x], weight.new_ones(1), weight.unsqueeze(0), bias.unsqueeze(0), groups, **how)


torch.fx.wrap("_normed")  # one node in a graph that torch.fx traces: the op looks at real tensors


class GroupNormReLU(nn.GroupNorm):
    """Drop-in for ``nn.Sequential(nn.GroupNorm(...), nn.ReLU())`` on ``[N, C, H, W]``; its parameters are GroupNorm's,
    and always there: it has no ``affine=False`` and no ``bias=False``.

    Half the memory traffic, and one map less in memory: backward recomputes what it needs from the input.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        backend: str | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_groups, num_channels, eps, device=device, dtype=dtype)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        return group_norm_relu(x, self, backend=self.backend)
