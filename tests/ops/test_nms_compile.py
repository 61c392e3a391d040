"""nms, batched_nms and nms_padded under torch.compile, torch.export, torch.vmap and opcheck."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nasdet.ops import batched_nms, nms, nms_padded
from nasdet.ops._suppression import clustered
from nasdet.testing import Inputs

BACKENDS = [pytest.param("cpp", marks=pytest.mark.needs("cpp")), "reference"]
needs_cpp = pytest.mark.needs("cpp")


def scene(count: int, clusters: int = 6) -> tuple[Tensor, Tensor]:
    return clustered(Inputs(), count, clusters=clusters)


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_maps_over_any_dimension(backend: str) -> None:
    boxes, scores = clustered(Inputs(), 3, 2, 40)
    idxs = torch.randint(3, (3, 2, 40))
    expected = nms_padded(boxes, scores, 0.5, 15, idxs=idxs)

    def one(b: Tensor, s: Tensor, i: Tensor) -> tuple[Tensor, Tensor]:
        return nms_padded(b, s, 0.5, 15, idxs=i, backend=backend)

    twice = torch.vmap(torch.vmap(one))(boxes, scores, idxs)
    inner = torch.vmap(one, in_dims=(1, 1, 1), out_dims=1)(boxes, scores, idxs)
    for actual in (twice, inner):
        assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    shared = torch.vmap(one, in_dims=(0, None, None))(boxes[:, 0], scores[0, 0], idxs[0, 0])
    for b in range(3):
        alone = one(boxes[b, 0], scores[0, 0], idxs[0, 0])
        assert torch.equal(shared[0][b], alone[0]) and torch.equal(shared[1][b], alone[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_padded_maps_over_no_lanes(backend: str) -> None:
    boxes, scores, idxs = torch.zeros(0, 3, 4), torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64)
    index, count = torch.vmap(lambda b, s: nms_padded(b, s, 0.5, 2, backend=backend))(boxes, scores)
    assert index.shape == (0, 2) and count.shape == (0,)
    by_class = torch.vmap(lambda b, s, i: nms_padded(b, s, 0.5, 2, idxs=i, backend=backend))(boxes, scores, idxs)
    assert by_class[0].shape == (0, 2) and by_class[1].shape == (0,)


@needs_cpp
@pytest.mark.parametrize("by_class", [False, True], ids=["one-class", "classes"])
def test_opcheck(by_class: bool) -> None:
    boxes, scores = clustered(Inputs(), 2, 20)
    idxs = torch.randint(3, (2, 20)) if by_class else None
    first = None if idxs is None else idxs[0]
    torch.library.opcheck(torch.ops.nasdet.nms, (boxes[0].requires_grad_(), scores[0].requires_grad_(), first, 0.5))
    torch.library.opcheck(torch.ops.nasdet.nms, (boxes[0, :0], scores[0, :0], None, 0.5))
    torch.library.opcheck(torch.ops.nasdet.nms_padded, (boxes, scores, idxs, 0.5, 9))


def survivors(boxes: Tensor, scores: Tensor, idxs: Tensor) -> tuple[Tensor, Tensor]:
    keep = batched_nms(boxes, scores, idxs, 0.5)
    return boxes[keep].sum(0), nms(boxes, scores, 0.5) * 2


@needs_cpp
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_one_compiled_graph_serves_any_number_of_survivors(compiler: str) -> None:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(survivors, fullgraph=True, backend=compiler, dynamic=True)
        for count, clusters in ((40, 6), (20, 1), (33, 33)):
            boxes, scores = scene(count, clusters=clusters)
            inputs = (boxes, scores, torch.arange(count) % 2)
            for actual, expected in zip(compiled(*inputs), survivors(*inputs), strict=True):
                torch.testing.assert_close(actual, expected)
        # No box: inductor itself cannot lower boxes[keep] of a tensor known to be empty.
        alone = torch.compile(lambda b, s: nms(b, s, 0.5) * 2, fullgraph=True, backend=compiler, dynamic=True)
        for count, kept in ((40, 1), (0, 0), (1, 1)):
            boxes, scores = torch.tensor([[3.0, 4, 30, 40]]).repeat(count, 1), torch.rand(count)
            found = alone(boxes, scores)
            assert found.shape == (kept,) and torch.equal(found, scores.argsort(descending=True)[:kept] * 2)


@needs_cpp
def test_padded_compiles_without_any_setting() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda b, s: nms_padded(b, s, 0.5, 10), fullgraph=True, backend="aot_eager")
    for count in (30, 0):
        boxes, scores = clustered(Inputs(), 2, count)
        for actual, expected in zip(compiled(boxes, scores), nms_padded(boxes, scores, 0.5, 10), strict=True):
            assert torch.equal(actual, expected)


@needs_cpp
def test_exports() -> None:
    class Head(torch.nn.Module):
        def forward(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
            return nms(boxes, scores, 0.5), nms_padded(boxes, scores, 0.5, 10)[0]

    boxes, scores = scene(30)
    exported = torch.export.export(Head(), (boxes, scores)).module()
    for actual, expected in zip(exported(boxes, scores), Head()(boxes, scores), strict=True):
        assert torch.equal(actual, expected)
