"""From a model and a data set to detections in COCO's form, and to their average precision."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from nasdet._files import write_json
from nasdet.data.base import DetectionDataset
from nasdet.data.loader import make_eval_loader
from nasdet.data.transforms import Batch, Resize
from nasdet.detectors.parts.paste import paste_to_rle
from nasdet.engine import distributed
from nasdet.engine.average_precision import available_backends, coco_ap
from nasdet.engine.checkpoint import LAST, load_into, load_trained
from nasdet.engine.runs import read_info
from nasdet.spaces.assemble import ModelConfig, build_model

__all__ = [
    "available_backends",
    "coco_ap",
    "detect_all",
    "detect_batch",
    "evaluate",
    "load_run",
    "load_run_at",
    "predicts_masks",
]


@torch.inference_mode()
def detect_batch(
    model: nn.Module, batch: Batch, *, device: torch.device, channels_last: bool = False, amp: bool = False
) -> list[dict[str, Any]]:
    """Detections of one batch in the pixels of the stored images, on the CPU.

    Per image ``boxes`` float32 ``[n, 4]`` (x1, y1, x2, y2), ``scores`` ``[n]``, ``labels`` ``[n]``, best first. A model
    that detects ``mask_logits`` ``[n, M, M]`` gives ``masks`` here, a list of n COCO RLE dicts of the stored image's
    size; ``mask_scores`` ``[n]``, if any, are passed on. ``model`` is put into evaluation mode. ``amp`` runs it in
    bfloat16.
    """
    model.eval()
    layout = torch.channels_last if channels_last else torch.preserve_format
    images = batch.images.to(device, memory_format=layout, non_blocking=True)
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        outputs = model(images)
    found: list[dict[str, Any]] = []
    detections = model.detect(outputs, batch.sizes)  # type: ignore[operator]  # a detector's method
    for detection, (sy, sx), target in zip(detections, batch.scales, batch.targets, strict=True):
        boxes = detection["boxes"].float().cpu() / torch.tensor([sx, sy, sx, sy])
        kept = {"boxes": boxes, "scores": detection["scores"].float().cpu(), "labels": detection["labels"].cpu()}
        if "mask_logits" in detection:
            kept["masks"] = paste_to_rle(detection["mask_logits"], boxes, target["size"])
        if "mask_scores" in detection:
            kept["mask_scores"] = detection["mask_scores"].float().cpu()
        found.append(kept)
    return found


def detect_all(
    model: nn.Module,
    dataset: DetectionDataset,
    *,
    short: int,
    long: int | None = None,
    batch: int = 1,
    workers: int = 0,
    device: torch.device | str = "cpu",
    channels_last: bool = False,
    amp: bool = False,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """COCO results of every image of ``dataset``, in its order, the same list on every rank.

    Images are scaled to ``short`` / ``long`` pixels (see ``nasdet.data.transforms.Resize``); boxes are x, y, width,
    height in pixels of the stored images (to 0.01), ``category_id`` is the file's, scores are to 1e-6. Masks, where the
    model gives them, are ``segmentation`` (RLE, ``counts`` as str), and ``mask_score``. Several processes share the
    images. The model is left in the mode it came in.
    """
    device, was_training = torch.device(device), model.training
    rank, ranks = distributed.rank(), distributed.world_size()
    loader = make_eval_loader(dataset, batch, Resize(short, long), workers=workers, rank=rank, world_size=ranks)
    hidden = not (progress and distributed.is_main())
    look: dict[str, Any] = {"file": sys.stderr, "leave": False, "mininterval": 0.5 if sys.stderr.isatty() else 10.0}
    bar = tqdm(loader, desc="evaluate", unit="batch", disable=hidden, **look)
    results: list[tuple[int, list[dict[str, Any]]]] = []
    try:
        for images in bar:
            found = detect_batch(model, images, device=device, channels_last=channels_last, amp=amp)
            for target, detection in zip(images.targets, found, strict=True):
                rows = coco_results(detection, int(target["image_id"]), dataset.category_ids)
                results.append((int(target["image_id"]), rows))
    finally:
        model.train(was_training)
    place = {image_id: index for index, image_id in enumerate(dataset.image_ids)}
    everything = [entry for share in distributed.gather_objects(results) for entry in share]
    everything.sort(key=lambda entry: place[entry[0]])
    return [row for _, rows in everything for row in rows]


def coco_results(detection: dict[str, Any], image_id: int, category_ids: Sequence[int]) -> list[dict[str, Any]]:
    """One image's detections (see :func:`detect_batch`) as COCO results, which JSON can hold."""
    rows: list[dict[str, Any]] = []
    for (x1, y1, x2, y2), score, label in zip(
        detection["boxes"].tolist(), detection["scores"].tolist(), detection["labels"].tolist(), strict=True
    ):
        box = [round(value, 2) for value in (x1, y1, x2 - x1, y2 - y1)]
        rows.append({"image_id": image_id, "category_id": category_ids[label], "bbox": box, "score": round(score, 6)})
    for row, rle in zip(rows, detection.get("masks", ()), strict="masks" in detection):
        row["segmentation"] = {"size": list(rle["size"]), "counts": rle["counts"].decode("ascii")}
    if "mask_scores" in detection:
        for row, score in zip(rows, detection["mask_scores"].tolist(), strict=True):
            row["mask_score"] = round(score, 6)
    return rows


