"""Files: atomic writing, downloads, folders and zips read in place, and a cache of decoded data.

Two folders, each with a variable that moves it: the data folder (METARUN_DATA) keeps what was
downloaded, the cache folder (METARUN_CACHE) keeps what can be computed again.
"""

from __future__ import annotations

import csv
import errno
import glob
import hashlib
import http.client
import io
import json
import os
import re
import shutil
import stat
import tarfile
import time
import urllib.error
import urllib.request
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from metarun.errors import DataError, first_line

try:
    import fcntl
except ImportError:  # not on Windows: two processes may then do the same work, never harm it
    fcntl = None  # type: ignore[assignment]

CHUNK = 1 << 18  # bytes read at a time
TIMEOUT = 30.0  # seconds without a byte before a connection counts as lost
TRIES = 3
PAUSE = 1.0  # seconds before the second try; one more before each later one
MEMBER_LIMIT = 64 << 20  # bytes one archive member may unpack to


def cache_dir() -> Path:
    """The folder for what can be computed again: METARUN_CACHE, else ~/.cache/metarun."""
    return Path(os.environ.get("METARUN_CACHE") or "~/.cache/metarun").expanduser()


def data_dir() -> Path:
    """The folder for downloads: METARUN_DATA, else ~/.cache/metarun/data."""
    return Path(os.environ.get("METARUN_DATA") or "~/.cache/metarun/data").expanduser()


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


def once(
    path: Path, load: Callable[[], Any], make: Callable[[], Any], variable: str = "METARUN_CACHE"
) -> Any:
    """What `load` gives; where that is None, what `make` does, in one process at a time."""
    if (value := load()) is not None:
        return value
    with _blaming(path.parent, variable):
        lock = _lock(path)
    with lock:
        value = load()  # another process may have made it while this one waited
        return make() if value is None else value


