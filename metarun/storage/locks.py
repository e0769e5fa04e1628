"""Work that only one process at a time may do, guarded by a lock file beside what is worked on.

The lock files are empty and stay when the work is done. Do not delete one that another process may wait
for: that process would then hold the lock of a deleted file, and a later one that of a new file.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from metarun.errors import printable
from metarun.storage.files import blaming

PATIENCE = 1.0  # seconds to wait for another process without a message
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # from file systems that have no locks


def once(
    path: Path, load: Callable[[], Any], make: Callable[[], Any], variable: str = "METARUN_CACHE"
) -> Any:
    """The result of `load`, or of `make` where `load` returns None; only one process at a time makes it.

    A process that had to wait for another one calls `load` again before it calls `make`. After about a
    second of waiting it says so on standard error.

    Args:
        path: what is loaded or made; the lock file is beside it, in a folder that is created if missing.
        load: returns what is there, or None.
        make: makes it and returns it.
        variable: the environment variable that chooses the folder, for the error message.

    Raises:
        DataError: the lock file cannot be written.
    """
    if (value := load()) is not None:
        return value
    lock = FileLock(lock_path(path))
    try:
        with blaming(path.parent, variable):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not _acquire(lock, PATIENCE):
                what = printable(str(path))
                print(f"waiting for another process that prepares {what} ...", file=sys.stderr, flush=True)
                _acquire(lock, -1)
        value = load()  # another process may have made it while this one waited
        return make() if value is None else value
    finally:
        lock.release()


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Take the lock of `path` without waiting, and yield whether no other process has it.

    The lock is held until the context ends. Where the file system has no locks, nobody can know, and the
    answer is True. Raises OSError where the lock file cannot be written.
    """
    lock = FileLock(lock_path(path))
    try:
        yield _acquire(lock, 0)
    finally:
        lock.release()


def is_taken(path: Path) -> bool:
    """Whether another process has the lock of `path`; False where nobody can know."""
    try:
        if not lock_path(path).exists():
            return False
        with locked(path) as alone:
            return not alone
    except OSError:
        return False


def lock_path(path: Path) -> Path:
    """The lock file of `path`."""
    return path.with_name(f".{path.name}.lock")


def _acquire(lock: FileLock, seconds: float) -> bool:
    """Whether the lock was taken within so many seconds; -1: however long it takes. True without locks."""
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    except NotImplementedError:  # from filelock, of a file system that has no locks
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True
