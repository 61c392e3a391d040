"""Checks of ops on maps of more than 2^31 elements: a few results that lie far away, against float64 on what they see.

Sizes and device are parameters, so that the checks themselves are tested on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import op_checks
import torch
import torch.nn.functional as F
from torch import Tensor

from nasdet._dispatch import Op
from nasdet.testing import assert_close, tolerance

CHUNK = 1 << 27
Place = tuple[int, int, int]  # image, row, column


def chunks(count: int, size: int = CHUNK) -> list[slice]:
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def random_map(
    shape: Sequence[int], layout: str, device: str, seed: int, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Normal values, made on the device, piece by piece: a copy in float32 would not fit beside."""
    images, channels, height, width = shape
    generator = torch.Generator(device).manual_seed(seed)
    flat = torch.empty(images * channels * height * width, dtype=dtype, device=device)
    for chunk in chunks(len(flat)):
        flat[chunk].normal_(generator=generator)
    if layout == "channels_last":
        return flat.view(images, height, width, channels).permute(0, 3, 1, 2)
    return flat.view(tuple(shape))


def places(shape: Sequence[int], count: int = 6) -> list[Place]:
    """The first and the last pixel, and others of the last image, where offsets are largest."""
    images, _, height, width = shape
    generator = torch.Generator().manual_seed(3)
    rows, columns = (torch.randint(size, (count,), generator=generator).tolist() for size in (height, width))
    inner = [(images - 1, row, column) for row, column in zip(rows, columns, strict=True)]
    return [(0, 0, 0), (images - 1, height - 1, width - 1), (images - 1, height - 1, 0), *inner]


def around(x: Tensor, place: Place, radius: int) -> tuple[Tensor, int, int]:
    """What a convolution of this reach sees of ``x`` at a place, in float64, and where the place is in it."""
    image, row, column = place
    top, left = max(row - radius, 0), max(column - radius, 0)
    crop = x[image : image + 1, :, top : row + radius + 1, left : column + radius + 1]
    return crop.double(), row - top, column - left


