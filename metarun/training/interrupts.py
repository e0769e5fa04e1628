"""Ctrl-C and SIGTERM, held until a step has ended."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator


@contextlib.contextmanager
def hold_interrupts() -> Iterator[list[int]]:
    """Collect the first SIGINT or SIGTERM in the list that is given; a second one stops at once."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only there can signals be handled
        yield caught
        return

    def handler(number: int, frame: object) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
        with contextlib.suppress(
            OSError
        ):  # the reader of a pipe may have ended: saving must not depend on it
            # Not through rich, which may be interrupted while it draws.
            os.write(2, b"\nstopping and saving (once more: stop at once)\n")

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, old in before.items():
            signal.signal(number, old)
