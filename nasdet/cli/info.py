"""``nasdet info``: versions, libraries, and which backend of which operator can run here, or why not."""

from __future__ import annotations

import argparse
import json as _json
import platform
from typing import Any

HELP = "what can run on this machine, and why the rest can't"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb to its parser."""
    parser.description = (
        "Versions, the compiled libraries that loaded, the CPU's instruction set, CUDA architectures, and for every "
        "operator which backends can run here. The first that can is the one an operator uses."
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, for machines and bug reports")


def collect() -> dict[str, Any]:
    """Everything that ``nasdet info`` prints, as plain data."""
    import importlib.util
    from importlib.metadata import PackageNotFoundError, version

    import torch

    import nasdet.ops  # noqa: F401  enters the operators
    from nasdet import _library
    from nasdet._dispatch import OPS
    from nasdet._version import __version__

    def version_of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    build = None
    if importlib.util.find_spec("nasdet._C"):
        from nasdet import _C  # type: ignore[attr-defined]  # a compiled module

        build = dict(_C.build_info())
    packages = ("torch", "triton", "numpy", "pycocotools", "faster-coco-eval", "pillow", "torchvision")
    return {
        "nasdet": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: version_of(name) for name in packages},
        "torch_cuda": torch.version.cuda,
        "cuda_devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "libraries": {name: _library.why_not(name) or "loaded" for name in ("cpu", "cuda")},
        "cpu_capability": _library.cpu_isa(),
        "matrix_tiles": _library.cpu_tiles(),
        "build": build,
        "ops": {name: {b.name: b.available() or "can run" for b in op.backends} for name, op in OPS.items()},
    }


def run(*, json: bool = False) -> int:
    """Print what ``collect`` finds."""
    info = collect()
    if json:
        print(_to_json(info))
        return 0
    print(f"nasdet {info['nasdet']}, Python {info['python']}, {info['platform']}")
    print("packages:   " + ", ".join(f"{k} {v or '-'}" for k, v in info["packages"].items()))
    devices = ", ".join(info["cuda_devices"]) or "none"
    print(f"CUDA:       torch built for {info['torch_cuda'] or 'none'}; devices: {devices}")
    for name, state in info["libraries"].items():
        print(f"library {name + ':':<6}{state}")
    tiles = f", matrix tiles: {info['matrix_tiles']}" if info["cpu_capability"] else ""
    print(f"CPU:        kernels for {info['cpu_capability'] or 'none: the reference runs'}{tiles}")
    if info["build"]:
        build = info["build"]
        print(
            f"build:      {build['compiler']}, PyTorch headers {build['torch_headers']}, loads in PyTorch >= "
            f"{build['torch_target']}, CUDA {build['cuda_compiler'] or '-'} for {build['cuda_archs'] or '-'}"
        )
    print("operators (the first backend that can run is used):")
    for name, backends in info["ops"].items():
        print(f"  {name}")
        for backend, state in backends.items():
            print(f"    {'+' if state == 'can run' else '-'} {backend:<10}{'' if state == 'can run' else state}")
    return 0


def _to_json(value: Any) -> str:
    return _json.dumps(value, indent=1)
