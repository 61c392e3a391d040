"""The CUDA kernels of the suppression family: run on the CPU by the host shim, and compiled for real architectures."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from test_host_shim import FLAGS, SHIM, STORAGES, WARNINGS, run_checks
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


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory, cuda_sources: Path) -> Callable[[str], Path]:
    """Compiles a driver, once."""
    folder, built = tmp_path_factory.mktemp("shim"), dict[str, Path]()

    def build(name: str) -> Path:
        if name not in built:
            includes = [f"-I{path}" for path in (SHIM, cuda_sources, cuda_sources.parent / "include")]
            command = ["g++", *FLAGS.split(), *WARNINGS.split(), *includes, str(SHIM / f"{name}.cpp")]
            result = subprocess.run([*command, "-o", str(folder / name)], capture_output=True, text=True, timeout=240)
            assert result.returncode == 0, result.stderr[-4000:]
            built[name] = folder / name
        return built[name]

    return build


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
    driver: Callable[[str], Path],
    program_environment: Callable[..., dict[str, str]],
    name: str,
    part: str,
    at_least: int,
) -> None:
    """Against plain loops; sanitizers on; in both thread orders."""
    run_checks(driver(name), part, at_least, program_environment, timeout=120)


@pytest.mark.needs("nvcc")
def test_kernels_do_not_spill(tmp_path: Path, cuda_sources: Path) -> None:
    source = tmp_path / "kernels.cu"
    source.write_text(KERNELS)
    use = compiled(source, cuda_sources, cuda_sources.parent / "include")
    assert len(use) == len(ARCHS) * KERNEL_COUNT
    assert not {kernel: numbers for kernel, numbers in use.items() if any(numbers)}
