"""Signals that ask a run to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def handled(handler: Callable[[int, Any], Any], *numbers: int) -> Iterator[None]:
    """Signals ``numbers`` call ``handler`` while the block runs.

    Only the main thread can have that; in another one they do what they did before.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # None stands for a handler that was not installed from Python and cannot be put back.
    previous = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}
    for number in numbers:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
