"""``DepthwiseConv2d`` in the place of a depthwise ``nn.Conv2d``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import nasdet
from nasdet.measure import count, total
from nasdet.nn import DepthwiseConv2d

CONVS: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "5x5-stride": {"kernel_size": 5, "padding": 2, "stride": 2, "bias": False},
    "7x7-same": {"kernel_size": 7, "padding": "same"},
    "dilated": {"kernel_size": 3, "padding": (2, 3), "dilation": (2, 3)},
    "not-padded": {"kernel_size": 3},
}


@pytest.fixture(params=CONVS)
def conv(request: pytest.FixtureRequest) -> nn.Conv2d:
    return nn.Conv2d(18, 18, groups=18, **CONVS[request.param])


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_is_the_convolution(conv: nn.Conv2d, layout: torch.memory_format) -> None:
    made = DepthwiseConv2d.from_conv(conv)
    assert made.weight is conv.weight and made.bias is conv.bias
    assert list(made.state_dict()) == list(conv.state_dict())
    x = torch.randn(2, 18, 9, 10).to(memory_format=layout).requires_grad_()
    y, expected = made(x), conv(x)
    torch.testing.assert_close(y, expected)
    assert y.stride() == expected.stride()
    leaves = [x, *conv.parameters()]
    upstream = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(y, leaves, upstream), torch.autograd.grad(expected, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_takes_pictures_without_a_batch(conv: nn.Conv2d) -> None:
    x = torch.randn(18, 9, 10)
    torch.testing.assert_close(DepthwiseConv2d.from_conv(conv)(x), conv(x))


def test_is_drawn_as_a_convolution_is() -> None:
    torch.manual_seed(3)
    made = DepthwiseConv2d(6, 5, 2)
    torch.manual_seed(3)
    conv = nn.Conv2d(6, 6, 5, 2, 2, groups=6)
    assert isinstance(made, nn.Conv2d) and str(made).endswith(str(conv))
    for name, value in conv.state_dict().items():
        assert torch.equal(made.state_dict()[name], value)
    made.load_state_dict(conv.state_dict())


def test_same_padding_at_every_stride() -> None:
    made = DepthwiseConv2d(4, 5, (1, 2), dilation=(3, 1))
    assert made.padding == (6, 2) and made(torch.randn(1, 4, 7, 9)).shape == (1, 4, 7, 5)


def test_costs_what_the_convolution_costs(conv: nn.Conv2d) -> None:
    image = torch.empty(1, 18, 20, 25, device="meta")
    assert total(count(DepthwiseConv2d.from_conv(conv), image))[1:] == total(count(conv, image))[1:]


def test_autocast_takes_both_operands_in_its_dtype() -> None:
    made, x = DepthwiseConv2d(4), torch.randn(1, 4, 6, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = made(x)
    assert y.dtype == torch.bfloat16 and torch.equal(y, made.bfloat16()(x.bfloat16()))


@pytest.mark.parametrize(
    ("conv", "message"),
    [
        pytest.param(nn.Conv2d(4, 8, 3, groups=4), "as many groups as .*got 4, 4 and 8", id="multiplier"),
        pytest.param(nn.Conv2d(4, 4, 3), "as many groups as .*got 1, 4 and 4", id="dense"),
        pytest.param(nn.Conv2d(4, 4, (3, 1), groups=4), "square kernel of odd size, got 3x1", id="flat-kernel"),
        pytest.param(nn.Conv2d(4, 4, 2, groups=4), "square kernel of odd size, got 2x2", id="even-kernel"),
        pytest.param(nn.Conv2d(4, 4, 257, padding=128, groups=4), "at most 255, got 257x257", id="large-kernel"),
        pytest.param(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", groups=4), "reflect", id="reflect"),
    ],
)
def test_refuses_other_convolutions(conv: nn.Conv2d, message: str) -> None:
    with pytest.raises(ValueError, match=f"layer.dw must .*{message}"):
        DepthwiseConv2d.from_conv(conv, "layer.dw")


def test_refuses_what_would_be_lost() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1, groups=4)
    conv.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match="dw must have nothing but a weight and a bias, got forward hooks"):
        DepthwiseConv2d.from_conv(conv, "dw")
    with nasdet.accelerate(nn.Sequential(conv)) as report:  # where the module itself stays, so does its hook
        assert report.swapped == ("0",)


def test_refuses_what_is_no_plain_convolution() -> None:
    with pytest.raises(TypeError, match="conv must be a plain nn.Conv2d, got DepthwiseConv2d"):
        DepthwiseConv2d.from_conv(DepthwiseConv2d(4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels must be a positive integer, got 0"),
        ({"channels": 4, "kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"channels": 2, "kernel_size": 257}, "kernel_size must be at most 255, got 257"),
        ({"channels": 4, "stride": 0}, "stride must be a positive integer or a pair of them, got 0"),
        ({"channels": 4, "padding": "valid"}, "padding must be 'same', an integer of at least 0 .*got 'valid'"),
    ],
    ids=["channels", "kernel", "large-kernel", "stride", "padding"],
)
def test_errors_name_the_argument(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DepthwiseConv2d(**arguments)


def test_an_exported_one_needs_no_operator_of_ours() -> None:
    made, x = DepthwiseConv2d(4, 5, 2, dilation=3), torch.randn(1, 4, 20, 21)
    program = torch.export.export(made, (x,))
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert names and not any("nasdet" in name for name in names)
    torch.testing.assert_close(program.module()(x), made(x))
    traced = torch.jit.trace(made, x)
    assert {node.kind() for node in traced.graph.nodes()} >= {"aten::_convolution"}
    assert not any(node.kind().startswith("nasdet") for node in traced.graph.nodes())
    torch.testing.assert_close(torch.jit.script(made)(x), made(x))


def test_another_padding_mode_is_torchs() -> None:
    made, x = DepthwiseConv2d(4, 5), torch.randn(1, 4, 20, 21)
    conv = nn.Conv2d(4, 4, 5, padding="same", groups=4, padding_mode="reflect")
    made.load_state_dict(conv.state_dict())
    made.padding_mode = "reflect"
    for call in (made, torch.jit.script(made)):
        torch.testing.assert_close(call(x), conv(x))


def test_torch_fx_takes_one_call() -> None:
    model, x = nn.Sequential(DepthwiseConv2d(8, 5, 2), nn.ReLU()), torch.randn(1, 8, 9, 10)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
