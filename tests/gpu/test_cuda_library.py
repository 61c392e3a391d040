"""The CUDA library loads beside any PyTorch, with or without CUDA, and brings its kernels."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nasdet

KERNELS = [
    *("mix", "mix_backward", "multilevel_roi_align", "multilevel_roi_align_backward"),
    *("nms", "nms_padded", "soft_nms"),
]
LIBRARY = Path(nasdet.__file__).with_name("libnasdet_cuda.so")
PROGRAM = """
import json, sys, torch, nasdet.ops
if not torch._C._dispatch_has_kernel("nasdet::_cuda_runtime"):
    torch.ops.load_library(sys.argv[1])
has = torch._C._dispatch_has_kernel_for_dispatch_key
ops = torch.ops.nasdet
print(json.dumps({
    "kernels": [op for op in sys.argv[2:] if has(f"nasdet::{op}", "CUDA")],
    "runtime": ops._cuda_runtime(), "driver": ops._cuda_driver(),
    "sum": ops.mix([torch.ones(3)], torch.ones(1)).tolist() if has("nasdet::mix", "CPU") else [1, 1, 1],
}))
"""


def test_loads_and_registers(
    program_environment: Callable[..., dict[str, str]], require: Callable[[str, str | None], None]
) -> None:
    require("cuda", None if LIBRARY.is_file() else f"{LIBRARY.name} is not built; it is with nvcc on PATH")
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(LIBRARY), *KERNELS],
        env=program_environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-4000:]
    report = json.loads(result.stdout.splitlines()[-1])
    assert report["kernels"] == KERNELS
    assert report["runtime"] >= 11000 and (report["driver"] == 0 or report["driver"] >= 11000)
    assert report["sum"] == [1, 1, 1]  # the CPU's kernels are still there
