"""patch_torchvision() where there is no torchvision, or one that does not load."""

from __future__ import annotations

import sys

import pytest

from nasdet import _library, compat
from nasdet.compat import patch


def test_a_missing_torchvision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.delitem(sys.modules, "torchvision.ops", raising=False)
    with pytest.raises(ImportError, match="patch_torchvision.. needs torchvision, which cannot be imported"):
        compat.patch_torchvision()
    assert patch._installation is None and patch._holders == 0


def test_a_torchvision_for_another_pytorch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(patch.importlib, "import_module", broken)
    with pytest.raises(ImportError, match="needs a torchvision that fits this PyTorch: operator torchvision::nms does"):
        compat.patch_torchvision()


def test_without_compiled_kernels_nothing_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patch, "_import_torchvision", lambda: None)
    monkeypatch.setattr(_library, "why_not", lambda name: f"libnasdet_{name}.so is not installed")
    with pytest.raises(RuntimeError, match=r"no kernels to put in place: .*libnasdet_cpu.so is not installed"):
        compat.patch_torchvision()
    assert patch._installation is None and patch._holders == 0
