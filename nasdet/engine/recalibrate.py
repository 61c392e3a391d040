"""Batch norm statistics for a path of a supernet, measured anew on a few training images."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

MODES = ("cumulative", "momentum")


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    mode: str = "cumulative",
    momentum: float = 0.1,
    forward: Callable[[Any], Any] | None = None,
) -> int:
    """Forget the running statistics of the model's batch norms and measure them on ``batches``.

    A supernet's running statistics are a mixture over all paths that it was trained with, and fit none of them. Those
    of every trainable batch norm are set to mean 0 and variance 1; then ``forward(batch)`` (default: ``model(batch)``)
    runs on each batch without gradients, the batch norms in training mode and all else in evaluation mode, as it will
    be when the model is scored: nothing random happens that ``forward`` does not do itself. Modes of all modules are
    afterwards what they were. Statistics of norms that do not run, as those off the path, stay 0 and 1; frozen ones
    (``FrozenBatchNorm2d``, norms of a backbone's frozen stages) are left alone, as are group norms. Synchronised norms
    take this process's images only, so that every process can recalibrate a path of its own.

    Args:
        mode: ``"cumulative"``: the plain mean over the batches of each batch's mean and unbiased variance (DetNAS: over
            500 images). ``"momentum"``: their running mean from 0 and 1 on, with ``momentum`` for each new batch
            (DetNAS's released code: 500 steps, 0.1).
        momentum: in (0, 1].

    Returns:
        The number of batches seen; 0, and no batch is taken, where no norm is to be measured.

    Raises:
        ValueError: an unknown mode, a momentum out of range, or no batch; the model is then as it was.

    Source: Chen et al., DetNAS, NeurIPS 2019, section 3.2; Guo et al., SPOS, ECCV 2020.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not 0 < momentum <= 1:
        raise ValueError(f"momentum must be in (0, 1], got {momentum}")
    forward = model if forward is None else forward
    with _measuring(model, None if mode == "cumulative" else momentum) as norms:
        if not norms:
            return 0
        iterator = iter(batches)
        try:
            first = next(iterator)
        except StopIteration:
            raise ValueError("batches must hold at least one batch to measure statistics on, got none") from None
        for norm in norms:
            norm.reset_running_stats()
        seen = 0
        with torch.no_grad():
            for batch in itertools.chain((first,), iterator):
                forward(batch)
                seen += 1
    return seen


@contextlib.contextmanager
def _measuring(model: nn.Module, momentum: float | None) -> Iterator[list[_BatchNorm]]:
    """The norms to measure, in training mode, local to this process and with ``momentum``; all else evaluates."""
    modes = {module: module.training for module in model.modules()}
    model.train()  # a backbone keeps its frozen stages in evaluation mode
    norms = [module for module in modes if isinstance(module, _BatchNorm) and module.training]
    norms = [norm for norm in norms if norm.track_running_stats]
    model.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.training, norm.momentum = True, momentum
        if isinstance(norm, nn.SyncBatchNorm):
            norm.forward = MethodType(_BatchNorm.forward, norm)  # type: ignore[method-assign]  # undone below
    try:
        yield norms
    finally:
        for norm, before in zip(norms, momenta, strict=True):
            norm.momentum = before
            norm.__dict__.pop("forward", None)
        for module, training in modes.items():
            module.training = training
