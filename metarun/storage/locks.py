"""Work that one process does at a time: its lock is a file beside what is worked on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from metarun.storage.files import blaming

try:
    import fcntl
except ImportError:  # not on Windows: two processes may then do the same work, never harm it
    fcntl = None  # type: ignore[assignment]


def once(
    path: Path, load: Callable[[], Any], make: Callable[[], Any], variable: str = "METARUN_CACHE"
) -> Any:
    """What `load` gives; where that is None, what `make` does, in one process at a time."""
    if (value := load()) is not None:
        return value
    with blaming(path.parent, variable):
        lock = _lock(path)
    with lock:
        value = load()  # another process may have made it while this one waited
        return make() if value is None else value


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Whether no other process works on `path`; none begins to while this lasts.

    Where there are no locks (Windows, some network file systems) nobody knows, and it is taken as free.
    """
    while True:
        with open(lock_path(path), "ab") as file:
            taken = False
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:  # some network file systems have no locks
                taken = isinstance(error, BlockingIOError)
            if taken or _is_at(file, lock_path(path)):
                yield not taken
                return


def _lock(path: Path) -> BinaryIO:
    """Wait until no other process works on `path`; closing what is returned lets the next one in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        file = open(lock_path(path), "ab")  # noqa: SIM115 - the caller closes it
        if fcntl is not None:
            with suppress(OSError):  # some network file systems have no locks
                fcntl.flock(file, fcntl.LOCK_EX)
        if _is_at(file, lock_path(path)):
            return file
        file.close()


def lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Whether a lock's file is still the one there: who held it before may have removed it."""
    if fcntl is None:
        return True
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except OSError:
        return False
