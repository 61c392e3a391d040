"""Every recipe of docs/adding.md, followed on a dummy."""

from __future__ import annotations

import json
from typing import Any

import pytest


def add_scale(tree: Any, example: str = "scale.py") -> None:
    tree.add(example, "nasdet/ops/scale.py")
    tree.insert(
        "nasdet/ops/__init__.py",
        "from nasdet.ops.norm_act_mix import norm_act_mix",
        "from nasdet.ops.scale import scale",
    )
    tree.insert("nasdet/ops/__init__.py", '    "roi_align",', '    "scale",')


def test_one_more_operator(tree: Any, repository: Any) -> None:
    add_scale(tree)
    info = json.loads(tree.run("-m", "nasdet", "info", "--json"))
    assert info["ops"]["scale"] == {"reference": "can run"}
    generic = str(repository / "tests/ops/test_ops.py")
    report = tree.run("-m", "pytest", "-q", "-p", "no:cacheprovider", generic, "-k", "scale and (values or meta)")
    assert "passed" in report and "failed" not in report


@pytest.mark.slow
@pytest.mark.needs("triton", "interpreter")
def test_one_more_backend(tree: Any) -> None:
    add_scale(tree, "scale_with_triton.py")
    tree.add("scale_kernel.py", "kernels/scale.py")
    info = json.loads(tree.run("-m", "nasdet", "info", "--json", TRITON_INTERPRET="1"))
    assert info["ops"]["scale"] == {"triton": "can run", "reference": "can run"}
    assert tree.check("backend", TRITON_INTERPRET="1").split() == ["same"]


@pytest.mark.slow
def test_one_more_search_space(tree: Any) -> None:
    tree.add("kernel_space.py", "nasdet/spaces/kernel.py")
    last, line = '"fad": "nasdet.spaces.fad:FADSpace",', '"kernel": "nasdet.spaces.kernel:KernelSpace",'
    tree.insert("nasdet/spaces/__init__.py", f"    {last}", line)
    assert tree.check("space").split() == ["same"]


@pytest.mark.slow
def test_one_more_algorithm(tree: Any) -> None:
    tree.add("climb.py", "nasdet/search/climb.py")
    assert tree.check("algorithm").split() == ["same"]


@pytest.mark.slow
def test_one_more_backbone(tree: Any) -> None:
    tree.add("pooled.py", "nasdet/detectors/pooled.py")
    line = "from nasdet.detectors.pooled import Pooled"
    tree.insert("nasdet/detectors/backbones.py", "from nasdet.detectors.mobilenet import MobileNetV2", line)
    entry = '"mobilenet_v2": MobileNetV2,'
    tree.edit("nasdet/detectors/backbones.py", entry, f'{entry} "pooled": Pooled,')
    assert tree.check("backbone").split()[-1] == "learns"


def test_one_more_detector(tree: Any) -> None:
    pytest.importorskip("sklearn", reason="the digits data set is made from scikit-learn's")
    pytest.importorskip("pycocotools")
    tree.add("center.py", "nasdet/detectors/center.py")
    line = "from nasdet.detectors.center import build_center"
    tree.insert("nasdet/detectors/__init__.py", "from nasdet.detectors.fcos import FCOS", line)
    tree.edit("nasdet/detectors/__init__.py", '"fcos": build_fcos,', '"fcos": build_fcos, "center": build_center,')
    assert tree.check("detector").split() == ["done"]


@pytest.mark.slow
def test_one_more_data_set(tree: Any) -> None:
    pytest.importorskip("PIL")
    tree.add("table.py", "nasdet/data/table.py")
    line = "from nasdet.data.table import TableDetection"
    tree.insert("nasdet/data/__init__.py", "from nasdet.data.split import Split, require_selectable", line)
    assert tree.check("data").split() == ["same"]
