"""The CUDA kernels of the suppression family: run on the CPU by the host shim, and compiled for real architectures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from test_host_shim import STORAGES
from test_ptxas import ARCHS, compiled

KERNELS = """
#include "nms.cuh"
#include "soft_nms.cuh"
namespace nasdet::cuda {
#define SOURCE const __grid_constant__ BoxSource
#define SORTED(T) const __grid_constant__ Sorted<T>
#define RUNS(T) const __grid_constant__ Runs<T>
#define SOFT(T) const __grid_constant__ SoftSettings<T>, const __grid_constant__ SoftState<T>
#define KERNELS(T)                                                                                       \\
  template __global__ void order_runs_kernel<T>(SOURCE, SORTED(T), RUNS(T), uint32_t);                    \\
  template __global__ void merge_runs_kernel<T>(SOURCE, SORTED(T), RUNS(T), RUNS(T), uint32_t, uint32_t); \\
  template __global__ void suppress_kernel<T>(SORTED(T), int64_t, int64_t, T);                           \\
  template __global__ void soft_nms_kernel<T>(SORTED(T), SOFT(T), int64_t);                              \\
  template __global__ void list_chosen_kernel<T>(const uint32_t*, const T*, int64_t, int64_t*, void*, int32_t);
KERNELS(float) KERNELS(double)
}
"""
KERNEL_COUNT = 2 * 5 + 1  # list_kept_kernel knows no dtype


@pytest.mark.needs("g++")
@pytest.mark.parametrize(
    ("name", "part", "at_least"),
    [
        *(pytest.param("nms_driver", *storage.values, 2000, marks=storage.marks) for storage in STORAGES),
        ("nms_driver", "many", 14_000),
        ("nms_driver", "thresholds", 6000),
        ("nms_driver", "chain", 260),
        *(pytest.param("soft_nms_driver", *storage.values, 18, marks=storage.marks) for storage in STORAGES),
        ("soft_nms_driver", "sizes", 25),
    ],
)
def test_kernels_on_the_cpu(
    check_kernels: Callable[[str, str, int], None], name: str, part: str, at_least: int
) -> None:
    """Against plain loops; sanitizers on; in both thread orders."""
    check_kernels(name, part, at_least)


@pytest.mark.needs("nvcc")
def test_kernels_do_not_spill(tmp_path: Path, cuda_sources: Path) -> None:
    source = tmp_path / "kernels.cu"
    source.write_text(KERNELS)
    use = compiled(source, cuda_sources, cuda_sources.parent / "include")
    assert len(use) == len(ARCHS) * KERNEL_COUNT
    assert not {kernel: numbers for kernel, numbers in use.items() if any(numbers)}
