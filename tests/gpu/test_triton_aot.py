"""Every Triton kernel compiles for real architectures, without a GPU, as its launcher starts it; nothing spills."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.needs("triton")
SHARED_MEMORY = {80: 166912, 90: 232448}  # bytes that one block may have
KERNELS = {
    "mix.forward_kernel", "mix.backward_kernel", "mix.reduce_kernel",
    "norm_act_mix.moments_kernel", "norm_act_mix.statistics_kernel", "norm_act_mix.forward_kernel",
    "norm_act_mix.sums_kernel", "norm_act_mix.coefficients_kernel", "norm_act_mix.parameters_kernel",
    "norm_act_mix.gradient_kernel",
    "sigmoid_focal_loss.forward_kernel", "sigmoid_focal_loss.sum_kernel", "sigmoid_focal_loss.reduce_kernel",
    "sigmoid_focal_loss.backward_kernel",
}  # fmt: skip

Report = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def report(program_environment: Callable[..., dict[str, str]]) -> Report:
    """Kernel, dtype, layout, architecture -> what it uses. A process of its own, without TRITON_INTERPRET."""
    environment = program_environment()
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).with_name("aot_compile.py")), *map(str, SHARED_MEMORY)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    return json.loads(result.stdout.splitlines()[-1])


def test_every_kernel_is_compiled_for_every_architecture(report: Report) -> None:
    for arch in SHARED_MEMORY:
        assert {name.partition("-")[0] for name in report if name.endswith(f"-sm{arch}")} == KERNELS


def test_nothing_spills(report: Report) -> None:
    wrong = {name: row for name, row in report.items() if row["stack"] or row["local"]}
    assert not wrong


def test_shared_memory_fits(report: Report) -> None:
    wrong = {name: row for name, row in report.items() if row["shared"] > SHARED_MEMORY[int(name[-2:])]}
    assert not wrong


def test_maps_are_loaded_16_bytes_at_a_time(report: Report) -> None:
    maps = {name: row for name, row in report.items() if "bf16" in name or "fp32" in name}
    assert len(maps) >= 2 * 2 * 2
    wrong = {name: row for name, row in maps.items() if row["narrow_loads"] or not row["wide_loads"]}
    assert not wrong
