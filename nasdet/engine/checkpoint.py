"""Checkpoints and weights: plain data, written atomically, read without running code."""

from __future__ import annotations

import hashlib
import importlib.util
import random
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy
import torch
from torch import Tensor, nn

from nasdet._files import first_line, write_atomic
from nasdet.detectors.weights import read_weights

LAST = Path("checkpoints") / "last.pt"


class NonFiniteState(ValueError):
    """A state that holds NaN or infinity, which must not replace a good checkpoint."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        super().__init__(f"state must be finite, got NaN or infinity in {', '.join(names[:3])}{more}")


def save_checkpoint(path: str | Path, payload: Mapping[str, Any]) -> Path:
    """Write ``payload`` atomically with ``torch.save``.

    ``payload`` must be plain data (tensors, numbers, text, None, and lists, tuples, dicts of them), so that
    ``weights_only=True`` can read it: anything else is a ``TypeError`` naming its place. A floating tensor with NaN or
    infinity is ``NonFiniteState``, and what the disk does not take an ``OSError``. In all cases the old file stays.
    """
    poisoned: list[str] = []
    _inspect(payload, "", poisoned)
    if poisoned:
        raise NonFiniteState(poisoned)

    def write(file: IO[bytes]) -> None:
        try:
            torch.save(dict(payload), file)
        except RuntimeError as error:  # of torch's zip writer, about the place where the file broke off
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise

    return write_atomic(path, write)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; ``OSError`` when absent, ``ValueError`` naming the file when it is damaged."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    try:
        payload = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the zip reader and the unpickler raise half a dozen unrelated types
        raise ValueError(f"{path}: not a readable checkpoint: {first_line(error)}") from error
    if not isinstance(payload, dict):
        raise ValueError(f"{path}: a checkpoint must hold a dict, got {type(payload).__name__}")
    return payload


def save_weights(model: nn.Module, folder: str | Path, name: str = "weights") -> Path:
    """Write the state dict to ``folder/name.safetensors``, or ``name.pt`` where safetensors is not installed."""
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    if importlib.util.find_spec("safetensors") is None:
        return save_checkpoint(Path(folder) / f"{name}.pt", state)
    from safetensors.torch import save

    return write_atomic(Path(folder) / f"{name}.safetensors", save(state))


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a ``.safetensors`` file, a weights ``.pt`` file, or (its ``model``) a checkpoint of a run."""
    return load_trained(path)[0]


def load_trained(path: str | Path) -> tuple[dict[str, Tensor], int | None]:
    """As :func:`load_weights`, and the number of steps that a checkpoint's weights have learnt; else None."""
    path, step = Path(path), None
    if path.suffix != ".safetensors":
        state = load_checkpoint(path)
        if "state" in state and "step" in state:
            state, step = state["state"]["model"], state["step"]
    else:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such weights file")
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            state = load(path.read_bytes())
        except SafetensorError as error:
            raise ValueError(f"{path}: not a readable safetensors file: {error}") from error
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path}: a weights file must hold tensors by name only")
    return state, step


def digest(state: Mapping[str, Tensor]) -> str:
    """A fingerprint of weights: SHA-256 over names and values."""
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(name.encode())
        found.update(state[name].detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def digest_of(weights: str | Path | None) -> str | None:
    """The :func:`digest` of what a backbone's weight file holds; None for no file. It raises what reading it raises."""
    return None if weights is None else digest(read_weights(weights))


def load_into(name: str, target: Any, state: Any, source: str | Path) -> None:
    """``target.load_state_dict(state)`` with one clear ``ValueError`` when it does not fit."""
    try:
        target.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"{source}: its {name!r} does not fit this configuration: {detail[:300]}") from error


def rng_state() -> dict[str, Any]:
    """The states of Python's, numpy's and torch's generators (and the current GPU's), as plain data."""
    kind, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)  # a tuple, in legacy form
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(numpy.asarray(keys, "int64")), int(position), int(has_gauss), float(gauss)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put the generators back to what ``rng_state`` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators (all devices). ``seed`` must be in ``0..2**32-1``."""
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in 0..4294967295, got {seed}")
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def _inspect(value: Any, place: str, poisoned: list[str]) -> None:
    if isinstance(value, Tensor):
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            poisoned.append(place)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if type(key) not in (str, int, float, bool):
                raise TypeError(f"checkpoint keys must be plain, got {type(key).__name__} in {place or 'the top'}")
            _inspect(item, f"{place}.{key}" if place else str(key), poisoned)
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _inspect(item, f"{place}[{index}]", poisoned)
    elif value is not None and type(value) not in (str, int, float, bool):
        raise TypeError(f"checkpoint must be plain data, got {type(value).__name__} at {place}")
