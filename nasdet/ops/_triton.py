"""Registers a Triton launcher as the kernel of ``nasdet::<op>_triton`` the first time that it is needed."""

from __future__ import annotations

import importlib

import torch

from nasdet._library import LIBRARY

_registered: set[str] = set()


@torch.compiler.assume_constant_result  # run, not traced, by torch.compile
def ensure_registered(op: str) -> None:
    """Import ``nasdet.kernels.<op>`` (and with it triton) and register its launchers.

    Those are ``forward``, ``backward`` and, where backward can write over its inputs, ``backward_``; each has the
    positional arguments of its op's schema.
    """
    if op in _registered:
        return
    kernels = importlib.import_module(f"nasdet.kernels.{op}")
    for device in ("CUDA", "CPU"):  # the CPU only under Triton's interpreter
        LIBRARY.impl(f"{op}_triton", kernels.forward, device)
        LIBRARY.impl(f"{op}_backward_triton", kernels.backward, device)
        if hasattr(kernels, "backward_"):
            LIBRARY.impl(f"{op}_backward_triton_", kernels.backward_, device)
    _registered.add(op)
