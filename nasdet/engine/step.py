"""One step of training: forward, backward, clipping, optimiser."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nasdet.data.transforms import Batch
from nasdet.engine.distributed import average_gradients
from nasdet.engine.optim import clip_gradients, set_lr


def train_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    lr: float,
    *,
    clip: float | None = None,
    amp: bool = False,
    average: bool = False,
) -> dict[str, Tensor]:
    """Train ``module`` (a :class:`~nasdet.engine.distributed.LossModule`) once on a batch that is on its device.

    ``lr`` is the rate of all parameter groups in this step, ``clip`` bounds the gradient's 2-norm, ``amp`` computes in
    bfloat16. ``average`` takes the mean of the gradients over all processes; DDP does so by itself. A parameter without
    part in the loss keeps the gradient None, so the optimiser leaves it as it is, decay and momentum included. Returns
    ``loss``, its terms by name, and ``grad_norm``, before clipping.
    """
    set_lr(optimizer, lr)
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=amp):
        terms: dict[str, Tensor] = module(batch.images, batch.targets)
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()  # type: ignore[no-untyped-call]  # torch's stub lacks the annotation
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if average:
        average_gradients(parameters)
    norm = clip_gradients(parameters, clip)
    optimizer.step()
    return {"loss": loss, **terms, "grad_norm": norm}
