"""A trained detector as a file that needs no nasdet."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasdet.arch import load_card
from nasdet.detectors import DETECTORS, WITH_MASKS
from nasdet.detectors.parts.postprocess import Selection
from nasdet.engine import export
from nasdet.engine.export import Disagreement, export_detector
from nasdet.spaces.assemble import ModelConfig, build_model
from nasdet.spaces.fad import FADSpace
from nasdet.spaces.nats import NATSSpace

SIZE = (64, 96)
# Loads and runs a file where nasdet cannot be imported, and keeps what came out.
USE = """
import json, sys
sys.modules["nasdet"] = None
import torch
given = torch.load("in.pt", weights_only=True)
if sys.argv[1].endswith(".onnx"):
    import onnxruntime
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    values = session.run(None, {name: value.numpy() for name, value in given.items()})
    found = {output.name: torch.from_numpy(value) for output, value in zip(session.get_outputs(), values)}
    assert facts["outputs"] == json.dumps(list(found)) and facts["detector"] == sys.argv[2]
else:
    extra = {"nasdet.json": ""}
    program = torch.export.load(sys.argv[1], extra_files=extra)
    found = program.module()(given["images"], given["sizes"], given["threshold"])
    facts = json.loads(extra["nasdet.json"])
    assert facts["outputs"] == list(found) and facts["detector"] == sys.argv[2]
assert not [name for name in sys.modules if name.startswith("nasdet.")]
torch.save(found, "out.pt")
"""


def trained(name: str, part: str = "plain") -> tuple[Any, ModelConfig]:
    """A small detector of noise for weights, so that its outputs differ from place to place, and its configuration."""
    backbone = "resnet50" if part == "nats" else "resnet18"
    settings: dict[str, Any] = {"backbone": backbone, "width": 0.125, "fpn_channels": 12, "norm": "gn"}
    if part == "fad" and name in WITH_MASKS:
        mask = FADSpace(groups=("mask",)).random(random.Random(0), settings={"channels": 12, "inner_channels": 6})
        settings |= {"mask_trunk": mask.to_json(), "cells": 1}
    elif part == "fad":
        settings |= {"towers": load_card("fad-paper").to_json(), "inner_channels": 6, "cells": 1, "levels": 2}
    if part == "nats":
        space = NATSSpace(backbone=backbone, width=0.125, channel_groups=2)
        settings |= {"backbone_card": space.random(random.Random(1)).to_json()}
    if "rcnn" in name:
        settings |= {"options": {"hidden": 32, "rpn": {"limit": [60, 60]}}}
    config = ModelConfig(detector=name, num_classes=3, categories=("a", "b", "c"), tower_convs=1, **settings)
    torch.manual_seed(0)
    model = build_model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model, config


def frozen(backbone: str) -> tuple[Any, ModelConfig]:
    """FCOS on a backbone of frozen norms that are not the identity."""
    small: dict[str, Any] = {"width": 0.125, "fpn_channels": 12, "tower_convs": 1, "levels": 3}
    config = ModelConfig(backbone=backbone, norm="frozen_bn", num_classes=3, categories=("a", "b", "c"), **small)
    torch.manual_seed(0)
    model: Any = build_model(config).eval()
    for name, value in model.backbone.named_buffers():
        value.uniform_(0.5, 1.5) if name.endswith(("weight", "var")) else value.normal_(std=0.1)
    return model, config


def used(file: Path, name: str, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The file's outputs, from a process without nasdet."""
    torch.save(given, file.parent / "in.pt")
    (file.parent / "use.py").write_text(USE)
    subprocess.run([sys.executable, "use.py", file.name, name], cwd=file.parent, check=True, env={"PYTHONPATH": ""})
    found: dict[str, Tensor] = torch.load(file.parent / "out.pt", weights_only=True)
    return found


def compare(file: Path, format: str, name: str, part: str = "plain", batch: int = 1) -> None:
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    model, config = trained(name, part)
    facts = export_detector(model, config, file, format=format, size=SIZE, batch=batch)
    assert facts["images"] == [batch, 3, *SIZE] and facts["categories"] == ["a", "b", "c"]
    images, areas = torch.randn(batch, 3, *SIZE), [SIZE, (50, 81)][:batch]
    threshold = {"fcos": 0.005, "retinanet": 0.005}.get(name, 0.2)
    given = {"images": images, "sizes": torch.tensor(areas), "threshold": torch.tensor(threshold)}
    found = used(file, name, given)
    with torch.no_grad():
        wanted = model.detect(model(images), areas, Selection(threshold))
    for index, image in enumerate(wanted):
        count = len(image["labels"])
        assert count > 0 and torch.equal(found["labels"][index, :count], image["labels"])
        for key in image.keys() - {"labels"}:
            # Masks are seen through boxes, whose last digits they inherit in proportion to the largest logit.
            scale = float(image[key].abs().max()) if key == "mask_logits" else 1.0
            torch.testing.assert_close(found[key][index, :count], image[key], rtol=1e-3, atol=1e-3 * scale)
    assert str(Path(export.__file__).parent).encode() not in file.read_bytes(), "a path of this machine"


