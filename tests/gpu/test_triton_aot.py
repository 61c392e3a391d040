"""Every Triton kernel compiles for real architectures, without a GPU, as its launcher starts it; nothing spills."""

from __future__ import annotations

import importlib
import json
import re
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
    "dilation_conv.fold_kernel", "dilation_conv.product_kernel", "dilation_conv.weight_gradient_kernel",
    "dilation_conv.unfold_kernel",
}  # fmt: skip

Report = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def report(program_environment: Callable[..., dict[str, str]]) -> Report:
    """Kernel, dtype, layout, architecture -> what it uses. A process of its own, without TRITON_INTERPRET."""
    environment = program_environment()
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).with_name("aot_compile.py")), *map(str, SHARED_MEMORY)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
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
    maps = {
        name: row
        for name, row in report.items()
        if ("bf16" in name or "fp32" in name) and not name.startswith("dilation_conv")
    }
    assert len(maps) >= 2 * 2 * 2
    wrong = {name: row for name, row in maps.items() if row["narrow_loads"] or not row["wide_loads"]}
    assert not wrong


def products_of(report: Report, kind: str) -> Report:
    kernels = ("dilation_conv.product_kernel", "dilation_conv.weight_gradient_kernel")
    return {name: row for name, row in report.items() if name.startswith(kernels) and f"-{kind}-" in name}


@pytest.mark.parametrize("kind", ["bf16-16-bit", "fp16-16-bit", "fp32-tf32"])
def test_products_run_on_the_matrix_units(report: Report, kind: str) -> None:
    rows = products_of(report, kind)
    assert len(rows) >= 2 * len(SHARED_MEMORY)
    wrong = {name: row for name, row in rows.items() if row["products"] != ("wgmma" if "sm90" in name else "mma")}
    assert not wrong


def test_exact_products_do_not_round_to_tf32(report: Report) -> None:
    rows = products_of(report, "fp32-ieee")
    assert len(rows) >= 2 * len(SHARED_MEMORY)
    assert not {name: row for name, row in rows.items() if row["products"]}


def test_first_choices_are_not_serialised_on_hopper(report: Report) -> None:
    """Deterministic calls, and graphs that were not warmed up, run the first choice without measuring any."""
    first = {name: row for name, row in report.items() if "serialised" in row}
    for kind in ("bf16-16-bit", "fp32-tf32"):
        assert len(products_of(first, kind)) >= 5  # two of the mixture, three of the grouped form
    assert not {name for name, row in first.items() if row["serialised"]}


# The accumulators of one product are written to while the next may be in flight.
PLANTED = """
.version 8.0
.target sm_90a
.address_size 64
.visible .entry planted(.param .u64 out, .param .u32 count)
{
    .reg .f32 %f<4>;
    .reg .b64 %d<3>;
    .reg .b32 %r<2>;
    .reg .pred %p;
    ld.param.u64 %d1, [out];
    ld.param.u32 %r1, [count];
    mov.b64 %d2, 0;
    mov.f32 %f0, 0f00000000;
    mov.f32 %f1, %f0;
    mov.f32 %f2, %f0;
    mov.f32 %f3, %f0;
LOOP:
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %d2, %d2, 1, 1, 1, 0, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 1;
    mov.f32 %f0, 0f3f800000;
    sub.s32 %r1, %r1, 1;
    setp.ne.s32 %p, %r1, 0;
    @%p bra LOOP;
    wgmma.wait_group.sync.aligned 0;
    st.global.v4.f32 [%d1], {%f0, %f1, %f2, %f3};
    ret;
}
"""


def test_a_serialised_product_is_noticed() -> None:
    aot_compile = importlib.import_module("aot_compile")
    assert aot_compile.serialised(PLANTED)
    assert not aot_compile.serialised(PLANTED.replace("    mov.f32 %f0, 0f3f800000;\n", ""))


def test_products_keep_several_stages_of_operands_in_flight(report: Report) -> None:
    """Copies past the registers, 16 bytes at a time, into as many buffers as asked for; sm_80 computes on the last.

    Of a kernel for several widths the widest, which come first.
    """
    rows = products_of(report, "bf16-16-bit") | products_of(report, "fp16-16-bit")
    wrong = {}
    for name, row in rows.items():
        m, n, k, stages = (int(v) for v in re.findall(r"(\d+)x(\d+)[+\d]*x(\d+)[+\d]*-\d+w-(\d)s", name)[0])
        buffers = stages if name.endswith("sm90") else stages - 1
        if not row["async_loads"] or row["shared"] < buffers * (m + n) * k * 2:
            wrong[name] = row
    assert rows and not wrong
