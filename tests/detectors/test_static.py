"""Detectors with results of one shape give what the detectors give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasdet import use_backend
from nasdet.detectors import DETECTORS, RoIPooler
from nasdet.detectors.parts.postprocess import Selection
from nasdet.detectors.static import GatheringPooler, PaddedSelection, StaticDetector, pick
from nasdet.ops import batched_nms

SIZE = (64, 96)
SIZES = [SIZE, (40, 70)]
THRESHOLDS = {"fcos": 0.02, "retinanet": 0.05}  # of two stages 0.25: some detections, and room for more


def small(name: str, **options: Any) -> Any:
    """A small detector that is sure of nothing, but not of nothing everywhere alike."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"width": 0.125, "fpn_channels": 16, "norm": "gn", "tower_convs": 1}
    if "rcnn" in name:
        settings |= {"hidden": 32, "rpn": {"limit": (100, 50)}}
    model = DETECTORS[name]("resnet18", 5, **settings | options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def scattered(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    corner = torch.rand(count, 2) * 60
    boxes = torch.cat([corner, corner + 1 + torch.rand(count, 2) * 30], dim=1)
    return boxes, torch.rand(count), torch.randint(0, 3, (count,))


@pytest.mark.parametrize(("count", "threshold"), [(1, 0.5), (7, 0.3), (300, 0.0), (300, 0.5), (300, 1.0)])
def test_pick_is_batched_nms(count: int, threshold: float) -> None:
    for seed in range(5):
        boxes, scores, labels = scattered(count, seed)
        kept = batched_nms(boxes, scores, labels, threshold)
        chosen = pick(boxes, scores, labels, threshold, 40)
        assert chosen[: len(kept)].tolist() == kept[:40].tolist() and bool((chosen[len(kept) :] == -1).all())


def test_pick_takes_the_first_of_equal_scores_and_nothing_that_is_out() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10]])
    scores = torch.tensor([0.5, 0.5, 0.5, -torch.inf])
    assert pick(boxes, scores, torch.zeros(4, dtype=torch.int64), 0.5, 5).tolist() == [0, 2, -1, -1, -1]
    assert pick(boxes, torch.full((4,), -torch.inf), torch.zeros(4, dtype=torch.int64), 0.5, 2).tolist() == [-1, -1]


def test_what_there_is_not_is_filled_up() -> None:
    boxes = torch.tensor([[-5.0, 0, 10, 10], [3, 3, 3, 9], [torch.nan, 0, 5, 5], [90, 90, 95, 95]])
    scores, labels = torch.tensor([0.5, 0.9, 0.8, 0.7]), torch.tensor([4, 1, 1, 1])
    found = PaddedSelection().finish(boxes, scores, labels, torch.tensor([20, 30]), 0.5, 3)
    assert found["boxes"].tolist() == [[0, 0, 10, 10], [0] * 4, [0] * 4]
    assert found["scores"].tolist() == [0.5, 0, 0] and found["labels"].tolist() == [4, -1, -1]


def test_candidates_that_do_not_count_are_minus_infinity() -> None:
    scores = torch.tensor([[0.1, 0.9], [torch.nan, 0.8], [0.9, torch.inf]])
    values, rows, columns = PaddedSelection().top(scores, scores, 0.5, 4)
    counted = values > -torch.inf
    assert values[counted].tolist() == [scores[0, 1], scores[1, 1], scores[2, 0]]
    assert rows[counted].tolist() == [0, 1, 2] and columns[counted].tolist() == [1, 1, 0]
    lower = PaddedSelection(torch.tensor(0.85)).top(scores, scores, 0.5, 6)[0]
    assert int((lower > -torch.inf).sum()) == 2