def run_the_guide(folder: Path, file: str, images: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The example of docs/export.md that reads ``file``, on two pictures."""
    guide = Path(__file__).resolve().parents[2] / "docs" / "export.md"
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", guide.read_text(), re.DOTALL) if file in code]
    assert "[[480, 640]]" in code
    names = {"images": images}
    monkeypatch.chdir(folder)
    exec(compile(code.replace("[[480, 640]]", "[[64, 96], [50, 81]]"), "docs/export.md", "exec"), names)
    return names


@pytest.mark.parametrize(
    ("name", "part", "batch"),
    [pytest.param("fcos", "fad", 1, marks=pytest.mark.slow), ("retinanet", "nats", 2)],
)
def test_program_without_nasdet(
    name: str, part: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(tmp_path / "net.pt2", "torch", name, part, batch)
    if batch == 2:
        names = run_the_guide(tmp_path, "net.pt2", torch.randn(2, 3, *SIZE), monkeypatch)
        assert names["found"]["boxes"].shape[::2] == (2, 4) and names["facts"]["categories"] == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["fcos", pytest.param("mask_scoring_rcnn", marks=pytest.mark.slow)])
def test_onnx_without_nasdet(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare(tmp_path / "net.onnx", "onnx", name, batch=2)
    names = run_the_guide(tmp_path, "net.onnx", torch.randn(2, 3, *SIZE).numpy(), monkeypatch)
    assert names["boxes"].shape[::2] == (2, 4) and set(names["names"]) <= {"a", "b", "c"}


# A searched backbone for every detector, searched towers or mask heads for those that have them.
PAIRS = [(name, part) for name in DETECTORS for part in ("plain", "nats")]
PAIRS += [(name, "fad") for name in DETECTORS if "rcnn" not in name or name in WITH_MASKS]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch", "onnx"])
@pytest.mark.parametrize(("name", "part"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_every_detector_without_nasdet(name: str, part: str, format: str, tmp_path: Path) -> None:
    compare(tmp_path / f"net.{format}", format, name, part)


FROZEN = ("resnet18", "shufflenet_v2_20", "mobilenet_v2")


@pytest.mark.parametrize("backbone", FROZEN)
@torch.no_grad()
def test_a_backbone_with_frozen_norms_is_exported(backbone: str) -> None:
    body, images = frozen(backbone)[0].backbone, torch.randn(1, 3, *SIZE)
    found = torch.export.export(body, (images,)).module()(images)
    for name, wanted in body(images).items():
        assert bool(wanted.any())
        torch.testing.assert_close(found[name], wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["torch", "onnx"])
@pytest.mark.parametrize("backbone", FROZEN)
def test_frozen_norms_are_exported(backbone: str, format: str, tmp_path: Path) -> None:
    """They are folded into their convolutions in eager, and stay by themselves in the file."""
    if format == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package)
    model, config = frozen(backbone)
    export_detector(model, config, tmp_path / "net", format=format, size=SIZE)
    run = export.FORMATS[format][1]((tmp_path / "net").read_bytes())
    images = torch.randn(1, 3, *SIZE)
    found = run(images, torch.tensor([SIZE]), torch.tensor(0.0))
    with torch.no_grad():
        maps = model(images)
        for buffer in model.backbone.buffers():
            buffer.mul_(1.5)
        others = model(images)
    assert bool((found["labels"] >= 0).any())
    for level, wanted, other in zip(("p3", "p4", "p5"), maps["cls"], others["cls"], strict=True):
        scale = float((wanted - wanted.mean()).abs().max())
        torch.testing.assert_close(found[f"cls_{level}"], wanted, rtol=0, atol=1e-3 * scale)
        assert float((other - wanted).abs().max()) > 0.1 * scale


class _Wrong(nn.Module):
    """An exported model with a fault in one output."""

    def __init__(self, run: Any, name: str, fault: Any) -> None:
        super().__init__()
        self.run, self.name, self.fault = run, name, fault

    def forward(self, *given: Tensor) -> dict[str, Tensor]:
        found = dict(self.run(*given))
        found[self.name] = self.fault(found[self.name].clone())
        return found


def _swap(value: Tensor) -> Tensor:
    value[:, [0, 1]] = value[:, [1, 0]]
    return value


FAULTS: dict[str, tuple[str, Any, str]] = {
    "a map": ("rpn_cls_p3", lambda value: value * 1.01, "rpn_cls_p3 differs by up to"),
    "not a number": ("features_p2", lambda value: value * torch.nan, "features_p2 differs by up to nan"),
    "a shape": ("rpn_box_p2", lambda value: value[..., 1:], "rpn_box_p2 must have shape"),
    "proposals": ("proposals", lambda value: value.roll(3, -1), "proposals: "),
    "probabilities": ("probabilities", lambda value: value.roll(1, -1), "probabilities differs"),
    "box": ("boxes", lambda value: value + 0.1, "boxes of image 0 lack the detector's"),
    "order": ("scores", _swap, "scores differs"),
    "label": ("labels", lambda value: (value + 1) % 3, "labels of image 0 differ"),
    "one too many": ("labels", lambda value: value.clamp(min=0), "labels of image 0 differ"),
    "masks": ("mask_logits", lambda value: value.flip(-1), "mask_logits differs"),
}


@pytest.fixture(scope="module")
def mask_program() -> tuple[Any, Any, tuple[Tensor, Tensor]]:
    """A detector of masks, its program, and what they are compared on."""
    model, _ = trained("mask_rcnn")
    given = export.inputs(1, SIZE)
    return model, export.trace(model, *given)[0].module(), given


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(fault: str, mask_program: Any) -> None:
    model, run, given = mask_program
    export.check(model, run, *given)
    name, change, message = FAULTS[fault]
    if fault == "one too many":  # where there are fewer than there may be
        model.boxes.score_threshold = 0.3
    with pytest.raises(Disagreement, match=message):
        export.check(model, _Wrong(run, name, change), *given)


def test_a_file_that_disagrees_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = trained("fcos")
    write, load = export.FORMATS["torch"]
    wrong = (write, lambda content: _Wrong(load(content), "cls_p3", torch.neg))
    monkeypatch.setitem(export.FORMATS, "torch", wrong)
    (tmp_path / "net.pt2").write_text("the one before")
    with pytest.raises(Disagreement, match="cls_p3 differs"):
        export_detector(model, config, tmp_path / "net.pt2", format="torch", size=SIZE)
    assert [path.name for path in tmp_path.iterdir()] == ["net.pt2"]
    assert (tmp_path / "net.pt2").read_text() == "the one before"


class _Loose(nn.Module):
    """A detector of an operator that is not torch's, or of a result whose size depends on data."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.neck = nn.Identity()
        self.neck.strides = {"p3": 8}  # type: ignore[assignment]  # as a neck says

    def forward(self, images: Tensor) -> dict[str, list[Tensor]]:
        from nasdet.ops import nms

        if self.kind == "own":
            images = images + nms(images[0, 0, :, :4], images[0, 0, :, 0], 0.5, backend="cpp").sum()
        return {"cls": [images]}

    def detect(self, outputs: dict[str, list[Tensor]], sizes: Any, selection: Any) -> list[dict[str, Tensor]]:
        values = outputs["cls"][0].flatten()
        if self.kind == "data":
            values = values[: int(values[0].sum())]
        return [{"boxes": values}]


@pytest.mark.parametrize("kind", [pytest.param("own", marks=pytest.mark.needs("cpp")), "data"])
def test_what_cannot_be_exported_is_an_error(kind: str, tmp_path: Path) -> None:
    config = ModelConfig(num_classes=1, norm="gn")
    with pytest.raises(ValueError, match="_Loose cannot be exported"):
        export_detector(_Loose(kind), config, tmp_path / "net.pt2", format="torch", size=(32, 32))
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tmp_path: Path) -> None:
    model, config = trained("fcos")
    for options, message in (
        ({"format": "tf"}, "format must be one of torch, onnx, got 'tf'"),
        ({"format": "torch", "batch": 0}, "batch must be positive, got 0"),
        ({"format": "torch", "size": (100, 96)}, "size must be multiples of 32, as pictures are padded, got 100x96"),
    ):
        with pytest.raises(ValueError, match=message):
            export_detector(model, config, tmp_path / "x", **options)  # type: ignore[arg-type]  # on purpose


def test_onnx_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if "onnx" in name else find(name, *rest))
    with pytest.raises(ModuleNotFoundError, match=r"onnx, onnxscript, onnxruntime: pip install 'nasdet\[onnx\]'"):
        export._installed("onnx", "onnxscript", "onnxruntime")
    assert json.dumps(export.INPUTS) == '["images", "sizes", "threshold"]'
