"""The modules in the place of ``nn.Conv2d``."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn import utils

from nasdet.nn import (
    AcceleratedConv2d,
    DepthwiseConv2d,
    GroupedDilationConv2d,
    MixedDilationConv2d,
    check_same_conv2d,
)

CONVS = {
    "plain": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "padding": 1, "stride": 2},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 4, "bias": False},
    "k5-same": {"kernel_size": 5, "padding": "same"},
    "k1": {"kernel_size": 1, "stride": (2, 1)},
}


@pytest.fixture(params=CONVS)
def conv(request: pytest.FixtureRequest) -> nn.Conv2d:
    return nn.Conv2d(8, 12, **CONVS[request.param])


def test_grouped_with_dilation_1_is_the_convolution(conv: nn.Conv2d) -> None:
    made = GroupedDilationConv2d.from_conv(conv, [1, 1], [3, 9])
    x = torch.randn(2, 8, 9, 7)
    torch.testing.assert_close(made(x), conv(x))
    assert made.weight is conv.weight and made.bias is conv.bias
    assert list(made.state_dict()) == list(conv.state_dict())


def test_grouped_slices_have_their_dilations() -> None:
    conv = nn.Conv2d(8, 12, 3, padding=1, stride=2)
    made = GroupedDilationConv2d.from_conv(conv, [2, (1, 3)], [4, 8])
    x = torch.randn(2, 8, 9, 7)
    parts = [
        F.conv2d(x, conv.weight[:4], conv.bias[:4], 2, 2, 2),  # type: ignore[index]  # it has a bias
        F.conv2d(x, conv.weight[4:], conv.bias[4:], 2, (1, 3), (1, 3)),  # type: ignore[index]  # it has a bias
    ]
    torch.testing.assert_close(made(x), torch.cat(parts, 1))


def test_mixed_starts_as_the_even_mixture_of_copies(conv: nn.Conv2d) -> None:
    dilations = [1, 3, (2, 1)]
    made = MixedDilationConv2d.from_conv(conv, dilations, channel_groups=4)
    assert made.alpha.shape == (4, 3) and not made.alpha.any()
    for replica in made.replicas:
        assert torch.equal(replica, conv.weight)
    x = torch.randn(2, 8, 9, 7)
    radius = conv.kernel_size[0] // 2
    branches = []
    for d in ((1, 1), (3, 3), (2, 1)):
        padding = (d[0] * radius, d[1] * radius)
        branches.append(F.conv2d(x, conv.weight, conv.bias, conv.stride, padding, d, conv.groups))
    torch.testing.assert_close(made(x), torch.stack(branches).mean(0))
    torch.testing.assert_close(MixedDilationConv2d.from_conv(conv, [1, 1, 1], 2)(x), conv(x))


def test_each_slice_follows_its_alphas() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1)
    made = MixedDilationConv2d.from_conv(conv, [1, 2], channel_groups=3)
    with torch.no_grad():
        made.alpha.copy_(torch.tensor([[0.0, -1e4], [-1e4, 0.0], [0.0, -1e4]]))
    grouped = GroupedDilationConv2d.from_conv(conv, [1, 2, 1], [2, 2, 2])
    x = torch.randn(1, 4, 7, 8)
    torch.testing.assert_close(made(x), grouped(x))


def test_channels_last_modules() -> None:
    conv = nn.Conv2d(8, 12, 3, padding=1)
    x = torch.randn(2, 8, 9, 7)
    for made in (GroupedDilationConv2d.from_conv(conv, [1, 2]), MixedDilationConv2d.from_conv(conv, [1, 2], 3)):
        expected = made(x)
        made.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks this form
        assert made.weight.is_contiguous()  # as the kernels read it, without a copy in every call
        y = made(x.to(memory_format=torch.channels_last))
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y, expected)


def test_from_a_channels_last_convolution() -> None:
    conv = nn.Conv2d(8, 12, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before, x = conv.weight.detach().clone(), torch.randn(2, 8, 9, 7)
    expected = conv(x)
    for made in (GroupedDilationConv2d.from_conv(conv, [1, 1]), MixedDilationConv2d.from_conv(conv, [1, 1], 3)):
        assert made.weight.is_contiguous(), "as the kernels read it"
        torch.testing.assert_close(made(x), expected)
    assert torch.equal(conv.weight, before)


@pytest.mark.parametrize("kind", [GroupedDilationConv2d, MixedDilationConv2d])
def test_a_weight_that_is_computed_is_not_computed_by_to(kind: Any) -> None:
    """Spectral norm's vectors move whenever the weight is read."""
    made = utils.parametrizations.spectral_norm(kind(8, 8, 3, [1, 2]))
    before = copy.deepcopy(made.state_dict())
    made.to(torch.float32).to(memory_format=torch.channels_last)
    assert all(torch.equal(value, before[name]) for name, value in made.state_dict().items())
    x = torch.randn(1, 8, 9, 7)
    assert made.eval()(x).shape == x.shape


