"""The Triton kernels' arithmetic, indices and masks, without a GPU: every case in Triton's interpreter on the CPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interpret_ops
import op_checks
import pytest
import torch

from nasdet._dispatch import OPS

pytestmark = pytest.mark.needs("triton")
WITH_TRITON = [op.name for op in OPS.values() if any(backend.name == "triton" for backend in op.backends)]
TESTS = {
    name: {
        **{
            f"{case.id}-{label}": label
            for case in op_checks.cases_of(OPS[name])
            for label in interpret_ops.dtypes_of(name, case)
        },
        **{test.__name__: "fp32" for test in interpret_ops.PROPERTIES.get(name, ())},
    }
    for name in WITH_TRITON
}


def slow(name: str, label: str) -> bool:
    """Products of 16-bit matrices take the interpreter a minute, as checks of every sum of integers do."""
    return name in interpret_ops.CONVOLUTION_OPS and label != "fp32"


@pytest.fixture(scope="module")
def verdicts(program_environment: Callable[..., dict[str, str]]) -> Callable[[str, bool], dict[str, str]]:
    """All verdicts on an op, fast or slow, from one process: TRITON_INTERPRET is read when triton is imported."""
    known: dict[tuple[str, bool], dict[str, str]] = {}

    def of(name: str, slowly: bool) -> dict[str, str]:
        if (name, slowly) not in known:
            labels = sorted({label for label in TESTS[name].values() if slow(name, label) == slowly})
            command = [sys.executable, str(Path(__file__).with_name("interpret_ops.py")), name, *labels]
            environment = program_environment(TRITON_INTERPRET="1")
            result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
            assert result.returncode == 0, result.stderr[-4000:]
            known[name, slowly] = json.loads(result.stdout.splitlines()[-1])
        return known[name, slowly]

    return of


@pytest.mark.needs("interpreter")
@pytest.mark.parametrize(
    ("name", "test", "label"),
    [
        pytest.param(name, test, label, id=f"{name}-{test}", marks=pytest.mark.slow if slow(name, label) else ())
        for name, tests in TESTS.items()
        for test, label in tests.items()
    ],
)
def test_interpreted(verdicts: Callable[[str, bool], dict[str, str]], name: str, test: str, label: str) -> None:
    verdict = verdicts(name, slow(name, label))[test]
    assert verdict == "right", verdict


def test_guards_notice_a_write_outside_and_a_hole() -> None:
    with pytest.raises(AssertionError, match="written outside a tensor of 6 elements"):
        with op_checks.guarded_allocations():
            y = torch.empty_like(torch.zeros(2, 3))
            assert y.isnan().all()
            y.as_strided((1,), (1,), y.storage_offset() + 6).fill_(1)
    x = op_checks.embedded(torch.arange(6.0).reshape(2, 3).t())
    assert x.stride() == (1, 3) and torch.equal(x, torch.arange(6.0).reshape(2, 3).t())
    assert x.as_strided((1,), (1,), x.storage_offset() - 1).isnan()


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [
        ("3.6.0", "2.4.0", False),
        ("3.6.0+git1", "2.10.1", False),
        ("3.6.0", "2.3.5", True),
        ("3.7.1", "2.4.6", True),
        ("3.10.0", "3.0.0", True),
    ],
)
def test_only_old_tritons_are_excused(repository: Path, triton: str, numpy: str, works: bool) -> None:
    fault = conftest_of(repository).interpreter_fault(triton, numpy)
    assert (fault is None) == works and (works or f"Triton {triton}" in fault)


def test_the_pinned_version_is_not_excused(repository: Path) -> None:
    """With it NASDET_REQUIRE=triton holds the interpreter's tests too, whatever NumPy is the newest."""
    pinned = dict(line.split("==") for line in (repository / "constraints.txt").read_text().split() if "==" in line)
    assert conftest_of(repository).interpreter_fault(pinned["triton"], "99.0") is None


def conftest_of(repository: Path) -> Any:
    spec = importlib.util.spec_from_file_location("conftest_of_tests", repository / "tests" / "conftest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
