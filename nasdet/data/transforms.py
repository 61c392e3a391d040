"""From a stored picture to a batch: resize, flip, normalise, pad.

A transform is a callable ``(image, target, rng) -> (image, target)``: image uint8 ``[3, H, W]``, target as
:class:`~nasdet.data.base.DetectionDataset` gives it, ``rng`` a :class:`random.Random` that all its chance comes from.
It returns new values and leaves its arguments as they were.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as functional

Target = dict[str, Any]
Transform = Callable[[torch.Tensor, Target, random.Random], "tuple[torch.Tensor, Target]"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

PAPER_SIZES: dict[str, tuple[int | Sequence[int], int]] = {
    "800/1333": (800, 1333),  # Hit-Detector, NATS, FAD 1x and MSNAS; every paper's test size
    "416/693": (416, 693),  # FAD's search on VOC
    "640-800/1333": (range(640, 801), 1333),  # FAD 2x: multi-scale training
}
"""``Resize(*PAPER_SIZES[name])``: the ``(short, long)`` of the papers."""


class Compose:
    """Transforms one after the other."""

    def __init__(self, transforms: Sequence[Transform]) -> None:
        self.transforms = list(transforms)

    def __call__(self, image: torch.Tensor, target: Target, rng: random.Random) -> tuple[torch.Tensor, Target]:
        for transform in self.transforms:
            image, target = transform(image, target, rng)
        return image, target


class Resize:
    """Scale the shorter side to ``short`` pixels, or less where the longer would exceed ``long``.

    Both sides by ``s = min(short / min(H, W), long / max(H, W))``; the new size is (round(sH), round(sW)), at least 1.
    Bilinear with antialiasing; boxes, areas and masks (nearest pixel) follow the sizes actually reached.

    Args:
        short: length in pixels, or several to draw from for each image (multi-scale training).
        long: greatest length of the longer side; None for no limit.
    """

    def __init__(self, short: int | Sequence[int], long: int | None = None) -> None:
        self.short = [short] if isinstance(short, int) else short
        self.long = long
        if not len(self.short) or min(self.short) < 1:
            raise ValueError(f"short must be positive lengths in pixels, got {short!r}")
        if long is not None and long < max(self.short):
            raise ValueError(f"long must be at least short = {max(self.short)}, got {long!r}")

    def __call__(self, image: torch.Tensor, target: Target, rng: random.Random) -> tuple[torch.Tensor, Target]:
        height, width = image.shape[-2:]
        short = rng.choice(self.short)  # drawn even when there is one choice: the chance of later transforms stays put
        scale = short / min(height, width)
        if self.long is not None:
            scale = min(scale, self.long / max(height, width))
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        return resize(image, target, size)


def resize(image: torch.Tensor, target: Target, size: tuple[int, int]) -> tuple[torch.Tensor, Target]:
    """Resize image and target to ``size = (height, width)``."""
    height, width = image.shape[-2:]
    if (height, width) == tuple(size):
        return image, dict(target)
    scaled = functional.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
    sy, sx = size[0] / height, size[1] / width
    target = dict(target)
    if "boxes" not in target:
        return scaled, target
    target["boxes"] = target["boxes"] * target["boxes"].new_tensor([sx, sy, sx, sy])
    target["area"] = target["area"] * (sy * sx)
    if "masks" in target:
        masks = target["masks"]
        if len(masks):
            # Views: at 800 x 1333 fifty masks are 53 MB, which a change of type would copy twice.
            masks = functional.interpolate(masks[None].view(torch.uint8), size=size, mode="nearest-exact")[0]
            masks = masks.view(torch.bool)
        target["masks"] = masks if len(masks) else masks.new_zeros((0, *size))
    return scaled, target


class HorizontalFlip:
    """Mirror left and right with probability ``p``."""

    def __init__(self, p: float = 0.5) -> None:
        if not 0 <= p <= 1:
            raise ValueError(f"p must be a probability in [0, 1], got {p!r}")
        self.p = p

    def __call__(self, image: torch.Tensor, target: Target, rng: random.Random) -> tuple[torch.Tensor, Target]:
        if rng.random() >= self.p:
            return image, dict(target)
        width = image.shape[-1]
        target = dict(target)
        if "boxes" in target:
            x1, y1, x2, y2 = target["boxes"].unbind(1)
            target["boxes"] = torch.stack([width - x2, y1, width - x1, y2], dim=1)
        if "masks" in target:
            target["masks"] = target["masks"].flip(-1)
        return image.flip(-1), target


@dataclass
class Batch:
    """Pictures of one step.

    Attributes:
        images: float32 ``[N, 3, H, W]``, normalised, zero-padded at the bottom and right.
        sizes: ``[(h, w)]``, the valid area of each.
        scales: ``[(sy, sx)]``, resized over stored size: batch coordinates divided by these are the picture's own.
        targets: the data set's targets in batch coordinates; masks, if any, cover the valid area ``[n, h, w]``.
    """

    images: torch.Tensor
    sizes: list[tuple[int, int]]
    scales: list[tuple[float, float]]
    targets: list[Target] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.sizes)

    def to(
        self,
        device: torch.device | str,
        memory_format: torch.memory_format = torch.preserve_format,
        non_blocking: bool = False,
    ) -> Batch:
        """A batch with images and target tensors on ``device``; ``memory_format`` is for the images."""
        images = self.images.to(device, non_blocking=non_blocking, memory_format=memory_format)
        return self._with(images, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """A batch in page-locked memory, from where copies to a GPU need not block."""
        return self._with(self.images.pin_memory(), lambda tensor: tensor.pin_memory())

    def _with(self, images: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        targets = [
            {key: change(value) if isinstance(value, torch.Tensor) else value for key, value in target.items()}
            for target in self.targets
        ]
        return Batch(images, list(self.sizes), list(self.scales), targets)


def padded(side: int, divisor: int = 32) -> int:
    """A height or width as pictures are padded: the next multiple of ``divisor``."""
    return -(-side // divisor) * divisor


def collate(
    items: Sequence[tuple[torch.Tensor, Target]],
    divisor: int = 32,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Batch:
    """Normalise (``(pixel / 255 - mean) / std`` per channel), zero-pad to the largest size, a multiple of ``divisor``.

    Args:
        items: ``(image, target)`` pairs, at least one; images uint8 ``[3, h, w]``.
        divisor: what height and width are padded to a multiple of (the largest stride of the detector).

    Raises:
        ValueError: no item, or an image that is not uint8 ``[3, h, w]``.
    """
    if not items:
        raise ValueError("items must hold at least one (image, target), got none")
    for image, _ in items:
        if image.dtype != torch.uint8 or image.dim() != 3 or len(image) != 3:
            raise ValueError(f"image must be uint8 of shape (3, h, w), got {image.dtype} of {tuple(image.shape)}")
    sizes = [(int(image.shape[1]), int(image.shape[2])) for image, _ in items]
    height, width = (padded(max(lengths), divisor) for lengths in zip(*sizes, strict=True))
    images = torch.zeros(len(items), 3, height, width)
    offset = torch.tensor(mean).view(3, 1, 1) * 255
    scale = (torch.tensor(std).view(3, 1, 1) * 255).reciprocal()
    for canvas, (image, _), (h, w) in zip(images, items, sizes, strict=True):
        canvas[:, :h, :w].copy_(image).sub_(offset).mul_(scale)
    stored = [target["size"] for _, target in items]
    scales = [(h / of[0], w / of[1]) for (h, w), of in zip(sizes, stored, strict=True)]
    return Batch(images, sizes, scales, [dict(target) for _, target in items])
