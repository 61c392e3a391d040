"""What the launchers share: layouts, the current device, and lists of maps too long for one launch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

# Maps are passed as a tuple of pointer arguments: no table of pointers to copy to the device, nothing to synchronise,
# and a CUDA graph records them. Kernels unroll over the tuple, so a launch takes so many and a longer list several.
MAPS_PER_LAUNCH = 32


def launches(maps: int) -> Iterator[slice]:
    """The maps of each launch."""
    for first in range(0, maps, MAPS_PER_LAUNCH):
        yield slice(first, min(first + MAPS_PER_LAUNCH, maps))


def in_layout_of(x: Tensor, like: Tensor) -> Tensor:
    """``x`` itself if its strides are those of ``like`` (size-1 dimensions do not count), else a copy laid out so."""
    equal = all(size <= 1 or a == b for size, a, b in zip(x.shape, x.stride(), like.stride(), strict=True))
    return x if equal else torch.empty_like(like).copy_(x)


def all_in_layout_of(xs: Sequence[Tensor], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(in_layout_of(x, like) for x in xs)


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors' one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
