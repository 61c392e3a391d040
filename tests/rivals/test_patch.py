"""patch_torchvision(): what it replaces, how it goes back, and torchvision's own machinery above it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nasdet.compat import Patch, patch, patch_torchvision

OPS = ("nms", "roi_align", "_roi_align_backward")
CPU_KERNELS = {f"torchvision::{name} [CPU]" for name in OPS}
FUNCTIONS = {
    "torchvision.ops.boxes._batched_nms_vanilla",
    "torchvision.ops.boxes._batched_nms_coordinate_trick",
    "torchvision.ops.poolers._multiscale_roi_align",
    "torchvision.ops.roi_align._roi_align",
}


def state() -> dict[str, Any]:
    """Everything that a patch touches: the dispatcher's tables, the fake, the functions."""
    import sys

    import torchvision.ops

    del torchvision
    functions = {label: getattr(sys.modules[label.rpartition(".")[0]], label.rpartition(".")[2]) for label in FUNCTIONS}
    fake = torch._library.simple_registry.singleton.find("torchvision::nms").fake_impl.kernel
    return {**{name: torch._C._dispatch_dump(f"torchvision::{name}") for name in OPS}, **functions, "fake": fake}


@pytest.fixture(autouse=True)
def _nothing_stays_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    before = state()
    yield
    assert patch._holders == 0 and patch._installation is None
    assert state() == before


def out_of_batch() -> tuple[Tensor, Tensor]:
    return torch.rand(2, 3, 8, 8), torch.tensor([[7.0, 1.0, 1.0, 4.0, 4.0]])


def runs_nasdet(tv: Any) -> bool:
    """nasdet shows itself by classes that stay apart at negative coordinates."""
    boxes = torch.tensor([[-11.0, -11.0, -1.0, -1.0]] * 2)
    return tv.batched_nms(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), 0.5).tolist() == [0, 1]


def test_it_says_what_it_replaced(tv: Any) -> None:
    with patch_torchvision() as active:
        assert isinstance(active, Patch) and active.active
        assert set(active.replaced) >= CPU_KERNELS | FUNCTIONS | {"torchvision::nms [fake]"}
        missing = {f"torchvision::{name} [CUDA]" for name in OPS} - set(active.replaced)
        assert missing <= set(active.kept) and all(active.kept.values())
        text = repr(active)
        assert "in force" in text and all(name in text for name in (*active.replaced, *active.kept))
        after = state()
    assert "restored" in repr(active) and not active.active
    for name, value in state().items():
        assert after[name] != value, f"{name} was not replaced"


def test_as_a_call_it_lasts_until_it_is_restored(tv: Any) -> None:
    assert not runs_nasdet(tv)
    active = patch_torchvision()
    try:
        assert runs_nasdet(tv)
    finally:
        active.restore()
    assert not runs_nasdet(tv)
    active.restore()  # again: no effect
    with pytest.raises(RuntimeError, match="restored already"), active:
        pass


def test_an_exception_inside_the_block_restores(tv: Any) -> None:
    with pytest.raises(KeyError), patch_torchvision():
        assert runs_nasdet(tv)
        raise KeyError
    assert not runs_nasdet(tv)


def test_patches_nest_in_any_order(tv: Any) -> None:
    outer = patch_torchvision()
    with patch_torchvision() as inner:
        assert inner.replaced == outer.replaced
        outer.restore()
        assert runs_nasdet(tv)  # the inner one is still in force
        outer.restore()
        assert runs_nasdet(tv)
    assert not runs_nasdet(tv)
    with patch_torchvision(), patch_torchvision():
        pass
    assert not runs_nasdet(tv)


def test_it_works_again_after_it_was_restored(tv: Any) -> None:
    for _ in range(3):
        with patch_torchvision():
            assert runs_nasdet(tv)
        assert not runs_nasdet(tv)


def test_functions_that_users_imported_before_are_reached(tv: Any) -> None:
    batched_nms = tv.batched_nms  # as `from torchvision.ops import batched_nms` binds it
    boxes = torch.tensor([[-11.0, -11.0, -1.0, -1.0]] * 2)
    with patch_torchvision():
        assert batched_nms(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]), 0.5).tolist() == [0, 1]


