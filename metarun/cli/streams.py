"""Standard output and error that never raise: a run must not fail because nobody reads its output."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any

from metarun.cli.overrides import Failed, say
from metarun.training.interrupts import stop_requested

# What an encoding without these characters shows instead; of others, the escape, such as \xe9.
PLAIN = {"±": "+-", "…": "...", "━": "-", "\N{REPLACEMENT CHARACTER}": "?"}


def encodable(error: UnicodeError) -> tuple[str | bytes, int]:
    """An error handler of `codecs`: other characters for those that an encoding does not have."""
    assert isinstance(error, UnicodeEncodeError)
    characters = error.object[error.start : error.end]
    plain = (PLAIN.get(each) or each.encode("ascii", "backslashreplace").decode() for each in characters)
    return "".join(plain), error.end


ERRORS = "metarun"  # the name of that handler
codecs.register_error(ERRORS, encodable)
POSIX = os.name == "posix"
# As much as select promises to take without blocking.
AT_ONCE = getattr(select, "PIPE_BUF", 512)


class Output(io.RawIOBase):
    """Writes to a file descriptor until that fails, and from then on drops everything.

    A full pipe is waited for, but not once a signal has asked the process to stop.

    Attributes:
        error: why output was dropped, or None.
    """

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.wait()
                return os.write(self.descriptor, data[:AT_ONCE])
            except OSError as error:
                self.error = error
        return len(data)

    def wait(self) -> None:
        """Wait until the descriptor takes data. Raises OSError if it does not and the process must stop."""
        while POSIX and not select.select([], [self.descriptor], [], 0.1)[1]:
            if stop_requested():
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


@contextlib.contextmanager
def output_that_never_fails() -> Iterator[None]:
    """A context in which writing to standard output and standard error never raises.

    If standard output was lost, the command ends with status 1 when it would otherwise succeed, and says
    why, unless a reader such as `head` has simply ended.
    """
    open_closed_descriptors()
    before = sys.stdout, sys.stderr
    output = protected("stdout", 1)
    protected("stderr", 2)
    try:
        yield
        flush()
        if output is not None and output.error is not None:
            if output.error.errno == errno.EPIPE:
                sys.exit(1)
            failed = Failed(f"standard output: cannot be written ({output.error.strerror})", status=1)
            say(failed)
            raise failed
    finally:
        flush()
        sys.stdout, sys.stderr = before


def open_closed_descriptors() -> None:
    """Open the null device where standard input, output or error is closed.

    Otherwise, the next file to be opened would get that number, and messages would be written into it.
    """
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free number, which is this one


def protected(name: str, descriptor: int) -> Output | None:
    """Replace `sys.NAME` by a stream that never raises; None if it is not the process's own stream."""
    own = getattr(sys, name)
    if own is not getattr(sys, f"__{name}__") or (own is not None and own.isatty() and not POSIX):
        return None  # replaced by a notebook or a test, or a console of Windows, which has its own functions
    output = Output(descriptor)
    if own is None:
        stream = io.TextIOWrapper(io.BufferedWriter(output), encoding="utf-8", errors=ERRORS)
    else:
        own.flush()
        stream = io.TextIOWrapper(
            io.BufferedWriter(output),
            encoding=own.encoding,
            errors=ERRORS,
            line_buffering=own.line_buffering or own.write_through,
        )
    setattr(sys, name, stream)
    return output


def flush() -> None:
    """Write what is buffered."""
    sys.stdout.flush()
    sys.stderr.flush()
