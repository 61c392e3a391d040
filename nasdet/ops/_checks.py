"""Checks shared by the public operators: "name must be X, got Y"."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nasdet._checks import plain_int

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def is_integer(value: Any) -> bool:
    """Whether it is an int, also one that a compiler traces, and no bool."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def integer_within(name: str, value: Any, least: int, most: int) -> int:
    """``value``, an integer of any library or one that a compiler traces, from ``least`` to ``most``; or an error."""
    whole: int = plain_int(value)
    if not is_integer(whole):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not least <= whole <= most:
        raise ValueError(f"{name} must be from {least} to {most}, got {whole}")
    return whole


def _is_one_number(value: Any) -> bool:
    return hasattr(value, "__float__") and tuple(getattr(value, "shape", ())) == ()


def checked_number(name: str, value: Any) -> float:
    """A number of any library as a float, also one that a compiler traces; NaN is one here. Else an error."""
    known = isinstance(value, (int, float, torch.SymInt, torch.SymFloat))
    if isinstance(value, bool) or not (known or _is_one_number(value)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        number: float = torch.sym_float(value)
    except OverflowError:
        raise ValueError(f"{name} must be a number that fits a float, got a larger {type(value).__name__}") from None
    return number


def positive_number(name: str, value: Any) -> float:
    """``value`` as a float above 0 and finite, or an error."""
    number = checked_number(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return number


def checked_maps(xs: Sequence[Tensor]) -> list[Tensor]:
    """The feature maps of a mixing op: one shape, one device, promoted to their widest dtype (also under autocast)."""
    if isinstance(xs, Tensor) or not isinstance(xs, Sequence):
        raise TypeError(f"xs must be a sequence of tensors, got {type(xs).__name__}")
    if len(xs) == 0:
        raise ValueError("xs must hold at least one map, got none")
    shape, device, dtypes = None, None, set()
    for index, x in enumerate(xs):
        if not isinstance(x, Tensor) or x.dtype not in FLOATS:
            kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"xs[{index}] must be a float32, float64, float16 or bfloat16 tensor, got {kind}")
        if shape is None:
            shape, device = x.shape, x.device
        if x.shape != shape:
            raise ValueError(f"xs[{index}] must have shape {tuple(shape)}, got {tuple(x.shape)}")
        if x.device != device:
            raise ValueError(f"xs[{index}] must be on {device}, got {x.device}")
        dtypes.add(x.dtype)
    if len(dtypes) == 1:
        return list(xs)
    widest = functools.reduce(torch.promote_types, dtypes)
    return [x.to(widest) for x in xs]


def checked_parameter(name: str, value: Tensor, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A parameter of the given shape on ``like``'s device, in the arithmetic's dtype: float32; float64 for float64."""
    if not isinstance(value, Tensor) or value.dtype not in FLOATS:
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating-point tensor, got {kind}")
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {tuple(value.shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device}, got {value.device}")
    wanted = torch.float64 if like.dtype == torch.float64 else torch.float32
    return value if value.dtype == wanted else value.to(wanted)
