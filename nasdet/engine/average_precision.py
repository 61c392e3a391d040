"""COCO average precision of boxes and masks through pycocotools, or a faster pair of the same classes if installed."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy

# Module and the names of its COCO and COCOeval classes, fastest first; pycocotools is the oracle.
BACKENDS = {
    "faster_coco_eval": ("faster_coco_eval", "COCO", "COCOeval_faster"),
    "pycocotools": ("pycocotools", "coco.COCO", "cocoeval.COCOeval"),
}
IOU_TYPES = ("bbox", "segm")
_AREAS = {"all": 0, "s": 1, "m": 2, "l": 3}


def available_backends() -> list[str]:
    """The evaluators installed here, fastest first."""
    return [name for name, (module, _, _) in BACKENDS.items() if importlib.util.find_spec(module) is not None]


def coco_ap(
    ground_truth: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    backend: str = "auto",
    iou_type: str = "bbox",
) -> dict[str, Any]:
    """Average precision of COCO results by boxes or by masks, at most 100 detections per image.

    Args:
        ground_truth: a COCO dict: ``images``, ``annotations`` (``bbox`` x, y, width, height), ``categories``. Every
            image in it counts, with or without detections. It is not changed. For masks, images have ``height`` and
            ``width``, and annotations ``segmentation`` (polygons, compressed or uncompressed RLE).
        results: COCO results ``{"image_id", "category_id", "bbox", "score"}`` in pixels of the stored image; for masks
            with ``segmentation``, compressed RLE, and ``mask_score`` where masks are ranked by a score of their own.
        backend: ``"auto"`` (the fastest installed), ``"pycocotools"`` or ``"faster_coco_eval"``.
        iou_type: ``"bbox"`` or ``"segm"``: what intersection over union, and the area of a detection, is taken of.

    Returns:
        ``AP`` (mean over IoU 0.50:0.05:0.95 and categories), ``AP50``, ``AP75``; ``APs``, ``APm``, ``APl`` for areas
        below 32^2, between, and above 96^2 pixels; ``AR100``; ``per_category`` AP by category name; the counts
        ``images`` and ``detections``; ``backend``. Precisions are in 0..1; one is -1 where there is nothing to find (no
        annotation of that kind that is not crowd), and 0 where there is something but nothing was found.

    Raises:
        ValueError: an unknown backend or IoU type, a result of an unknown image or category, a box or score that is
            not finite, or, for masks, a segmentation that is missing or of another size than its image.
    """
    if iou_type not in IOU_TYPES:
        raise ValueError(f"iou_type must be one of {', '.join(IOU_TYPES)}, got {iou_type!r}")
    names = available_backends()
    if backend != "auto" and backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {list(BACKENDS)}, got {backend!r}")
    if not names or backend not in ("auto", *names):
        wanted = "pycocotools" if backend == "auto" else backend
        raise ValueError(f"no COCO evaluator: {wanted} is not installed here; pip install {wanted.replace('_', '-')}")
    chosen = names[0] if backend == "auto" else backend
    truth = _truth(ground_truth, iou_type)
    found = _found(truth, results, iou_type)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluated = _evaluate(chosen, truth, found, iou_type)
    summary: dict[str, Any] = _summary(evaluated["precision"], evaluated["recall"])
    order = sorted(truth["categories"], key=lambda category: category["id"])
    summary["per_category"] = {
        category["name"]: _mean(evaluated["precision"][:, :, index, _AREAS["all"], -1])
        for index, category in enumerate(order)
    }
    return {**summary, "images": len(truth["images"]), "detections": len(results), "backend": chosen}


def _truth(ground_truth: Mapping[str, Any], iou_type: str) -> dict[str, Any]:
    missing = [key for key in ("images", "annotations", "categories") if key not in ground_truth]
    if missing:
        raise ValueError(f"ground_truth must have images, annotations and categories, got no {', '.join(missing)}")
    annotations = []
    # An annotation id of 0 would read as "not matched" in both evaluators, so ids are given anew from 1.
    for number, annotation in enumerate(ground_truth["annotations"], start=1):
        x, y, width, height = (float(value) for value in annotation["bbox"])
        kept = {
            "id": number,
            "image_id": annotation["image_id"],
            "category_id": annotation["category_id"],
            "bbox": [x, y, width, height],
            "area": float(annotation.get("area", width * height)),
            "iscrowd": int(annotation.get("iscrowd", 0)),
        }
        if iou_type == "segm":
            if annotation.get("segmentation") is None:
                raise ValueError(f"annotations[{number - 1}] must have a segmentation to evaluate masks, got none")
            kept["segmentation"] = annotation["segmentation"]
        annotations.append(kept)
    images = [dict(image) for image in ground_truth["images"]]
    return {"images": images, "annotations": annotations, "categories": [dict(c) for c in ground_truth["categories"]]}


def _found(truth: Mapping[str, Any], results: Sequence[Mapping[str, Any]], iou_type: str) -> dict[str, Any]:
    images = {image["id"]: image for image in truth["images"]}
    categories = {category["id"] for category in truth["categories"]}
    annotations = []
    for number, result in enumerate(results, start=1):
        place = f"results[{number - 1}]"
        if result["image_id"] not in images:
            raise ValueError(f"{place} must be of an image in the ground truth, got image_id {result['image_id']!r}")
        if result["category_id"] not in categories:
            raise ValueError(f"{place} must be of a known category, got category_id {result['category_id']!r}")
        box, score = [float(value) for value in result["bbox"]], float(result["score"])
        if iou_type == "segm":
            score = float(result.get("mask_score", score))
        if len(box) != 4 or not all(map(math.isfinite, [*box, score])):
            raise ValueError(f"{place} must have four finite box numbers and a finite score, got {box} and {score}")
        kept = {"id": number, "bbox": box, "score": score, "area": box[2] * box[3], "iscrowd": 0}
        if iou_type == "segm":
            kept |= _mask(result.get("segmentation"), images[result["image_id"]], place)
        annotations.append({**kept, "image_id": result["image_id"], "category_id": result["category_id"]})
    return {"images": truth["images"], "annotations": annotations, "categories": truth["categories"]}


def _mask(segmentation: Any, image: Mapping[str, Any], place: str) -> dict[str, Any]:
    """A detection's RLE and area. The evaluators would read beyond a mask that is smaller than its image."""
    from pycocotools import mask as coco_mask

    given = segmentation if isinstance(segmentation, Mapping) else {}
    if not isinstance(given.get("counts"), (str, bytes)):
        raise ValueError(f"{place} must have a segmentation with size and compressed counts, got {segmentation!r:.80}")
    size = [image["height"], image["width"]]
    if list(given.get("size", ())) != size:
        raise ValueError(f"{place} must have a mask of its image's size {size}, got {given.get('size')!r}")
    rle = {"size": size, "counts": given["counts"]}
    return {"segmentation": rle, "area": float(coco_mask.area(rle))}


