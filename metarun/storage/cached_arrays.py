"""Entries of the cache folder, each made once and checked at every use: bytes, or an unpacked archive."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from metarun.errors import DataError
from metarun.storage.archives import tree_digest, unpack
from metarun.storage.files import atomic_write, blaming, cache_dir, encoded, md5_sum, write_json
from metarun.storage.locks import once


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
            with blaming(path.parent, "METARUN_CACHE"):
                file.write(piece)

        try:
            made.update(build(write))
        except OSError as error:  # of what is read, not of what is written
            raise DataError(f"{error.filename or path.name}: {error.strerror or error}") from error

    notes = path.with_name(path.name + ".json")
    with blaming(path.parent, "METARUN_CACHE"):
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
        if md5 is not None and (found := md5_sum(archive)) != md5:
            raise DataError(
                f"{archive} has the md5 sum {found}, and the authors' archive {md5}: get it again, or unpack "
                "it yourself and set dataset.root to that folder"
            )
        staging = folder.with_name(f".{folder.name}.tmp")
        record = {"what": f"{dataset} unpacked {archive}", "source": os.path.abspath(archive), "unpacked": ""}
        shutil.rmtree(staging, ignore_errors=True)  # by a process that was killed
        try:
            with blaming(folder.parent, "METARUN_CACHE"):
                write_json(staging.with_name(staging.name + ".json"), record)  # so that it can be told
                unpack(archive, staging)
            sums = {"unpacked": tree_digest(staging), "sha256": tree_digest(staging, contents=True)}
            with blaming(folder.parent, "METARUN_CACHE"):
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
