"""Forces one configuration of the dilation convolutions' products at a time, wherever the kernels keep their list."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import op_checks
import pytest
import torch
from torch import Tensor

import nasdet.kernels
from nasdet._dispatch import OPS
from nasdet.testing import Case, Inputs

# The lists by name: of forward and the map's gradient, and of the weights' gradient.
LISTS = ("PRODUCTS", "WEIGHT_PRODUCTS")
KINDS = {
    "16-bit": (torch.bfloat16, False),
    "tf32": (torch.float32, True),
    "ieee": (torch.float32, False),
}  # dtype, TF32
# Whole tiles; tiles and sums with a rest, in channels that are loaded 16 bytes at a time, and one by one.
CHANNELS = {"whole": 256, "rest": 272, "unaligned": 264}
HEIGHT, WIDTH = 12, 40


def configurations() -> list[tuple[str, str, int]]:
    """(list, kind, index) of every configuration; none without triton."""
    if importlib.util.find_spec("triton") is None:
        return []
    return [
        (name, kind, index) for name, lists in _lists().items() for kind in KINDS for index in range(len(lists[kind]))
    ]


def config_of(name: str, kind: str, index: int) -> Any:
    return _lists()[name][kind][index]


def _lists() -> dict[str, dict[str, Sequence[Any]]]:
    found: dict[str, dict[str, Sequence[Any]]] = {}
    for module in pkgutil.iter_modules(nasdet.kernels.__path__):
        if module.name.startswith("_dilation"):
            members = vars(importlib.import_module(f"nasdet.kernels.{module.name}"))
            found |= {name: members[name] for name in LISTS if name in members}
    assert set(found) == set(LISTS), f"the kernels' lists of tiles must be called {LISTS}, found {sorted(found)}"
    return found


def case_of(shape: str, name: str, kind: str, index: int) -> tuple[str, Case]:
    """An op and a case of its own for every configuration: what the kernels remember of a shape belongs to one."""
    channels, place = CHANNELS[shape], configurations().index((name, kind, index))
    grouped = shape == "rest"

    def make(inputs: Inputs) -> tuple[list[Any], dict[str, Any]]:
        x = inputs.randn(2, channels, HEIGHT, WIDTH + place, layout="channels_last")
        scale = (9 * channels) ** -0.5
        if grouped:
            first = channels // 32 * 16
            return [x, inputs.randn(channels, channels, 3, 3, scale=scale), (1, 2), (first, channels - first), 1, 1], {}
        mix = torch.stack([inputs.weights(2) for _ in range(channels)], dim=1)
        return [x, inputs.randn(2, channels, channels, 3, 3, scale=scale), mix, (1, 2), 1, 1], {}

    op = "grouped_dilation_conv2d" if grouped else "mixed_dilation_conv2d"
    return op, Case(f"{shape}-{name}-{kind}-{index}", make)


Launch = tuple[str, int, int, int]  # kernel, tile's rows, warps, stages


@contextlib.contextmanager
def forced(name: str, kind: str, index: int, start: bool = True) -> Iterator[list[Launch]]:
    """Within the block the list holds this configuration alone; notes the launches of tiles, which are not started when
    not ``start``."""
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    launch: Callable[..., Any] = JITFunction.run

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "num_stages" in kwargs:
            launches.append((self.fn.__name__, kwargs["BLOCK_M"], kwargs["num_warps"], kwargs["num_stages"]))
        return launch(self, *args, **kwargs) if start else None

    lists = _lists()[name]
    with mock.patch.dict(lists, {kind: (lists[kind][index],)}), mock.patch.object(JITFunction, "run", noted):
        yield launches


def assert_ran(launches: Sequence[Launch], name: str, config: Any) -> None:
    """The products of this list were made with ``config``, and there were as many as there should be."""
    weights = name == "WEIGHT_PRODUCTS"
    own = [launch[1:] for launch in launches if ("weight" in launch[0]) == weights]
    expected = (config.block_m, config.warps, config.stages)
    assert len(own) == (1 if weights else 2) and set(own) == {expected}, f"launched {launches}, expected {expected}"


def why_not_on(capability: int, config: Any, shape: str) -> str | None:
    """Why a compute capability has no use for a configuration; shapes with a rest have tiles of several widths."""
    if not config.least <= capability <= config.most:
        return f"{config} is for compute capabilities {config.least} to {config.most}, this is {capability}"
    if capability < config.uneven and shape != "whole":
        return f"{config} has tiles of several widths from compute capability {config.uneven} on, this is {capability}"
    return None


def why_not_here(config: Any, like: Tensor, shape: str) -> str | None:
    """Why a device has no use for a configuration."""
    major, minor = torch.cuda.get_device_capability(like.device)
    if reason := why_not_on(10 * major + minor, config, shape):
        return reason
    properties = torch.cuda.get_device_properties(like.device)
    if config.shared_memory(like.element_size()) > getattr(properties, "shared_memory_per_block_optin", 101376):
        return f"{config} needs more shared memory than this device has"
    return None


def check(name: str, kind: str, index: int, shape: str, device: str) -> None:
    """Forward and all gradients with this configuration, against float64; skips what is not for the device."""
    (dtype, tf32), config = KINDS[kind], config_of(name, kind, index)
    if reason := why_not_here(config, torch.empty(0, dtype=dtype, device=device), shape):
        pytest.skip(reason)
    op, case = case_of(shape, name, kind, index)
    with forced(name, kind, index) as launches:
        if tf32:
            op_checks.check_tf32(OPS[op], case, device, "triton", deterministic=True)
        else:  # where nothing may be measured the first is taken, which is the only one
            op_checks.check(OPS[op], case, dtype, device, "triton", deterministic=True)
    assert_ran(launches, name, config)