def test_weights_in_a_flat_buffer_stay_there() -> None:
    conv = nn.Conv2d(8, 12, 3, padding=1, bias=False)
    flat = torch.randn(2 * conv.weight.numel())
    conv.weight.data = flat[: conv.weight.numel()].view(12, 3, 3, 8).permute(0, 3, 1, 2)
    made = GroupedDilationConv2d.from_conv(conv, [1, 2])
    assert made.weight is conv.weight and made.weight.data_ptr() == flat.data_ptr()


def test_gradients_reach_replicas_alphas_and_bias() -> None:
    made = MixedDilationConv2d(4, 6, 3, [1, 2, 3], channel_groups=2)
    made(torch.randn(2, 4, 7, 8)).square().sum().backward()
    for parameter in made.parameters():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0
    assert len(list(made.parameters())) == 3


def test_from_conv_keeps_what_belongs_to_the_convolution() -> None:
    conv = nn.Conv2d(8, 12, 3, padding=1, dtype=torch.float64).eval().requires_grad_(False)
    for made in (GroupedDilationConv2d.from_conv(conv, [1, 2]), MixedDilationConv2d.from_conv(conv, [1, 2])):
        assert made.weight.dtype == torch.float64 and not made.weight.requires_grad and not made.training
        assert made.bias is conv.bias
    assert MixedDilationConv2d.from_conv(conv, [1, 2]).alpha.dtype == torch.float64
    assert MixedDilationConv2d.from_conv(conv.half(), [1, 2]).alpha.dtype == torch.float32
    assert GroupedDilationConv2d.from_conv(conv, [1, 2]).splits == (6, 6)
    frozen = MixedDilationConv2d.from_conv(conv, [1, 2])
    assert frozen.alpha.requires_grad, "the alphas of a frozen convolution are still searched"


def test_fresh_modules_draw_as_conv2d() -> None:
    torch.manual_seed(0)
    made = GroupedDilationConv2d(64, 128, 3, [1, 2, (1, 3), 1])
    conv = nn.Conv2d(64, 128, 3)
    for ours, theirs in zip(made.parameters(), conv.parameters(), strict=True):
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours.std(), theirs.std(), rtol=0.2, atol=0)
    assert "dilations=(1, 2, 1x3, 1), splits=(32, 32, 32, 32)" in repr(made)
    assert "channel_groups=4" in repr(MixedDilationConv2d(8, 8, 3, [1, 2], 4))


def test_state_round_trip_from_the_convolution() -> None:
    """Weights trained for the plain convolution load as they are."""
    conv, made = nn.Conv2d(8, 12, 3, padding=1), GroupedDilationConv2d(8, 12, 3, [1, 1])
    made.load_state_dict(conv.state_dict())
    x = torch.randn(1, 8, 5, 5)
    torch.testing.assert_close(made(x), conv(x))


