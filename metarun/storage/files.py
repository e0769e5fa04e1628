"""Reading and writing files: the data and cache folders, atomic writes, checksums.

The data folder (METARUN_DATA) holds downloads, the cache folder (METARUN_CACHE) what can be computed again.
"""

from __future__ import annotations

import csv
import errno
import gzip
import hashlib
import io
import json
import os
import re
import stat
import uuid
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from metarun.errors import DataError, first_line

CHUNK = 1 << 18  # bytes read at a time


def cache_dir() -> Path:
    """The cache folder: the variable METARUN_CACHE, or ~/.cache/metarun if it is not set."""
    return own_folder("METARUN_CACHE", "~/.cache/metarun")


def data_dir() -> Path:
    """The folder for downloads: the variable METARUN_DATA, or ~/.cache/metarun/data if it is not set."""
    return own_folder("METARUN_DATA", "~/.cache/metarun/data")


def own_folder(variable: str, default: str) -> Path:
    """The folder that a variable chooses. Raises DataError if it is in a home folder that is not known."""
    folder = user_path(os.environ.get(variable) or default)
    if str(folder).startswith("~"):
        raise DataError(f"{folder}: the home folder is not known; set the variable {variable} to a folder")
    return folder


def user_path(text: str) -> Path:
    """A typed path, with `~` as the home folder; unchanged if there is no such user."""
    return Path(os.path.expanduser(text))


@contextmanager
def blaming(folder: Path, variable: str) -> Iterator[None]:
    """Turn an OSError of writing to `folder` into a DataError that names `variable`, which chooses it.

    The error of a file that is not in that folder, such as an archive that is read, names that file.
    """
    try:
        yield
    except OSError as error:
        where, own = (Path(os.path.abspath(os.fsdecode(p))) for p in (error.filename or folder, folder))
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not (full or where.is_relative_to(own) or own.is_relative_to(where)):
            raise DataError(f"{where}: cannot be read ({error.strerror or error})") from error
        raise DataError(
            f"cannot write to {folder} ({error.strerror or error}): "
            f"set the variable {variable} to a folder that can be written"
        ) from error


def atomic_write(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Create or replace the file `path`; it is never half-written, also not if the machine crashes.

    Args:
        path: the file; its folder is created if missing.
        write: called with the opened temporary file, to which it writes the content.

    Raises:
        OSError: the file cannot be written. Whatever `write` raises is passed on. In both cases `path` is
            left unchanged and the temporary file is deleted.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, since a rename is atomic only within one file system. See TEMPORARY.
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


TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")  # the names of temporary files


def remove_temporary(folder: Path) -> None:
    """Remove the temporary files that a killed process left in a folder, which no other process may use."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if TEMPORARY.fullmatch(path.name):
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Create or replace a UTF-8 text file atomically; file names in it keep the bytes they have on disk."""
    atomic_write(path, lambda file: file.write(encoded(text)))


def write_json(path: Path, content: object, indent: int | None = 2) -> None:
    """Create or replace a JSON file atomically, indented to be read, or in one line."""
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # a file name that is not UTF-8, which JSON can only escape
        text = json.dumps(content, indent=indent)
    write_text(path, text + "\n")


def encoded(text: str) -> bytes:
    """The text as UTF-8 bytes; file names in another encoding become the bytes they have on disk."""
    return text.encode("utf-8", "surrogateescape")


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Create or replace a CSV file atomically: a header with the keys of all rows, then one line per row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def read_regular(path: Path) -> bytes:
    """The bytes of a regular file. Raises OSError for anything else, since reading a pipe may never end."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return path.read_bytes()


def read_text(path: Path) -> str:
    """The content of a text file in UTF-8, with or without a byte order mark, unpacked if it is a gzip file.

    Raises:
        DataError: there is no such file, it cannot be read, or it is not UTF-8.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".gz" or data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line}: is not UTF-8 text; save the file as UTF-8") from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{path}: is a folder; name a file") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}); get it again") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def md5_sum(path: Path) -> str:
    """The MD5 sum of a file, in hexadecimal. Raises OSError."""
    digest = hashlib.md5(usedforsecurity=False)
    add_bytes(digest, path)
    return digest.hexdigest()


def kind_of_sum(checksum: str) -> str:
    """The kind of a sum in hexadecimal, by its length: "md5" or "sha256"."""
    return {32: "md5", 64: "sha256"}[len(checksum)]


def file_sum(path: Path, like: str) -> str:
    """The sum of a file, in hexadecimal and of the kind of another sum. Raises OSError."""
    digest = hashlib.new(kind_of_sum(like), usedforsecurity=False)
    add_bytes(digest, path)
    return digest.hexdigest()


def add_bytes(digest: Any, path: Path | str, advance: Callable[[int], object] = lambda count: None) -> None:
    """Update a hashlib digest with a file's bytes; `advance(n)` is called after every n bytes.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            advance(len(chunk))
