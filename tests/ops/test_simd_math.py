"""exp, log1p and log of csrc/include/nasdet/simd_math.h against long double, for every instruction set of this CPU."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nasdet import _library

pytestmark = pytest.mark.needs("g++")
LEVELS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma -mf16c",
    "avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512cd -mfma -mf16c -Wno-maybe-uninitialized",
}
ORDER = (*LEVELS, "avx512_bf16", "amx")
ULP = {"exp_nonpositive": 1.5, "log1p_unit": 2.0, "log_normal": 2.0}


@pytest.mark.parametrize("level", LEVELS)
def test_errors_are_at_most_2_ulp(level: str, tmp_path: Path, repository: Path, require) -> None:
    best = _library.cpu_isa() or "baseline"
    if ORDER.index(level) > ORDER.index(best):
        require(level, f"this CPU's best instruction set is {best}")
    program = tmp_path / "check"
    source = Path(__file__).with_name("simd_math_check.cpp")
    flags = "-std=c++17 -O3 -ffp-contract=fast -fno-math-errno -Wall -Wextra -Werror -Wno-psabi"
    command = ["g++", *flags.split(), *LEVELS[level].split(), f"-I{repository / 'csrc/include'}"]
    built = subprocess.run([*command, str(source), "-o", str(program)], capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr[-3000:]
    ran = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    errors = {tuple(line.split()[:2]): float(line.split()[2]) for line in ran.stdout.splitlines()}
    assert set(errors) == {(name, kind) for name in ULP for kind in ("float", "double")}
    assert not {key: error for key, error in errors.items() if not 0 < error <= ULP[key[0]]}
