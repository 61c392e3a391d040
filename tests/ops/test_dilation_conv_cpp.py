"""The C++ backend of the multi-dilation convolutions: its choice of an algorithm, its errors, its scratch memory."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import nasdet
from nasdet import _library
from nasdet.ops import _dilation, grouped_dilation_conv2d, mixed_dilation_conv2d
from nasdet.testing import assert_close, tolerance

pytestmark = pytest.mark.needs("cpp")
MEBIBYTE = 1 << 20


@pytest.fixture(autouse=True)
def _default_limit() -> Iterator[None]:
    before = nasdet.scratch_limit()
    yield
    nasdet.scratch_limit(before)


def operands(channels: int = 32, size: int = 12, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(1, channels, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(2, channels, channels, 3, 3, dtype=dtype), torch.rand(2, channels)


@pytest.mark.parametrize("needs", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("splits", [(), (20, 12)], ids=["mixed", "grouped"])
def test_the_choice_can_be_asked_for(splits: tuple[int, ...], needs: tuple[bool, bool]) -> None:
    x, weight, _ = operands()
    own = weight if not splits else weight[0]
    arguments = (x, own, ((1, 1), (2, 2)), splits, (1, 1), 1)
    for name in (None, "direct"):
        chosen = _dilation.chosen_algorithm(*arguments, algorithm=name, need_x=needs[0], need_weight=needs[1])
        assert chosen in _dilation.ALGORITHMS and name in (None, chosen)
    exact = _dilation.chosen_algorithm(*arguments, precision="exact", need_x=needs[0], need_weight=needs[1])
    assert exact in ("direct", "frequency")


@pytest.mark.parametrize("algorithm", ["frequency", "winograd"])
@pytest.mark.parametrize("grouped", [False, True])
def test_an_algorithm_that_cannot_run_is_an_error_with_its_reason(algorithm: str, grouped: bool) -> None:
    """float64 is left to the direct algorithm."""
    x, weight, mix = operands(dtype=torch.float64)
    with pytest.raises(ValueError, match=f"algorithm must be one that can run this call, got '{algorithm}': .+"):
        if grouped:
            grouped_dilation_conv2d(x, weight[0], (1, 2), (16, 16), algorithm=algorithm)
        else:
            mixed_dilation_conv2d(x, weight, mix, (1, 2), algorithm=algorithm)


def test_raw_calls_with_bad_arguments_are_errors_not_crashes() -> None:
    x, weight, mix = operands()
    mixed, grouped = torch.ops.nasdet.mixed_dilation_conv2d, torch.ops.nasdet.grouped_dilation_conv2d
    for call in (
        lambda: mixed(x, weight, mix, [1, 1], 1, 1, 1, 0),
        lambda: mixed(x, weight, mix, [1, 1, 2, 0], 1, 1, 1, 0),
        lambda: mixed(x, weight, mix.double(), [1, 1, 2, 2], 1, 1, 1, 0),
        lambda: mixed(x, weight, mix[:, :3], [1, 1, 2, 2], 1, 1, 1, 0),
        lambda: mixed(x, weight, mix, [1, 1, 2, 2], 0, 1, 1, 0),
        lambda: mixed(x, weight, mix, [1, 1, 2, 2], 1, 1, 1, 9),
        lambda: grouped(x, weight[0], [1, 1, 2, 2], [16, 17], 1, 1, 1, 0),
        lambda: grouped(x, weight[0], [1, 1, 2, 2], [32], 1, 1, 1, 0),
        lambda: grouped(x, weight[0, :, :4], [1, 1, 2, 2], [3, 29], 1, 1, 8, 0),
        lambda: grouped(x.double(), weight[0], [1, 1], [32], 1, 1, 1, 0),
    ):
        with pytest.raises(RuntimeError, match="must"):
            call()


LEAST = {"direct": 1, "frequency": 4, "winograd": 1}  # MiB within which the smallest pieces of this problem fit


@pytest.mark.parametrize("threads", [1, 2, 16])
@pytest.mark.parametrize(
    ("algorithm", "limit"), [(name, size) for name, least in LEAST.items() for size in (1, 4, 8, 64) if size >= least]
)
def test_scratch_stays_below_the_limit_and_is_kept_until_released(algorithm: str, limit: int, threads: int) -> None:
    if algorithm != "direct" and _library.cpu_isa() == "baseline":
        pytest.skip(f"{algorithm} needs AVX2")
    x, weight, mix = operands(128, 24)
    leaves = [x, weight[0]] if algorithm == "winograd" else [x, weight, mix]
    leaves = [value.detach().requires_grad_() for value in leaves]

    def convolved() -> Tensor:
        if algorithm == "winograd":  # which takes no branches that overlap
            return grouped_dilation_conv2d(*leaves, (1, 2), (80, 48), algorithm=algorithm)
        return mixed_dilation_conv2d(*leaves, (1, 2), algorithm=algorithm)

    before, page = torch.get_num_threads(), 2 * MEBIBYTE  # memory is taken in huge pages
    room = -(-limit * MEBIBYTE // page) * page
    nasdet.release_scratch()
    assert nasdet.scratch_limit(limit * MEBIBYTE) == limit * MEBIBYTE == nasdet.scratch_limit()
    torch.set_num_threads(threads)
    try:
        first = convolved()
        assert 0 < nasdet.release_scratch() <= room, "forward"
        for needed in (leaves[:1], leaves[1:], leaves):
            torch.autograd.grad(first.sum(), needed, retain_graph=True)
            assert 0 < nasdet.release_scratch() <= room, f"backward to {len(needed)}"
        assert torch.equal(first, convolved())
    finally:
        torch.set_num_threads(before)
    assert 0 < nasdet.release_scratch() <= room and nasdet.release_scratch() == 0


@pytest.mark.parametrize("shape", [(1, 256, 50, 76), (1, 320, 40, 40), (1, 128, 100, 152)])
def test_wide_slices_stay_below_the_limit(shape: tuple[int, ...]) -> None:
    """On matrix tiles, where the CPU has them: gradients are summed over whole blocks of tiles."""
    if _library.cpu_isa() == "baseline":
        pytest.skip("winograd needs AVX2")
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(shape[1], shape[1], 3, 3, requires_grad=True)
    nasdet.scratch_limit(4 * MEBIBYTE)
    nasdet.release_scratch()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        y = grouped_dilation_conv2d(x, weight, (1,), (shape[1],), algorithm="winograd")
        assert 0 < nasdet.release_scratch() <= 4 * MEBIBYTE, "forward"
        y.sum().backward()
        assert 0 < nasdet.release_scratch() <= 4 * MEBIBYTE, "backward"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("stride", [3, 4, 5, 1000, 2**30 - 1])
def test_long_strides_of_bfloat16_stay_below_the_limit(stride: int) -> None:
    """On matrix tiles, where the CPU has them: their copy of the map has a place for every pixel of a step."""
    x = torch.randn(1, 17, 16, 9).bfloat16().requires_grad_()
    weight = torch.randn(8, 17, 3, 3).bfloat16().requires_grad_()
    nasdet.scratch_limit(4 * MEBIBYTE)
    nasdet.release_scratch()
    y = grouped_dilation_conv2d(x, weight, (1,), (8,), stride, backend="cpp")
    found = [y, *torch.autograd.grad(y.float().square().sum(), (x, weight))]
    assert 0 < nasdet.release_scratch() <= 4 * MEBIBYTE
    exact, kernel = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
    z = torch.nn.functional.conv2d(exact, kernel, None, stride, 1)
    wanted = [z, *torch.autograd.grad(z.square().sum(), (exact, kernel))]
    for ours, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=0.02, atol=0.02 * float(expected.detach().abs().max()))


def test_a_lower_limit_gives_back_what_is_larger() -> None:
    x, weight, mix = operands(256, 24)
    nasdet.release_scratch()
    mixed_dilation_conv2d(x, weight, mix, (1, 2), algorithm="direct")
    kept = nasdet.release_scratch()
    assert kept > 2 * MEBIBYTE
    for limit, left in ((kept, kept), (kept - 1, kept), (kept - 2 * MEBIBYTE, 0), (MEBIBYTE, 0)):
        nasdet.scratch_limit(64 * MEBIBYTE)
        mixed_dilation_conv2d(x, weight, mix, (1, 2), algorithm="direct")
        nasdet.scratch_limit(limit)
        assert nasdet.release_scratch() == left


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "64 MB"])
def test_the_limit_is_a_positive_integer(value: object) -> None:
    with pytest.raises(ValueError, match="bytes must be a positive integer or None"):
        nasdet.scratch_limit(value)  # type: ignore[arg-type]  # the point of the test
    with pytest.raises(ValueError, match=r"bytes must be below 2\*\*63, got 9223372036854775808"):
        nasdet.scratch_limit(2**63)


def test_sixteen_threads_at_once_have_scratch_of_their_own() -> None:
    x, weight, mix = operands(64, 20)
    expected = mixed_dilation_conv2d(x, weight, mix, (1, 3), algorithm="direct")
    results: list[bool] = []

    def work(index: int) -> None:
        for _ in range(4):
            y = mixed_dilation_conv2d(x, weight, mix * 2**index, (1, 3), algorithm="direct")
            results.append(torch.equal(y, expected * 2**index))
            if index % 5 == 0:
                nasdet.release_scratch()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 64 and all(results)
    nasdet.release_scratch()


def test_a_child_forked_meanwhile_has_scratch_too() -> None:
    """As a loader's processes are, while a thread of the parent runs a net."""
    over = threading.Event()

    def work() -> None:
        while not over.is_set():
            nasdet.release_scratch()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(200):
            if (child := os.fork()) == 0:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.alarm(20)  # ends a child that waits forever
                nasdet.release_scratch()
                os._exit(0)
            assert os.waitpid(child, 0)[1] == 0
    finally:
        over.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize(
    ("channels", "groups", "dtype", "size"),
    [
        (64, 1, torch.bfloat16, 10),
        (64, 64, torch.float32, 10),
        (64, 8, torch.float32, 10),
        (64, 4, torch.bfloat16, 10),
        (64, 1, torch.float32, 3),
    ],
    ids=["bfloat16", "depthwise", "narrow-groups", "groups-in-bfloat16", "tiny-map"],
)
def test_where_torch_is_faster_its_convolutions_run(
    channels: int, groups: int, dtype: torch.dtype, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dilation, "_BFLOAT16_PRODUCTS", True)
    x = torch.randn(1, channels, size, size).to(dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, channels // groups, 3, 3).to(dtype)
    assert _dilation.torch_is_faster(x, weight, (1, 1), groups)
    y = grouped_dilation_conv2d(x, weight, [2], [channels], 1, groups, backend="cpp")
    assert torch.equal(y, F.conv2d(x, weight, padding=2, dilation=2, groups=groups)) and y.stride() == x.stride()
    ours = grouped_dilation_conv2d(x, weight, [2], [channels], 1, groups, algorithm="direct")
    torch.testing.assert_close(ours, y, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=1e-4 * 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_elsewhere_the_kernels_run(dtype: torch.dtype) -> None:
    x, weight, _ = operands(dtype=dtype)
    assert not _dilation.torch_is_faster(x, weight[0], (1, 1), 1)
    x, weight, _ = operands()
    assert not _dilation.torch_is_faster(x, weight[0], (1, 1), 1)
    assert not _dilation.torch_is_faster(x, weight[0, :, :4].requires_grad_(), (1, 1), 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_slices_of_groups_are_left_to_torch_on_large_maps_only(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_dilation, "_BFLOAT16_PRODUCTS", True)
    monkeypatch.setattr(_dilation, "_BFLOAT16_TILES", False)
    weight = torch.randn(64, 8, 3, 3, dtype=dtype)
    for size, slices, expected in ((64, 5, True), (10, 5, False), (10, 1, True)):
        x = torch.randn(1, 64, size, size, dtype=dtype)
        assert _dilation.torch_is_faster(x, weight, (1, 1), 8, slices) is expected
    assert not _dilation.torch_is_faster(x.requires_grad_(), weight, (1, 1), 8, 1)


@pytest.mark.parametrize("groups", [1, 4])
def test_with_matrix_tiles_one_slice_of_bfloat16_is_left_to_torch(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = calls_of_torch(monkeypatch)
    monkeypatch.setattr(_dilation, "_BFLOAT16_TILES", True)
    x, weight = torch.randn(1, 32, 48, 48).bfloat16(), torch.randn(1, 32, 32 // groups, 3, 3).bfloat16()
    mix = torch.rand(1, 32)
    grouped_dilation_conv2d(x, weight[0], [1, 2], [16, 16], 1, groups, backend="cpp")
    mixed_dilation_conv2d(x, weight.expand(2, -1, -1, -1, -1), mix.expand(2, -1), (1, 2), 1, groups, backend="cpp")
    mixed_dilation_conv2d(x, weight, mix.requires_grad_(), (1,), 1, groups, backend="cpp")
    assert not calls
    grouped_dilation_conv2d(x, weight[0], [2], [32], 1, groups, backend="cpp")
    y = mixed_dilation_conv2d(x, weight, mix.detach(), (3,), 1, groups, backend="cpp")
    assert calls == [(2, 2), (3, 3)]
    ours = mixed_dilation_conv2d(x, weight, mix.detach(), (3,), 1, groups, backend="cpp", algorithm="direct")
    torch.testing.assert_close(ours, y, rtol=2e-2, atol=2e-1)
    narrow = torch.randn(32, 4, 3, 3).bfloat16()
    assert not _dilation.torch_is_faster(x, narrow, (1, 1), 8)


def test_bfloat16_groups_stay_here_where_the_cpu_has_no_products_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dilation, "_BFLOAT16_PRODUCTS", False)
    monkeypatch.setattr(_dilation, "_BFLOAT16_TILES", False)
    x, weight = torch.randn(1, 64, 64, 64, dtype=torch.bfloat16), torch.randn(64, 8, 3, 3, dtype=torch.bfloat16)
    assert not _dilation.torch_is_faster(x, weight, (1, 1), 8, 1)


def test_strided_convolutions_are_left_to_torch_in_the_forward_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's gradients of strided weights can be wrong."""
    monkeypatch.setattr(_dilation, "_BFLOAT16_PRODUCTS", True)
    for dtype, size, expected in ((torch.float32, 96, True), (torch.float32, 48, False), (torch.bfloat16, 48, True)):
        x, weight = torch.randn(1, 64, size, size, dtype=dtype), torch.randn(64, 64, 3, 3, dtype=dtype)
        assert _dilation.torch_is_faster(x, weight, (2, 2), 1) is expected
        assert not _dilation.torch_is_faster(x, weight.requires_grad_(), (2, 2), 1)


def mixture_of_wholes() -> tuple[Tensor, Tensor, Tensor]:
    """Eight groups of eight channels: every product and every sum is a bfloat16."""
    x = torch.randint(-1, 2, (1, 64, 48, 48)).bfloat16().contiguous(memory_format=torch.channels_last)
    weight = torch.randint(-1, 2, (3, 64, 8, 3, 3)).bfloat16()
    return x, weight, torch.tensor([0.5, 0.25, 0.25])[:, None].repeat(1, 8)


def calls_of_torch(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The dilations of torch's convolutions from now on."""
    calls: list[tuple[int, ...]] = []
    own = F.conv2d

    def counted(x: Tensor, weight: Tensor, bias: None, stride: Any, padding: Any, dilation: Any, groups: int) -> Tensor:
        calls.append(dilation)
        return own(x, weight, bias, stride, padding, dilation, groups)

    monkeypatch.setattr(F, "conv2d", counted)
    monkeypatch.setattr(_dilation, "_BFLOAT16_PRODUCTS", True)
    monkeypatch.setattr(_dilation, "_BFLOAT16_TILES", False)
    return calls


def test_a_mixture_of_groups_in_bfloat16_is_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, mix = mixture_of_wholes()
    dilations = (1, (2, 3), 5)
    exact = mixed_dilation_conv2d(x.double(), weight.double(), mix, dilations, groups=8, backend="reference")
    calls = calls_of_torch(monkeypatch)
    y = mixed_dilation_conv2d(x, weight, mix, dilations, groups=8, backend="cpp")
    assert calls == [(1, 1), (2, 3), (5, 5)]
    assert torch.equal(y.double(), exact) and y.dtype == x.dtype and y.stride() == x.stride()
    ours = mixed_dilation_conv2d(x, weight, mix, dilations, groups=8, backend="cpp", algorithm="direct")
    assert torch.equal(ours, y) and len(calls) == 3


@pytest.mark.skipif(
    _library.cpu_isa() not in ("avx512_bf16", "amx"), reason="elsewhere torch's bfloat16 may sum in 16 bits"
)
def test_what_torch_mixes_is_as_accurate_as_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(1, 64, 48, 48).bfloat16(), torch.randn(3, 64, 8, 3, 3).bfloat16() / 8
    mix = torch.softmax(torch.randn(3, 64), 0)
    exact = mixed_dilation_conv2d(x.double(), weight.double(), mix, (1, 2, 3), groups=8, backend="reference")
    calls = calls_of_torch(monkeypatch)
    y = mixed_dilation_conv2d(x, weight, mix, (1, 2, 3), groups=8, backend="cpp")
    assert len(calls) == 3
    assert_close(y, exact, tolerance(x.dtype, 3 * 8 * 9, float(exact.abs().max())), "y")
    assert float((y - exact).norm() / exact.norm()) < torch.finfo(x.dtype).eps


@pytest.mark.parametrize("case", ["x", "weight", "mix", "small-map", "stride", "one-group", "float32"])
def test_other_mixtures_stay_here(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, mix = mixture_of_wholes()
    stride, groups = (2, 8) if case == "stride" else (1, 8)
    if case in ("x", "weight", "mix"):  # a gradient follows
        {"x": x, "weight": weight, "mix": mix}[case].requires_grad_()
    if case == "small-map":
        x = x[:, :, :8, :8]
    if case == "one-group":
        weight, groups = torch.randn(3, 16, 64, 3, 3).bfloat16(), 1
    if case == "float32":
        x, weight = x.float(), weight.float()
    calls = calls_of_torch(monkeypatch)
    y = mixed_dilation_conv2d(x, weight, mix, (1, 2, 3), stride, groups, backend="cpp")
    assert not calls and y.requires_grad == (case in ("x", "weight", "mix"))
    with torch.no_grad():  # then none does
        mixed_dilation_conv2d(x, weight, mix, (1, 2, 3), stride, groups, backend="cpp")
    assert len(calls) == (3 if case in ("x", "weight", "mix") else 0)
