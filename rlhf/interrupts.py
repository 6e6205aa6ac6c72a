"""Ctrl-C during a run that must not stop half way through an update."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def interrupts_held() -> Iterator[list[int]]:
    """Hold back Ctrl-C, so that no state holds half an update; the list is empty until it came.

    The second Ctrl-C stops at once, and what the last checkpoint does not hold is lost.
    """
    held: list[int] = []

    def hold(number: int, frame: Any) -> None:
        if held:
            raise KeyboardInterrupt
        held.append(number)
        print("\nsaving after this update; Ctrl-C again stops at once", flush=True)

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield held
        return
    before = signal.signal(signal.SIGINT, hold)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, before)