def mapped(
    name: str, build: Callable[[Callable[[bytes], object]], dict[str, Any]], what: str = "", source: str = ""
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Bytes in the cache folder as `name`, memory-mapped [bytes] uint8, and notes about them.

    `build(write)` writes the bytes piece by piece and returns the notes, to which their `sha256`
    is added; it is called where they are not there or damaged. The notes also keep `what` they are, the
    same for the same split and settings whatever the files, and the `source` they are of no use without.
    Processes that need the same entry at once wait for the first. Raises DataError where the folder cannot
    be written.
    """
    path = cache_dir() / name

    def make() -> tuple[torch.Tensor, dict[str, Any]] | None:
        _build_mapped(path, build, {"what": what, "source": source})
        return _map(path)

    return once(path, lambda: _map(path), make)


def _build_mapped(
    path: Path, build: Callable[[Callable[[bytes], object]], dict[str, Any]], record: dict[str, str]
) -> None:
    digest = hashlib.sha256()
    made: dict[str, Any] = {}

    def fill(file: BinaryIO) -> None:
        def write(piece: bytes) -> None:
            digest.update(piece)
            with _blaming(path.parent, "METARUN_CACHE"):
                file.write(piece)

        try:
            made.update(build(write))
        except OSError as error:  # of what is read, not of what is written
            raise DataError(f"{error.filename or path.name}: {error.strerror or error}") from error

    notes = path.with_name(path.name + ".json")
    with _blaming(path.parent, "METARUN_CACHE"):
        for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):  # by a process that was killed
            left.unlink(missing_ok=True)
        notes.unlink(missing_ok=True)  # it vouches for the bytes, and comes last
        atomic_write(path, fill)
        write_json(notes, made | record | {"sha256": digest.hexdigest()})


def _map(path: Path) -> tuple[torch.Tensor, dict[str, Any]] | None:
    """The bytes and notes, or None where they are absent or damaged."""
    try:
        made = json.loads(path.with_name(path.name + ".json").read_text("utf-8"))
        content = np.memmap(path, np.uint8, mode="c")  # changes would stay in memory
    except (OSError, ValueError):  # also an empty file, which cannot be mapped
        return None
    if not isinstance(made, dict) or hashlib.sha256(content.data).hexdigest() != made.get("sha256"):
        return None
    return torch.from_numpy(content), made


def unpacked(archive: Path, dataset: str, tell: Callable[[], object], md5: str | None = None) -> Path:
    """The folder in the cache with what a dataset's tar archive holds, unpacked whole or not at all.

    That is at first use, and again where a file's name or size is no more what it was. `tell` is called
    before that work. `md5`: what the archive must be. Raises DataError for a damaged archive, and for one
    with a member that leads out of the folder, by its name or as a link.
    """
    status = archive.stat()
    mark = f"{archive.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"
    folder = cache_dir() / f"{dataset}-unpacked-{hashlib.sha256(encoded(mark)).hexdigest()[:24]}"
    kept_as = folder.with_name(folder.name + ".json")

    def there() -> Path | None:
        with suppress(OSError, ValueError, AttributeError):
            if json.loads(kept_as.read_text("utf-8")).get("unpacked") == tree_digest(folder):
                return folder
        return None

    def make() -> Path:
        tell()
        if md5 is not None and (found := _md5(archive)) != md5:
            raise DataError(
                f"{archive} has the md5 sum {found}, and the authors' archive {md5}: get it again, or unpack "
                "it yourself and set dataset.root to that folder"
            )
        staging = folder.with_name(f".{folder.name}.tmp")
        record = {"what": f"{dataset} unpacked {archive}", "source": os.path.abspath(archive), "unpacked": ""}
        shutil.rmtree(staging, ignore_errors=True)  # by a process that was killed
        try:
            with _blaming(folder.parent, "METARUN_CACHE"):
                write_json(staging.with_name(staging.name + ".json"), record)  # so that it can be told
                _unpack(archive, staging)
            sums = {"unpacked": tree_digest(staging), "sha256": tree_digest(staging, contents=True)}
            with _blaming(folder.parent, "METARUN_CACHE"):
                kept_as.unlink(missing_ok=True)
                if folder.is_dir():
                    shutil.rmtree(folder)
                write_json(kept_as, record | sums)
                os.replace(staging, folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
            staging.with_name(staging.name + ".json").unlink(missing_ok=True)
        return folder

    return once(folder, there, make)


def tree_digest(
    folder: Path, contents: bool = False, advance: Callable[[int], object] = lambda count: None
) -> str:
    """SHA-256 of the names and sizes below a folder, and of the bytes there where asked. OSError."""
    digest = hashlib.sha256()
    paths = sorted(os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
    for path in paths:
        digest.update(encoded(f"\0{os.path.relpath(path, folder)}\0{os.lstat(path).st_size}\0"))
        if contents and os.path.isfile(path):
            with open(path, "rb") as file:
                while chunk := file.read(CHUNK):
                    digest.update(chunk)
                    advance(len(chunk))
    return digest.hexdigest()


class _Member(tarfile.TarInfo):
    """A member whose damaged header is an error: tarfile takes one for the archive's end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:  # type: ignore[override]
        try:
            return super().frombuf(buf, encoding, errors)  # type: ignore[return-value]
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(first_line(error)) from error


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar. Raises DataError for the archive's faults, and OSError where it cannot be written."""
    if not hasattr(tarfile, "data_filter"):  # a Python from before mid 2023
        raise DataError(
            f"{archive}: this Python cannot unpack it safely; unpack it yourself, and name the folder"
        )
    try:
        with tarfile.open(archive, tarinfo=_Member) as tar:
            tar.extractall(folder, filter="data")
            while tar.fileobj and tar.fileobj.read(CHUNK):  # to the end, where the compression's sum is
                pass
    except tarfile.FilterError as error:
        raise DataError(
            f"{archive} cannot be used ({first_line(error)}): delete it and get it again"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # tarfile and what decompresses raise many kinds
        why = first_line(error)
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            why = f"it holds a name that is too long: {Path(str(error.filename)).name[:40]}..."
        elif isinstance(error, OSError) and error.errno is not None and error.filename != str(archive):
            raise
        raise DataError(f"{archive} is damaged ({why}): delete it and get it again") from error


def download(url: str, path: Path, md5: str) -> None:
    """Fetch `url` to `path` unless it exists. Raises DataError, saying how to do it by hand.

    What arrives is kept in `path`.part, from which a later try goes on, in this call or the next.
    `path` itself appears only once the md5 sum is right.
    """
    once(path, lambda: path.exists() or None, lambda: _download(url, path, md5), "METARUN_DATA")


def _download(url: str, path: Path, md5: str) -> None:
    part = path.with_name(path.name + ".part")
    try:
        fetch(url, part)
    except OSError as error:
        raise DataError(
            f"cannot download {url}: {_reason(error)}; check the network, or put that file at {path} yourself"
        ) from error
    found = _md5(part)
    if found != md5:
        part.unlink()
        raise DataError(
            f"{url} gave a file with md5 sum {found} where {md5} is right; it was deleted: "
            f"try again later, or put the right file at {path} yourself"
        )
    os.replace(part, path)


def fetch(url: str, part: Path) -> None:
    """All of `url` in `part`, going on from what is there; tried again where that may help.

    Raises OSError.
    """
    for tried in range(1, TRIES + 1):
        try:
            return _receive(url, part)
        except (OSError, http.client.HTTPException) as error:  # OSError covers urllib's own
            status = 500
            if isinstance(error, urllib.error.HTTPError):
                status = error.code
                error.close()  # it is the response as well
            if tried == TRIES or (status < 500 and status not in (408, 416, 429)):
                raise error if isinstance(error, OSError) else ConnectionError(_reason(error)) from error
            if status == 416:  # what is there is no beginning of the file: start over
                part.unlink(missing_ok=True)
            time.sleep(PAUSE * tried)


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError) and not isinstance(error, urllib.error.HTTPError):
        return str(error.reason)  # without urllib's brackets around it
    return str(error) or type(error).__name__


def _receive(url: str, part: Path) -> None:
    """Fetch `url` to `part`, going on from what is there where the server can."""
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "metarun"} | ({"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT) as response:
        if response.status != 206:  # the whole file, asked for or not
            have = 0
        total = None if response.length is None else have + response.length
        with open(part, "ab" if have else "wb") as file, _bytes_bar() as bar:
            task = bar.add_task(f"download {url.rpartition('/')[2]}", completed=have, total=total)
            while chunk := response.read(CHUNK):
                file.write(chunk)
                have += len(chunk)
                bar.update(task, completed=have)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and have < total:  # urllib takes a closed connection for the end
        raise ConnectionError(f"the connection was lost after {have:,} of {total:,} bytes")


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _bytes_bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))


