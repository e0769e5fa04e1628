"""What asks a command to stop: Ctrl-C, a closed terminal, the warning of a batch system, the end of its time.

Outside of training, signals raise KeyboardInterrupt (`ending_on_signals`). Training holds them until it has
saved (`hold_interrupts`), and nothing interrupts the writing of a checkpoint (`uninterrupted`). A limit of
time (`stop.minutes`) is handled in the same way (`Requests`, `OutOfTime`).
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

# A closed terminal sends SIGHUP. Batch systems announce the end of a job by SIGTERM, SIGUSR1, SIGUSR2 or
# SIGXCPU. Windows has only some of these, and SIGBREAK.
NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK")
SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
# Signals within so many seconds are one request: terminals, shells and batch systems send several at once.
ONE_REQUEST = 1.0

_last_request: list[float] = []  # the time of the last request in this process, if there was one
_began = time.monotonic()  # when the command of this process began
_ignored: list[bool] = []  # not empty: requests are ignored, and nothing is said about them
_silent: list[bool] = []  # not empty: another process says something about them


class OutOfTime(KeyboardInterrupt):
    """The time of the command is over, which ends it in the same way as a signal."""


class Requests:
    """Requests to stop; true if there are any.

    Args:
        until: the time (`deadline`) from which on there is one.

    Attributes:
        signals: the number of the first signal, if one has arrived.
        handlers: of each signal, before this one held it.
    """

    def __init__(self, until: float = math.inf) -> None:
        self.until = until
        self.signals: list[int] = []
        self.handlers: Mapping[int, Any] = {}

    def __bool__(self) -> bool:
        return bool(self.signals) or self.late

    @property
    def late(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() >= self.until

    def add(self, signalled: bool, late: bool) -> None:
        """Note that there has been a signal, or that the time is over, in another process of the command."""
        if signalled and not self.signals:
            self.signals.append(signal.SIGTERM)
        if late:
            self.until = -math.inf

    def stop(self) -> None:
        """Raise KeyboardInterrupt after a signal, OutOfTime after `until`; nothing without a request.

        A handler of another program, such as that of submitit, is called first: it may queue the job again
        and exit.
        """
        for number in self.signals:
            if callable(handler := self.handlers.get(number)) and handler.__module__ != __name__:
                with contextlib.suppress(Exception):
                    handler(number, None)
            raise KeyboardInterrupt
        if self:
            raise OutOfTime


def deadline(minutes: float | None) -> float:
    """The time at which a command has run for so many minutes, for `Requests`; None: never."""
    return math.inf if minutes is None else _began + 60 * minutes


def stop_requested() -> bool:
    """Whether a signal has asked this process to stop."""
    return bool(_last_request)


def begin() -> None:
    """Note that a command begins: its time counts from now, and earlier requests were for other commands."""
    global _began
    _began = time.monotonic()
    _last_request.clear()
    _ignored.clear()


def say_nothing() -> None:
    """Leave what is said about a request to another process."""
    _silent.append(True)


def ignore_requests() -> None:
    """Ignore further requests: the command is about to end anyway, and says why."""
    _ignored.append(True)


@contextlib.contextmanager
def ending_on_signals() -> Iterator[None]:
    """A context for a whole command, in which a signal raises KeyboardInterrupt.

    Further signals of the same request are ignored, so that they do not interrupt the cleaning up.
    """

    def handler(number: int, frame: object) -> None:
        if _is_new_request():
            raise KeyboardInterrupt

    begin()
    try:
        with _handling(handler):
            yield
    finally:
        if stop_requested():  # the process is about to end; Python would answer Ctrl-C by a traceback
            for number in SIGNALS:
                signal.signal(number, signal.SIG_DFL)


@contextlib.contextmanager
def hold_interrupts(until: float = math.inf) -> Iterator[Requests]:
    """A context that holds signals.

    Args:
        until: the time (`deadline`) from which on there is a request to stop, too.

    Yields:
        The requests, in which a signal is noted. Ctrl-C pressed again, but no other signal, raises
        KeyboardInterrupt immediately.
    """
    requests = Requests(until)
    caught = requests.signals

    def handler(number: int, frame: object) -> None:
        new = _is_new_request()
        if not caught and not _ignored:
            caught.append(number)
            _say(b"\nstopping and saving (press Ctrl-C again to stop immediately)\n")
        elif new and number == signal.SIGINT:
            raise KeyboardInterrupt

    with _handling(handler) as requests.handlers:
        yield requests


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """A context at whose end signals that arrived in it are delivered."""
    caught: list[int] = []
    with _handling(lambda number, frame: caught.append(number)):
        yield
    if caught:
        signal.raise_signal(caught[0])


@contextlib.contextmanager
def _handling(handler: Callable[[int, object], None]) -> Iterator[Mapping[int, Any]]:
    """A context with a handler for all signals, except those that the caller ignores, as nohup does.

    Yields:
        The handlers that they had before.
    """
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
        yield {}
        return
    # Shells ignore SIGINT in background jobs of scripts, but who sends it to a run wants it to stop.
    kept = (signal.SIG_IGN, None)  # None: a handler that was not installed from Python
    numbers = [n for n in SIGNALS if n == signal.SIGINT or signal.getsignal(n) not in kept]
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield before
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)


def _is_new_request() -> bool:
    """Whether a signal that arrives now is a request of its own; if it is, its time is noted."""
    now = time.monotonic()
    if _ignored or (_last_request and now - _last_request[0] < ONE_REQUEST):
        return False
    _last_request[:] = [now]
    return True


def _say(message: bytes) -> None:
    """Write to standard error from a signal handler; nothing happens if it is closed or full.

    Not by rich or print, which are not reentrant: the signal may arrive while they write.
    """
    if _silent:
        return
    with contextlib.suppress(OSError, ValueError):
        if os.name != "posix" or select.select([], [2], [], 0)[1]:
            os.write(2, message)
