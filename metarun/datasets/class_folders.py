"""Images in class folders, in folders or zips: found, decoded once in parallel, memory-mapped ever after."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from metarun import images
from metarun.episodes import ClassStore
from metarun.errors import DataError
from metarun.files import Archive, mapped
from metarun.tracking import Bar, notes, say

Fit = Literal["pad", "crop", "stretch"]
Unreadable = Literal["stop", "skip"]
BLOCK = 256  # images decoded before they are written: bounds the memory
VERSION = 1  # counts changes of what is decoded


class Entry(NamedTuple):
    """One file, in a folder or in a zip."""

    parts: tuple[str, ...]  # its path below the root, a zip counting as a folder
    path: Path  # of the file, or of its zip
    archive: Archive | None = None
    member: str = ""  # its name in the zip

    def __str__(self) -> str:
        return f"{self.path}: {self.member}" if self.archive else str(self.path)

    def read(self) -> bytes:
        if self.archive:
            return self.archive.read(self.member)
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be read ({error.strerror})") from error


def entries(root: Path) -> list[Entry]:
    """Every file below a folder, also in zips there, or in a zip; sorted. DataError where there is none."""
    if not root.exists():
        raise DataError(f"dataset.root={root}: no such folder")
    if root.is_file() and root.suffix.lower() != ".zip":
        raise DataError(f"dataset.root={root}: is neither a folder nor a zip")
    every = _in_zip(root, ()) if root.is_file() else _below(root, (), set())
    found = sorted(every, key=lambda entry: (entry.parts, str(entry.path)))
    if not found:
        raise DataError(f"dataset.root={root}: has no files")
    return found


def _below(folder: Path, parts: tuple[str, ...], above: set[Path]) -> Iterator[Entry]:
    """Links to folders are followed, unless they lead back to where they are."""
    real = folder.resolve()
    if real in above:
        return
    for path in images.visible(folder):
        if path.is_dir():
            yield from _below(path, (*parts, path.name), above | {real})
        elif path.suffix.lower() == ".zip":
            yield from _in_zip(path, (*parts, path.stem))
        else:
            yield Entry((*parts, path.name), path)


def _in_zip(path: Path, parts: tuple[str, ...]) -> Iterator[Entry]:
    archive = Archive(path)
    for member in archive.names():
        names = tuple(member.split("/"))
        if not any(name.startswith(".") or name in images.UNASKED for name in names):
            yield Entry((*parts, *names), path, archive, member)


def class_store(
    title: str,
    classes: Mapping[str, Sequence[Entry]],
    root: Path,
    item_shape: tuple[int, int, int],
    device: torch.device | str,
    fit: Fit = "pad",
    unreadable: Unreadable = "stop",
    kept_as: str = "",
) -> ClassStore:
    """The classes' images below `root`, decoded into the cache where these very files are not there yet.

    `unreadable`: stop at a file that is no image (DataError), or leave it out and say so. `kept_as`: what
    the cache calls them, DATASET-SPLIT; as the title where it is empty.
    """
    files = [entry for name in classes for entry in classes[name]]
    kept_as = kept_as or title.replace(" ", "-")
    source = os.path.abspath(root.expanduser())
    settings = f"{VERSION} {item_shape} {fit} {unreadable}"
    digest = hashlib.sha256(settings.encode())
    for name, own in classes.items():
        digest.update(f"\0{name}\0{len(own)}".encode())
    identity = cache(_identity)  # of a zip with all its images, once
    for entry in files:
        digest.update(f"\0{entry.member}\0{identity(entry.path)}".encode())

    def build(write: Callable[[bytes], object]) -> dict[str, list[str]]:
        skipped = []
        with ThreadPoolExecutor(os.cpu_count()) as pool, Bar(f"decode {title}", len(files), "images") as bar:
            for start in range(0, len(files), BLOCK):
                block = files[start : start + BLOCK]
                for entry, pixels in zip(
                    block, pool.map(lambda one: decode(one, item_shape, fit, unreadable), block), strict=True
                ):
                    if pixels is None:
                        skipped.append("/".join(entry.parts))
                    else:
                        write(pixels)
                bar.advance(len(block))
        if len(skipped) == len(files):
            raise DataError(f"{title}: none of its {len(files)} files is an image that can be read")
        return {"skipped": skipped}

    what = f"{kept_as} {settings} {source}"
    bytes_, made = mapped(f"{kept_as}-{digest.hexdigest()[:24]}", build, what, source)
    skipped = set(made["skipped"])
    if skipped:
        say(notes, f"{title}: {len(skipped)} unreadable files left out, such as {min(skipped)}")
    counts = [sum("/".join(entry.parts) not in skipped for entry in own) for own in classes.values()]
    if empty := [name for name, count in zip(classes, counts, strict=True) if not count]:
        raise DataError(f"{title}: class {empty[0]!r} has no images; add some, or take the class out")
    return ClassStore(
        bytes_.view(-1, *item_shape), counts, list(classes), title, device, fingerprint=made["sha256"]
    )


def _identity(path: Path) -> str:
    """Changes when the file is written again."""
    status = os.stat(path)
    return f"{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}"


def decode(entry: Entry, item_shape: tuple[int, int, int], fit: Fit, unreadable: Unreadable) -> bytes | None:
    """An image as channels x height x width bytes; None where it may be skipped."""
    try:
        image = images.read(io.BytesIO(entry.read()), str(entry))
    except DataError as error:
        if unreadable == "skip":
            return None
        raise DataError(f"{error}, or set dataset.unreadable=skip") from error
    channels, height, width = item_shape
    pixels = images.fit(image.convert("L" if channels == 1 else "RGB"), height, width, fit)
    return (pixels if channels == 1 else pixels.transpose(2, 0, 1)).tobytes()