def test_takes_what_conv2d_takes() -> None:
    """A pair as kernel, device and dtype, pictures without a batch, and drawing again."""
    for kind in (GroupedDilationConv2d, MixedDilationConv2d):
        made = kind(8, 12, (3, 3), [1, 2], dtype=torch.float64)
        assert all(p.dtype == torch.float64 for p in made.parameters())
        assert all(p.is_meta for p in kind(8, 12, 3, [1, 2], device="meta").parameters())
        x = torch.randn(8, 6, 7, dtype=torch.float64)
        torch.testing.assert_close(made(x), made(x[None])[0])
        before = [p.clone() for p in made.parameters()]
        torch.manual_seed(3)
        made.reset_parameters()
        torch.manual_seed(3)
        again = kind(8, 12, 3, [1, 2], dtype=torch.float64)
        assert not torch.equal(before[0], made.weight)
        assert all(torch.equal(a, b) for a, b in zip(made.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("kind", [GroupedDilationConv2d, MixedDilationConv2d])
def test_transforms_and_tracing(kind: Any) -> None:
    """torch.func, and graphs of torch.fx; neither has rules for kernels."""
    made, x = kind(8, 12, 3, [1, 2]), torch.randn(3, 8, 6, 7)
    torch.testing.assert_close(torch.func.vmap(made)(x), made(x))
    expected = torch.autograd.grad(made(x.requires_grad_()).square().sum(), x)[0]
    torch.testing.assert_close(torch.func.grad(lambda x: made(x).square().sum())(x), expected)
    traced = torch.fx.symbolic_trace(nn.Sequential(made, nn.ReLU()))
    assert torch.equal(traced(x), made(x).relu())


@pytest.mark.parametrize("groups", [1, 16])
def test_an_exported_program_serves_maps_of_any_size(groups: int) -> None:
    made = GroupedDilationConv2d(64, 64, 3, [1, 2], groups=groups).requires_grad_(False)
    sizes = {2: torch.export.Dim("height", max=512), 3: torch.export.Dim("width", max=512)}
    program = torch.export.export(made, (torch.randn(1, 64, 64, 64),), dynamic_shapes=({**sizes},)).module()
    x = torch.randn(1, 64, 9, 20)
    torch.testing.assert_close(program(x), made(x))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Conv1d(4, 4, 3, padding=1), TypeError, "conv must be a plain nn.Conv2d, got Conv1d"),
        (lambda: type("Standardised", (nn.Conv2d,), {})(4, 4, 3, padding=1), TypeError, "got Standardised"),
        (lambda: nn.Conv2d(4, 4, 4, padding=2), ValueError, "square kernel of odd size, got 4x4"),
        (lambda: nn.Conv2d(4, 4, (3, 5), padding=(1, 2)), ValueError, "square kernel of odd size, got 3x5"),
        (lambda: nn.Conv2d(4, 4, 3), ValueError, "padded with 1x1 zeros, got .0, 0."),
        (lambda: nn.Conv2d(4, 4, 3, padding=1, dilation=2), ValueError, "padded with 2x2 zeros"),
        (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), ValueError, "reflect"),
    ],
)
def test_only_plain_same_convolutions_are_replaced(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_same_conv2d(make())
    for kind in (GroupedDilationConv2d, MixedDilationConv2d):
        with pytest.raises(error, match=message):
            kind.from_conv(make(), [1])


def _patched(name: str) -> nn.Conv2d:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    setattr(conv, name, lambda *tensors: tensors[0])
    return conv


def _hooked(register: str) -> nn.Conv2d:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    getattr(conv, register)(lambda *arguments: None)
    return conv


def _with(register: str, value: Any) -> nn.Conv2d:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    getattr(conv, register)("mask", value)
    return conv


def _computed(how: Any) -> Any:
    with pytest.warns(FutureWarning) if how is utils.weight_norm else nullcontext():
        return how(nn.Conv2d(4, 4, 3, padding=1))


LOST = {
    "forward": (lambda: _patched("forward"), "a forward of its own"),
    "conv-forward": (lambda: _patched("_conv_forward"), "a _conv_forward of its own"),
    "forward-hook": (lambda: _hooked("register_forward_hook"), "forward hooks"),
    "pre-hook": (lambda: _hooked("register_forward_pre_hook"), "forward pre hooks"),
    "backward-hook": (lambda: _hooked("register_full_backward_hook"), "backward hooks"),
    "state-hook": (lambda: _hooked("register_load_state_dict_pre_hook"), "load state dict pre hooks"),
    "buffer": (lambda: _with("register_buffer", torch.ones(4)), "'mask'"),
    "parameter": (lambda: _with("register_parameter", nn.Parameter(torch.ones(4))), "'mask'"),
    "child": (lambda: _with("add_module", nn.ReLU()), "'mask'"),
    "spectral-norm": (lambda: _computed(utils.spectral_norm), "forward pre hooks"),
    "weight-norm": (lambda: _computed(utils.weight_norm), "forward pre hooks"),
}


@pytest.mark.parametrize(("make", "got"), LOST.values(), ids=LOST)
def test_what_another_module_would_lack_is_refused(make: Any, got: str) -> None:
    message = f"must have nothing but a weight and a bias, got {got}, which would be lost"
    with pytest.raises(ValueError, match=f"layer.0 {message}"):
        check_same_conv2d(make(), "layer.0")
    for kind in (GroupedDilationConv2d, MixedDilationConv2d):
        with pytest.raises(ValueError, match=message):
            kind.from_conv(make(), [1, 2])
    kept = make()
    assert check_same_conv2d(kept, kept=True) is kept


def test_a_computed_weight_is_refused_without_hooks_too() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1)
    weight = conv.weight.detach()
    del conv.weight
    conv.weight = weight  # type: ignore[assignment]  # what is tested
    with pytest.raises(ValueError, match="got a weight that is computed"):
        check_same_conv2d(conv)