class _Top(nn.Module):
    """The choice of candidates alone."""

    def forward(self, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return PaddedSelection().top(scores, scores, 0.3, 40)


def check_tied(run: Callable[[Tensor], Sequence[Tensor]]) -> None:
    """``run`` chooses what the detector chooses, though most scores are equal and the cut is among equals."""
    for seed in range(5):
        torch.manual_seed(seed)
        table = torch.randint(0, 11, (300, 5)) / 10.0
        wanted = Selection().top(table, table, 0.3, 40)
        assert int((table == wanted[0][-1]).sum()) > int((wanted[0] == wanted[0][-1]).sum())
        order = (wanted[1] * 5 + wanted[2]).argsort()
        for value, expected in zip(run(table), wanted, strict=True):
            assert value.tolist() == expected[order].tolist()


def test_candidates_of_equal_scores_are_the_first_of_the_table() -> None:
    check_tied(_Top())


def test_candidates_of_equal_scores_when_few_count() -> None:
    scores = torch.zeros(50, 2)
    scores[7, 1] = scores[3, 0] = scores[20, 0] = 0.5
    values, rows, columns = PaddedSelection().top(scores, scores, 0.3, 10)
    assert len(values) == 10 and (rows * 2 + columns).diff().min() > 0
    counted = values > -torch.inf
    assert rows[counted].tolist() == [3, 7, 20] and columns[counted].tolist() == [0, 1, 0]


@pytest.mark.slow
def test_candidates_of_equal_scores_in_an_onnx_model(tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    runtime = pytest.importorskip("onnxruntime")
    program = torch.onnx.export(_Top().eval(), (torch.zeros(300, 5),), dynamo=True, verbose=False)
    assert program is not None
    program.save(str(tmp_path / "top.onnx"))
    session = runtime.InferenceSession(str(tmp_path / "top.onnx"), providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    check_tied(lambda table: [torch.from_numpy(value) for value in session.run(None, {given.name: table.numpy()})])


@pytest.mark.parametrize("name", ["fcos", "retinanet"])
@torch.no_grad()
def test_same_detections_where_scores_are_equal(name: str) -> None:
    model = small(name, candidates=20)
    outputs = model(torch.randn(1, 3, *SIZE))
    outputs["cls"] = [level.mul(2).round() / 2 for level in outputs["cls"]]
    if name == "fcos":  # scores are of both
        outputs["centerness"] = [torch.zeros_like(level) for level in outputs["centerness"]]
    (found,), (given,) = (model.detect(outputs, [SIZE], choice(0.0)) for choice in (Selection, PaddedSelection))
    count = len(found["labels"])
    assert count > 10 and len(found["scores"].unique()) < count / 2
    for key in found:
        torch.testing.assert_close(given[key][:count], found[key])
    assert bool((given["labels"][count:] == -1).all())


@pytest.mark.parametrize("size", [7, 14])
@pytest.mark.parametrize("aligned", [False, True], ids=["plain", "aligned"])
def test_gathering_pools_the_same(size: int, aligned: bool) -> None:
    torch.manual_seed(1)
    features = [torch.randn(2, 5, 64 // stride, 96 // stride) for stride in (4, 8, 16)]
    corner = torch.rand(2, 30, 2) * 80 - 20
    boxes = list(torch.cat([corner, corner + torch.rand(2, 30, 2) ** 3 * 300], dim=2))
    boxes[1][0] = 0.0
    boxes[1][1] = torch.tensor([500.0, 500, 600, 600])
    pooler = RoIPooler((4, 8, 16), size, aligned=aligned, canonical_scale=64, canonical_level=3)
    gathering = GatheringPooler((4, 8, 16), size, aligned=aligned, canonical_scale=64, canonical_level=3)
    wanted = pooler(features, boxes)
    assert bool(wanted.any())
    torch.testing.assert_close(gathering(features, boxes), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", DETECTORS)
@torch.no_grad()
def test_same_detections_as_the_detector(name: str) -> None:
    model = small(name)
    pooler = getattr(getattr(model, "boxes", None), "pooler", None)
    images = torch.randn(2, 3, *SIZE)
    threshold = THRESHOLDS.get(name, 0.25)
    with use_backend("reference"):
        given = StaticDetector(model)(images, torch.tensor(SIZES), torch.tensor(threshold))
    assert given["boxes"].shape == (2, 100, 4) and given["scores"].shape == given["labels"].shape == (2, 100)
    found = model.detect(model(images), SIZES, Selection(threshold))
    assert any(3 < len(image["labels"]) < 100 for image in found)
    for index, image in enumerate(found):
        count = len(image["labels"])
        assert torch.equal(given["labels"][index, :count], image["labels"])
        assert bool((given["labels"][index, count:] == -1).all()) and not given["boxes"][index, count:].any()
        for key in image.keys() - {"labels"}:
            torch.testing.assert_close(given[key][index, :count], image[key], rtol=1e-3, atol=1e-3)
    assert pooler is None or type(pooler) is RoIPooler, "the detector itself was changed"


def test_adaptive_sampling_has_no_fixed_shape() -> None:
    model = small("faster_rcnn")
    model.boxes.pooler = RoIPooler(model.boxes.pooler.strides, 7, sampling_ratio=0)
    with pytest.raises(ValueError, match="sampling_ratio must be positive to be exported, got 0"):
        StaticDetector(model)


BETWEEN_THEM_ALL = ("fcos", "retinanet", "mask_scoring_rcnn")  # they have all parts that the others have, but a cascade


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in BETWEEN_THEM_ALL else pytest.mark.slow) for name in DETECTORS]
)
def test_one_graph(name: str) -> None:
    """The whole detector, suppression included, compiles without a break."""
    static: nn.Module = StaticDetector(small(name))
    arguments = (torch.randn(1, 3, *SIZE), torch.tensor([SIZE]), torch.tensor(THRESHOLDS.get(name, 0.25)))
    torch.compiler.reset()
    wanted = static(*arguments)
    found = torch.compile(static, fullgraph=True, backend="eager")(*arguments)
    assert found.keys() == wanted.keys() and int((wanted["labels"] >= 0).sum()) > 3
    assert torch.equal(found["labels"], wanted["labels"])
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value)
