"""torchvision's files: downloaded, verified and read by torchvision itself, whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from metarun.errors import DataError
from metarun.storage.downloads import fetch
from metarun.storage.locks import once


class Labelled(Protocol):
    """What a torchvision dataset is: images with the numbers of their classes."""

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
    """The parts of torchvision's dataset `kind` below `folder`, downloaded to it where they are not there.

    They are downloaded and unpacked beside it and moved there when all is right: torchvision takes some
    folders for whole whose unpacking was stopped. `ours`: what is damaged in `folder` may be replaced.
    Raises DataError, which ends with what to do `instead`.
    """
    import torchvision.datasets

    def parts(place: Path, download: bool) -> list[Labelled]:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                make = getattr(torchvision.datasets, kind)
                return [make(str(place), download=download, **part) for part in settings]
        except ImportError as error:
            raise DataError(f"{name} is read with a library that is missing here: {error}") from error

    def there() -> list[Labelled] | None:
        try:
            return parts(folder, False)
        except DataError:
            raise
        except Exception:  # of many kinds, where files are missing or damaged
            return None

    def got() -> list[Labelled]:
        if not download:
            raise DataError(f"{name} is not in {folder}, and dataset.download=false: allow it, or {instead}")
        staging = folder / f".{kind}.tmp"
        shutil.rmtree(staging, ignore_errors=True)  # by a process that was killed
        try:
            with resumed(folder):
                parts(staging, True)
            for path in staging.iterdir():
                _move(path, folder / path.name, ours)
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{name} is not in {folder} and could not be downloaded ({told(error)}): check the network, "
                f"or {instead}"
            ) from error
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        return parts(folder, False)

    if not download:
        return there() or got()
    return once(folder / kind, there, got, "METARUN_DATA")


def _move(path: Path, target: Path, replaces: bool) -> None:
    if target.exists():
        if not replaces:
            raise DataError(
                f"{target}: damaged or incomplete, and yours; move it away to have it downloaded again"
            )
        shutil.rmtree(target) if target.is_dir() else target.unlink()
    os.replace(path, target)


@contextlib.contextmanager
def resumed(folder: Path) -> Iterator[None]:
    """torchvision's downloads go on where an earlier one stopped, and are tried again."""
    from torchvision.datasets import utils

    def retrieve(url: str, filename: str | Path, *args: object, **settings: object) -> None:
        part = folder / f".{hashlib.sha256(url.encode()).hexdigest()[:24]}.part"
        fetch(url, part)
        os.replace(part, filename)

    def final(url: str, *args: object, **settings: object) -> str:
        return url  # where it leads is asked for once, by `fetch`

    before = utils._urlretrieve, utils._get_redirect_url
    utils._urlretrieve, utils._get_redirect_url = retrieve, final  # all that opens a connection there
    try:
        yield
    finally:
        utils._urlretrieve, utils._get_redirect_url = before


def told(error: Exception) -> str:
    """torchvision's reasons in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.replace("File not found or corrupted.", "what arrived has a wrong checksum")
