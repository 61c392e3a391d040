"""First-order bilevel search: architecture parameters and weights take turns, each on data of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Loss = Callable[[], Tensor]


class Bilevel:
    """Alternate descent (DARTS's first-order form, which FAD uses; Liu et al., ICLR 2019, section 2.3)::

        alpha <- alpha - Adam(d L_arch(w, alpha) / d alpha)        on architecture data
        w     <- w     - SGD (d L_weight(w, alpha) / d w)          on weight data

    While one side moves, the other's parameters take no part in autograd: they get no gradient, and no graph is kept
    for them, so the architecture step costs no backward pass below the searched part. The optimisers hold disjoint
    parameters.

    Args:
        weight_parameters: the supernet's and detector's weights; those that need no gradient (frozen) are left out.
        arch_parameters: the alphas.
        lr, momentum, weight_decay: of SGD (FAD's released search: 0.004, 0.9, 1e-4).
        clip: largest L2 norm of the weights' gradient; None: no clipping (20).
        schedule: the learning rate of a step, counted from 0; None: ``lr`` throughout.
        arch_lr, arch_betas, arch_weight_decay: of Adam (3e-4, (0.5, 0.999), 1e-3).

    Raises ``ValueError`` for an empty side or a parameter on both.
    """

    def __init__(
        self,
        weight_parameters: Iterable[nn.Parameter],
        arch_parameters: Iterable[nn.Parameter],
        *,
        lr: float = 0.004,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        clip: float | None = 20.0,
        schedule: Callable[[int], float] | None = None,
        arch_lr: float = 3e-4,
        arch_betas: tuple[float, float] = (0.5, 0.999),
        arch_weight_decay: float = 1e-3,
    ) -> None:
        self.weights = [parameter for parameter in weight_parameters if parameter.requires_grad]
        self.alphas = list(arch_parameters)
        if not self.weights or not self.alphas:
            sizes = f"{len(self.weights)} and {len(self.alphas)}"
            raise ValueError(f"weight_parameters and arch_parameters must not be empty, got {sizes}")
        if shared := {id(p) for p in self.weights} & {id(p) for p in self.alphas}:
            raise ValueError(f"arch_parameters must not be among weight_parameters, got {len(shared)} in both")
        if clip is not None and not (clip > 0 and math.isfinite(clip)):
            raise ValueError(f"clip must be positive or None, got {clip}")
        self.clip = clip
        self.schedule = schedule
        self.weight_optimizer = torch.optim.SGD(self.weights, lr=lr, momentum=momentum, weight_decay=weight_decay)
        self.arch_optimizer = torch.optim.Adam(
            self.alphas, lr=arch_lr, betas=arch_betas, weight_decay=arch_weight_decay
        )

    def step(self, index: int, weight_loss: Loss, arch_loss: Loss) -> dict[str, Tensor]:
        """One architecture step, then one weight step; step ``index`` from 0.

        The losses are functions, called in turn; each must run the model and return a scalar. Returns ``arch_loss``,
        ``loss`` and ``grad_norm`` (of the weights, before clipping) as detached scalars.
        """
        arch = self.arch_step(arch_loss)
        return {"arch_loss": arch, **self.weight_step(index, weight_loss)}

    def arch_step(self, loss: Loss) -> Tensor:
        """Move the alphas; no weight changes, and none has a gradient afterwards."""
        self.arch_optimizer.zero_grad(set_to_none=True)
        with _held(self.weights):
            value = loss()
            _backward(value, "arch_loss")
        self.arch_optimizer.step()
        self.arch_optimizer.zero_grad(set_to_none=True)
        return value.detach()

    def weight_step(self, index: int, loss: Loss) -> dict[str, Tensor]:
        """Move the weights; no alpha changes."""
        if self.schedule is not None:
            for group in self.weight_optimizer.param_groups:
                group["lr"] = self.schedule(index)
        self.weight_optimizer.zero_grad(set_to_none=True)
        with _held(self.alphas):
            value = loss()
            _backward(value, "weight_loss")
        norm = nn.utils.clip_grad_norm_(self.weights, math.inf if self.clip is None else self.clip)
        self.weight_optimizer.step()
        self.weight_optimizer.zero_grad(set_to_none=True)
        return {"loss": value.detach(), "grad_norm": norm.detach()}


@contextmanager
def _held(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Take parameters out of autograd for a while."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _backward(value: Tensor, name: str) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must return a scalar tensor, got {got}")
    if not value.requires_grad:
        raise ValueError(f"{name} must depend on the parameters of its side, got a constant")
    value.backward()