def test_what_somebody_else_put_there_meanwhile_stays(tv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision.ops.poolers as poolers

    original = poolers._multiscale_roi_align
    active = patch_torchvision()
    theirs = object()
    poolers._multiscale_roi_align = theirs
    active.restore()
    assert poolers._multiscale_roi_align is theirs
    poolers._multiscale_roi_align = original


def test_a_failure_half_way_leaves_nothing(tv: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(patch, "_FUNCTIONS", (*patch._FUNCTIONS, ("torchvision.ops.boxes", "nms", fail)))
    with pytest.raises(MemoryError):
        patch_torchvision()
    assert not runs_nasdet(tv)


def test_kernels_are_nasdets_and_autograd_is_torchvisions(tv: Any) -> None:
    maps, rois = out_of_batch()
    with patch_torchvision(), pytest.raises((RuntimeError, ValueError), match=r"rois\[0\] must have a batch index"):
        tv.roi_align(maps, rois, 2)
    rois[0, 0] = 1
    with patch_torchvision():
        pooled = tv.roi_align(maps.requires_grad_(), rois, 2)
        assert "torchvision" in type(pooled.grad_fn).__name__.lower() or "roi" in type(pooled.grad_fn).__name__.lower()
        assert pooled.is_contiguous()
        first = torch.autograd.grad(pooled.sum(), maps)[0]
        with pytest.raises(RuntimeError, match="[Dd]ouble backward"):
            (again,) = torch.autograd.grad(tv.roi_align(maps, rois, 2).square().sum(), maps, create_graph=True)
            again.sum().backward()
    torch.testing.assert_close(first, torch.autograd.grad(tv.roi_align(maps, rois, 2).sum(), maps)[0])


@pytest.mark.parametrize("sampling", [2, -1])
@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradcheck_through_torchvision(tv: Any, sampling: int, aligned: bool, layout: torch.memory_format) -> None:
    maps = torch.randn(2, 3, 7, 6, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    rois = torch.tensor([[0, 1.3, 0.4, 9.1, 11.7], [1, -2.0, 3.1, 4.4, 8.8], [1, 5.0, 5.0, 5.0, 5.0]]).double()
    with patch_torchvision():
        assert torch.autograd.gradcheck(lambda x: tv.roi_align(x, rois, (2, 3), 0.5, sampling, aligned), maps)


def test_modules_and_functions_give_torchvisions_values(tv: Any, clustered: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    boxes, scores = clustered(2000, generator) + 100, torch.rand(2000)
    idxs = torch.randint(0, 20, (2000,))
    maps = {str(i): torch.randn(1, 5, 640 // s, 640 // s) for i, s in enumerate((4, 8, 16, 32))}
    pooler = tv.MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)

    def everything() -> list[Tensor]:
        return [
            tv.nms(boxes, scores, 0.5),
            tv.batched_nms(boxes, scores, idxs, 0.5),
            tv.batched_nms(boxes[:500], scores[:500], idxs[:500], 0.5),
            tv.roi_align(maps["1"], [boxes[:30]], (3, 5), 0.125, 2, True),
            tv.RoIAlign(7, 0.25, -1)(maps["0"], [boxes[:30]]),
            pooler(maps, [boxes[:200]], [(640, 640)]),
            pooler({"0": maps["0"]}, [boxes[:20]], [(640, 640)]),
        ]

    expected = everything()
    with patch_torchvision():
        got = everything()
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.stride() == theirs.stride()
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["gap", "unordered", "two-dtypes", "other-epsilon"])
def test_pyramids_of_another_kind_go_to_torchvisions_own_pooler(tv: Any, case: str) -> None:
    strides = (4, 16, 8, 32) if case == "unordered" else (4, 8, 16, 32)
    maps = {str(i): torch.randn(1, 2, 256 // s, 256 // s) for i, s in enumerate(strides)}
    names = ["0", "2"] if case == "gap" else ["0", "1", "2", "3"]
    pooler = tv.MultiScaleRoIAlign(names, 2, 2)
    boxes = [torch.tensor([[0.0, 0.0, s, s] for s in (8.0, 111.9999, 112.0, 130.0, 240.0)])]
    pooler(maps, boxes, [(256, 256)])
    if case == "two-dtypes":
        maps["3"] = maps["3"].double()
    if case == "other-epsilon":
        pooler.map_levels.eps = 0.1

    def result() -> Tensor | str:
        try:
            return pooler(maps, boxes, [(256, 256)])
        except RuntimeError as error:
            return str(error)

    expected = result()
    with patch_torchvision():
        got = result()
    if isinstance(expected, str):
        assert isinstance(got, str)
    else:
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_autocast_still_computes_in_float32(tv: Any) -> None:
    maps, rois = torch.randn(1, 3, 16, 16), torch.tensor([[0.0, 1.3, 2.1, 13.2, 14.9]])
    boxes, scores = torch.rand(9, 4).bfloat16(), torch.rand(9).bfloat16()
    with patch_torchvision(), torch.autocast("cpu", torch.bfloat16):
        pooled = tv.roi_align(maps.bfloat16(), rois.bfloat16(), 3, 1.0, 2, True)
        assert pooled.dtype == torch.bfloat16
        assert tv.nms(boxes, scores, 0.5).dtype == torch.int64
    exact = tv.roi_align(maps.bfloat16().float(), rois.bfloat16().float(), 3, 1.0, 2, True)
    torch.testing.assert_close(pooled, exact.bfloat16(), atol=0, rtol=8e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_16_bit_inputs_reach_the_kernels(tv: Any, dtype: torch.dtype) -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [20.0, 20.0, 30.0, 30.0]]).to(dtype)
    scores = torch.tensor([0.5, 0.75, 0.25]).to(dtype)
    maps, rois = (
        torch.randn(1, 3, 16, 16).to(dtype).requires_grad_(),
        torch.tensor([[0.0, 1.5, 2.0, 13.0, 14.5]]).to(dtype),
    )
    with patch_torchvision():
        assert tv.nms(boxes, scores, 0.5).tolist() == [1, 2]
        pooled = tv.roi_align(maps, rois, 3)
        (gradient,) = torch.autograd.grad(pooled.sum(), maps)
    assert pooled.dtype == gradient.dtype == dtype
    exact = maps.detach().float().requires_grad_()
    expected = tv.roi_align(exact, rois.float(), 3)
    torch.testing.assert_close(pooled.float(), expected, atol=2e-2, rtol=1e-2)
    torch.testing.assert_close(gradient.float(), torch.autograd.grad(expected.sum(), exact)[0], atol=2e-2, rtol=1e-2)


class Head(nn.Module):
    """Both operators as a detector's head uses them."""

    def __init__(self, tv: Any) -> None:
        super().__init__()
        self.pooler = tv.MultiScaleRoIAlign(["0", "1"], 2, 2)

    def forward(self, a: Tensor, b: Tensor, boxes: Tensor) -> Tensor:
        return self.pooler({"0": a, "1": b}, [boxes], [(64, 64)])


def head_inputs() -> tuple[Tensor, Tensor, Tensor]:
    boxes = torch.tensor([[1.0, 2.0, 30.0, 40.0], [0.0, 0.0, 60.0, 60.0], [5.0, 5.0, 6.0, 9.0]])
    return torch.randn(1, 3, 16, 16), torch.randn(1, 3, 8, 8), boxes


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_torchscript_made_under_the_patch_is_torchvisions_own(tv: Any) -> None:
    inputs = head_inputs()
    expected = Head(tv)(*inputs)
    with patch_torchvision():
        scripted = torch.jit.script(Head(tv))
        inside = scripted(*inputs)
        nms = torch.jit.script(tv.batched_nms)
    torch.testing.assert_close(inside, expected)
    torch.testing.assert_close(scripted(*inputs), expected)
    assert "nasdet" not in str(scripted.inlined_graph)
    assert nms(inputs[2], torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0, 0, 1]), 0.2).tolist() == [2, 1]


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning", "ignore::torch.jit.TracerWarning")
def test_traced_graphs_hold_torchvisions_operators(tv: Any) -> None:
    inputs = head_inputs()
    head = Head(tv)
    expected = head(*inputs)
    with patch_torchvision():
        traced = torch.jit.trace(head, inputs)
    assert "torchvision::roi_align" in str(traced.inlined_graph) and "nasdet" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(*inputs), expected)


@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_exported_graphs_hold_torchvisions_operators(tv: Any, strict: bool) -> None:
    class Suppress(nn.Module):
        def forward(self, boxes: Tensor, scores: Tensor, idxs: Tensor) -> Tensor:
            return tv.batched_nms(boxes, scores, idxs, 0.5)

    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [1.0, 0.0, 11.0, 10.0], [20.0, 20.0, 30.0, 30.0]])
    inputs = (boxes, torch.tensor([0.5, 0.9, 0.7]), torch.tensor([0, 0, 1]))
    with patch_torchvision():
        program = torch.export.export(Suppress(), inputs, strict=strict)
        inside = program.module()(*inputs)
    assert "torchvision.nms" in str(program.graph) and "nasdet" not in str(program.graph)
    assert inside.tolist() == program.module()(*inputs).tolist() == [1, 2]


