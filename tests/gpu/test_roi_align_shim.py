"""RoIAlign's CUDA kernels without a GPU: run on the CPU by shim/host_shim.h, and compiled for real architectures."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from test_host_shim import STORAGES
from test_ptxas import ARCHS, compiled

import nasdet

LIBRARY = Path(nasdet.__file__).with_name("libnasdet_cuda.so")
OPS = ["multilevel_roi_align", "multilevel_roi_align_backward"]

# Every kernel that the launcher starts, without torch's headers, which take longer than the kernels.
FORWARD = """
#include "roi_align.cuh"
namespace nasdet::cuda {
#define KERNEL(S, W, N)                                \\
  template __global__ void roi_align_forward_kernel<S, W, N>(  \\
      const __grid_constant__ RoiMaps<arithmetic_t<S>>, const arithmetic_t<S>*, S*, int64_t, int, int);
#define STORAGE(S) KERNEL(S, kWide<S>, true) KERNEL(S, 1, true) KERNEL(S, 4, false)
STORAGE(float) STORAGE(double) STORAGE(__half) STORAGE(__nv_bfloat16)
}
"""
SCATTER = """
#include "roi_align_scatter.cuh"
namespace nasdet::cuda {
#define KERNEL(S, W, N)                                \\
  template __global__ void roi_align_scatter_kernel<S, W, N>(  \\
      const __grid_constant__ RoiMaps<arithmetic_t<S>>, const arithmetic_t<S>*, const S*, int64_t, int);
#define STORAGE(S, G) KERNEL(S, G, true) KERNEL(S, 1, true) KERNEL(S, 4, false)
STORAGE(float, 4) STORAGE(double, 2) STORAGE(__half, 4) STORAGE(__nv_bfloat16, 4)
template __global__ void roi_align_round_kernel<__half>(const __grid_constant__ RoiSums);
template __global__ void roi_align_round_kernel<__nv_bfloat16>(const __grid_constant__ RoiSums);
}
"""
GATHER = """
#include "roi_align_gather.cuh"
namespace nasdet::cuda {
#define KERNEL(S, W, N)                               \\
  template __global__ void roi_align_gather_kernel<S, W, N>(  \\
      const __grid_constant__ RoiMaps<arithmetic_t<S>>, const arithmetic_t<S>*, const Footprint*, const S*,  \\
      int64_t, int64_t, int);
#define STORAGE(S, G, P) KERNEL(S, G, true) KERNEL(S, 1, true) KERNEL(S, P, false)
STORAGE(float, 4, 16) STORAGE(double, 2, 8) STORAGE(__half, 4, 16) STORAGE(__nv_bfloat16, 4, 16)
#define FOOTPRINT(T) \\
  template __global__ void roi_align_footprint_kernel<T>(  \\
      const __grid_constant__ RoiMaps<T>, const T*, Footprint*, int64_t);
FOOTPRINT(float) FOOTPRINT(double)
}
"""


@pytest.mark.needs("g++")
@pytest.mark.parametrize("storage", STORAGES)
def test_kernels_on_the_cpu(check_kernels: Callable[[str, str, int], None], storage: str) -> None:
    check_kernels("roi_align_driver", storage, 100_001)


@pytest.mark.slow
@pytest.mark.needs("nvcc")
@pytest.mark.parametrize(
    ("program", "kernels"),
    [
        pytest.param(FORWARD, 12, id="forward"),
        pytest.param(SCATTER, 14, id="scatter"),
        pytest.param(GATHER, 14, id="gather"),
    ],
)
def test_kernels_do_not_spill(tmp_path: Path, cuda_sources: Path, program: str, kernels: int) -> None:
    source = tmp_path / "kernels.cu"
    source.write_text(program)
    use = compiled(source, cuda_sources, cuda_sources.parent / "include")
    assert len(use) == len(ARCHS) * kernels
    assert not {kernel: numbers for kernel, numbers in use.items() if any(numbers)}


def test_library_brings_the_ops(
    program_environment: Callable[..., dict[str, str]], require: Callable[[str, str | None], None]
) -> None:
    require("cuda", None if LIBRARY.is_file() else f"{LIBRARY.name} is not built; it is with nvcc on PATH")
    program = (
        "import json, sys, torch, nasdet.ops.roi_align\n"
        "if not torch._C._dispatch_has_kernel('nasdet::_cuda_runtime'): torch.ops.load_library(sys.argv[1])\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        f"print(json.dumps([op for op in {OPS} if has('nasdet::' + op, 'CUDA')]))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(LIBRARY)],
        env=program_environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    assert json.loads(result.stdout.splitlines()[-1]) == OPS
