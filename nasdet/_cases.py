"""Inputs of an op, written once: the case list that drives its tests and benchmarks on every backend."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """``make(inputs)`` returns the op's positional and keyword arguments.

    ``large`` cases are for benchmarks only; ``condition`` is how much the case magnifies a rounding of its inputs.
    """

    id: str
    make: Callable[[Inputs], tuple[Sequence[Any], Mapping[str, Any]]]
    large: bool = False
    condition: float = 1.0


class Inputs:
    """Makes seeded tensors of one dtype on one device, in the layouts that callers really pass."""

    def __init__(self, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0):
        self.dtype, self.device = dtype, device
        self.generator = torch.Generator().manual_seed(seed)

    @property
    def weight_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def randn(self, *shape: int, layout: str = "contiguous", scale: float = 1.0, shift: float = 0.0) -> Tensor:
        """Normal values in ``layout``: contiguous, channels_last, sliced, expanded or transposed."""
        if layout == "sliced":
            wide = self._normal((*shape[:-1], 2 * shape[-1] + 3), scale, shift)
            return wide[..., 1 : 1 + 2 * shape[-1] : 2]
        if layout == "expanded":
            return self._normal((1, *shape[1:]), scale, shift).expand(shape)
        if layout == "transposed":
            return self._normal((*shape[:-2], shape[-1], shape[-2]), scale, shift).transpose(-1, -2)
        tensor = self._normal(shape, scale, shift)
        return tensor.to(memory_format=torch.channels_last) if layout == "channels_last" else tensor

    def weights(self, count: int) -> Tensor:
        """Float32 weights (float64 with float64 maps) that sum to 1, as a softmax gives them."""
        logits = torch.randn(count, generator=self.generator, dtype=torch.float64)
        return torch.softmax(logits, 0).to(self.weight_dtype).to(self.device)

    def affine(self, *shape: int) -> tuple[Tensor, Tensor]:
        """Scale and bias of a normalisation."""
        weight = 1 + 0.2 * torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        bias = 0.3 * torch.randn(*shape, generator=self.generator, dtype=torch.float64)
        return weight.to(self.weight_dtype).to(self.device), bias.to(self.weight_dtype).to(self.device)

    def _normal(self, shape: Sequence[int], scale: float, shift: float) -> Tensor:
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float32) * scale + shift
        return values.to(self.dtype).to(self.device)


def tolerance(dtype: torch.dtype, reduce_len: int, scale: float) -> float:
    """The largest error to accept in a value of magnitude ``scale``, made by summing ``reduce_len`` terms.

    One rounding into ``dtype`` plus the random walk of the sum in the arithmetic type (float32; float64 for
    float64): ``scale * (u(dtype) + 8 u(arithmetic) sqrt(reduce_len))``, u the unit roundoff, with a factor 2 of room.
    """
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    store, compute = torch.finfo(dtype).eps / 2, torch.finfo(arithmetic).eps / 2
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # a subnormal's rounding
    return 2 * scale * (store + 8 * compute * math.sqrt(max(reduce_len, 1))) + tiny
