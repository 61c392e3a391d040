"""The depthwise convolution's CUDA kernels without a GPU: run on the CPU, and compiled for real architectures."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_host_shim import STORAGES
from test_ptxas import ARCHS, compiled

import nasdet

LIBRARY = Path(nasdet.__file__).with_name("libnasdet_cuda.so")
OPS = ["depthwise_conv2d", "depthwise_conv2d_backward"]

# Every kernel that the launcher starts, without torch's headers, which take longer than the kernels.
FAST = """
#include "depthwise_conv2d_weights.cuh"
namespace nasdet::cuda {
#define EACH(S, W, K) PIXELS(S, W, K, 1) PIXELS(S, W, K, 2)
#define PLANE(S, K) PLANES(S, K, 1) PLANES(S, K, 2)
#define STORAGE(S)                                                                  \\
  EACH(S, kWide<S>, 3) EACH(S, kWide<S>, 5) EACH(S, kWide<S>, 7)                     \\
  EACH(S, 4 / sizeof(S), 3) EACH(S, 4 / sizeof(S), 5) EACH(S, 4 / sizeof(S), 7)      \\
  PLANE(S, 3) PLANE(S, 5) PLANE(S, 7)
#define ARGUMENTS(S) const __grid_constant__ DepthwiseMaps, const S* __restrict__, const S* __restrict__
"""
FORWARD = (
    FAST
    + """
#define PIXELS(S, W, K, P) template __global__ void depthwise_pixels_kernel<S, W, K, P>(ARGUMENTS(S), S* __restrict__);
#define PLANES(S, K, P) template __global__ void depthwise_planes_kernel<S, K, P>(ARGUMENTS(S), S* __restrict__);
STORAGE(float) STORAGE(__half) STORAGE(__nv_bfloat16)
}
"""
)
WEIGHTS = (
    FAST
    + """
#define PIXELS(S, W, K, P) \\
  template __global__ void depthwise_pixels_weights_kernel<S, W, K, P>(ARGUMENTS(S), arithmetic_t<S>*);
#define PLANES(S, K, P) \\
  template __global__ void depthwise_planes_weights_kernel<S, K, P>(ARGUMENTS(S), arithmetic_t<S>*);
STORAGE(float) STORAGE(__half) STORAGE(__nv_bfloat16)
}
"""
)
GENERAL = (
    FAST
    + """
#define GATHER(S, W, N) template __global__ void depthwise_gather_kernel<S, W, N>(ARGUMENTS(S), S* __restrict__);
#define ANY(S, N) template __global__ void depthwise_any_weights_kernel<S, N>(ARGUMENTS(S), S*);
#define ALL(S)                                                                            \\
  GATHER(S, kWide<S>, true) GATHER(S, 1, true) GATHER(S, 1, false) ANY(S, true) ANY(S, false) \\
  template __global__ void depthwise_sum_parts_kernel<S>(const arithmetic_t<S>*, int64_t, int64_t, S*);
ALL(float) ALL(double) ALL(__half) ALL(__nv_bfloat16)
}
"""
)


@pytest.mark.needs("g++")
@pytest.mark.parametrize("storage", STORAGES)
def test_kernels_on_the_cpu(check_kernels: Callable[[str, str, int], None], storage: str) -> None:
    check_kernels("depthwise_driver", storage, 3_001)


@pytest.mark.slow
@pytest.mark.needs("nvcc")
@pytest.mark.parametrize(
    ("program", "kernels"),
    [
        pytest.param(FORWARD, 54, id="forward"),
        pytest.param(WEIGHTS, 54, id="weights"),
        pytest.param(GENERAL, 24, id="general"),
    ],
)
def test_kernels_do_not_spill(tmp_path: Path, cuda_sources: Path, program: str, kernels: int) -> None:
    source = tmp_path / "kernels.cu"
    source.write_text(program)
    use = compiled(source, cuda_sources)
    assert len(use) == len(ARCHS) * kernels
    assert not {kernel: numbers for kernel, numbers in use.items() if any(numbers)}


def test_library_brings_the_ops(
    program_environment: Callable[..., dict[str, str]], require: Callable[[str, str | None], None]
) -> None:
    require("cuda", None if LIBRARY.is_file() else f"{LIBRARY.name} is not built; it is with nvcc on PATH")
    program = (
        "import sys, torch, nasdet.ops.depthwise_conv2d\n"
        "if not torch._C._dispatch_has_kernel('nasdet::_cuda_runtime'): torch.ops.load_library(sys.argv[1])\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        f"print(*[op for op in {OPS} if has('nasdet::' + op, 'CUDA')])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(LIBRARY)],
        env=program_environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.splitlines()[-1].split() == OPS
