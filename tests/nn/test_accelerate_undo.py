"""What ``accelerate`` leaves as it was: memory, classes and copies; and the way back."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerated_net import net, picture
from torch import nn

from nasdet.nn import AcceleratedConv2d, accelerate, decelerate

pytestmark = pytest.mark.needs("cpp")


def test_weights_lie_as_the_kernels_take_them_until_undone() -> None:
    model = net().to(memory_format=torch.channels_last)
    weights = {name: model[int(name)].weight.detach().clone() for name in ("2", "4")}
    report = accelerate(model)
    model(picture()).sum().backward()
    for name in report.swapped:
        conv = model[int(name)]
        assert conv.weight.is_contiguous() and conv.weight.grad.is_contiguous()
    report.undo()
    for name, before in weights.items():
        weight = model[int(name)].weight
        assert torch.equal(weight, before) and weight.stride() == before.stride()


def test_weights_of_other_strides_stay_as_they_are() -> None:
    conv = nn.Conv2d(64, 64, 3, padding=1)
    conv.weight.data = conv.weight.data.transpose(0, 1)
    strides, x = conv.weight.stride(), torch.randn(1, 64, 19, 26)
    expected = conv(x)
    with accelerate(conv) as report:
        assert report.swapped and conv.weight.stride() == strides
        assert torch.allclose(conv(x), expected, atol=1e-4)
    assert conv.weight.stride() == strides


@pytest.mark.parametrize("memory", ["shared", "flat"])
def test_weights_that_others_hold_too_stay_where_they_are(memory: str) -> None:
    conv = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
    size, strides = conv.weight.numel(), conv.weight.stride()
    buffer = torch.zeros(2 * size)
    if memory == "flat":
        buffer[:size] = conv.weight.detach().permute(0, 2, 3, 1).flatten()
        conv.weight.data = buffer.as_strided(conv.weight.shape, strides)
    else:
        conv.share_memory()
    place, x = conv.weight.data_ptr(), torch.randn(1, 64, 19, 26)
    expected = conv(x)
    with accelerate(conv) as report:
        assert report.swapped and conv.weight.data_ptr() == place
        torch.testing.assert_close(conv(x), expected, rtol=1e-4, atol=1e-5)
    assert conv.weight.data_ptr() == place and conv.weight.stride() == strides
    assert conv.weight.is_shared() == (memory == "shared")


def test_weights_shared_since_stay_shared() -> None:
    conv = nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last)
    with accelerate(conv):
        conv.share_memory()
        place = conv.weight.data_ptr()
    assert conv.weight.is_shared() and conv.weight.data_ptr() == place


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_made_in_inference_mode(inside: bool) -> None:
    with torch.inference_mode():
        model = net().to(memory_format=torch.channels_last)
        expected = model(picture())
    with torch.inference_mode(inside):
        report = accelerate(model)
    with torch.inference_mode():
        assert report.swapped and torch.allclose(model(picture()), expected, atol=1e-4)
    with torch.inference_mode(inside):
        report.undo()
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("undone", [False, True])
def test_accelerated_in_inference_mode_it_learns_afterwards(undone: bool) -> None:
    model = net().to(memory_format=torch.channels_last)
    with torch.inference_mode():
        report = accelerate(model)
        model(picture())
        if undone:
            report.undo()
    model(picture()).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_twice_is_harmless() -> None:
    model = net()
    first = accelerate(model)
    second = accelerate(model)
    assert second.swapped == () and second.left["2"] == second.left["4"] == "accelerated already"
    second.undo()
    assert type(model[2]) is AcceleratedConv2d, "what the first call did is the first's to undo"
    with accelerate(model):
        pass
    assert first.active and type(model[2]) is AcceleratedConv2d
    first.undo()
    first.undo()
    assert type(model[2]) is nn.Conv2d
    with pytest.raises(RuntimeError, match="undone already"), first:
        pass


def test_undone_when_the_block_raises() -> None:
    model = net()
    with pytest.raises(KeyError), accelerate(model):
        raise KeyError
    assert type(model[2]) is nn.Conv2d


def test_a_class_changed_since_is_named_and_the_rest_undone() -> None:
    model = net().to(memory_format=torch.channels_last)
    report = accelerate(model)
    torch.nn.utils.parametrizations.weight_norm(model[2])
    with pytest.raises(RuntimeError, match="keep their class until undo.*: 2 is a Parametrized"):
        report.undo()
    assert type(model[4]) is nn.Conv2d and report.active
    torch.nn.utils.parametrize.remove_parametrizations(model[2], "weight")
    report.undo()
    assert type(model[2]) is nn.Conv2d and not report.active
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)


def test_copies_are_accelerated_on_their_own() -> None:
    model = net()
    report = accelerate(model)
    twin = copy.deepcopy(model)
    report.undo()
    assert type(twin[2]) is AcceleratedConv2d and type(model[2]) is nn.Conv2d
    expected = model.eval()(picture())
    torch.testing.assert_close(twin.eval()(picture()), expected, rtol=1e-4, atol=1e-5)
    assert decelerate(twin) == ("2", "4") and decelerate(twin) == ()
    assert type(twin[2]) is nn.Conv2d and torch.equal(twin(picture()), expected)


def test_what_was_decelerated_needs_no_undo() -> None:
    model = net().to(memory_format=torch.channels_last)
    report = accelerate(model)
    decelerate(model)
    assert not report.active and model[2].weight.is_contiguous()
    report.undo()
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        decelerate("model")  # type: ignore[arg-type]  # what is tested
