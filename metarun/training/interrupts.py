"""Deferred handling of Ctrl-C and SIGTERM, so that a step always completes."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def hold_interrupts() -> Iterator[list[int]]:
    """A context that defers SIGINT and SIGTERM.

    Yields:
        A list, empty until a signal arrives; then it contains the number of the signal. A second signal
        raises KeyboardInterrupt immediately.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
        yield caught
        return

    def handler(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        # Saving must not fail because standard error is a closed pipe.
        with contextlib.suppress(OSError):
            # Not by rich, which is not reentrant: the signal may arrive while it draws.
            os.write(2, b"\nstopping and saving (press Ctrl-C again to stop immediately)\n")

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)
