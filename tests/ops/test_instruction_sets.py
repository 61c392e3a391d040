"""The kernels of every instruction set that this CPU has, each in its own process: the choice is made at load."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nasdet import _library

LEVELS = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")


@pytest.mark.parametrize(
    ("level", "dtypes"),
    [
        pytest.param(level, dtypes, marks=() if (level, dtypes) == ("avx2", "fp32 or bf16") else pytest.mark.slow)
        for level in LEVELS
        for dtypes in ("fp32 or bf16", "fp64 or fp16")
    ],
)
def test_all_cases_pass(level: str, dtypes: str, require) -> None:
    best = _library.cpu_isa()
    if best is None or LEVELS.index(level) > LEVELS.index(best):
        require("cpp" if best is None else level, f"this CPU's best instruction set is {best}")
    if level == best:
        pytest.skip("those files run this one")
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *(str(Path(__file__).with_name(name)) for name in ("test_ops.py", "test_nms.py", "test_soft_nms.py")),
        *("-k", f"cpp and test_values and ({dtypes}) or (test_nms or test_soft_nms) and not compiled"),
    ]
    environment = os.environ | {"NASDET_CPU_CAPABILITY": level, "NASDET_EXPECT_ISA": level}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert " passed" in result.stdout


def test_the_cap_is_obeyed() -> None:
    code = "from nasdet import _library; print(_library.cpu_isa())"
    for level in ("baseline", "avx2"):
        result = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"NASDET_CPU_CAPABILITY": level},
            capture_output=True,
            text=True,
        )
        assert result.stdout.strip() in (level, "None", "baseline"), result.stderr
