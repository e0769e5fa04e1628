"""Files: the two folders metarun keeps things in, writing whole or not at all, reading what is a file.

The data folder (METARUN_DATA) keeps what was downloaded, the cache folder (METARUN_CACHE) what can be
computed again.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import stat
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from metarun.errors import DataError

CHUNK = 1 << 18  # bytes read at a time


def cache_dir() -> Path:
    """The folder for what can be computed again: METARUN_CACHE, else ~/.cache/metarun."""
    return Path(os.environ.get("METARUN_CACHE") or "~/.cache/metarun").expanduser()


def data_dir() -> Path:
    """The folder for downloads: METARUN_DATA, else ~/.cache/metarun/data."""
    return Path(os.environ.get("METARUN_DATA") or "~/.cache/metarun/data").expanduser()


@contextmanager
def blaming(folder: Path, variable: str) -> Iterator[None]:
    """Turn a failure to write into a DataError that names the folder and how to choose another."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write to {folder} ({error.strerror or error}): "
            f"set the variable {variable} to a folder that can be written"
        ) from error


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Create or replace `path` with what `write` puts into a file; never half of it.

    A failure (OSError, or whatever `write` raises) leaves `path` as it was and nothing beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename is atomic only within one file system.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        for fault in (error, error.__cause__, error.__context__):  # torch.save wraps what the file raised
            if isinstance(fault, OSError) and fault.filename in (None, str(temporary)):
                fault.filename = str(path)
        raise


def write_text(path: Path, text: str) -> None:
    """Create or replace a text file, whole or not at all; names of files that are not UTF-8 as they are."""
    atomic_write(path, lambda file: file.write(encoded(text)))


def write_json(path: Path, content: object) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # the name of a file that is not UTF-8: JSON can only escape it
        text = json.dumps(content, indent=2)
    write_text(path, text + "\n")


def encoded(text: str) -> bytes:
    """UTF-8; of a file's name in another encoding, the bytes it has on the disk."""
    return text.encode("utf-8", "surrogateescape")


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """One line a row; its columns are all the rows' keys in the order they first appear."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_regular(path: Path) -> bytes:
    """A file's bytes. OSError also for what is no file: reading a pipe would wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return path.read_bytes()


def md5_sum(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    add_bytes(digest, path)
    return digest.hexdigest()


def add_bytes(digest: Any, path: Path | str, advance: Callable[[int], object] = lambda count: None) -> None:
    """A file's bytes into a digest of hashlib, piece by piece; `advance(n)` is told of every n. OSError."""
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            advance(len(chunk))
