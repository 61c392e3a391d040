"""Convolutions with their norms folded in: the same values and gradients, and folded only where nobody can tell."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nasdet
from nasdet.detectors import MobileNetV2, ResNet, ShuffleNetV2
from nasdet.detectors.norm import FoldingSequential, FrozenBatchNorm2d, conv_norm
from nasdet.nn import GroupedDilationConv2d


def pair(norm: type[nn.Module] = FrozenBatchNorm2d, **options: Any) -> tuple[nn.Conv2d, Any]:
    """A convolution, and a norm that has seen something."""
    torch.manual_seed(0)
    conv, layer = nn.Conv2d(16, 24, 3, padding=1, bias=False), norm(24, **options)
    for name, value in layer.state_dict().items():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5) if name.endswith(("var", "weight")) else value.normal_()
    return conv, layer.eval()


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 16, 9, 11, generator=torch.Generator().manual_seed(1)).to(dtype)


def called(conv: nn.Module, norm: nn.Module) -> list[str]:
    """Which modules ``conv_norm`` calls, seen without hooks."""
    names: list[str] = []
    for name, module in (("conv", conv), ("norm", norm)):
        forward = module.forward
        object.__setattr__(module, "forward", lambda x, name=name, forward=forward: (names.append(name), forward(x))[1])
    conv_norm(conv, norm, image(conv.weight.dtype))
    for module in (conv, norm):
        del module.__dict__["forward"]
    return names


@pytest.mark.parametrize("norm", [FrozenBatchNorm2d, nn.BatchNorm2d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_the_same_values_and_gradients(norm: type[nn.Module], dtype: torch.dtype) -> None:
    conv, layer = pair(norm)
    conv, layer = conv.to(dtype), layer.to(dtype)
    assert called(conv, layer) == []
    results = []
    for run in (lambda x: conv_norm(conv, layer, x), lambda x: layer(conv(x))):
        x = image(dtype).requires_grad_()
        y = run(x)
        wanted = [x, conv.weight, *layer.parameters()]
        results.append((y, *torch.autograd.grad(y.square().mean(), wanted)))
    accuracy = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    for got, expected in zip(*results, strict=True):
        assert float((got - expected).detach().norm() / expected.detach().norm()) < accuracy


def test_no_map_between_is_kept_for_backward() -> None:
    conv, layer = pair()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        conv_norm(conv, layer, image())
    assert {x.numel() for x in kept if x.dim() == 4} == {24, conv.weight.numel(), image().numel()}


UNFOLDED = {
    "training": pair(nn.BatchNorm2d),
    "no-statistics": pair(nn.BatchNorm2d, track_running_stats=False),
    "not-affine": pair(nn.BatchNorm2d, affine=False),
    "group-norm": (pair()[0], nn.GroupNorm(8, 24)),
    "conv-with-a-bias": (nn.Conv2d(16, 24, 3), pair()[1]),
    "conv-of-another-class": (type("Odd", (nn.Conv2d,), {})(16, 24, 3, bias=False), pair()[1]),
}
UNFOLDED["training"][1].train()


@pytest.mark.parametrize("case", UNFOLDED)
def test_both_are_called_where_the_norm_is_not_fixed(case: str) -> None:
    assert called(*UNFOLDED[case]) == ["conv", "norm"]


@pytest.mark.parametrize("which", [0, 1], ids=["conv", "norm"])
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook"])
def test_hooks_are_heard(which: int, kind: str) -> None:
    both = pair()
    heard: list[str] = []
    handle = getattr(both[which], f"register_{kind}")(lambda *args: heard.append(kind))
    y = conv_norm(*both, image().requires_grad_())
    y.sum().backward()
    assert heard == [kind]
    torch.testing.assert_close(y, both[1](both[0](image())), rtol=1e-5, atol=1e-5)
    handle.remove()
    assert called(*both) == []


def test_export_shows_both() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = pair()

        def forward(self, x: Tensor) -> Tensor:
            return conv_norm(self.conv, self.norm, x)

    program = torch.export.export(Block().eval(), (image(),))
    assert any("batch_norm" in str(node.target) for node in program.graph.nodes)


def test_bfloat16() -> None:
    conv, layer = pair()
    exact = layer(conv(image())).detach()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = conv_norm(conv, layer, image())
    assert got.dtype == torch.bfloat16 and float((got.float() - exact).norm() / exact.norm()) < 2e-2
    whole = conv_norm(conv.bfloat16(), layer.bfloat16(), image(torch.bfloat16))
    assert whole.dtype == torch.bfloat16 and float((whole.float() - exact).detach().norm() / exact.norm()) < 2e-2


def test_a_dilated_convolution_folds_too() -> None:
    conv, layer = pair()
    derived = GroupedDilationConv2d.from_conv(conv, [1, 2], [16, 8])
    assert called(derived, layer) == []
    torch.testing.assert_close(conv_norm(derived, layer, image()), layer(derived(image())), rtol=1e-5, atol=1e-5)


def test_in_sequence() -> None:
    """Convolutions without a norm, norms without a convolution, and two norms after one."""
    conv, layer = pair()
    for layers in ([conv], [conv, layer], [conv, layer, layer], [nn.ReLU(), conv, layer, nn.ReLU()], [conv, nn.ReLU()]):
        assert list(FoldingSequential(*layers).state_dict()) == list(nn.Sequential(*layers).state_dict())
        expected = nn.Sequential(*layers)(image())
        torch.testing.assert_close(FoldingSequential(*layers)(image()), expected, rtol=1e-5, atol=1e-5)


BACKBONES: dict[str, Callable[[str], Any]] = {
    "resnet18": lambda norm: ResNet(18, width=0.25, norm=norm),
    "resnet50": lambda norm: ResNet(50, width=0.25, norm=norm),
    "mobilenet": lambda norm: MobileNetV2(width=0.25, norm=norm),
    "shufflenet": lambda norm: ShuffleNetV2(
        8, (16, 32, 64), (1, 2, 2), ["xcep", "sh5", "sh7", "sh3", "xcep"], norm=norm
    ),
}


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
def test_a_backbone_calls_no_fixed_norm(backbone: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    net = backbone("frozen_bn")

    def refuse(*args: Any) -> Tensor:
        raise AssertionError("a norm was called")

    monkeypatch.setattr(FrozenBatchNorm2d, "forward", refuse)
    net(torch.randn(1, 3, 64, 96))


@pytest.mark.parametrize("backbone", BACKBONES.values(), ids=BACKBONES)
@pytest.mark.parametrize("norm", ["frozen_bn", "bn"])
def test_a_backbone_computes_what_it_did(backbone: Callable[[str], Any], norm: str) -> None:
    """Against the same net in float64 with its norms heard, and so called."""
    torch.manual_seed(0)
    net = backbone(norm)
    x = torch.randn(1, 3, 128, 160)
    net.train()(x)
    net.eval()
    plain = copy.deepcopy(net).double()
    for module in plain.modules():
        module.register_forward_hook(lambda *args: None)
    for accelerated in (False, True):
        if accelerated:
            nasdet.accelerate(net)
        for name, expected in plain(x.double()).items():
            distance = float((net(x)[name] - expected).detach().norm() / expected.detach().norm())
            assert distance < 1e-5, (name, accelerated)
