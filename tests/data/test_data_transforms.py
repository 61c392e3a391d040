"""Geometry: what happens to pixels happens to boxes, areas and masks."""

from __future__ import annotations

import random

import pytest
import torch

from nasdet.data import PAPER_SIZES, Batch, Compose, HorizontalFlip, Resize, collate


def sample(height=60, width=90, seed=0):
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 20.0, 40.0, 50.0], [0.0, 0.0, float(width), float(height)]])
    masks = torch.zeros(2, height, width, dtype=torch.bool)
    for mask, (x1, y1, x2, y2) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y1:y2, x1:x2] = True
    target = {
        "boxes": boxes,
        "labels": torch.tensor([3, 1]),
        "iscrowd": torch.tensor([False, True]),
        "area": masks.sum((1, 2)).float(),
        "masks": masks,
        "image_id": 7,
        "size": (height, width),
    }
    return image, target


def boxes_of(masks):
    found = []
    for mask in masks:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        found.append([float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)])
    return torch.tensor(found)


def same(first, second):
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key], key


RNG = random.Random(0)


@pytest.mark.parametrize(
    "size, short, long, expected",
    [
        ((427, 640), 800, 1333, (800, 1199)),
        ((480, 640), 800, 1333, (800, 1067)),
        ((360, 640), 800, 1333, (750, 1333)),
        ((640, 360), 800, 1333, (1333, 750)),
        ((375, 500), 416, 693, (416, 555)),
        ((200, 500), 416, 693, (277, 693)),
        ((10, 4000), 800, 1333, (3, 1333)),
        ((1, 5000), 416, 693, (1, 693)),
        ((50, 70), 25, None, (25, 35)),
    ],
)
def test_resize_reaches_the_papers_sizes(size, short, long, expected):
    image, target = sample(60, 90)
    image = torch.zeros(3, *size, dtype=torch.uint8)
    target = {key: value for key, value in target.items() if key != "masks"} | {"size": size}
    resized, _ = Resize(short, long)(image, target, RNG)
    assert (tuple(resized.shape), resized.dtype) == ((3, *expected), torch.uint8)


@pytest.mark.parametrize("name", PAPER_SIZES)
def test_paper_sizes_keep_their_limits(name):
    short, long = PAPER_SIZES[name]
    transform = Resize(short, long)
    allowed = {short} if isinstance(short, int) else set(short)
    seen = set()
    for seed in range(20):
        image, _ = transform(*sample(30, 40), random.Random(seed))
        assert max(image.shape[1:]) <= long
        seen.add(min(image.shape[1:]))
    assert seen <= allowed and len(seen) > (1 if len(allowed) > 1 else 0)


def test_resize_moves_boxes_areas_and_masks_with_the_pixels():
    image, target = sample()
    before = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in target.items()}
    resized, changed = Resize(120)(image, target, RNG)
    assert tuple(resized.shape) == (3, 120, 180)
    assert torch.equal(changed["boxes"], target["boxes"] * 2)
    assert torch.equal(changed["area"], target["area"] * 4)
    assert torch.equal(boxes_of(changed["masks"]), changed["boxes"])
    assert torch.equal(changed["masks"].sum((1, 2)).float(), changed["area"])
    assert changed["size"] == (60, 90)  # of the stored picture
    same(before, target)


def test_resize_scales_by_the_size_reached():
    image, target = sample(61, 97)
    resized, changed = Resize(37)(image, target, RNG)
    height, width = resized.shape[1:]
    assert changed["boxes"][1].tolist() == pytest.approx([0, 0, width, height])
    assert (boxes_of(changed["masks"]) - changed["boxes"]).abs().max() <= 1


def test_resize_averages_when_shrinking():
    image, target = sample()
    image[:] = (torch.arange(90) % 2 * 255).to(torch.uint8)  # stripes of one pixel
    resized, _ = Resize(15)(image, target, RNG)
    assert (resized[:, :, 2:-2].float() - 127.5).abs().max() < 20


def test_resize_to_the_own_size_changes_nothing():
    image, target = sample()
    resized, changed = Resize(60)(image, target, RNG)
    assert torch.equal(resized, image)
    same(changed, target)


def test_no_objects():
    image, target = sample()
    empty = {key: value[:0] if isinstance(value, torch.Tensor) else value for key, value in target.items()}
    resized, changed = Compose([Resize(30), HorizontalFlip(1.0)])(image, empty, RNG)
    assert changed["boxes"].shape == (0, 4)
    assert changed["masks"].shape == (0, *resized.shape[1:])


def test_flipping_twice_is_the_identity():
    image, target = sample()
    flip = HorizontalFlip(1.0)
    once_image, once = flip(image, target, RNG)
    assert torch.equal(once_image[:, :, 0], image[:, :, -1])
    assert once["boxes"][0].tolist() == [50.0, 20.0, 80.0, 50.0]
    assert torch.equal(boxes_of(once["masks"]), once["boxes"])
    twice_image, twice = flip(once_image, once, RNG)
    assert torch.equal(twice_image, image)
    same(twice, target)


def test_flip_keeps_its_probability():
    image, target = sample()
    rng = random.Random(0)
    flipped = sum(not torch.equal(HorizontalFlip(0.3)(image, target, rng)[0], image) for _ in range(500))
    assert 110 < flipped < 190
    assert torch.equal(HorizontalFlip(0.0)(image, target, rng)[0], image)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Resize(0), "short must be positive"),
        (lambda: Resize([]), "short must be positive"),
        (lambda: Resize(800, 400), "long must be at least short = 800, got 400"),
        (lambda: HorizontalFlip(1.5), "p must be a probability"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_collate_normalises_and_pads():
    items = [Resize(30)(*sample(), RNG), Resize(40)(*sample(80, 50), RNG)]
    batch = collate(items)
    assert isinstance(batch, Batch) and len(batch) == 2
    assert (tuple(batch.images.shape), batch.images.dtype) == ((2, 3, 64, 64), torch.float32)
    assert batch.sizes == [(30, 45), (64, 40)]
    assert batch.scales == [(0.5, 0.5), (0.8, 0.8)]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    expected = (items[0][0].double() / 255 - mean) / std
    assert (batch.images[0, :, :30, :45] - expected).abs().max() < 1e-5
    assert batch.images[0, :, 30:].abs().max() == 0 and batch.images[0, :, :, 45:].abs().max() == 0
    same(batch.targets[0], items[0][1])
    assert collate(items, divisor=1).images.shape == (2, 3, 64, 45)


def test_batch_moves_as_a_whole():
    batch = collate([sample()])
    moved = batch.to("meta", memory_format=torch.channels_last)
    assert moved.images.is_meta and moved.targets[0]["boxes"].is_meta and moved.targets[0]["masks"].is_meta
    assert moved.targets[0]["image_id"] == 7 and moved.sizes == batch.sizes
    assert not batch.images.is_meta
    last = batch.to("cpu", memory_format=torch.channels_last)
    assert last.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(last.images, batch.images)


def test_collate_refuses_what_is_no_picture():
    with pytest.raises(ValueError, match="items must hold at least one"):
        collate([])
    image, target = sample()
    with pytest.raises(ValueError, match=r"image must be uint8 of shape \(3, h, w\), got torch.float32"):
        collate([(image.float(), target)])