def check_convolution(
    op: Op, x: Tensor, parameters: Sequence[Tensor], options: Sequence[Any], radius: int, backend: str | None
) -> tuple[Tensor, Tensor]:
    """``op.call(x, *parameters, *options)``, linear in ``x`` and with the size of ``x``, and its map's gradient, at a
    few places; returns the incoming gradient and the first parameter's, which have checks of their own."""
    layout = "contiguous" if x.is_contiguous() else "channels_last"
    leaves = [x.detach().requires_grad_(), parameters[0].detach().requires_grad_()]
    with op_checks.deterministic_algorithms():  # nothing is measured first, which would take as long again
        y = op.call(*leaves, *parameters[1:], *options, backend=backend)
        assert y.shape[2:] == x.shape[2:] and (y.is_contiguous() == x.is_contiguous())
        grad = random_map(y.shape, layout, x.device.type, 5, x.dtype)
        dx, dweight = torch.autograd.grad(y, leaves, grad)
    exact = [value.double() for value in parameters]
    found = [(y.detach(), _outputs(op, x, exact, options, radius)), (dx, _gradients(op, grad, exact, options, radius))]
    for name, (result, expected) in zip(("y", "dx"), found, strict=True):
        for place, wanted in expected:
            image, row, column = place
            bound = tolerance(x.dtype, parameters[0].numel() // x.shape[1], wanted.abs().max().item())
            assert_close(result[image, :, row, column], wanted, bound, f"{name} at {place}")
    return grad, dweight


def _outputs(
    op: Op, x: Tensor, parameters: Sequence[Tensor], options: Sequence[Any], radius: int
) -> Iterator[tuple[Place, Tensor]]:
    for place in places(x.shape):
        crop, row, column = around(x, place, radius)
        yield place, op.call(crop, *parameters, *options, backend="reference")[0, :, row, column]


def _gradients(
    op: Op, grad: Tensor, parameters: Sequence[Tensor], options: Sequence[Any], radius: int
) -> Iterator[tuple[Place, Tensor]]:
    """Of the map: linear in the incoming gradient, of which a place sees what lies within the reach."""
    for place in places(grad.shape):
        crop, row, column = around(grad, place, radius)
        channels = parameters[0].shape[0] if op.name == "depthwise_conv2d" else parameters[0].shape[-3]
        zeros = crop.new_zeros(1, channels, *crop.shape[2:]).requires_grad_()
        y = op.call(zeros, *parameters, *options, backend="reference")
        yield place, torch.autograd.grad(y, zeros, crop)[0][0, :, row, column]


def correlation(grad: Tensor, x: Tensor, offset: tuple[int, int]) -> Tensor:
    """``sum_p grad[p] x[p + offset]`` of one channel of each, ``[N, H, W]``, in float64: an element of a gradient."""
    (rows, columns), pads = offset, [abs(value) for value in offset]
    wide = F.pad(x.double(), (pads[1], pads[1], pads[0], pads[0]))
    top, left = rows + pads[0], columns + pads[1]
    return (grad.double() * wide[:, top : top + grad.shape[1], left : left + grad.shape[2]]).sum()


def assert_sum(actual: Tensor, expected: Tensor, terms: int, what: str) -> None:
    """An element of a parameter's gradient, the sum of so many products of normal values, times at most 1."""
    assert_close(actual, expected, tolerance(actual.dtype, terms, max(terms**0.5, expected.abs().item())), what)


def check_dilated(op: Op, shape: Sequence[int], device: str, backend: str | None) -> None:
    """``mixed_`` or ``grouped_dilation_conv2d`` with the dilations 1 and (2, 3)."""
    channels, dilations = shape[1], ((1, 1), (2, 3))
    x = random_map(shape, "channels_last", device, 1)
    mixed, scale = op.name.startswith("mixed"), (9 * channels) ** -0.5
    weight = scale * torch.randn((2,) * mixed + (channels, channels, 3, 3), device=device)
    mix = torch.rand(2, channels, device=device)
    half = channels // 2
    if mixed:
        parameters, options = [weight.to(x.dtype), mix], (dilations, 1, 1)
    else:
        parameters, options = [weight.to(x.dtype)], (dilations, (half, channels - half), 1, 1)
    grad, dweight = check_convolution(op, x, parameters, options, 3, backend)
    for o, c, u, v in ((0, 0, 0, 0), (channels - 1, channels - 1, 2, 2), (half + 1, 3, 0, 2)):
        for branch, dilation in enumerate(dilations):
            if not mixed and branch != int(o >= half):
                continue
            offset = ((u - 1) * dilation[0], (v - 1) * dilation[1])
            expected = correlation(grad[:, o], x[:, c], offset) * (mix[branch, o].double() if mixed else 1)
            actual = dweight[branch, o, c, u, v] if mixed else dweight[o, c, u, v]
            assert_sum(actual, expected, x[:, 0].numel(), f"weight's gradient {(branch, o, c, u, v)}")


def check_depthwise(op: Op, shape: Sequence[int], layout: str, device: str, backend: str | None) -> None:
    x = random_map(shape, layout, device, 1)
    weight = (torch.randn(shape[1], 1, 3, 3, device=device) / 3).to(x.dtype)
    grad, dweight = check_convolution(op, x, [weight], (1, "same", 2), 2, backend)
    for c, u, v in ((0, 0, 0), (shape[1] - 1, 2, 2), (shape[1] // 2, 1, 0)):
        expected = correlation(grad[:, c], x[:, c], (2 * (u - 1), 2 * (v - 1)))
        assert_sum(dweight[c, 0, u, v], expected, x[:, 0].numel(), f"weight's gradient {(c, u, v)}")


def check_focal_loss(op: Op, count: int, device: str, backend: str | None) -> None:
    """Losses and gradients of the first and the last elements; and a sum to which only the last ones add anything."""
    settings = (0.25, 2.0)
    logits = random_map((1, 1, 1, count), "contiguous", device, 1).view(-1)
    targets = torch.zeros_like(logits)
    targets[::7] = 1
    leaf = logits.detach().requires_grad_()
    losses = op.call(leaf, targets, *settings, "none", backend=backend)
    (gradient,) = torch.autograd.grad(losses, leaf, torch.ones_like(losses))
    for part in (slice(0, 5000), slice(count // 2, count // 2 + 5000), slice(count - 5000, count)):
        exact = logits[part].double().requires_grad_()
        wanted = op.call(exact, targets[part].double(), *settings, "none", backend="reference")
        (slope,) = torch.autograd.grad(wanted.sum(), exact)
        for actual, expected, what in ((losses, wanted.detach(), "losses"), (gradient, slope, "gradient")):
            bound = tolerance(logits.dtype, 1, expected.abs().max().item())
            assert_close(actual.detach()[part], expected, bound, f"{what} of {part}")
    del losses, gradient, leaf
    logits[:-1000] = -1e4  # of no loss where the target is 0
    targets[:-1000] = 0
    expected = op.call(logits[-1000:].double(), targets[-1000:].double(), *settings, "sum", backend="reference")
    total = op.call(logits, targets, *settings, "sum", backend=backend)
    assert_close(total, expected, tolerance(logits.dtype, 1000, expected.item()), "sum")


def check_roi_align(op: Op, side: int, channels: int, layout: str, device: str, backend: str | None) -> None:
    """Boxes in the last corner of the map, and the same boxes on that corner alone."""
    x = random_map((1, channels, side, side), layout, device, 1)
    corner = 64 if side > 128 else side // 2
    first = side - corner
    inside = torch.tensor(
        [[4, 5, 20, 24], [1, 2, 12, 9], [corner - 12, corner - 16, corner - 2, corner - 1]], device=device
    )
    boxes = F.pad(inside.float(), (1, 0))
    leaf = x.detach().requires_grad_()
    shifted = boxes + torch.tensor([0, first, first, first, first], device=device)
    with op_checks.deterministic_algorithms():
        y = op.call([leaf], shifted, 7, [1.0], 2, lowest_level=0, backend=backend)
        grad = op_checks.upstream_of(y)
        (dx,) = torch.autograd.grad(y, leaf, grad)
    crop = x[:, :, first:, first:].double().requires_grad_()
    wanted = op.call([crop], boxes.double(), 7, [1.0], 2, lowest_level=0, backend="reference")
    (slope,) = torch.autograd.grad(wanted, crop, grad.double())
    # A place is rounded to float32, by 2^-24 of the map's side, and moves the value between pixels.
    moved = side * 2**-22 * x.double()[:, :, first:, first:].abs().max().item()
    assert_close(y.detach(), wanted.detach(), tolerance(x.dtype, 16, wanted.abs().max().item()) + moved, "pooled")
    assert_close(dx[:, :, first:, first:], slope, tolerance(x.dtype, 64, slope.abs().max().item()) + moved, "gradient")
    assert not dx[:, :, :first].any() and not dx[:, :, :, :first].any(), "a gradient where no box is"
