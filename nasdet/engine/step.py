"""One step of training: forward, backward, clipping, optimiser."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nasdet.data.transforms import Batch
from nasdet.engine.optim import clip_gradients, set_lr


def train_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    lr: float,
    *,
    clip: float | None = None,
    amp: bool = False,
) -> dict[str, Tensor]:
    """Train ``module`` (:func:`nasdet.engine.distributed.wrap`'s) once on a batch that is on its device.

    ``lr`` is the rate of all parameter groups in this step, ``clip`` bounds the gradient's 2-norm, ``amp`` computes in
    bfloat16. A parameter without part in the loss keeps the gradient None, so the optimiser leaves it as it is, decay
    and momentum included. Returns ``loss``, its terms by name, and ``grad_norm``, before clipping.
    """
    set_lr(optimizer, lr)
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=amp):
        terms: dict[str, Tensor] = module(batch.images, batch.targets)
    loss = torch.stack(list(terms.values())).sum()
    loss.backward()  # type: ignore[no-untyped-call]  # torch's stub lacks the annotation
    norm = clip_gradients((parameter for group in optimizer.param_groups for parameter in group["params"]), clip)
    optimizer.step()
    return {"loss": loss, **terms, "grad_norm": norm}
