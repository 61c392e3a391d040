"""What the Triton launchers of the dilation convolutions prepare for a call: tiles, tables, and plans that are kept."""

from __future__ import annotations

import importlib
import itertools
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from nasdet._dispatch import INTERPRETING, OPS
from nasdet.ops._dilation import checked_dilations, flat

pytestmark = [
    pytest.mark.needs("triton"),
    pytest.mark.skipif(INTERPRETING, reason="plans for real devices"),
]
SET_C = [1, 1, 2, 2, 3, 3, 1, 3, 3, 1]
SPLITS = [48, 32, 16, 16, 16]


class Kernels:
    """The modules under test, imported with triton when a test runs."""

    def __init__(self) -> None:
        names = ("mixed_dilation_conv2d", "grouped_dilation_conv2d", "_dilation_plan", "_dilation_choice")
        modules = [importlib.import_module(f"nasdet.kernels.{name}") for name in names]
        self.mixed, self.grouped, self.plan, self.choice = modules
        self.run, self.tuning = (importlib.import_module(f"nasdet.kernels.{n}") for n in ("_dilation_run", "_tuning"))
        self.recording = importlib.import_module("aot_compile").recording


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    modules = Kernels()
    for module in (modules.mixed, modules.grouped):
        module._plan.cache_clear()
    with mock.patch.dict(modules.plan._on_device, clear=True), mock.patch.dict(modules.tuning._fastest, clear=True):
        yield modules


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")


