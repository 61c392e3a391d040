"""Peak memory of a step that has not run: the step is traced on tensors without storage."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Held(TorchDispatchMode):
    """Bytes of the tensors that are alive, and the most there were; counted by storage, from the moment of entry."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):  # older than the step, or known
            self._see(value, counted=False)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            self._see(value, counted=True)
        return result

    def _see(self, value: Any, counted: bool) -> None:
        if not isinstance(value, Tensor):
            return
        storage: Any = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if counted else 0
        self._known.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


def forecast_memory(prepare: Callable[[], Callable[[], Any]]) -> int:
    """The most bytes that the tensors of a step will hold at one time beyond those there were before it.

    ``prepare()`` makes models and inputs and returns the step, a function without arguments; both run on CPU tensors
    without storage (``FakeTensorMode``), so that nothing is computed and no memory is taken, whatever the sizes: a
    forward and a backward pass cost some Python per operator. The number is that of
    :func:`nasdet.measure.memory.peak_memory` for the same step with ``tensors_only``: activations kept for backward,
    gradients, and what is alive in passing; the work space of libraries is not in it, nor is what a GPU's operators
    do otherwise.

    The step must not depend on the values of tensors (no ``nonzero``, no ``item``).
    """
    with FakeTensorMode():
        step = prepare()
        with _Held() as held:
            result = step()
    del result
    return held.peak


__all__ = ["forecast_memory"]