def read_regular(path: Path) -> bytes:
    """A file's bytes. OSError also for what is no file: reading a pipe would wait for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return path.read_bytes()


class Folder:
    """The files below a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def identity(self) -> str:
        """Changes when a file comes, goes, or is written again."""
        digest = hashlib.sha256(encoded(str(self.path.resolve())))
        for name in self.names():
            try:
                status = os.stat(f"{self.path}/{name}")  # with 32,460 files, pathlib's cost shows
            except OSError as error:
                raise self._unreadable(name, error) from error
            digest.update(encoded(f"\0{name}\0{status.st_size}\0{status.st_mtime_ns}"))
        return digest.hexdigest()

    def names(self) -> list[str]:
        """Paths relative to the folder, with forward slashes, sorted."""
        found = []
        for folder, _, files in os.walk(self.path):
            inner = Path(folder).relative_to(self.path).as_posix()
            found += files if inner == "." else [f"{inner}/{file}" for file in files]
        return sorted(found)

    def read(self, name: str) -> bytes:
        """The bytes of one file. Raises DataError."""
        try:
            return read_regular(self.path / name)
        except OSError as error:
            raise self._unreadable(name, error) from error

    def _unreadable(self, name: str, error: OSError) -> DataError:
        return DataError(f"cannot read {self.path / name} ({error.strerror}): get it again")


class Archive:
    """The files in a zip, read in place: nothing is unpacked to disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def identity(self) -> str:
        """Changes when the zip is written again."""
        status = self.path.stat()
        return f"{self.path.resolve()}\0{status.st_size}\0{status.st_mtime_ns}"

    def names(self) -> list[str]:
        """Members that are files, sorted. Raises DataError, also for a name that leads out of the zip.

        Such a name could not do harm here; the zip that has one was not made in good faith.
        """
        for member in self._zip.infolist():
            name = member.filename
            if re.match(r"[/\\]|[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
                raise self._damaged(f"it holds a member named {name!r}, which leads out of it")
            if stat.S_ISLNK(member.external_attr >> 16):
                raise self._damaged(f"its member {name!r} is a link, and not a file")
        return sorted({name for name in self._zip.namelist() if not name.endswith("/")})

    def read(self, name: str) -> bytes:
        """The bytes of one member. Raises DataError."""
        if self._zip.getinfo(name).file_size > MEMBER_LIMIT:
            raise self._damaged(f"{name} unpacks to more than {MEMBER_LIMIT:,} bytes")
        try:
            return self._zip.read(name)
        except MemoryError:
            raise
        except Exception as error:  # encrypted, of an unknown kind, or damaged: each of many kinds
            raise self._damaged(f"{name}: {first_line(error)}") from error

    def stamp(self, name: str) -> tuple[int, int]:
        """A member's size and CRC-32 sum, as the zip's own list has them."""
        member = self._zip.getinfo(name)
        return member.file_size, member.CRC

    def _damaged(self, how: str) -> DataError:
        return DataError(f"{self.path} cannot be used ({how}): delete it and get it again")

    @cached_property
    def _zip(self) -> zipfile.ZipFile:
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):  # opening a pipe would wait for ever
                raise self._damaged("it is no regular file")
            return zipfile.ZipFile(self.path)
        except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
            raise self._damaged(first_line(error)) from error


@contextmanager
def _blaming(folder: Path, variable: str) -> Iterator[None]:
    """Turn a failure to write into a DataError that names the folder and how to choose another."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"cannot write to {folder} ({error.strerror or error}): "
            f"set the variable {variable} to a folder that can be written"
        ) from error


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Whether no other process works on `path`; none begins to while this lasts."""
    while True:
        with open(lock_path(path), "ab") as file:
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            if _is_at(file, lock_path(path)):
                yield True
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
