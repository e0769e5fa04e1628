"""Zips read in place; tar archives unpacked, safely and to their end."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from metarun.errors import DataError, first_line
from metarun.storage.files import CHUNK, add_bytes, encoded

MEMBER_LIMIT = 64 << 20  # bytes one archive member may unpack to


class Archive:
    """The files in a zip, read in place: nothing is unpacked to disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

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


def unpack(archive: Path, folder: Path) -> None:
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


def tree_digest(
    folder: Path, contents: bool = False, advance: Callable[[int], object] = lambda count: None
) -> str:
    """SHA-256 of the names and sizes below a folder, and of the bytes there where asked. OSError."""
    digest = hashlib.sha256()
    paths = sorted(os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
    for path in paths:
        digest.update(encoded(f"\0{os.path.relpath(path, folder)}\0{os.lstat(path).st_size}\0"))
        if contents and os.path.isfile(path):
            add_bytes(digest, path, advance)
    return digest.hexdigest()