def evaluate(
    model: nn.Module,
    dataset: DetectionDataset,
    *,
    out: str | Path | None = None,
    step: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Average precision of ``model`` on ``dataset``: ``coco_ap``'s figures, with ``split``, the role of the data set.

    The figures are those of boxes; where the model detects masks and ``dataset.masks`` is set, ``masks`` holds the same
    keys (``AP`` to ``AR100``, ``per_category``) of masks. ``options`` go to ``detect_all``. With ``out``, ``eval.json``
    and ``detections.json`` are written there (for another role than test, ``eval-ROLE.json`` and
    ``detections-ROLE.json``). ``step`` is noted.
    """
    results = detect_all(model, dataset, **options)
    summary = {"split": dataset.role, **({} if step is None else {"step": step})}
    truth = dataset.ground_truth()
    summary |= coco_ap(truth, results)
    if dataset.masks and (predicts_masks(model) or any("segmentation" in row for row in results)):
        of_masks = coco_ap(truth, results, iou_type="segm")
        summary["masks"] = {key: of_masks[key] for key in of_masks if key not in ("images", "detections", "backend")}
    if out is not None and distributed.is_main():
        suffix = "" if dataset.role == "test" else f"-{dataset.role}"
        write_json(Path(out) / f"detections{suffix}.json", results)
        write_json(Path(out) / f"eval{suffix}.json", summary)
    distributed.barrier()
    return summary


def predicts_masks(model: nn.Module) -> bool:
    """Whether a detector detects masks: whether it has a mask stage, ``masks``."""
    return getattr(model, "masks", None) is not None


def load_run(
    run: str | Path, device: torch.device | str = "cpu", weights: str | Path | None = None
) -> tuple[nn.Module, ModelConfig]:
    """The model of a training run, ready for detection, and its configuration.

    Weights are the file ``weights``, by default ``weights.safetensors`` (or ``.pt``) of a finished run, else those of
    the last checkpoint. Raises ``FileNotFoundError`` or ``ValueError`` that names what is missing or does not fit, and
    ``ValueError`` for a search, whose weights are a supernet's.
    """
    return load_run_at(run, device, weights)[:2]


def load_run_at(
    run: str | Path, device: torch.device | str = "cpu", weights: str | Path | None = None
) -> tuple[nn.Module, ModelConfig, int | None]:
    """As :func:`load_run`, and how many steps the weights have learnt, where that is known."""
    run = Path(run)
    info = read_info(run) if weights is None else {}
    if str(info.get("verb")).startswith("search"):
        raise ValueError(f"{run} is a search; train its card first: nasdet train --card {run / 'card.json'}")
    if not (run / "model.json").is_file():
        raise FileNotFoundError(f"{run}: not the folder of a training run: it has no model.json")
    config = ModelConfig.load(run / "model.json")
    candidates = [run / "weights.safetensors", run / "weights.pt", run / LAST]
    source = next((path for path in candidates if path.is_file()), None) if weights is None else Path(weights)
    if source is None:
        raise FileNotFoundError(f"{run}: it has no weights and no checkpoint yet")
    model = build_model(config)
    state, step = load_trained(source)
    load_into("model", model, state, source)
    if step is None:
        step = (info.get("arguments") or {}).get("steps")
    return model.to(device).eval(), config, step
