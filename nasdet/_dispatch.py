"""Chooses a backend for each call of an op, in plain Python on metadata, so that ``torch.compile`` traces through.

An op lists its backends best first; each has ``why_not(*args) -> str | None``, the one predicate that chooses,
explains (``nasdet info``, debug log), raises (``backend="..."``) and skips tests.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nasdet import _library
from nasdet._cases import Case

logger = logging.getLogger("nasdet")
_forced: str | None = None


@dataclass(frozen=True)
class Backend:
    """One implementation of an op. ``why_not`` takes the op's own arguments, ``available`` none."""

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None]
    available: Callable[[], str | None]


@dataclass(frozen=True)
class Op:
    """An op's entry in the registry: what tests, benchmarks and ``nasdet info`` iterate over."""

    name: str
    call: Callable[..., Any]  # the public function
    reference: Callable[..., Any]  # a few lines of PyTorch; also the fallback
    backends: Sequence[Backend]
    cases: Sequence[Case]
    reduce_len: Callable[..., int]  # how many terms the longest sum of the forward has, for the tolerance
    differentiable: Sequence[int] = ()  # positions of the arguments with gradients (tensors or lists of tensors)


OPS: dict[str, Op] = {}


def register(op: Op) -> Op:
    """Enter an op; its tests, benchmark rows and ``nasdet info`` lines follow from the entry."""
    OPS[op.name] = op
    return op


def choose(name: str, backend: str | None, *args: Any) -> Backend:
    """The backend that runs this call: the one asked for, else the first that can.

    Raises ValueError when the backend asked for (by argument or ``use_backend``) does not exist or cannot run, and
    with every backend's reason when none can.
    """
    wanted = backend or _forced
    backends = OPS[name].backends
    if wanted is not None:
        for candidate in backends:
            if candidate.name == wanted:
                if reason := candidate.why_not(*args):
                    raise ValueError(f"{name}: backend {wanted!r} cannot run this call: {reason}")
                return candidate
        raise ValueError(f"backend must be one of {[b.name for b in backends]}, got {wanted!r}")
    reasons = []
    for candidate in backends:
        reason = candidate.why_not(*args)
        if reason is None:
            return candidate
        reasons.append(f"{candidate.name}: {reason}")
        if not torch.compiler.is_compiling() and logger.isEnabledFor(logging.DEBUG):
            logger.debug("%s: not %s: %s", name, candidate.name, reason)
    # Only where the caller asks for what the reference has not, such as one of several algorithms.
    raise ValueError(f"{name}: no backend can run this call: {'; '.join(reasons)}")


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Within the block, ops called without ``backend=`` use this one (process-wide); None means automatic."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def never() -> str | None:
    """``why_not`` of a reference: it can always run."""
    return None


def reference_backend(run: Callable[..., Any]) -> Backend:
    return Backend("reference", run, lambda *args: None, never)


def transformed() -> str | None:
    """Why no kernel can run here: forward-mode differentiation would silently lose its tangents, and the transforms of
    ``torch.func`` have no rules for the kernels."""
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is left to the reference"
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        return "the transforms of torch.func are left to the reference"
    return None


def compiled_backend(
    name: str,
    op: str,
    run: Callable[..., Any],
    tensor_of: Callable[..., torch.Tensor],
    differentiable: bool = True,
) -> Backend:
    """The C++ backend ``"cpp"`` (CPU) or ``"cuda"`` of ``torch.ops.nasdet.<op>``.

    ``tensor_of(*args)`` is the tensor whose device decides. An op that is not ``differentiable`` has nothing that a
    transform could lose. What the libraries hold is looked up once, here: a lookup
    per call would break ``torch.compile``'s graph.
    """
    device = {"cpp": "cpu", "cuda": "cuda"}[name]
    missing = _library.why_not(device)
    if missing is None and not _library.has_kernel(op, device.upper()):
        missing = f"libnasdet_{device}.so has no kernel for it"

    def available() -> str | None:
        if missing is None and device == "cuda" and not torch.cuda.is_available():
            return "no CUDA device"
        return missing

    def why_not(*args: Any) -> str | None:
        tensor = tensor_of(*args)
        if tensor.device.type != device:
            return f"the tensors are on {tensor.device.type}, not {device}"
        return missing or (transformed() if differentiable else None)

    return Backend(name, run, why_not, available)


TRITON_MISSING = None if importlib.util.find_spec("triton") else "triton is not installed"
INTERPRETING = (
    os.environ.get("TRITON_INTERPRET") == "1"
)  # Triton's interpreter, which runs kernels on the CPU for tests


def triton_backend(run: Callable[..., Any], tensor_of: Callable[..., torch.Tensor]) -> Backend:
    """The Triton backend: CUDA tensors of every dtype but float64, and CPU tensors under Triton's interpreter."""

    def available() -> str | None:
        if TRITON_MISSING is None and not INTERPRETING and not torch.cuda.is_available():
            return "no CUDA device"
        return TRITON_MISSING

    def why_not(*args: Any) -> str | None:
        tensor = tensor_of(*args)
        if tensor.device.type != ("cpu" if INTERPRETING else "cuda"):
            return f"the tensors are on {tensor.device.type}, not cuda"
        if tensor.dtype == torch.float64:
            return "float64 is left to the reference"
        return TRITON_MISSING or transformed()

    return Backend("triton", run, why_not, available)
