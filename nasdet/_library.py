"""Loads nasdet's shared libraries into torch, once, and remembers why one is not there.

A missing or unloadable library never breaks the import: the operators then fall back to their references and
``why_not`` says what is wrong.
"""

from __future__ import annotations

from pathlib import Path

import torch

from nasdet._checks import plain_int

LIBRARY = torch.library.Library("nasdet", "FRAGMENT")  # schemas are defined here, by the op modules

_FOLDER = Path(__file__).parent
_MARKERS = {"cpu": "nasdet::_cpu_isa", "cuda": "nasdet::_cuda_runtime"}  # an op that each library defines
_ISA_NAMES = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")
_reasons: dict[str, str | None] = {}


def _load(name: str) -> str | None:
    """Load one library; the reason why not, or None. A second copy in one process would crash it, hence the marker."""
    if name == "cuda" and torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    if torch._C._dispatch_has_kernel(_MARKERS[name]):
        return None
    path = _FOLDER / f"libnasdet_{name}.so"
    if not path.is_file():
        return f"{path.name} is not installed; build nasdet from source (pip install .) to have it"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load: {error}"
    return _driver_too_old() if name == "cuda" else None


def _driver_too_old() -> str | None:
    """The CUDA runtime inside the library needs a driver of its own major version or later."""
    runtime, driver = int(torch.ops.nasdet._cuda_runtime()), int(torch.ops.nasdet._cuda_driver())
    if driver // 1000 < runtime // 1000:
        found = f"supports CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "is missing"
        return f"it needs a driver for CUDA {runtime // 1000}.{runtime % 1000 // 10}, and the driver {found}"
    return None


def why_not(name: str) -> str | None:
    """Why library ``"cpu"`` or ``"cuda"`` is not loaded, or None when it is."""
    if name not in _reasons:
        _reasons[name] = _load(name)
    return _reasons[name]


def cpu_isa() -> str | None:
    """The kernels that run on this CPU: baseline, avx2, avx512, avx512_bf16 or amx; None without the library."""
    return None if why_not("cpu") else _ISA_NAMES[torch.ops.nasdet._cpu_isa()]


def cpu_tiles() -> str | None:
    """The matrix tiles that the convolutions use: hardware, emulated or none; None without the library.

    The first call asks the system for AMX's tiles, which it may refuse.
    """
    return None if why_not("cpu") else ("none", "emulated", "hardware")[torch.ops.nasdet._cpu_tiles()]


def cuda_runtime() -> int | None:
    """The CUDA runtime version (13000 = 13.0) linked into the CUDA library; None without the library."""
    return None if why_not("cuda") else int(torch.ops.nasdet._cuda_runtime())


def has_kernel(op: str, device: str) -> bool:
    """Whether a loaded library implements ``nasdet::<op>`` for ``"CPU"`` or ``"CUDA"``."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"nasdet::{op}", device))


def scratch_limit(bytes: int | None = None) -> int:
    """The scratch memory, in bytes, that one call of a compiled convolution should stay below: 64 MiB unless set.

    With ``bytes`` given, sets it, and gives back what is kept between calls in pieces larger than that. Smaller limits
    mean smaller pieces; a call takes more only where its smallest piece needs it. Calls at the same time have such
    memory each. 0 without the compiled library.
    """
    bytes = plain_int(bytes)
    if bytes is not None and (isinstance(bytes, bool) or not isinstance(bytes, int) or bytes < 1):
        raise ValueError(f"bytes must be a positive integer or None, got {bytes!r}")
    if bytes is not None and bytes >= 2**63:
        raise ValueError(f"bytes must be below 2**63, got {bytes}")
    return 0 if why_not("cpu") else int(torch.ops.nasdet._scratch_limit(-1 if bytes is None else bytes))


def release_scratch() -> int:
    """Give the scratch memory kept between calls back to the system; how much it was, in bytes."""
    return 0 if why_not("cpu") else int(torch.ops.nasdet._release_scratch())
