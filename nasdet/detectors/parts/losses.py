"""Losses of one-stage detectors. Half precision is computed in float32; float32 and float64 stay what they are."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from nasdet.detectors.parts.boxes import giou
from nasdet.ops.sigmoid_focal_loss import sigmoid_focal_loss as focal_loss


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32 if it is of lower precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def sigmoid_focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Focal loss summed over everything: a scalar.

    ``sum -a_t (1 - p_t)^gamma log(p_t)``, ``p_t`` and ``a_t`` being p and alpha where the class is the location's,
    1 - p and 1 - alpha elsewhere. ``logits`` ``[..., K]``; ``labels`` int64 ``[...]`` in 0..K-1, or -1 for background.
    (Lin et al., 2017, equation 5.)
    """
    logits = at_least_float32(logits)
    targets = (labels.unsqueeze(-1) == torch.arange(logits.shape[-1], device=logits.device)).to(logits.dtype)
    return focal_loss(logits, targets, alpha, gamma, "sum")


def giou_loss(boxes: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """``sum_i w_i (1 - GIoU_i)`` over boxes ``[..., 4]`` and weights ``[...]``: a scalar."""
    return (at_least_float32(weights) * (1.0 - giou(at_least_float32(boxes), at_least_float32(targets)))).sum()


def centerness_target(distances: Tensor) -> Tensor:
    """``sqrt(min(l,r)/max(l,r) * min(t,b)/max(t,b))`` of distances ``[..., 4]`` in (l, t, r, b); FCOS, equation 3.

    In [0, 1]; 0 for points outside their box.
    """
    opposite = torch.stack([distances[..., :2], distances[..., 2:]], dim=-1)
    small, large = opposite.amin(dim=-1).clamp(min=0), opposite.amax(dim=-1)
    ratio = small / large.clamp(min=torch.finfo(distances.dtype).tiny)
    return (ratio[..., 0] * ratio[..., 1]).sqrt()


def centerness_loss(logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Binary cross-entropy with targets in [0, 1], weighted and summed; all of shape ``[...]``."""
    logits = at_least_float32(logits)
    return (weights * F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")).sum()


def world_size() -> int:
    """The number of processes of a distributed run, or 1."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(value: Tensor) -> Tensor:
    """The mean of ``value`` over the processes of a distributed run; ``value`` itself in a single one. No gradient."""
    value = value.detach()
    if world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / world_size()
