"""``accelerate``: what is swapped and what is not, the same values, training, and the way back."""

from __future__ import annotations

import copy
import importlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerated_net import net, picture
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.optimization import fuse

import nasdet
from nasdet.nn import AcceleratedConv2d, DepthwiseConv2d, accelerate

pytestmark = pytest.mark.needs("cpp")


class Doubled(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


LEFT = {
    "1x1": (nn.Conv2d(64, 64, 1), "torch's is as fast at a 1x1 kernel"),
    "stride-2": (nn.Conv2d(128, 128, 3, stride=2, padding=1), "kernel of stride 2"),
    "depthwise-not-square": (nn.Conv2d(64, 64, (3, 5), padding=1, groups=64), "square kernel of odd size, got 3x5"),
    "ours": (DepthwiseConv2d(64), "it runs on the library's kernels by itself"),
    "grouped": (nn.Conv2d(64, 64, 3, padding=1, groups=32), "torch's is as fast at a 3x3 kernel"),
    "not-padded": (nn.Conv2d(64, 64, 3), "it must be padded with 1x1 zeros, got (0, 0) (zeros)"),
    "reflected": (nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect"), "got (1, 1) (reflect)"),
    "not-square": (nn.Conv2d(64, 64, (3, 1), padding=(1, 0)), "square kernel of odd size, got 3x1"),
    "subclass": (Doubled(64, 64, 3, padding=1), "plain nn.Conv2d, got Doubled"),
    "float64": (nn.Conv2d(64, 64, 3, padding=1).double(), "its weight is torch.float64"),
    "large-kernel": (nn.Conv2d(1, 1, 257, padding=128), "it must have a kernel of at most 255, got 257x257"),
    "depthwise-large-kernel": (nn.Conv2d(2, 2, 257, padding=128, groups=2), "of at most 255, got 257x257"),
    "far": (nn.Conv2d(64, 64, 3, padding=2**30, dilation=2**30), "dilation of it must be below 2**30, got"),
    "wide-steps": (nn.Conv2d(64, 64, 3, padding=1, stride=2**31), "stride of it must be below 2**30, got"),
    "negative": (nn.Conv2d(64, 64, 3, padding=-1, groups=64), "padding must be 'same', an integer"),
    "meta": (nn.Conv2d(64, 64, 3, padding=1, device="meta"), "its weight is on meta"),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_to_torch_with_the_reason(case: str) -> None:
    conv, reason = LEFT[case]
    kind = type(conv)
    report = accelerate(nn.Sequential(conv, nn.ReLU()))
    assert report.swapped == () and not report.active and type(conv) is kind
    assert list(report.left) == ["0"] and reason in report.left["0"]
    assert "accelerated 0 of 1 convolutions" in str(report) and reason in str(report)


def test_the_report_of_one_convolution_names_it() -> None:
    swapped, left = accelerate(nn.Conv2d(64, 64, 3, padding=1)), accelerate(nn.Conv2d(64, 64, 3))
    assert str(swapped).splitlines() == ["accelerated 1 of 1 convolutions", "  the model itself"]
    assert str(left).endswith("(the model itself)")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("inputs", "outputs"), [(8, 0), (0, 8)])
def test_no_channels_are_left(inputs: int, outputs: int) -> None:
    reason = f"it must have channels, got {inputs} inputs and {outputs} outputs"
    assert accelerate(nn.Conv2d(inputs, outputs, 3, padding=1)).left == {"": reason}


def test_a_weight_of_another_shape_is_left() -> None:
    conv = nn.Conv2d(64, 64, 3, padding=1)
    conv.weight = nn.Parameter(conv.weight[:32])
    reason = "it must have a weight of shape (64, 64, 3, 3), got (32, 64, 3, 3)"
    assert accelerate(conv).left == {"": reason}
    conv.register_parameter("weight", None)
    assert accelerate(conv).left == {"": reason.replace("(32, 64, 3, 3)", "None")}


def test_a_replaced_forward_is_left() -> None:
    conv = nn.Conv2d(64, 64, 3, padding=1)
    conv.forward = lambda input: input  # type: ignore[method-assign]  # what is tested
    assert accelerate(conv).left == {"": "its forward was replaced"}


@pytest.mark.parametrize(
    ("conv", "size"),
    [
        (nn.Conv2d(64, 64, 3, padding=1), (19, 26)),
        (nn.Conv2d(64, 80, 3, padding=(2, 3), dilation=(2, 3), bias=False), (19, 26)),
        (nn.Conv2d(64, 64, 3, padding="same", dilation=4), (19, 26)),
        (nn.Conv2d(64, 1, 3, padding=1), (150, 152)),
        (nn.Conv2d(64, 64, 5, stride=2, padding=1, groups=64), (19, 26)),
        (nn.Conv2d(64, 64, 3, padding="same", dilation=(2, 1), groups=64, bias=False), (19, 26)),
    ],
    ids=["plain", "uneven-dilation", "same", "one-output", "depthwise", "depthwise-same"],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_the_same_values(conv: nn.Conv2d, size: tuple[int, int], layout: torch.memory_format) -> None:
    conv = copy.deepcopy(conv).to(memory_format=layout)
    x = torch.randn(2, 64, *size, generator=torch.Generator().manual_seed(2)).contiguous(memory_format=layout)
    expected = conv(x)
    exact = copy.deepcopy(conv).double()(x.double())
    with accelerate(conv) as report:
        assert report.swapped == ("",) and type(conv) is AcceleratedConv2d
        got = conv(x)
    assert not torch.equal(got, expected), "the library's kernel ran"
    assert got.is_contiguous(memory_format=layout) and got.shape == expected.shape
    assert float((got - exact).detach().norm() / exact.detach().norm()) < 5e-6
    assert torch.equal(conv(x), expected), "undone at the end of the block"


def test_the_report_names_every_convolution() -> None:
    model = net()
    report = nasdet.accelerate(model)
    assert report.swapped == ("2", "4") and list(report.left) == ["0", "5"] and report.active
    lines = str(report).splitlines()
    assert lines[:3] == ["accelerated 2 of 4 convolutions", "  2", "  4"] and len(lines) == 5
    report.undo()
    assert not report.active and "(undone)" in str(report)
    assert all(type(conv) in (nn.Conv2d, nn.ReLU, nn.BatchNorm2d) for conv in model)


def test_everything_but_the_class_is_the_very_same() -> None:
    model = net()
    parameters, state = dict(model.named_parameters()), model.state_dict()
    seen: list[tuple[int, ...]] = []
    model[2].register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    before = {key: value for key, value in vars(model[2]).items()}
    report = accelerate(model)
    assert report.swapped == ("2", "4"), "a hook stays where it is"
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
    assert list(model.state_dict()) == list(state) and isinstance(model[2], nn.Conv2d)
    model(picture())
    assert seen == [(2, 32, 36, 48)]
    report.undo()
    after = vars(model[2])
    assert type(model[2]) is nn.Conv2d and after.keys() == before.keys()
    assert all(after[key] is value for key, value in before.items())


@pytest.mark.parametrize("value", [None, "resnet", torch.nn.functional.conv2d, [nn.Conv2d(4, 4, 3)]])
def test_nonsense_is_refused(value: Any) -> None:
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got"):
        accelerate(value)


def train(model: nn.Module, steps: int = 3) -> tuple[list[float], dict[str, Tensor]]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(picture()).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_training_goes_the_same_way() -> None:
    expected, wanted = train(net())
    model = net()
    with accelerate(model) as report:
        assert len(report.swapped) == 2
        losses, weights = train(model)
    assert losses == pytest.approx(expected, rel=1e-4) and losses[-1] < losses[0]
    for name, weight in weights.items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-3, atol=1e-5)


def test_states_go_both_ways() -> None:
    plain, fast = net(), net()
    with torch.no_grad():
        for parameter in fast.parameters():
            parameter.mul_(1.5)
    accelerate(fast)
    plain.load_state_dict(fast.state_dict())
    fast.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fast.eval()(picture()), plain.eval()(picture()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_compiled_as_one_graph(grad: bool) -> None:
    model = net().eval()
    with torch.set_grad_enabled(grad):
        expected = model(picture())
        accelerate(model)
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(picture())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert got.requires_grad == grad


def test_bfloat16_autocast() -> None:
    model = net().eval()
    exact = model(picture()).detach()
    accelerate(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = model(picture())
    assert got.dtype == torch.bfloat16
    assert float((got.float() - exact).norm() / exact.norm()) < 2e-2


def test_the_reference_serves_when_asked_for() -> None:
    """The switch of every operator: torch's convolution, to the bit where the bias is not fused."""
    model = net(bias=False)[2]
    x = torch.randn(1, 32, 48, 60)
    expected = model(x)
    accelerate(model)
    with nasdet.use_backend("reference"):
        assert torch.equal(model(x), expected)
    assert not torch.equal(model(x), expected), "and otherwise the library's own"


@pytest.mark.parametrize(
    ("shape", "grad"), [((1, 32, 48, 56), True), ((1, 512, 8, 8), False)], ids=["little-work", "few-pixels"]
)
def test_a_small_call_is_torchs(shape: tuple[int, ...], grad: bool) -> None:
    conv = nn.Conv2d(shape[1], shape[1], 3, padding=1)
    x, larger = torch.randn(shape), torch.randn(*shape[:2], shape[2] + 1, shape[3] + 1)
    with torch.set_grad_enabled(grad):
        expected = conv(x), conv(larger)
        accelerate(conv)
        assert torch.equal(conv(x), expected[0]) and not torch.equal(conv(larger), expected[1])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_small_call_in_16_bits_is_ours(dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("nasdet.nn.accelerate")
    called: list[torch.dtype] = []

    def seen(x: Tensor, *rest: Any) -> Tensor:
        called.append(x.dtype)
        return nasdet.ops.grouped_dilation_conv2d(x, *rest)

    monkeypatch.setattr(module, "grouped_dilation_conv2d", seen)
    conv, x = nn.Conv2d(32, 32, 3, padding=1), torch.randn(1, 32, 5, 6)
    accelerate(conv)
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = conv(x) if autocast else conv.to(dtype)(x.to(dtype))
    assert len(called) == 1 and y.dtype == dtype


@pytest.mark.parametrize("shape", [(32, 12, 13), (0, 32, 12, 13), (1, 32, 1, 1)], ids=["unbatched", "none", "pixel"])
def test_odd_inputs(shape: tuple[int, ...]) -> None:
    conv = net()[2]
    x = torch.randn(shape)
    expected = conv(x)
    accelerate(conv)
    torch.testing.assert_close(conv(x), expected, rtol=1e-5, atol=1e-5)


def test_float64_after_the_swap_is_torchs() -> None:
    conv = net()[2]
    accelerate(conv)
    x = torch.randn(1, 32, 9, 9, dtype=torch.float64)
    plain = copy.deepcopy(conv).double()
    plain.__class__ = nn.Conv2d
    assert torch.equal(conv.double()(x), plain(x))


def test_exported_as_torchs_convolution() -> None:
    model = net().eval()
    accelerate(model)
    program = torch.export.export(model, (picture(),))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert any("conv2d" in name for name in called) and not any("nasdet" in name for name in called)
    traced = torch.jit.trace(model, picture())
    assert "nasdet::" not in str(traced.inlined_graph) and "aten::_convolution" in str(traced.inlined_graph)


@pytest.mark.parametrize("groups", [1, 32], ids=["plain", "depthwise"])
def test_torch_fx_takes_one_call(groups: int) -> None:
    model = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, groups=groups), nn.BatchNorm2d(32), nn.ReLU()).eval()
    x = torch.randn(1, 32, 60, 70)
    plain = model(x)
    assert accelerate(model).swapped == ("0",)
    traced, expected = torch.fx.symbolic_trace(model), model(x)
    assert torch.equal(traced(x), expected) and torch.equal(copy.deepcopy(traced)(x), expected)
    assert not torch.equal(expected, plain), "the library's kernel ran"
    torch.testing.assert_close(fuse(model)(x), expected)


@pytest.mark.parametrize("options", [{"padding": 1}, {"padding": "same", "groups": 32, "bias": False}])
def test_scripted_as_torchs_convolution(options: dict[str, Any]) -> None:
    model, x = nn.Sequential(nn.Conv2d(32, 32, 3, **options)), torch.randn(1, 32, 60, 70)
    expected = model(x)
    assert accelerate(model).swapped == ("0",)
    assert torch.equal(torch.jit.script(model)(x), expected)


def _padded_around(conv: nn.Conv2d) -> None:
    conv.padding_mode = "circular"


def _not_padded(conv: nn.Conv2d) -> None:
    conv.padding = (0, 0)


def _padded_by_an_integer(conv: nn.Conv2d) -> None:
    conv.padding = 2  # type: ignore[assignment]  # torch takes it


def _dilated(conv: nn.Conv2d) -> None:
    conv.dilation = (2, 2)


def _dilated_by_an_integer(conv: nn.Conv2d) -> None:
    conv.dilation = 2  # type: ignore[assignment]  # torch takes it


def _dilated_and_padded(conv: nn.Conv2d) -> None:
    conv.dilation = conv.padding = (3, 3)


def _larger(conv: nn.Conv2d) -> None:
    conv.weight = nn.Parameter(torch.randn(*conv.weight.shape[:2], 5, 5))


def _flat(conv: nn.Conv2d) -> None:
    conv.weight = nn.Parameter(torch.randn(*conv.weight.shape[:2], 1, 3))


CHANGES = (
    _padded_around,
    _not_padded,
    _padded_by_an_integer,
    _dilated,
    _dilated_by_an_integer,
    _dilated_and_padded,
    _larger,
    _flat,
)


@pytest.mark.parametrize("groups", [1, 32])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_what_is_changed_afterwards_counts(change: Any, groups: int) -> None:
    """Of several who change a model, such as for seamless tiles, none need know of the others."""
    conv, x = nn.Conv2d(32, 32, 3, padding=1, groups=groups), torch.randn(1, 32, 60, 70)
    torch.manual_seed(1)
    plain = copy.deepcopy(conv)
    assert accelerate(conv).swapped == ("",)
    for module in (plain, conv):
        torch.manual_seed(1)
        change(module)
    torch.testing.assert_close(conv(x), plain(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.jit.script(conv)(x), plain(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("groups", [1, 32])
def test_a_batch_of_biases(groups: int) -> None:
    conv, x, biases = nn.Conv2d(32, 32, 3, padding=1, groups=groups), torch.randn(1, 32, 60, 70), torch.randn(3, 32)
    assert accelerate(conv).swapped == ("",)

    def call(bias: Tensor) -> Any:
        return torch.func.functional_call(conv, {"bias": bias}, (x,))

    torch.testing.assert_close(torch.func.vmap(call)(biases), torch.stack([call(bias) for bias in biases]))


def test_without_values_all_is_left() -> None:
    with FakeTensorMode():
        report = accelerate(net())
    assert report.swapped == () and "its weight holds no data here" in report.left.values()


def test_without_the_library_all_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    # by name, as the package's attribute of this name is the function
    module = importlib.import_module("nasdet.nn.accelerate")
    for name in ("DENSE", "DEPTHWISE"):
        op = getattr(module, name)
        backends = [replace(backend, available=lambda: "no compiled part") for backend in op.backends]
        monkeypatch.setattr(module, name, replace(op, backends=backends))
    model = nn.Sequential(*net(), nn.Conv2d(16, 16, 3, padding=1, groups=16))
    report = accelerate(model)
    assert report.swapped == () and report.left["2"] == report.left["6"] == "no compiled part"
