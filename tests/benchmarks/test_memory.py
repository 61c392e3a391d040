"""The memory probe sees blocks of known size."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from nasdet.measure.memory import can_reset_high_water, peak_memory

SIZE = 200 * 2**20
ALONE = "NASDET_TEST_ALONE" in os.environ
BOTH = pytest.mark.parametrize("tensors_only", [not ALONE], ids=["resident" if ALONE else "tensors"])


def block(size: int = SIZE) -> torch.Tensor:
    return torch.ones(size // 4)


@pytest.mark.skipif(ALONE, reason="this is the process")
@pytest.mark.skipif(not can_reset_high_water(), reason="the high-water mark cannot be reset here")
def test_the_resident_set_in_a_process_of_its_own() -> None:
    """As `peak_memory` asks for: where thousands of tests have run, other threads and libraries take memory as well."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "resident"]
    environment = os.environ | {"NASDET_TEST_ALONE": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0 and "6 passed" in ran.stdout, ran.stdout[-3000:] + ran.stderr[-1000:]


@BOTH
def test_known_size(tensors_only: bool) -> None:
    assert peak_memory(block, tensors_only=tensors_only) == pytest.approx(SIZE, rel=0.03)


@BOTH
def test_blocks_one_after_the_other_count_once(tensors_only: bool) -> None:
    def call() -> None:
        for _ in range(3):
            block()

    assert peak_memory(call, tensors_only=tensors_only) == pytest.approx(SIZE, rel=0.03)


@BOTH
def test_blocks_together_add_up(tensors_only: bool) -> None:
    peak = peak_memory(lambda: [block(SIZE // 2), block(SIZE)], tensors_only=tensors_only)
    assert peak == pytest.approx(1.5 * SIZE, rel=0.03)


@BOTH
def test_what_was_there_before_does_not_count(tensors_only: bool) -> None:
    held = block()
    assert peak_memory(lambda: held.add_(1), tensors_only=tensors_only) < 0.03 * SIZE


@BOTH
def test_freeing_older_memory_is_no_negative_peak(tensors_only: bool) -> None:
    held = [block()]
    assert 0 <= peak_memory(held.clear, tensors_only=tensors_only) < 0.03 * SIZE


@BOTH
def test_backward_is_seen(tensors_only: bool) -> None:
    leaf = block(SIZE // 4).requires_grad_()

    def call() -> None:
        torch.autograd.grad(leaf.exp().sum(), leaf)

    # At the peak: the output that exp keeps, and the gradient made from it.
    assert peak_memory(call, warmup=1, tensors_only=tensors_only) == pytest.approx(SIZE // 2, rel=0.05)


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match="device must be a cpu or cuda device, got 'meta'"):
        peak_memory(block, device="meta")
    with pytest.raises(ValueError, match="warmup must be at least 0, got -1"):
        peak_memory(block, warmup=-1)


def test_the_calls_error_comes_through() -> None:
    def call() -> None:
        raise KeyError("planted")

    for tensors_only in (False, True):
        with pytest.raises(KeyError, match="planted"):
            peak_memory(call, tensors_only=tensors_only)
