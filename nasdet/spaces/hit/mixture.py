"""The weighted sum of candidate operations that holds one candidate's activations at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from nasdet.ops import mix


@torch.compiler.disable
def recomputed_mix(
    candidates: Sequence[nn.Module], x: Tensor, weights: Tensor, *, backend: str | None = None
) -> Tensor:
    """``sum_o weights[o] * candidates[o](x)``, the mixture of Equation 5, for the memory of its largest candidate.

    Forward keeps ``x`` alone. Backward runs each candidate again and takes its gradient before it goes on to the next,
    so that all maps of a candidate live only that long; a step costs one more forward. Gradients of ``x``, ``weights``
    and the candidates' parameters are those of ``mix([o(x) for o in candidates], weights)``, to the rounding of another
    order of sums.

    The second run repeats the first: same random numbers, same autocast, and no change of any buffer, so that a batch
    norm tracks its statistics once a step.

    Args:
        candidates: modules from ``[N, C, H, W]`` to maps of one shape; they must not change ``x`` in place.
        x: their input.
        weights: ``[len(candidates)]``, used in float32 (float64 with float64 maps), as by :func:`nasdet.ops.mix`.
        backend: that of :func:`nasdet.ops.mix`, which weights a map in backward.

    Sums are kept in float32 or wider. There is no second derivative.
    """
    parameters = [parameter for candidate in candidates for parameter in candidate.parameters()]
    out: Tensor = _Mixture.apply(tuple(candidates), backend, x, weights, *parameters)  # type: ignore[no-untyped-call]  # torch's
    return out


class _Mixture(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        candidates: tuple[nn.Module, ...],
        backend: str | None,
        x: Tensor,
        weights: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        ctx.candidates, ctx.backend, ctx.autocast, ctx.again = candidates, backend, _autocast(x), _random_state(x)
        ctx.save_for_backward(x, weights, *parameters)
        total, dtype = None, x.dtype
        with ctx.autocast():
            for candidate, weight in zip(candidates, weights.unbind(), strict=True):
                y = candidate(x)
                dtype = y.dtype
                total = _added(total, y, weight)
        assert total is not None
        return total.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        x, weights, *parameters = ctx.saved_tensors
        _, _, need_x, need_weights, *needed = ctx.needs_input_grad
        dx = torch.zeros_like(x, dtype=_wide(x.dtype)) if need_x else None
        dweights, dparameters = torch.zeros_like(weights), []
        given, wanted = iter(parameters), iter(needed)
        with torch.enable_grad(), ctx.autocast(), ctx.again():
            for index, candidate in enumerate(ctx.candidates):
                names = [name for name, _ in candidate.named_parameters()]
                own = {name: next(given).detach().requires_grad_(next(wanted)) for name in names}
                source = x.detach().requires_grad_(need_x)
                weight = weights[index : index + 1].detach().requires_grad_(need_weights)
                found = _gradients(candidate, own, source, weight, grad, ctx.backend)
                if dx is not None:
                    dx.add_(found[0])
                if need_weights:
                    dweights[index : index + 1] = found[1]
                dparameters += found[2:]
        return (
            None,
            None,
            dx if dx is None else dx.to(x.dtype),
            dweights if need_weights else None,
            *(value if need else None for value, need in zip(dparameters, needed, strict=True)),
        )


def _gradients(
    candidate: nn.Module, own: dict[str, Tensor], x: Tensor, weight: Tensor, grad: Tensor, backend: str | None
) -> list[Any]:
    """Gradients of ``weight * candidate(x)`` for ``x``, ``weight`` and its own parameters; None where none is wanted.

    What the candidate does to its buffers goes into copies.
    """
    buffers = {name: buffer.clone() for name, buffer in candidate.named_buffers()}
    out = mix([functional_call(candidate, own | buffers, (x,))], weight, backend=backend)
    leaves = [x, weight, *own.values()]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    found = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True, materialize_grads=True))
    return [next(found) if leaf.requires_grad else None for leaf in leaves]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _added(total: Tensor | None, y: Tensor, weight: Tensor) -> Tensor:
    """``total + weight * y``, into ``total``."""
    wide = _wide(y.dtype)
    weight = weight.to(wide)
    return y.to(wide) * weight if total is None else total.addcmul_(y.to(wide), weight)


def _autocast(x: Tensor) -> Callable[[], AbstractContextManager[Any]]:
    """Autocast as it is now, to be entered again.

    Without its cache: copies that are made where no gradient is taken would be found later where one is.
    """
    kind = x.device.type
    if not torch.amp.is_autocast_available(kind):
        return lambda: torch.autocast("cpu", enabled=False)
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype, enabled, cache_enabled=False)


def _random_state(x: Tensor) -> Callable[[], AbstractContextManager[None]]:
    """A block that draws the random numbers that come next now, and gives the generators back as they were."""
    devices = [x.device] if x.is_cuda else []
    states = [torch.cuda.get_rng_state(device) for device in devices]
    state = torch.get_rng_state()

    @contextmanager
    def again() -> Iterator[None]:
        with torch.random.fork_rng(devices):
            torch.set_rng_state(state)
            for device, own in zip(devices, states, strict=True):
                torch.cuda.set_rng_state(own, device)
            yield

    return again
