"""Zips read in place; tar, zip and gzip archives unpacked, safely and to their end."""

from __future__ import annotations

import errno
import gzip
import hashlib
import os
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from metarun.errors import DataError, first_line
from metarun.storage.files import CHUNK, add_bytes, encoded

MEMBER_LIMIT = 64 << 20  # bytes one zip member that is read in place may unpack to
SIZE_LIMIT = 64 << 20  # bytes any archive may unpack to, ...
RATIO_LIMIT = 100  # ... and this many times its own size on top
HEADER_LIMIT = 1 << 20  # bytes of an extended header of a tar
HEADERS = {
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
}
MEMBER_COST = 512  # bytes a member counts for besides its content, so that millions of empty ones add up


class Archive:
    """The files in a zip, read in place: nothing is extracted to disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        """The names of the members that are files, sorted.

        Raises DataError for a damaged zip. Names that lead out of the zip ("zip slip") and links are
        refused too: nothing is extracted here, but a zip that has one was made to do harm.
        """
        for member in self._zip.infolist():
            try:
                _check_member(member)
            except _Refused as error:
                raise self._damaged(str(error)) from error
        return sorted({name for name in self._zip.namelist() if not name.endswith("/")})

    def read(self, name: str) -> bytes:
        """The bytes of one member. Raises DataError if it is damaged or larger than MEMBER_LIMIT."""
        if self._zip.getinfo(name).file_size > MEMBER_LIMIT:
            raise self._damaged(f"{name} unpacks to more than {MEMBER_LIMIT:,} bytes")
        try:
            return self._zip.read(name)
        except MemoryError:
            raise
        except Exception as error:  # encrypted, of an unknown kind, or damaged: each of many kinds
            raise self._damaged(f"{name}: {first_line(error)}") from error

    def stamp(self, name: str) -> tuple[int, int]:
        """A member's size in bytes and its CRC-32 sum, from the zip's directory."""
        member = self._zip.getinfo(name)
        return member.file_size, member.CRC

    def _damaged(self, how: str) -> DataError:
        return DataError(f"{self.path} cannot be used ({how}): delete it and get it again")

    @cached_property
    def _zip(self) -> zipfile.ZipFile:
        try:
            if not stat.S_ISREG(os.stat(self.path).st_mode):  # opening a pipe would wait for ever
                raise self._damaged("it is not a regular file")
            return zipfile.ZipFile(self.path)
        except (zipfile.BadZipFile, OSError, NotImplementedError, ValueError) as error:
            raise self._damaged(first_line(error)) from error


class BadArchive(DataError):
    """An archive that is damaged or hostile. `reason` says why, without the file's name and the remedy."""

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class _Member(tarfile.TarInfo):
    """A tar member whose damaged or huge header is an error.

    tarfile takes a damaged header for the archive's end, and reads the content of an extended header, such as
    a long name, into memory whatever its size.
    """

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:  # type: ignore[override]
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(first_line(error)) from error
        if member.type in HEADERS and member.size > HEADER_LIMIT:
            raise tarfile.ReadError(f"it has a header of {member.size:,} bytes")
        return member  # type: ignore[return-value]


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a tar archive, compressed or not, into `folder`, which is created if missing.

    Every member is checked before it is written: absolute names, names with "..", symbolic links, hard
    links that lead out and device files are refused, and so is an archive that unpacks to an absurd size.
    What came before a refused member stays in `folder`, so pass a new folder and delete it on an error.

    Raises:
        BadArchive: `archive` is damaged or has a member that is refused.
        OSError: `folder` cannot be written.
    """
    if not hasattr(tarfile, "data_filter"):  # a Python from before mid 2023
        raise DataError(
            f"{archive}: this Python cannot unpack it safely; unpack it yourself, and name the folder"
        )
    with _naming(archive), tarfile.open(archive, tarinfo=_Member) as tar:
        # The filter is a second line of defence behind our own checks, and makes the files' modes sane.
        tar.extractall(folder, members=_checked(tar, archive), filter="data")
        while tar.fileobj and tar.fileobj.read(CHUNK):  # to the end, where the compression's checksum is
            pass


def unzip(archive: Path, folder: Path) -> None:
    """Unpack a zip archive into `folder`, which is created if missing; as safe as `unpack`.

    Raises:
        BadArchive: `archive` is damaged or has a member that is refused.
        OSError: `folder` cannot be written.
    """
    budget = _Budget(archive)
    with _naming(archive), zipfile.ZipFile(archive) as packed:
        for member in packed.infolist():
            _check_member(member)
            budget.spend(member.file_size)  # zipfile never reads more of a member than this
        packed.extractall(folder)  # also checks every member's CRC-32 sum


def gunzip(archive: Path, target: Path) -> None:
    """Decompress one gzip file to the file `target`, whose folder must exist.

    Raises:
        BadArchive: `archive` is damaged or decompresses to an absurd size.
        OSError: `target` cannot be written.
    """
    budget = _Budget(archive)
    with _naming(archive), gzip.open(archive) as packed, open(target, "wb") as file:
        while chunk := packed.read(CHUNK):
            budget.spend(len(chunk))
            file.write(chunk)


class _Refused(Exception):
    """An archive that must not be unpacked, and why."""


class _Budget:
    """How many bytes an archive may unpack to: images shrink by a small factor, bombs by thousands."""

    def __init__(self, archive: Path) -> None:
        self.limit = self.left = SIZE_LIMIT + RATIO_LIMIT * os.stat(archive).st_size

    def spend(self, size: int) -> None:
        self.left -= size + MEMBER_COST
        if self.left < 0:
            raise _Refused(
                f"it unpacks to more than {self.limit:,} bytes, which so small an archive should not"
            )


def _checked(tar: tarfile.TarFile, archive: Path) -> Iterator[tarfile.TarInfo]:
    """The members of a tar, each checked just before tarfile writes it. Raises _Refused."""
    budget = _Budget(archive)
    for member in tar:
        _check_name(member.name)
        if member.islnk():
            _check_name(member.linkname)
        elif not (member.isreg() or member.isdir()):
            kind = "link" if member.issym() else "device"
            raise _Refused(f"its member {member.name!r} is a {kind}, and not a file")
        budget.spend(member.size)
        yield member


def _check_member(member: zipfile.ZipInfo) -> None:
    """Raises _Refused for a zip member whose name leads out of the zip, and for a link."""
    _check_name(member.filename)
    if stat.S_ISLNK(member.external_attr >> 16):
        raise _Refused(f"its member {member.filename!r} is a link, and not a file")


def _check_name(name: str) -> None:
    """Raises _Refused for an absolute name and for one with "..", on any operating system."""
    if re.match(r"[/\\]|[A-Za-z]:", name) or ".." in re.split(r"[/\\]", name):
        raise _Refused(f"it holds a member named {name!r}, which leads out of it")


@contextmanager
def _naming(archive: Path) -> Iterator[None]:
    """Turn whatever is wrong with an archive into a BadArchive; let failures to write (OSError) through."""
    try:
        yield
    except (_Refused, getattr(tarfile, "FilterError", _Refused)) as error:
        reason = first_line(error)
        raise BadArchive(
            f"{archive} cannot be used ({reason}): delete it and get it again", reason
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # tarfile, zipfile and what decompresses raise many kinds
        reason = first_line(error)
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
            reason = f"it holds a name that is too long: {Path(str(error.filename)).name[:40]}..."
        elif isinstance(error, OSError) and error.errno in (errno.EEXIST, errno.EISDIR, errno.ENOTDIR):
            reason = f"two of its members have one name: {Path(str(error.filename)).name}"
        elif isinstance(error, OSError) and error.errno is not None and error.filename != str(archive):
            raise
        raise BadArchive(f"{archive} is damaged ({reason}): delete it and get it again", reason) from error


def tree_digest(
    folder: Path, contents: bool = False, advance: Callable[[int], object] = lambda count: None
) -> str:
    """SHA-256 sum, in hexadecimal, of the names and sizes of all files below a folder.

    Args:
        folder: where to look.
        contents: include the files' bytes.
        advance: `advance(n)` is called after every n bytes.

    Raises:
        OSError: a file cannot be read.
    """
    digest = hashlib.sha256()
    paths = sorted(os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
    for path in paths:
        digest.update(encoded(f"\0{os.path.relpath(path, folder)}\0{os.lstat(path).st_size}\0"))
        if contents and os.path.isfile(path):
            add_bytes(digest, path, advance)
    return digest.hexdigest()