def test_compiled_code_calls_nasdet_and_survives_none_or_one(tv: Any) -> None:
    def detect(boxes: Tensor, scores: Tensor) -> Tensor:
        return boxes[tv.nms(boxes, scores, 0.5)] + 1

    pooler = tv.MultiScaleRoIAlign(["0", "1"], 2, 2)
    a, b, boxes = head_inputs()
    expected = pooler({"0": a, "1": b}, [boxes], [(64, 64)])
    with patch_torchvision():
        torch._dynamo.reset()
        compiled = torch.compile(detect, fullgraph=True, backend="aot_eager", dynamic=True)
        for count in (3, 1, 0):
            apart = torch.arange(count)[:, None] * 20.0 + torch.tensor([[0.0, 0.0, 10.0, 10.0]])
            assert compiled(apart, torch.rand(count)).shape == (count, 4)
        pool = torch.compile(
            lambda a, b: pooler({"0": a, "1": b}, [boxes], [(64, 64)]), fullgraph=True, backend="aot_eager"
        )
        torch.testing.assert_close(pool(a, b), expected)
    torch._dynamo.reset()


def test_deterministic_algorithms_on_the_cpu(tv: Any) -> None:
    maps, rois = torch.randn(1, 2, 9, 9).requires_grad_(), torch.tensor([[0.0, 1.0, 1.0, 7.0, 7.0]] * 5)
    torch.use_deterministic_algorithms(True)
    try:
        with patch_torchvision():
            results = [torch.autograd.grad(tv.roi_align(maps, rois, 3).sum(), maps)[0] for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(*results)
