"""Batches for training and evaluation, in an order that neither workers nor a resumed run can change."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
import torch
from torch.utils.data import DataLoader, Dataset

from nasdet.data.base import PictureDataset
from nasdet.data.errors import DataError
from nasdet.data.transforms import Batch, Transform, collate

Key = tuple[int, int]  # (epoch, index in the data set)


class Loader:
    """An iterable of :class:`~nasdet.data.transforms.Batch`; each pass over it gives the same batches again.

    ``len()`` is the number of batches. A :class:`~nasdet.data.errors.DataError` of a worker is raised here as itself.
    """

    def __init__(self, batches: Sequence[list[Key]] | _TrainBatches, samples: _Samples, **options: Any) -> None:
        self._batches = batches
        # DataLoader draws a seed for its workers: from a generator of its own, or the caller's global one would move.
        generator = torch.Generator().manual_seed(samples.seed)
        self._loader: DataLoader[Any] = DataLoader(samples, batch_sampler=batches, generator=generator, **options)

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, DataError):
                raise batch
            yield _from_worker(batch)


def make_loader(
    dataset: PictureDataset,
    batch_size: int,
    transform: Transform | None = None,
    *,
    seed: int = 0,
    start_step: int = 0,
    steps: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    shuffle: bool = True,
    divisor: int = 32,
    pin_memory: bool = False,
) -> Loader:
    """Training batches ``start_step .. steps - 1``.

    All ranks walk one endless sequence: epoch 0's permutation of the data set, epoch 1's, and so on. Step t of rank r
    takes ``batch_size`` places from ``(t * world_size + r) * batch_size``, so a batch may reach into the next epoch
    and no image is dropped. The permutation is a function of (seed, epoch), the chance inside ``transform`` of (seed,
    epoch, image): neither depends on ``start_step``, ``workers`` or anything drawn elsewhere, and a resumed run sees
    exactly the batches that it would have seen.

    Args:
        batch_size: images per step and rank.
        transform: see :mod:`nasdet.data.transforms`; None leaves pictures as stored.
        start_step: steps already done.
        steps: step to stop before.
        workers: processes that read and transform; 0 does it here.
        shuffle: False takes the data set's order in every epoch.
        divisor: heights and widths are padded to a multiple of it.
        pin_memory: put batches in page-locked memory (for a GPU).
    """
    for name, value, least in (("batch_size", batch_size, 1), ("start_step", start_step, 0), ("workers", workers, 0)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if steps < start_step:
        raise ValueError(f"steps must be at least start_step = {start_step}, got {steps}")
    _check_rank(rank, world_size)
    if not len(dataset):
        raise ValueError("dataset must hold at least one image, got none")
    batches = _TrainBatches(len(dataset), batch_size, seed, start_step, steps, rank, world_size, shuffle)
    return _loader(batches, _Samples(dataset, transform, seed), workers, divisor, pin_memory)


def make_eval_loader(
    dataset: PictureDataset,
    batch_size: int,
    transform: Transform | None = None,
    *,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    divisor: int = 32,
    pin_memory: bool = False,
) -> Loader:
    """Every image once, in order. Rank r takes images r, r + world_size, ...; none is repeated to even out the ranks.

    ``target["image_id"]`` says which image is which; ``dataset.image_ids`` is the original order.
    """
    if batch_size < 1 or workers < 0:
        raise ValueError(f"batch_size must be at least 1 and workers at least 0, got {batch_size} and {workers}")
    _check_rank(rank, world_size)
    mine = list(range(rank, len(dataset), world_size))
    batches = [[(0, index) for index in mine[at : at + batch_size]] for at in range(0, len(mine), batch_size)]
    return _loader(batches, _Samples(dataset, transform, 0), workers, divisor, pin_memory)


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..world_size - 1 = {world_size - 1}, got {rank}")


def _loader(
    batches: Sequence[list[Key]] | _TrainBatches, samples: _Samples, workers: int, divisor: int, pin_memory: bool
) -> Loader:
    return Loader(
        batches,
        samples,
        num_workers=workers,
        collate_fn=_Collate(divisor, across_processes=workers > 0),
        pin_memory=pin_memory,
    )


class _TrainBatches:
    """The lists of (epoch, index) of one rank's batches."""

    def __init__(
        self, n: int, batch_size: int, seed: int, start: int, steps: int, rank: int, world_size: int, shuffle: bool
    ) -> None:
        self.n, self.batch_size, self.seed, self.start, self.steps = n, batch_size, seed, start, steps
        self.rank, self.world_size, self.shuffle = rank, world_size, shuffle

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[Key]]:
        epoch, order = -1, []
        for step in range(self.start, self.steps):
            first = (step * self.world_size + self.rank) * self.batch_size
            batch = []
            for place in range(first, first + self.batch_size):
                if place // self.n != epoch:
                    epoch = place // self.n
                    order = epoch_order(self.n, self.seed, epoch) if self.shuffle else list(range(self.n))
                batch.append((epoch, order[place % self.n]))
            yield batch


def epoch_order(n: int, seed: int, epoch: int) -> list[int]:
    """The permutation of ``range(n)`` that epoch ``epoch`` reads a data set in."""
    order = list(range(n))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return order


class _Samples(Dataset[Any]):
    """Transformed items by (epoch, index); a bad item is returned as its error, to cross processes unharmed."""

    def __init__(self, dataset: PictureDataset, transform: Transform | None, seed: int) -> None:
        self.dataset, self.transform, self.seed = dataset, transform, seed

    def __getitem__(self, key: Key) -> Any:
        epoch, index = key
        try:
            image, target = self.dataset[index]
        except DataError as error:
            return error
        if self.transform is not None:
            image, target = self.transform(image, target, random.Random(f"item {self.seed} {epoch} {index}"))
        return image, target


class _Collate:
    """Collates items, or passes on the first error among them."""

    def __init__(self, divisor: int, across_processes: bool) -> None:
        self.divisor, self.across_processes = divisor, across_processes

    def __call__(self, items: list[Any]) -> Batch | DataError:
        for item in items:
            if isinstance(item, DataError):
                return item
        batch = collate(items, self.divisor)
        return _to_parent(batch) if self.across_processes else batch


_SMALL = ("boxes", "labels", "iscrowd", "area")


def _to_parent(batch: Batch) -> Batch:
    """Target tensors as arrays: a tensor costs one open file between processes, and hundreds of them run out.

    Masks go as bits: fifty at 800 x 1333 are 53 MB of bool, and shared memory is often limited to 64 MB.
    """
    for target in batch.targets:
        target.update({key: target[key].numpy() for key in _SMALL if key in target})
        if "masks" in target:
            masks = target["masks"].numpy()
            target["masks"] = (numpy.packbits(masks), masks.shape)
    return batch


def _from_worker(batch: Batch) -> Batch:
    for target in batch.targets:
        target.update({key: torch.as_tensor(target[key]) for key in _SMALL if key in target})
        if isinstance(packed := target.get("masks"), tuple):
            bits, shape = packed
            masks = numpy.unpackbits(bits, count=math.prod(shape)).view(bool).reshape(shape)
            target["masks"] = torch.from_numpy(masks)
    return batch
