"""Masks from the file to the batch: what an annotation draws, what a transform moves, what crosses processes."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nasdet.data import CocoDetection, Compose, HorizontalFlip, Resize, collate, make_loader, open_data
from nasdet.data.loader import _from_worker, _to_parent
from nasdet.data.transforms import resize
from nasdet.measure.memory import peak_memory

coco_mask = pytest.importorskip("pycocotools.mask")


def write_coco(folder: Path, segmentations: list[Any], size: tuple[int, int]) -> CocoDetection:
    """One picture of ``size`` with an object for each segmentation, all with the picture as their box."""
    height, width = size
    Image.new("RGB", (width, height)).save(folder / "1.png")
    annotations = [
        {"id": i + 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, width, height], "segmentation": segmentation}
        for i, segmentation in enumerate(segmentations)
    ]
    image = {"id": 1, "file_name": "1.png", "height": height, "width": width}
    content = {"images": [image], "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}
    (folder / "a.json").write_text(json.dumps(content))
    return CocoDetection(folder, folder / "a.json", masks=True)


def star(rng: np.random.Generator, size: tuple[int, int]) -> list[float]:
    """A polygon around a point of the picture, its corners in the order of their angles."""
    centre = rng.uniform(0.3, 0.7, 2) * size[::-1]
    angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 12)))
    radii = rng.uniform(0.1, 0.3, len(angles)) * min(size)
    points = centre + radii[:, None] * np.stack((np.cos(angles), np.sin(angles)), axis=1)
    return [round(float(value), 2) for value in points.ravel()]


def runs(mask: np.ndarray) -> list[int]:
    flat = np.concatenate(([0], mask.ravel(order="F"), [2]))
    ends = np.flatnonzero(flat[1:] != flat[:-1])
    return [int(run) for run in np.diff(ends, prepend=0)]


def tight(masks: torch.Tensor) -> torch.Tensor:
    """The smallest box around each mask."""
    found = []
    for mask in masks:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        found.append([int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1])
    return torch.tensor(found, dtype=torch.float32).reshape(-1, 4)


@pytest.mark.parametrize("size", [(61, 97), (97, 61)], ids=str)
def test_polygons_come_back_from_both_kinds_of_rle(tmp_path: Path, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    polygons = [[star(rng, size) for _ in range(parts)] for parts in (1, 1, 1, 2, 3)]
    first = write_coco(tmp_path, polygons, size)[0][1]["masks"]
    assert (first.dtype, tuple(first.shape)) == (torch.bool, (5, *size))
    for mask, parts in zip(first.numpy(), polygons, strict=True):
        alone = [coco_mask.decode(coco_mask.frPyObjects([part], *size))[..., 0].astype(bool) for part in parts]
        assert np.array_equal(mask, np.logical_or.reduce(alone))
        assert 30 < mask.sum() < 0.9 * mask.size
    encoded = coco_mask.encode(np.asfortranarray(first.numpy().transpose(1, 2, 0).astype(np.uint8)))
    for counts in ([rle["counts"].decode() for rle in encoded], [runs(mask) for mask in first.numpy()]):
        again = write_coco(tmp_path, [{"size": list(size), "counts": c} for c in counts], size)[0][1]["masks"]
        assert torch.equal(again, first)


def test_the_area_of_a_polygon_is_that_of_the_shoelace_formula(tmp_path: Path) -> None:
    rng, size = np.random.default_rng(1), (300, 400)
    polygons = [star(rng, size) for _ in range(12)]
    masks = write_coco(tmp_path, [[polygon] for polygon in polygons], size)[0][1]["masks"]
    for mask, polygon in zip(masks, polygons, strict=True):
        x, y = np.array(polygon).reshape(-1, 2).T
        steps = np.hypot(np.diff(x, append=x[0]), np.diff(y, append=y[0])).sum()
        area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
        assert abs(int(mask.sum()) - area) < 0.75 * steps  # the outline's pixels count as inside


def test_digits_have_masks_tight_in_their_boxes(digits_folder: Path) -> None:
    data = open_data(digits_folder, masks=True).train()
    assert data.masks and sum(len(target["masks"]) for _, target in data) > 20
    for _, target in data:
        assert torch.equal(tight(target["masks"]), target["boxes"])
        assert torch.equal(target["masks"].sum((1, 2)).float(), target["area"])
        assert not (target["masks"].sum(0) > 1).any()  # only visible ink counts


@pytest.mark.parametrize("size", [(96, 128), (192, 256), (50, 81), (7, 300)], ids=str)
def test_a_resized_mask_takes_the_pixel_under_each_centre(digits_folder: Path, size: tuple[int, int]) -> None:
    image, target = open_data(digits_folder, masks=True).train()[0]
    height, width = image.shape[1:]
    _, changed = resize(image, target, size)
    rows = ((torch.arange(size[0]) + 0.5) * height / size[0]).long()
    columns = ((torch.arange(size[1]) + 0.5) * width / size[1]).long()
    assert torch.equal(changed["masks"], target["masks"][:, rows][:, :, columns])
    assert changed["masks"].dtype == torch.bool and target["masks"].shape[1:] == (height, width)


def test_masks_and_boxes_go_through_every_transform_together(digits_folder: Path) -> None:
    data = open_data(digits_folder, masks=True).train()
    transform = Compose([Resize(range(60, 200)), HorizontalFlip(0.5)])
    items = [transform(*data[index], random.Random(index)) for index in range(len(data))]
    batch = collate(items)
    sizes = {tuple(target["masks"].shape[1:]) for target in batch.targets}
    assert len(sizes) > 5 and sizes == set(batch.sizes)
    errors = [
        (tight(target["masks"]) - target["boxes"]).abs().max() for target in batch.targets if len(target["boxes"])
    ]
    assert len(errors) > 8 and max(errors) <= 1  # a side lies within the pixel whose centre decides
    moved = batch.to("cpu", torch.channels_last)
    for before, after in zip(batch.targets, moved.targets, strict=True):
        assert torch.equal(before["masks"], after["masks"])


def test_flip_mirrors_masks_and_commutes_with_resize(digits_folder: Path) -> None:
    image, target = open_data(digits_folder, masks=True).train()[1]
    flip, rng = HorizontalFlip(1.0), random.Random(0)
    assert torch.equal(flip(image, target, rng)[1]["masks"], target["masks"].flip(2))
    size = (2 * image.shape[1], 2 * image.shape[2])
    one = resize(*flip(image, target, rng), size)[1]["masks"]
    other = flip(*resize(image, target, size), rng)[1]["masks"]
    assert torch.equal(one, other) and one.any()


@pytest.mark.parametrize("count", [0, 1, 3])
def test_masks_cross_processes_as_bits(count: int) -> None:
    size = (13, 37)  # 481 pixels: no whole number of bytes
    masks = torch.rand(count, *size, generator=torch.Generator().manual_seed(count)) < 0.4
    target = {"boxes": torch.zeros(count, 4), "labels": torch.zeros(count).long(), "area": torch.zeros(count)}
    target |= {"iscrowd": torch.zeros(count).bool(), "masks": masks, "image_id": 1, "size": size}
    sent = _to_parent(collate([(torch.zeros(3, *size, dtype=torch.uint8), target)]))
    bits, shape = sent.targets[0]["masks"]
    assert bits.nbytes == -(-count * 481 // 8) and shape == (count, *size)
    assert torch.equal(_from_worker(sent).targets[0]["masks"], masks) and masks.dtype == torch.bool


def test_workers_send_the_same_masks(digits_folder: Path) -> None:
    data = open_data(digits_folder, masks=True).train()
    transform = Compose([Resize(range(40, 90)), HorizontalFlip()])
    here, there = (list(make_loader(data, 4, transform, steps=3, workers=workers)) for workers in (0, 1))
    for one, other in zip(here, there, strict=True):
        for a, b in zip(one.targets, other.targets, strict=True):
            assert a["masks"].dtype == b["masks"].dtype == torch.bool
            assert torch.equal(a["masks"], b["masks"])


def test_fifty_masks_at_full_size_cost_one_copy() -> None:
    masks = torch.zeros(50, 480, 800, dtype=torch.bool)
    masks[:, 100:200, 50:600] = True
    target = {"boxes": torch.rand(50, 4), "labels": torch.zeros(50).long(), "area": torch.ones(50), "masks": masks}
    image, size = torch.zeros(3, 480, 800, dtype=torch.uint8), (800, 1333)
    used = peak_memory(lambda: resize(image, target, size), tensors_only=True)
    whole = 50 * size[0] * size[1]
    assert whole <= used < 1.5 * whole  # the result, and the picture's own work space


def test_real_polygons_and_crowds(tiny_coco: Path) -> None:
    data = open_data(tiny_coco, masks=True).test()
    document = json.loads((tiny_coco / "annotations" / "instances_val2017.json").read_text())
    areas = {
        (annotation["image_id"], *annotation["bbox"]): (annotation["area"], annotation["iscrowd"])
        for annotation in document["annotations"]
    }
    errors = []
    for _, target in data:
        found = [value for key, value in areas.items() if key[0] == target["image_id"]]
        sums = sorted(target["masks"].sum((1, 2)).tolist())
        assert len(found) == len(sums)
        errors += [
            abs(pixels - area) / max(area, 100.0)
            for pixels, area in zip(sums, sorted(area for area, _ in found), strict=True)
        ]
    assert np.median(errors) < 0.05 and np.quantile(errors, 0.95) < 0.4
