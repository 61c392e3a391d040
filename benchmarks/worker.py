"""A contestant of a race of whole steps, in a process of its own: makes what it races, then does a step per input line.

Speaks JSON lines: the options as the only argument; ``{"ready": ...}``, then one object per step asked for.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any, Protocol

import torch
from backends import chosen_backends
from interleave import make_clock
from machine import float32_products, keep_freed_blocks
from torch import nn

from nasdet.measure.memory import peak_memory, trim_heap


class Contestant(Protocol):
    """What is raced. ``step()`` returns numbers that say what was computed, to compare contestants by."""

    model: nn.Module
    facts: dict[str, Any]  # optional: what else it says of itself before the race

    def step(self) -> dict[str, float]: ...


def serve(make: Callable[[dict[str, Any]], Contestant]) -> None:
    """Make a contestant from the options, and step until the input ends. Products of float32 are float32's."""
    options = json.loads(sys.argv[1])
    torch.set_num_threads(options["threads"])
    keep_freed_blocks()
    with float32_products(tf32=False):
        _serve(make, options)


def _serve(make: Callable[[dict[str, Any]], Contestant], options: dict[str, Any]) -> None:
    contestant = make(options)
    clock = make_clock(options["device"])
    parameters = sum(p.numel() for p in contestant.model.parameters())
    _say({"ready": True, "parameters": parameters, **getattr(contestant, "facts", {})})
    for line in sys.stdin:
        values: dict[str, float] = {}

        def step(into: dict[str, float] = values) -> None:
            into.update(contestant.step())

        # In a probe the profiler counts, which takes time; in other steps the kernel does.
        probing = line.strip() == "probe"
        seconds: list[float] = []

        def timed(into: list[float] = seconds, inner: Callable[[], None] = step) -> None:
            into.append(clock(inner))

        with chosen_backends() if probing else contextlib.nullcontext({}) as backends:
            peak = peak_memory(timed, device=options["device"], tensors_only=probing)
        trim_heap()  # or four contestants' freed memory would not fit beside each other
        _say({"seconds": seconds[0], "peak_memory": peak, "values": values, "backends": backends})


def _say(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def random_objects(count: int, size: list[int], classes: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """``count`` boxes of all sizes in a picture of ``size`` (height, width), and their labels."""
    # Boxes as (x, y) corners and extents; the picture's own proportions.
    whole = torch.tensor([size[1], size[0]])
    corner = torch.rand(count, 2, generator=generator) * whole * 0.6
    extent = 8 + torch.rand(count, 2, generator=generator) * whole * 0.35
    labels = torch.randint(0, classes, (count,), generator=generator)
    return {"boxes": torch.cat([corner, corner + extent], 1), "labels": labels}
