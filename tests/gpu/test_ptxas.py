"""The CUDA kernels compile for real architectures without a GPU, and none spills or has a stack frame."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs("nvcc")
ARCHS = ("80", "90")
ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)'")
FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")

# Every kernel that the launcher of mix starts, without torch's headers, which take longer than the kernels.
MIX = """
#include "mix.cuh"
namespace nasdet::cuda {
#define KERNELS(S, W, T)                        \\
  template __global__ void mix_forward_kernel<S, W>(   \\
      const __grid_constant__ MixMaps, const T*, S*, const T*, T*, int64_t);      \\
  template __global__ void mix_backward_kernel<S, W>(  \\
      const __grid_constant__ MixMaps, const T*, const S*, T*, bool, int64_t);
#define STORAGE(S, T) KERNELS(S, kWide<S>, T) KERNELS(S, 1, T)
STORAGE(float, float) STORAGE(double, double) STORAGE(__half, float) STORAGE(__nv_bfloat16, float)
template __global__ void mix_reduce_kernel<float>(const float*, float*, int64_t);
template __global__ void mix_reduce_kernel<double>(const double*, double*, int64_t);
}
"""
KERNEL_COUNT = 4 * 2 * 2 + 2


def resource_use(text: str) -> dict[tuple[str, str], tuple[int, ...]]:
    """(kernel, architecture) -> bytes of stack frame, spill stores and spill loads, from the output of ptxas -v."""
    use: dict[tuple[str, str], tuple[int, ...]] = {}
    entry: tuple[str, str] | None = None
    for line in text.splitlines():
        if match := ENTRY.search(line):
            entry = (match[1], match[2])
        elif (match := FRAME.search(line)) and entry:
            use[entry] = tuple(int(number) for number in match.groups())
            entry = None
    return use


def compiled(source: Path, *include: Path) -> dict[tuple[str, str], tuple[int, ...]]:
    archs = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    command = ["nvcc", "-std=c++17", "-O3", "-Xptxas=-v", "-fatbin", *archs]
    command += [f"-I{folder}" for folder in include]
    result = subprocess.run(
        [*command, str(source), "-o", str(source.with_suffix(".out"))], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return resource_use(result.stdout + result.stderr)


def test_mix_kernels_do_not_spill(tmp_path: Path, cuda_sources: Path) -> None:
    source = tmp_path / "kernels.cu"
    source.write_text(MIX)
    use = compiled(source, cuda_sources)
    assert len(use) == len(ARCHS) * KERNEL_COUNT
    assert not {kernel: numbers for kernel, numbers in use.items() if any(numbers)}


def test_the_gate_notices_a_stack_frame(tmp_path: Path) -> None:
    source = tmp_path / "frame.cu"
    source.write_text(
        "__global__ void frame(float* out, int p) {\n"
        "  float v[64];\n"
        "  for (int i = 0; i < 64; ++i) v[(i * p) & 63] = out[i];\n"
        "  out[p] = v[p & 63];\n"
        "}\n"
    )
    use = compiled(source)
    assert {arch for _, arch in use} == set(ARCHS) and all(numbers[0] > 0 for numbers in use.values())
