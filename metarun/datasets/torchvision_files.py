"""torchvision's datasets: downloaded, verified and unpacked by metarun; torchvision only reads the files."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from metarun.datasets.torchvision_sources import SOURCES, Source
from metarun.errors import DataError
from metarun.reporting.console import inform
from metarun.storage.archives import BadArchive, gunzip, unpack, unzip
from metarun.storage.downloads import download as download_file
from metarun.storage.files import md5_sum
from metarun.storage.locks import once


class Labelled(Protocol):
    """A torchvision dataset: images with the numbers of their classes."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Image.Image, int]: ...


def obtained(
    name: str,
    kind: str,
    settings: Sequence[dict[str, Any]],
    folder: Path,
    download: bool,
    ours: bool,
    instead: str,
) -> list[Labelled]:
    """torchvision's dataset `kind` in `folder`, downloaded if it is missing there.

    What is downloaded is unpacked in a folder beside it, read once by torchvision, and then moved to its
    place: torchvision takes some folders for complete whose unpacking was interrupted.

    Args:
        name: of the dataset, for messages.
        kind: the name of the class in torchvision.datasets.
        settings: the keyword arguments of each part that is returned, such as {"train": True}.
        folder: what torchvision calls root.
        download: whether missing files may be downloaded.
        ours: whether damaged files in `folder` may be replaced.
        instead: what else the user can do; error messages end with it.

    Returns:
        The parts, in the order of `settings`.

    Raises:
        DataError: the dataset is missing and cannot be downloaded or unpacked.
    """
    downloads = folder / f"{kind}.downloads"  # kept until all is unpacked, for a later run to resume
    archives = {downloads / source.name: source for source in SOURCES[kind]}
    missing = [path for path in archives if not path.exists()]

    def load() -> list[Labelled] | None:
        try:
            return _read(name, kind, settings, folder)
        except DataError:
            raise
        except Exception:  # of many kinds, where files are missing or damaged
            return None

    def make() -> list[Labelled]:
        staging = folder / f".{kind}.tmp"
        shutil.rmtree(staging, ignore_errors=True)  # from a process that was killed
        try:
            for path, source in archives.items():
                _download(source, path)
                _unpack(source, path, staging)
            _check(name, kind, settings, staging, downloads)
            for path in staging.iterdir():
                _move(path, folder / path.name, ours)
            shutil.rmtree(downloads)
        except DataError as error:
            raise DataError(f"{name} is not in {folder}: {error}, or {instead}") from error
        except OSError as error:
            raise DataError(
                f"{name} is not in {folder}: cannot write there ({error.strerror or error}), or {instead}"
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return _read(name, kind, settings, folder)

    if missing and not download:
        if (found := load()) is not None:
            return found
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(
            f"{name} is not in {folder}, and dataset.download=false: allow it, or put "
            f"{archives[missing[0]].urls[0]}{others} in {downloads}, or {instead}"
        )
    return once(folder / kind, load, make, "METARUN_DATA")


def _read(name: str, kind: str, settings: Sequence[dict[str, Any]], folder: Path) -> list[Labelled]:
    """The parts read by torchvision. Raises DataError for a missing library, else torchvision's errors."""
    import torchvision.datasets

    try:
        with contextlib.redirect_stdout(sys.stderr):
            make = getattr(torchvision.datasets, kind)
            return [make(str(folder), download=False, **part) for part in settings]
    except ImportError as error:
        raise DataError(f"{name} is read with a library that is missing here: {error}") from error


def _check(name: str, kind: str, settings: Sequence[dict[str, Any]], staging: Path, downloads: Path) -> None:
    """Raises DataError unless torchvision can read what was unpacked; deletes the downloads if it cannot."""
    try:
        _read(name, kind, settings, staging)
    except (DataError, MemoryError):
        raise
    except Exception as error:
        shutil.rmtree(downloads)
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"torchvision cannot read what was downloaded ({reason}); it was deleted: try again later"
        ) from error


def _download(source: Source, path: Path) -> None:
    """Download to `path`, or verify the file that is there. Raises DataError, of the first URL that fails."""
    if path.exists():
        if source.md5 is not None and (found := md5_sum(path)) != source.md5:
            raise DataError(
                f"{path} has the md5 sum {found} where {source.md5} is right: delete it, or put the right "
                "file there"
            )
        return
    first: DataError | None = None
    for url in source.urls:
        try:
            return download_file(url, path, source.md5)
        except DataError as error:
            first = first or error
    assert first is not None
    raise first


def _unpack(source: Source, archive: Path, staging: Path) -> None:
    """Unpack a downloaded file to where torchvision looks for it. Raises DataError and OSError.

    A damaged or hostile archive is deleted, so that the next run downloads it again.
    """
    folder = staging / source.folder
    folder.mkdir(parents=True, exist_ok=True)
    if source.unpack is None:
        shutil.copyfile(archive, folder / source.name)
        return
    inform(f"unpack {archive.name}")
    try:
        if source.unpack == "gzip":
            gunzip(archive, folder / source.name.removesuffix(".gz"))
        else:
            (unpack if source.unpack == "tar" else unzip)(archive, folder)
    except BadArchive as error:
        archive.unlink()
        raise DataError(
            f"{source.urls[0]} gave a file that cannot be used ({error.reason}); it was deleted: "
            "try again later"
        ) from error
    if source.inner:
        packed = list(folder.glob(source.inner))
        for path in packed:
            gunzip(path, folder / path.name.removesuffix(".gz"))
        for inner in {path.parent for path in packed}:
            shutil.rmtree(inner)


def _move(path: Path, target: Path, replaces: bool) -> None:
    if target.exists():
        if not replaces:
            raise DataError(
                f"{target}: damaged or incomplete, and yours; move it away to have it downloaded again"
            )
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    os.replace(path, target)
