"""The accuracy of a classifier on a data set."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nasdet._files import write_json
from nasdet.data.classification import ClassificationDataset, evaluation_transform
from nasdet.data.loader import make_eval_loader
from nasdet.engine import distributed

TOP = 5


def evaluate_classifier(
    model: nn.Module,
    dataset: ClassificationDataset,
    *,
    size: int = 224,
    short: int | None = None,
    batch: int = 256,
    workers: int = 0,
    device: torch.device | str = "cpu",
    channels_last: bool = False,
    amp: bool = False,
    progress: bool = True,
    out: str | Path | None = None,
    step: int | None = None,
) -> dict[str, Any]:
    """Top-1 and top-5 accuracy of ``model``, which maps ``[N, 3, size, size]`` to logits ``[N, K]``.

    Pictures: the shorter side scaled to ``short`` (8/7 of ``size``), the centre cut out. The figures are shares of the
    images in 0..1, counted, so in full precision; of equal logits the class of the smaller number comes first. Several
    processes share the images. The model is left in the mode it came in; its statistics are used, and kept, as they
    are.

    Returns ``split`` (the data set's role), ``step`` where given, ``images``, ``top1``, ``top5`` (of fewer than five
    classes, all of them). With ``out`` they are written to ``eval.json`` there (for another role than test,
    ``eval-ROLE.json``).

    Raises ``ValueError`` for logits that are not finite or of another number of classes, and for no image.
    """
    if not len(dataset):
        raise ValueError("dataset must hold at least one image to be scored on, got none")
    device, was_training = torch.device(device), model.training
    rank, ranks = distributed.rank(), distributed.world_size()
    transform = evaluation_transform(size, short)
    shares: dict[str, int] = {"rank": rank, "world_size": ranks, "divisor": 1, "workers": workers}
    loader = make_eval_loader(dataset, batch, transform, pin_memory=device.type == "cuda", **shares)
    hidden = not (progress and distributed.is_main())
    look: dict[str, Any] = {"file": sys.stderr, "leave": False, "mininterval": 0.5 if sys.stderr.isatty() else 10.0}
    layout = torch.channels_last if channels_last else torch.preserve_format
    counts = [0, 0, 0]
    model.eval()
    try:
        for images in tqdm(loader, desc="evaluate", unit="batch", disable=hidden, **look):
            labels = torch.tensor([target["label"] for target in images.targets])
            pixels = images.images.to(device, memory_format=layout, non_blocking=True)
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
                logits = model(pixels)
            found = _places(logits, labels, len(dataset.categories))
            counts = [
                counts[0] + len(found),
                counts[1] + sum(f < 1 for f in found),
                counts[2] + sum(f < TOP for f in found),
            ]
    finally:
        model.train(was_training)
    images_seen, first, near = (sum(column) for column in zip(*distributed.gather_objects(counts), strict=True))
    summary = {"split": dataset.role, **({} if step is None else {"step": step}), "images": images_seen}
    summary |= {"top1": first / images_seen, "top5": near / images_seen}
    if out is not None and distributed.is_main():
        suffix = "" if dataset.role == "test" else f"-{dataset.role}"
        write_json(Path(out) / f"eval{suffix}.json", summary)
    distributed.barrier()
    return summary


def _places(logits: Tensor, labels: Tensor, classes: int) -> list[int]:
    """For each image how many classes come before the right one."""
    logits = logits.float().cpu()
    if logits.shape != (len(labels), classes):
        raise ValueError(f"logits must have shape {(len(labels), classes)}, got {tuple(logits.shape)}")
    if not bool(logits.isfinite().all()):
        raise ValueError("logits must be finite, got NaN or infinity: the model cannot be scored")
    right = logits.gather(1, labels[:, None])
    before = torch.arange(classes) < labels[:, None]
    found: list[int] = ((logits > right) | ((logits == right) & before)).sum(1).tolist()
    return found
