"""Copies of the test process: a new process would import torch, which takes seconds."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable


class Fork:
    """A copy of this process that calls a function and ends; it has the lines that the function writes.

    Args:
        action: is called in the copy, with a function that writes a line.
    """

    def __init__(self, action: Callable[[Callable[[str], None]], object]) -> None:
        reader, writer = os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the copy does not have
            self.process = os.fork()
        if not self.process:
            try:
                action(lambda line: os.write(writer, f"{line}\n".encode()))
            except BaseException:
                os._exit(1)
            os._exit(0)
        os.close(writer)
        self.output = os.fdopen(reader)

    def kill(self) -> None:
        os.kill(self.process, signal.SIGKILL)

    def ended(self) -> tuple[int, str]:
        """The exit status, negative for a signal, and the lines that were not read yet."""
        with self.output:
            rest = self.output.read()
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1]), rest
