"""What decides a measurement besides what is measured: the device, and the versions of the software."""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

import torch

_CPUINFO = Path("/proc/cpuinfo")


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    from nasdet._version import __version__

    found = {"nasdet": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    return found | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def parse_device(device: str | torch.device) -> torch.device:
    """``device`` as torch's; ``ValueError`` for a name that is neither the CPU's nor a GPU's."""
    with contextlib.suppress(RuntimeError):  # of a name that torch does not know
        chosen = torch.device(device)
        if chosen.type in ("cpu", "cuda"):
            return chosen
    raise ValueError(f"device must be cpu, cuda or such as cuda:0, got {str(device)!r}")


def device_name(device: torch.device) -> str:
    """The model of a GPU or of this machine's CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = _CPUINFO.read_text().splitlines() if _CPUINFO.is_file() else []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()