def _evaluate(backend: str, truth: dict[str, Any], found: dict[str, Any], iou_type: str) -> dict[str, Any]:
    module, *names = BACKENDS[backend]
    classes = []
    for name in names:
        *parts, last = name.split(".")
        classes.append(getattr(importlib.import_module(".".join([module, *parts])), last))
    indexed = []
    for content in (truth, found):
        index = classes[0]()
        index.dataset = content
        index.createIndex()
        indexed.append(index)
    evaluator = classes[1](*indexed, iouType=iou_type)
    shape = (len(evaluator.params.iouThrs), len(evaluator.params.recThrs), len(truth["categories"]), 4, 3)
    if not truth["images"] or not truth["categories"]:
        return {"precision": numpy.full(shape, -1.0), "recall": numpy.full((shape[0], *shape[2:]), -1.0)}
    evaluator.evaluate()
    evaluator.accumulate()
    precision = numpy.asarray(evaluator.eval["precision"]).reshape(shape)
    return {"precision": precision, "recall": numpy.asarray(evaluator.eval["recall"]).reshape(shape[0], *shape[2:])}


def _summary(precision: numpy.ndarray, recall: numpy.ndarray) -> dict[str, Any]:
    # precision is [IoU threshold, recall, category, area, max detections], recall the same without its recall axis.
    every = precision[..., _AREAS["all"], -1]
    summary = {"AP": _mean(every), "AP50": _mean(every[0]), "AP75": _mean(every[5])}
    for area in ("s", "m", "l"):
        summary[f"AP{area}"] = _mean(precision[..., _AREAS[area], -1])
    summary["AR100"] = _mean(recall[..., _AREAS["all"], -1])
    return summary


def _mean(values: numpy.ndarray) -> float:
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0
