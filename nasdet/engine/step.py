"""One step of training: forward, backward, clipping, optimiser."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nasdet.data.transforms import Batch
from nasdet.engine.distributed import average_gradients
from nasdet.engine.optim import clip_gradients, set_lr


def train_step(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch | Sequence[Batch],
    lr: float,
    *,
    clip: float | None = None,
    amp: bool = False,
    average: bool = False,
) -> dict[str, Tensor]:
    """Train ``module`` (a :class:`~nasdet.engine.distributed.LossModule`) once on a batch that is on its device.

    A batch that does not fit there comes in parts, of as many images each: what counts is the mean of their losses and
    gradients, as of as many processes, and norms and losses see one part.
    ``lr`` is the rate of all parameter groups in this step, ``clip`` bounds the gradient's 2-norm, ``amp`` computes in
    bfloat16. ``average`` takes the mean of the gradients over all processes; DDP does so by itself. A parameter without
    part in the loss keeps the gradient None, so the optimiser leaves it as it is, decay and momentum included. Returns
    ``loss``, its terms by name, and ``grad_norm``, before clipping.
    """
    set_lr(optimizer, lr)
    optimizer.zero_grad(set_to_none=True)
    parts = [batch] if isinstance(batch, Batch) else batch
    found: list[dict[str, Tensor]] = []
    for part in parts:
        with torch.autocast(part.images.device.type, torch.bfloat16, enabled=amp):
            terms: dict[str, Tensor] = module(part.images, part.targets)
        loss = torch.stack(list(terms.values())).sum()
        (loss / len(parts)).backward()
        found.append({"loss": loss.detach(), **{name: term.detach() for name, term in terms.items()}})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if average:
        average_gradients(parameters)
    norm = clip_gradients(parameters, clip)
    optimizer.step()
    means = {name: torch.stack([terms[name] for terms in found]).mean(0) for name in found[0]}
    return {**means, "grad_norm": norm}
