"""Backbone weights from a local file, in torchvision's format."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Tensors by name from a ``.pth`` / ``.pt`` (a state dict; no pickled code is run) or ``.safetensors`` file.

    ``FileNotFoundError`` for no such file; ``ValueError`` naming the file for anything that is not whole tensors by
    name. Nothing is downloaded.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such weight file")
    suffix = path.suffix.lower()
    if suffix not in (".pth", ".pt", ".safetensors"):
        raise ValueError(f"{path}: weight file must end in .pth, .pt or .safetensors, got {suffix or 'no ending'!r}")
    state = _read_safetensors(path) if suffix == ".safetensors" else _read_torch(path)
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: weight file must hold tensors by name (a state dict), got {_describe(state)}")
    return {str(name): value for name, value in state.items()}


def _read_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable weight file: {_first_line(error)}") from error


def _read_safetensors(path: Path) -> object:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(f"{path}: reading .safetensors needs the safetensors package") from error
    try:
        return load_file(path, device="cpu")
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: not a readable weight file: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _describe(state: object) -> str:
    if isinstance(state, dict):
        kinds = sorted({type(value).__name__ for value in state.values() if not isinstance(value, Tensor)})
        return f"a dict with values of type {', '.join(kinds)}" if kinds else "an empty dict"
    return type(state).__name__


def _some(items: Iterable[str], most: int = 5) -> str:
    items = list(items)
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest


def load_backbone_weights(module: nn.Module, path: str | Path, unused: Sequence[str] | None = None) -> None:
    """Fill ``module`` from a local weight file whose names are the module's own (torchvision's for our backbones).

    Names that start with an entry of ``unused`` are passed over; by default the module's own ``unused_weights``, or
    the classifier ``fc.``. Batch norm's counter ``num_batches_tracked`` may be absent, as in old files, or there
    without a place, as for frozen batch norm. Any other difference in names or shapes, and any value that is not
    finite, is one ``ValueError`` that lists them all; then nothing has been loaded.
    """
    if unused is None:
        unused = getattr(module, "unused_weights", ("fc.",))
    given = {k: v for k, v in read_weights(path).items() if not k.startswith(tuple(unused))}
    wanted = module.state_dict()
    counter = "num_batches_tracked"
    missing = [key for key in wanted if key not in given and not key.endswith(counter)]
    unexpected = [key for key in given if key not in wanted and not key.endswith(counter)]
    common = [key for key in wanted if key in given]
    shapes = [
        f"{key} {tuple(given[key].shape)} for {tuple(wanted[key].shape)}"
        for key in common
        if given[key].shape != wanted[key].shape
    ]
    infinite = [key for key in common if given[key].is_floating_point() and not given[key].isfinite().all()]
    faults = {"missing": missing, "unexpected": unexpected, "of another shape": shapes, "not finite": infinite}
    if any(faults.values()):
        text = "; ".join(f"{len(keys)} {what}: {_some(keys)}" for what, keys in faults.items() if keys)
        raise ValueError(f"{path}: weights do not fit {type(module).__name__}: {text}")
    module.load_state_dict({key: given.get(key, wanted[key]) for key in wanted})