def test_parametrised_convolutions_are_no_plain_ones() -> None:
    with pytest.raises(TypeError, match="must be a plain nn.Conv2d, got ParametrizedConv2d"):
        check_same_conv2d(utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)))


def test_convolutions_of_the_library_are_plain_ones() -> None:
    conv = nn.Conv2d(64, 64, 3, padding=1)
    conv.__class__ = AcceleratedConv2d
    for plain in (conv, DepthwiseConv2d(8)):
        x = torch.randn(1, plain.in_channels, 7, 6)
        expected = plain(x)
        grouped = GroupedDilationConv2d.from_conv(plain, [1, 1])
        assert grouped.weight is plain.weight
        for made in (grouped, MixedDilationConv2d.from_conv(plain, [1, 1], 4)):
            torch.testing.assert_close(made(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupedDilationConv2d(4, 6, 2), "kernel_size must be odd, and the same in both directions, got 2"),
        (lambda: GroupedDilationConv2d(4, 6, (3, 5)), "kernel_size must be odd, and the same in both directions"),
        (lambda: GroupedDilationConv2d(4, 6, 3, [2**30]), r"dilations\[0\] must be below 2\*\*30, got 1073741824"),
        (lambda: GroupedDilationConv2d(4, 6, 3, stride=2**63), r"stride must be below 2\*\*30"),
        (lambda: GroupedDilationConv2d(4, 6, 3, [1, 0]), r"dilations\[1\] must be a positive integer"),
        (lambda: GroupedDilationConv2d(4, 6, 3, [1, 2], [3, 2]), "splits must sum to the 6 output channels"),
        (lambda: GroupedDilationConv2d(4, 6, 3, [1, 2], [1, 5], groups=2), "cover whole convolution groups of 3"),
        (lambda: GroupedDilationConv2d(4, 6, 3, [1, 2, 3, 4]), "out_channels must be a multiple of the 4 dilations"),
        (lambda: GroupedDilationConv2d(4, 6, 3, groups=3), "groups must divide in_channels 4 and out_channels 6"),
        (lambda: MixedDilationConv2d(4, 6, 3, [1, 2], 4), "channel_groups must divide the 6 output channels, got 4"),
        (lambda: MixedDilationConv2d(4, 6, 3, [1, 2], 0), "channel_groups must be a positive integer, got 0"),
        (lambda: MixedDilationConv2d(0, 6), "in_channels must be a positive integer, got 0"),
        (lambda: GroupedDilationConv2d(8, 8, 257), "kernel_size must be at most 255, got 257"),
        (lambda: GroupedDilationConv2d(8, 8, algorithm="zzz"), "algorithm must be one of direct.*got 'zzz'"),
        (lambda: MixedDilationConv2d(8, 8, precision="zzz"), "precision must be one of fast, exact, got 'zzz'"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