def nhwc(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta", memory_format=torch.channels_last)


def train(kernels: Kernels, height: int, width: int, channels: int = 128) -> list[Any]:
    """Both convolutions of such a map, forward and backward: their launches."""
    x = nhwc(1, channels, height, width)
    weight, mix, dense = meta(5, channels, channels, 3, 3), torch.empty(5, channels), meta(channels, channels, 3, 3)
    with kernels.recording() as launches:
        y = kernels.mixed.forward(x, weight, mix.to("meta"), SET_C, 1, 1, 1, 0)
        kernels.mixed.backward(y, x, weight, mix.to("meta"), SET_C, 1, 1, 1, 0, True, True, True)
        y = kernels.grouped.forward(x, dense, SET_C, SPLITS, 1, 1, 1, 0)
        kernels.grouped.backward(y, x, dense, SET_C, SPLITS, 1, 1, 1, 0, True, True)
    return launches


def issued_and_useful(table: Any) -> tuple[int, int]:
    """Multiply-adds of one pixel, of which the rest are with zeros that fill up tiles and steps."""
    issued = useful = 0
    for first, last, width, _, _, _, *bounds in table.tiles.values:
        for own, (begin, end) in zip(table.sums, itertools.pairwise(bounds), strict=True):
            steps = table.steps.values[begin:end]
            issued += width * own * len(steps)
            useful += (last - first) * sum(step[4] - step[3] for step in steps)
    return issued, useful


def issued_and_useful_of_weights(table: Any, block_m: int) -> tuple[int, int]:
    alive = [tile for tile in table.tiles.values if tile[3]]
    useful = sum((tile[5] - tile[4]) * (tile[9] - tile[8]) for tile in alive)
    return sum(block_m * tile[6] for tile in alive), useful


@pytest.mark.parametrize("images", [1, 2, 8])
@pytest.mark.parametrize("channels", [128, 256, 512])
def test_few_products_are_with_zeros(kernels: Kernels, channels: int, images: int) -> None:
    """NATS's slices are narrower than matrix units' usual tiles: whole tiles for them would be 2.5 times the work."""
    op = OPS["grouped_dilation_conv2d"]
    case = next(case for case in op.cases if case.id == f"c{channels}-n1")
    x, weight, dilations, splits, *_ = case.make(mock.Mock(randn=lambda *shape, **_: meta(*shape)))[0]
    plan = kernels.grouped.plan_of(
        nhwc(images, *x.shape[1:]), weight, flat(checked_dilations(dilations)), splits, 1, 1, 1
    )
    for product in (plan.forward, plan.gradient, plan.weights):
        assert len(product.candidates) == kernels.choice.MEASURED
        for config in product.candidates:
            table = product.prepared(config).table
            of_weights = product is plan.weights
            counts = issued_and_useful_of_weights(table, config.block_m) if of_weights else issued_and_useful(table)
            taps = 9 * channels * channels
            assert counts[1] == taps and counts[0] <= 1.15 * taps, (product.key[0], config, counts)


def test_estimate_prefers_full_tiles(kernels: Kernels) -> None:
    """Of two tilings with as many tiles the one with fewer zeros, and more waves of tiles cost more."""
    Piece, Config, tap = kernels.plan.Piece, kernels.tuning.Config, ((0, 0, 0),)
    narrow, wide = ([Piece((first, first + rows), 0, (((0, 128), tap),)) for first in (0, 128)] for rows in (32, 128))
    config = Config(128, 128, 64, 8, 3)
    assert kernels.choice.estimate(config, narrow, 10_000) < kernels.choice.estimate(config, wide, 10_000)
    one_wave, another = 66 * 128, 66 * 128 + 1
    assert 2 * kernels.choice.estimate(config, wide, one_wave) == kernels.choice.estimate(config, wide, another)


@pytest.mark.parametrize("size", [16, 32, 64, 256])
def test_blocks_cover_without_much_waste(kernels: Kernels, size: int) -> None:
    for count in range(1, 600):
        blocks = list(kernels.plan.blocks(7, 7 + count, size))
        assert [first for first, _, _ in blocks] == [7, *(last for _, last, _ in blocks[:-1])]
        assert blocks[-1][1] == 7 + count and all(0 < last - first <= width <= size for first, last, width in blocks)
        assert all(width in (16, 32, 64, 128, 256) for *_, width in blocks)
        assert all(8 * (last - first) > 5 * width or width == 16 for first, last, width in blocks)


def test_pieces_are_those_of_a_small_map(kernels: Kernels) -> None:
    plan, draw = kernels.plan, random.Random(0)
    for _ in range(300):
        strides, sizes = [draw.randint(1, 3) for _ in range(2)], [draw.randint(1, 20) for _ in range(2)]
        taps = [plan.kernel_taps(3, (draw.randint(1, 6), draw.randint(1, 6))) for _ in range(2)]
        parts = tuple((8 * i, 8 * i + 8, tuple((*tap, t) for t, tap in enumerate(own))) for i, own in enumerate(taps))
        problem = plan.Problem(3, 16, 16, 1, *sizes, *strides, 9, parts)
        small = plan.canonical(problem)
        assert small.images == 1 and small.height <= 6 + 3 + 1 and small.width <= 6 + 3 + 1
        assert plan.forward_pieces(small) == plan.forward_pieces(problem)
        assert plan.gradient_pieces(small) == plan.gradient_pieces(problem)
        assert plan.weight_table(small, 64, 64).tiles.values == plan.weight_table(problem, 64, 64).tiles.values


def test_a_second_call_prepares_nothing(kernels: Kernels) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("prepared again")

    first = train(kernels, 40, 52)
    names = {
        kernels.run: ("Plan", "product_table", "weight_table", "magic"),
        kernels.choice: ("estimate", "weight_estimate", "fitting_on"),
        kernels.plan: ("blocks", "ThreadPoolExecutor"),
    }
    patches = [mock.patch.object(module, name, refuse) for module, own in names.items() for name in own]
    for patch in patches:
        patch.start()
    try:
        second = train(kernels, 40, 52)
        with pytest.raises(AssertionError, match="prepared again"):
            train(kernels, 40, 53)
    finally:
        for patch in patches:
            patch.stop()
    assert len(first) == len(second) == 12
    for (kernel, arguments, options), (other, again, same) in zip(first, second, strict=True):
        assert kernel is other and options == same and arguments.keys() == again.keys()
        for name in ("tiles", "steps", "branches", "matrices"):
            assert arguments.get(name) is again.get(name)  # the very same tables


def test_tables_do_not_grow_with_the_sizes_of_maps(kernels: Kernels) -> None:
    """Training at many scales: device memory is for the tables of few configurations, whatever the sizes."""
    sizes = [(height, height + 9) for height in range(20, 80)]
    for height, width in sizes:
        train(kernels, height, width)
    count = len(kernels.plan._on_device)
    assert count <= 40 < len(sizes)  # not one more for each size, let alone for each size and product
    train(kernels, 2, 2)  # taps that see the padding alone: tables of its own
    assert len(kernels.plan._on_device) > count


def test_plans_are_bounded(kernels: Kernels) -> None:
    for module in (kernels.mixed, kernels.grouped):
        assert module._plan.cache_info().maxsize == kernels.run.PLANS


def test_only_tables_of_tried_configurations_are_made(kernels: Kernels) -> None:
    """Three while they are measured; where a size of its class is known, the winner's, and no estimate is made."""
    made: list[Any] = []

    def counted(original: Callable[..., Any]) -> Callable[..., Any]:
        def table(pieces: Any, *blocks: int) -> Any:
            made.append(blocks)
            return original(pieces, *blocks)

        return table

    def time_of(prepared: Any, launch: Callable[[Any], None]) -> float:
        return float(prepared.options["BLOCK_M"])

    table = mock.patch.object(kernels.run, "product_table", counted(kernels.run.product_table))
    milliseconds = mock.patch.object(kernels.tuning, "_milliseconds", time_of)
    measuring = mock.patch.object(kernels.tuning, "may_measure", lambda like: True)
    x, weight, mix = nhwc(1, 128, 100, 152), meta(5, 128, 128, 3, 3), torch.empty(5, 128, device="meta")
    with table, milliseconds, measuring, kernels.recording() as launches:
        kernels.mixed.forward(x, weight, mix, SET_C, 1, 1, 1, 0)
        fastest, tried = launches[-1][1]["BLOCK_M"], len(made)
        made.clear()
        with mock.patch.object(kernels.choice, "estimate", lambda *_: pytest.fail("estimated again")):
            kernels.mixed.forward(nhwc(1, 128, 99, 150), weight, mix, SET_C, 1, 1, 1, 0)
    assert tried == kernels.choice.MEASURED and len(made) == 1 and launches[-1][1]["BLOCK_M"] == fastest


def test_tables_are_made_by_a_thread_of_their_own(kernels: Kernels) -> None:
    """Who warms up for a CUDA graph gives its thread's allocations to the graph's pool: see ``on_device``."""
    makers = []
    make = torch.tensor

    def noting(*args: Any, **kwargs: Any) -> Tensor:
        makers.append(threading.get_ident())
        return make(*args, **kwargs)

    rows = kernels.plan.Rows(((1, 2), (3, 4)))
    with mock.patch.object(torch, "tensor", noting):
        table = kernels.plan.on_device(rows, torch.empty(0))
        assert kernels.plan.on_device(rows, torch.empty(0)) is table
    assert table.tolist() == [[1, 2], [3, 4]] and table.dtype == torch.int32
    assert len(makers) == 1 and makers[0] != threading.get_ident()


def test_rounds_are_queued_behind_a_wait(kernels: Kernels) -> None:
    """Else a small product's launches would be timed at the speed of Python."""
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self) -> None:
            order.append("event")

        def synchronize(self) -> None:
            order.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 1.0

    patches = mock.patch.multiple(torch.cuda, Event=Event, _sleep=lambda cycles: order.append("sleep"))
    with patches:
        assert kernels.tuning._milliseconds("own", order.append) == 1.0
    repeats, rounds = kernels.tuning.REPEATS, kernels.tuning.ROUNDS
    assert order == ["own", *(["sleep", "event", *["own"] * repeats, "event", "wait"] * rounds)]
