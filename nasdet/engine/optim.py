"""SGD as detectors use it, learning-rate schedules as pure functions of the step, and gradient clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)


OPTIMIZERS = ("sgd", "adamw")
DECAYS = ("step", "cosine", "linear", "constant")


def make_optimizer(
    name: str, model: nn.Module, lr: float, *, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The papers' ``"sgd"``, or ``"adamw"``, which learns in far fewer steps from random weights.

    Both leave out what asks for no gradient; AdamW spares norms and biases from weight decay.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, got {name!r}")
    if name == "sgd":
        return make_sgd(model, lr, momentum=momentum, weight_decay=weight_decay)
    groups = make_sgd(model, lr, weight_decay=weight_decay, decay_norm=False, decay_bias=False).param_groups
    kept = [{"params": group["params"], "weight_decay": group["weight_decay"]} for group in groups]
    return torch.optim.AdamW(kept, lr=lr)


def make_sgd(
    model: nn.Module,
    lr: float,
    *,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    decay_norm: bool = True,
    decay_bias: bool = True,
    exclude: Iterable[Tensor] = (),
) -> torch.optim.SGD:
    """SGD with momentum over the parameters of ``model`` that ask for a gradient.

    ``decay_norm=False`` and ``decay_bias=False`` spare the affine parameters of normalisation layers and the biases of
    all other layers from weight decay. ``exclude`` are parameters that belong to another optimiser, such as the
    architecture parameters of a search. Raises ``ValueError`` for numbers out of range, or when nothing is left.
    """
    for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number >= 0, got {value}")
    seen = {id(parameter) for parameter in exclude}
    decayed: list[Tensor] = []
    spared: list[Tensor] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            is_norm = isinstance(module, _NORMS)
            spare = (is_norm and not decay_norm) or (name == "bias" and not is_norm and not decay_bias)
            (spared if spare else decayed).append(parameter)
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError("model must have parameters to train, got none that ask for a gradient")
    return torch.optim.SGD(groups, lr=lr, momentum=momentum)


def scaled_lr(lr: float, batch: int, reference_batch: int = 16) -> float:
    """The linear scaling rule: ``lr * batch / reference_batch``; the papers' rates are for 16 images a step."""
    return lr * batch / reference_batch


def other_rate(words: str, rates: tuple[float, float], batches: tuple[int, int]) -> list[str]:
    """A line of deviations where our learning rate is not the paper's by :func:`scaled_lr`; both are given, ours first,
    and the images a step."""
    (ours, theirs), (batch, their_batch) = rates, batches
    if math.isclose(ours, scaled_lr(theirs, batch, their_batch)):
        return []
    return [f"{words}: {ours:g} for {batch} images a step; the paper: {theirs:g} for {their_batch}"]


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a pure function of the step (from 0): ``lr * warm-up(step) * decay(step)``.

    ``decay``: ``"step"`` multiplies by ``gamma`` at each of ``milestones``, fractions of ``steps`` (2/3 and 8/9 are 60k
    and 80k of 90k); ``"cosine"`` falls from 1 to ``final``, half a cosine over the ``steps``, ``"linear"`` along a
    straight line; ``"constant"`` is 1.
    ``warmup``: ``"linear"`` rises from ``warmup_factor`` to 1 over ``warmup_steps``; ``"constant"`` stays at
    ``warmup_factor`` for as long; ``"none"``. ``warmup_steps=None`` means 500, or a tenth of a run shorter than 5,000.
    """

    lr: float
    steps: int
    decay: str = "step"
    milestones: tuple[float, ...] = (2 / 3, 8 / 9)
    gamma: float = 0.1
    warmup: str = "linear"
    warmup_steps: int | None = None
    warmup_factor: float = 1 / 3
    final: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.lr) and self.lr >= 0):
            raise ValueError(f"lr must be a finite number >= 0, got {self.lr}")
        if self.steps < 1:
            raise ValueError(f"steps must be positive, got {self.steps}")
        if self.decay not in DECAYS:
            raise ValueError(f"decay must be one of {', '.join(DECAYS)}, got {self.decay!r}")
        if self.warmup not in ("linear", "constant", "none"):
            raise ValueError(f"warmup must be 'linear', 'constant' or 'none', got {self.warmup!r}")
        if not all(0 < milestone <= 1 for milestone in self.milestones):
            raise ValueError(f"milestones must be fractions of the steps in (0, 1], got {self.milestones}")
        if self.warmup_steps is not None and self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be >= 0, got {self.warmup_steps}")
        if not 0 <= self.warmup_factor <= 1:
            raise ValueError(f"warmup_factor must be in 0..1, got {self.warmup_factor}")
        if not 0 <= self.final <= 1:
            raise ValueError(f"final must be in 0..1, got {self.final}")

    def at(self, step: int) -> float:
        """The rate of ``step``."""
        return self.lr * self._warmup(step) * self._decay(step)

    def _warmup(self, step: int) -> float:
        length = min(500, self.steps // 10) if self.warmup_steps is None else self.warmup_steps
        if self.warmup == "none" or step >= length:
            return 1.0
        if self.warmup == "constant":
            return self.warmup_factor
        return self.warmup_factor + (1.0 - self.warmup_factor) * step / length

    def _decay(self, step: int) -> float:
        if self.decay == "constant":
            return 1.0
        if self.decay == "linear":
            return 1.0 + (self.final - 1.0) * min(step, self.steps) / self.steps
        if self.decay == "cosine":
            cosine = 0.5 * (1.0 + math.cos(math.pi * min(step, self.steps) / self.steps))
            return self.final + (1.0 - self.final) * cosine
        return self.gamma ** sum(step >= round(milestone * self.steps) for milestone in self.milestones)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group the rate ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Scale all gradients so that their common 2-norm is at most ``max_norm`` (``None``: any); returns the old norm."""
    limit = math.inf if max_norm is None else max_norm
    if not limit > 0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if max_norm is not None:
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_(gradients, scale)
    return norm
